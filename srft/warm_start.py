"""A short supervised start for a model built from scratch, so that its first rollouts are sometimes right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from srft.config import Config
from srft.conversation import Environment
from srft.data.prompts import Prompt
from srft.data.sampler import PromptSampler
from srft.dataset import Prompts
from srft.engine.sampling import make_sampling
from srft.engine.start import start_in_process
from srft.evaluation.held_out import evaluate
from srft.learning import update
from srft.methods import find_method
from srft.policy.export import export_model
from srft.policy.learner import Learner
from srft.policy.optimizer import make_optimizer
from srft.rewards.pool import RewardPool
from srft.rollout import Actor, demonstration

_EVAL_EVERY = 10
_EVAL_PROBLEMS = 256
# raised whenever the same options and data come to give another model
_VERSION = 2


def warm_start(learner: Learner, prompts: Prompts, pool: RewardPool, environment: Environment | None) -> None:
    """Train on demonstrations until held-out accuracy reaches its target or the steps run out.

    Args:
        learner: That of the run: its policy is trained, by an optimizer of the start's own; ``model.warm_start`` of
            its configuration says how long.
        prompts: Those with demonstrations are learned from; the first held-out ones tell when to stop.
        pool: The verifiers.
        environment: What the policy talks to, if anything.

    Raises:
        ValueError: When no prompt has a demonstration.
    """
    model, tokenizer = learner.model, learner.tokenizer
    shown = [p for p in prompts.start if p.demo_ids]
    if not shown:
        raise ValueError(
            "model.warm_start needs demonstrations; set model.warm_start.max_steps=0 or give data.columns.demo"
        )
    if len(shown) < len(prompts.start):
        print(f"warm start: {len(shown)} of {len(prompts.start)} prompts have a demonstration", file=sys.stderr)
    config = _supervised(learner.config)
    learner = replace(learner, config=config, optimizer=make_optimizer(model, config), memory={})
    engine = start_in_process(learner, torch.float32)
    sampling = make_sampling(config, tokenizer, model)
    sampler = PromptSampler(len(shown), config.train.seed + 1)
    actor = Actor(engine, sampling, tokenizer, pool, environment=environment)
    _until_it_answers(learner, actor, sampler, shown, prompts.held_out[:_EVAL_PROBLEMS])


def _until_it_answers(
    learner: Learner, actor: Actor, sampler: PromptSampler, shown: list[Prompt], held_out: list[Prompt]
) -> None:
    options = learner.config.model.warm_start
    for step in range(1, options.max_steps + 1):
        chosen = [shown[i] for i in sampler.next(min(options.batch_size, len(shown)))]
        figures = update(learner, [demonstration(prompt, 0) for prompt in chosen], step)
        if step % _EVAL_EVERY == 0 or step == options.max_steps:
            actor.engine.update_weights(learner.model.state_dict().items(), step)
            accuracy = evaluate(actor, held_out).get("eval/accuracy", 0.0)
            print(
                f"warm start: step {step}, loss {figures['loss/total'].value:.3f} nats, "
                f"held-out accuracy {accuracy:.3f}",
                file=sys.stderr,
            )
            if accuracy >= options.until_accuracy:
                return


def _supervised(config: Config) -> Config:
    """The same run by the sft method, at the rate of the warm start and with the model's own distribution."""
    train = {"lr": config.model.warm_start.lr, "lr_warmup_steps": 0, "weight_decay": 0.0}
    return config.model_copy(
        update={
            "method": find_method("sft")(name="sft"),
            "train": config.train.model_copy(update=train),
            "rollout": config.rollout.model_copy(update={"temperature": 1.0}),
        }
    )


def cached_start(config: Config, prompts: Prompts, reward: str) -> Path:
    """Return the folder of a warm-started model, whose name is a digest of everything that the model depends on.

    Args:
        config: The whole configuration.
        prompts: From ``make_prompts``.
        reward: The verifier's kind.
    """
    train, rollout = config.train, config.rollout
    facts = [
        _VERSION, config.model.model_dump(mode="json", exclude={"lora", "reference"}),
        train.seed, train.betas, train.grad_clip,
        config.microbatch_tokens, train.device, config.longest_sequence, rollout.max_new_tokens, rollout.stop,
        torch.__version__, reward, _digest_of_file(reward),
        [(p.prompt_ids, p.demo_ids, *([p.demo_spans] if p.demo_spans else [])) for p in prompts.start],
        [(p.prompt_ids, str(p.example.answer)) for p in prompts.held_out],
        *([config.env.model_dump(), _digest_of_file(config.env.name)] if config.env.name else []),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return config.cache_dir.expanduser() / f"tiny-{digest}"


def _digest_of_file(name: str) -> str | None:
    """Of a verifier or an environment of the user's, which changes with the file; None for the others."""
    file = Path(name.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def keep_start(folder: Path, learner: Learner) -> None:
    """Store a warm-started model for later runs.

    Args:
        folder: From ``cached_start``.
        learner: After ``warm_start``.

    Raises:
        WriteError: When the disk refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # another run may store the same model meanwhile: whoever is first stays
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    export_model(own, learner.model, learner.tokenizer)
    try:
        own.rename(folder)
    except OSError:
        shutil.rmtree(own)
