"""Everything before the first step: data, policy, engine; all that a user can get wrong fails here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.config import Config
from srft.data.examples import Example, load_examples
from srft.data.files import has_split, is_local
from srft.data.judging import check_answers, check_demos, fitting_reward
from srft.data.problems import Problems, drop_shared, hold_out
from srft.data.prompts import Prompt, build_prompts
from srft.engine.base import Engine
from srft.engine.hf import HfEngine
from srft.engine.sampling import prompt_format
from srft.methods import needs_demos, needs_rollouts
from srft.policy.checkpoint import export_model
from srft.policy.model import build_tiny, load_model, prepare_policy
from srft.policy.proof import Proof, prove
from srft.rewards.pool import RewardPool
from srft.warm_start import warm_start


def choose_device(config: Config) -> torch.device:
    """Return where the trainer computes.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: When CUDA is asked for and absent.
    """
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device=cuda, but torch sees no GPU; set train.device=cpu or install a CUDA build of torch"
        )
    name = (
        config.train.device
        if config.train.device != "auto"
        else "cuda"
        if torch.cuda.is_available()
        else "cpu"
    )
    return torch.device(name)


def read_problems(config: Config) -> Problems:
    """Read the training and held-out problems and settle how they are judged.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: Naming the file, line and column of what is wrong with the data.
    """
    data = config.data
    needs = needs_demos(config.method)
    examples = load_examples(
        data.train, split=data.split, columns=data.columns, limit=data.limit, seed=config.train.seed,
        task=data.task, use_demo=needs or _warm_starts(config), require_demo=needs, bad_rows=data.bad_rows,
    )  # fmt: skip
    if data.eval is None and is_local(data.train) and not has_split(data.train, data.eval_split):
        # one split: its end is held out
        examples, held_out = hold_out(examples)
        held_out = held_out[: data.eval_limit]
    else:
        held_out = load_examples(
            data.eval or data.train, split=data.eval_split, columns=data.columns, limit=data.eval_limit, seed=0,
            task=data.task, use_demo=False, bad_rows=data.bad_rows,
        )  # fmt: skip
    distinct = drop_shared(held_out, examples)
    if not distinct:
        raise ValueError(
            f"every held-out problem is also in {data.train}; set data.eval to problems that are not trained on"
        )
    if config.reward.kind != "auto":
        return Problems(examples, distinct, config.reward.kind)
    return Problems(examples, distinct, fitting_reward(data.train, data.system, examples))


def make_prompts(
    config: Config, problems: Problems, tokenizer: PreTrainedTokenizerBase, pool: RewardPool
) -> tuple[list[Prompt], list[Prompt], str]:
    """Check and tokenize the problems.

    Args:
        config: The whole configuration.
        problems: From ``read_problems``.
        tokenizer: The policy's.
        pool: Checks that each demonstration ends in its own answer.

    Returns:
        Training prompts, held-out prompts, and what to tell the user about them.

    Raises:
        ValueError: For demonstrations that fail their verifier, overlong rows, or too few prompts, by the settings.
    """
    data, train, examples = config.data, config.train, problems.train
    notes = [f"{len(examples)} training and {len(problems.held_out)} held-out problems from {data.train}"]
    with_demos = needs_demos(config.method) or _warm_starts(config)
    pool.prewarm()
    checked = with_demos and data.bad_demos != "keep"
    # a demonstration that is accepted shows that the answer can be read
    unreadable = _unreadable(config, [e for e in examples if not (checked and e.demos)], pool)
    unreadable_held_out = _unreadable(config, problems.held_out, pool)
    examples = [e for e in examples if e.id not in unreadable]
    held_out = [replace(e, demos=[]) for e in problems.held_out if e.id not in unreadable_held_out]
    if left_out := len(unreadable) + len(unreadable_held_out):
        notes.append(f"{left_out} rows skipped whose answer {pool.kind!r} cannot read")
    if checked:
        asked = examples
        examples, dropped = _accepted(examples, pool, data.bad_demos)
        if dropped:
            rows = len(asked) - len(examples)
            notes.append(f"{rows} rows skipped whose demonstration fails its verifier, of {dropped} demonstrations")
    if not with_demos:
        examples = [replace(e, demos=[]) for e in examples]
    prompts, counts = _encode(config, examples, tokenizer)
    held_out_prompts, held_out_counts = _encode(config, held_out, tokenizer)
    notes += [
        f"{number} {what}"
        for number, what in (
            (len(examples) - len(prompts), "training rows skipped as too long"),
            (counts["overlong_demos"], "demonstrations skipped as too long"),
            (held_out_counts["overlong_prompts"], "held-out rows skipped as too long"),
            (counts["closed_thoughts"], "demonstrations without a thought, which the prompt opens: closed empty"),
            (counts["dropped_thoughts"], "demonstrations without their thought, which the prompt closes"),
            (counts["plain_messages"], "prompts of messages as plain text, since the tokenizer has no chat template"),
            (_past_stop(prompts, config.rollout.stop), "demonstrations that go on after a text of rollout.stop"),
        )
        if number
    ]
    if needs_demos(config.method):
        enough = [p for p in prompts if len(p.demo_ids) >= train.demos_per_prompt]
        if len(enough) < len(prompts) and data.bad_rows == "error":
            few = next(p for p in prompts if len(p.demo_ids) < train.demos_per_prompt)
            raise ValueError(
                f"train.demos_per_prompt={train.demos_per_prompt}, but {few.example.id} has only {len(few.demo_ids)} "
                f"demonstrations, as {len(prompts) - len(enough)} of {len(prompts)} prompts do; lower it, or set "
                "data.bad_rows=skip"
            )
        if len(enough) < len(prompts):
            notes.append(f"{len(prompts) - len(enough)} prompts skipped that have too few demonstrations")
        prompts = enough
    if len(prompts) < train.prompts_per_step:
        raise ValueError(
            f"train.prompts_per_step={train.prompts_per_step}, but {data.train} gives only "
            f"{len(prompts)} usable prompts; "
            f"set train.prompts_per_step={len(prompts)} or fewer"
        )
    return prompts, held_out_prompts, ", ".join(notes)


def _unreadable(config: Config, examples: list[Example], pool: RewardPool) -> set[str]:
    """Ids of the examples that cannot be judged, where they may be skipped."""
    bad = check_answers(examples, pool)
    if bad and (config.data.bad_rows == "error" or len(bad) == len(examples)):
        first, reason = next(iter(bad.items()))
        raise ValueError(
            f"{len(bad)} of {len(examples)} answers cannot be read by {pool.kind!r}, the first is {first}: {reason}; "
            "mend them, set data.columns.answer or reward.kind, or data.bad_rows=skip"
        )
    return set(bad)


def load_policy(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    held_out: list[Prompt],
    pool: RewardPool,
    checkpoint: Path | None,
    device: torch.device,
) -> tuple[PreTrainedModel, Proof]:
    """Load the policy from a checkpoint, a folder or a hub, or build it and give it its short supervised start.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
        prompts: With demonstrations, for the supervised start.
        held_out: Tell when the supervised start has reached its target.
        pool: The verifiers.
        checkpoint: To resume from, or None.
        device: Where it computes.

    Returns:
        The policy, and the proof that it computes on packed sequences what it is.

    Raises:
        ValueError: When it cannot be read, or fails that proof.
    """
    remote = config.model.trust_remote_code

    def proved(model: PreTrainedModel) -> tuple[PreTrainedModel, Proof]:
        prepare_policy(model, config.model, config.train.tokens_per_microbatch, device)
        return model, prove(model, config)

    if checkpoint is not None:
        return proved(load_model(checkpoint, trust_remote_code=remote))
    if config.model.name != "tiny":
        model = load_model(config.model.name, trust_remote_code=remote)
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {config.model.name} embeddings for {rows}; "
                "set model.tokenizer to the model's own"
            )
        return proved(model)
    cached = config.cache_dir.expanduser() / f"tiny-{_start_key(config, prompts, held_out, pool.kind)}"
    starts = _warm_starts(config)
    if starts and (cached / "config.json").exists():
        return proved(load_model(cached, trust_remote_code=False))
    model, proof = proved(build_tiny(config.model, tokenizer, config.longest_sequence, config.train.seed))
    if starts:
        warm_start(config, model, tokenizer, prompts, held_out, pool)
        cached.parent.mkdir(parents=True, exist_ok=True)
        # another run may store the same model meanwhile: whoever is first stays
        own = cached.with_name(f"{cached.name}.{os.getpid()}")
        export_model(own, model, tokenizer)
        try:
            own.rename(cached)
        except OSError:
            shutil.rmtree(own)
    return model, proof


def make_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the policy, with weight decay on matrices alone.

    Args:
        model: The policy, fp32.
        config: The whole configuration.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas)


def start_engine(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
    device: torch.device,
) -> Engine:
    """Start the rollout engine on the policy's current weights.

    Args:
        config: The whole configuration.
        model: The policy.
        tokenizer: The policy's.
        run_dir: Holds the engine's log and the folder it loads.
        device: Where the trainer computes.

    Raises:
        ValueError: When vLLM is asked for and not installed.
    """
    kind = config.engine.kind
    if kind == "auto":
        kind = "vllm" if device.type == "cuda" and importlib.util.find_spec("vllm") else "hf"
    if kind == "hf":
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return HfEngine(
            model, dtype=config.engine_dtype, pad_token_id=pad, max_batch=config.engine.max_batch, tokenizer=tokenizer
        )
    from srft.engine.vllm import VllmEngine

    folder = run_dir / "engine"
    export_model(folder / "model", model, tokenizer)
    return VllmEngine(
        folder / "model",
        dtype=str(config.engine_dtype).removeprefix("torch."),
        max_model_len=config.longest_sequence,
        python=config.engine.python,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        log_path=folder / "vllm.log",
        tokenizer=tokenizer if config.rollout.stop else None,
        seed=config.train.seed,
        trust_remote_code=config.model.trust_remote_code,
    )


def describe_step(config: Config, model: PreTrainedModel, data_note: str) -> str:
    """Say in one sentence what a step consists of.

    Args:
        config: The whole configuration.
        model: The policy.
        data_note: From ``make_prompts``.
    """
    train = config.train
    parts = []
    if needs_rollouts(config.method):
        parts.append(
            f"{train.rollouts_per_prompt} rollouts of at most {config.rollout.max_new_tokens} tokens"
        )
    if needs_demos(config.method):
        parts.append(f"{train.demos_per_prompt} demonstration{'s' if train.demos_per_prompt > 1 else ''}")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    updates = f"{train.updates_per_step} update{'s' if train.updates_per_step > 1 else ''}"
    return (
        f"Each of {train.steps} steps: {train.prompts_per_step} prompts x ({' + '.join(parts)}) -> {updates} of a "
        f"{size:.1f}M-parameter policy by {config.method.name}, "
        f"at most {train.tokens_per_microbatch} tokens per forward pass; "
        f"{data_note}."
    )


def _warm_starts(config: Config) -> bool:
    return config.model.name == "tiny" and config.model.warm_start.max_steps > 0


def _accepted(
    examples: list[Example], pool: RewardPool, bad_demos: str
) -> tuple[list[Example], int]:
    """The examples with the demonstrations that their verifier accepts, and how many it does not."""
    bad = set(check_demos(examples, pool))
    if bad and bad_demos == "error":
        first, at = next((e, i) for e in examples for i in range(len(e.demos)) if (e.id, i) in bad)
        reason = pool.score([(first.demos[at], first.answer, first.row)])[0]
        outcome = "judged wrong" if reason.status == "ok" else f"{reason.status} {reason.message}".strip()
        raise ValueError(
            f"{len(bad)} of {sum(len(e.demos) for e in examples)} demonstrations do not end in an answer that "
            f"{pool.kind!r} accepts, the first is "
            f"{first.id} (answer {first.answer!r}, {outcome}); "
            "fix them, or set data.bad_demos=skip (or keep), or another reward.kind"
        )
    kept = [replace(e, demos=[d for i, d in enumerate(e.demos) if (e.id, i) not in bad]) for e in examples]
    return [new for new, old in zip(kept, examples, strict=True) if new.demos or not old.demos], len(bad)


def _past_stop(prompts: list[Prompt], stop: list[str]) -> int:
    """How many demonstrations say something after the first text that would end a rollout."""
    demos = [demo for p in prompts for demo in p.example.demos]
    return sum(any(demo.partition(words)[2].strip() for words in stop) for demo in demos)


def _encode(
    config: Config, examples: list[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], Counter[str]]:
    return build_prompts(
        examples, prompt_format(config, tokenizer), overlong=config.data.overlong,
        max_prompt_tokens=config.data.max_prompt_tokens, max_demo_tokens=config.rollout.max_new_tokens,
    )  # fmt: skip


def _start_key(config: Config, prompts: list[Prompt], held_out: list[Prompt], reward: str) -> str:
    """Name of a warm-started model: a digest of everything it depends on."""
    train = config.train
    facts = [
        config.model.model_dump(mode="json"), train.seed, train.betas, train.grad_clip, train.tokens_per_microbatch,
        train.device, config.rollout.max_new_tokens, torch.__version__, reward,
        [(p.prompt_ids, p.demo_ids) for p in prompts], [(p.prompt_ids, str(p.example.answer)) for p in held_out],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
