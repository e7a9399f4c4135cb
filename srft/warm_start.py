"""A short supervised start for a model built from scratch, so that its first rollouts are sometimes right."""

from __future__ import annotations

import sys
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.batch import Response, pack, unweighted
from srft.config import Config
from srft.data.prompts import Prompt
from srft.data.sampler import PromptSampler
from srft.engine.hf import HfEngine
from srft.engine.sampling import make_sampling
from srft.evaluate import evaluate
from srft.policy.model import final_hidden_states, head_of
from srft.rewards.pool import RewardPool
from srft_kernels import linear_cross_entropy

_EVAL_EVERY = 10
_EVAL_PROBLEMS = 256


def warm_start(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    held_out: list[Prompt],
    pool: RewardPool,
) -> None:
    """Train on demonstrations until held-out accuracy reaches its target or the steps run out.

    Args:
        config: The whole configuration; ``model.warm_start`` says how long.
        model: Trained in place.
        tokenizer: The policy's.
        prompts: Those with demonstrations are learned from.
        held_out: Its first problems tell when to stop.
        pool: The verifiers.

    Raises:
        ValueError: When no prompt has a demonstration.
    """
    options = config.model.warm_start
    shown = [p for p in prompts if p.demo_ids]
    if not shown:
        raise ValueError(
            "model.warm_start needs demonstrations; set model.warm_start.max_steps=0 or give data.columns.demo"
        )
    if len(shown) < len(prompts):
        print(f"warm start: {len(shown)} of {len(prompts)} prompts have a demonstration", file=sys.stderr)
    sampling = make_sampling(config, tokenizer, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    engine = HfEngine(
        model, dtype=torch.float32, pad_token_id=pad, max_batch=config.engine.max_batch, tokenizer=tokenizer
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=config.train.betas, weight_decay=0.0
    )
    sampler = PromptSampler(len(shown), config.train.seed + 1)
    for step in range(1, options.max_steps + 1):
        chosen = [shown[i] for i in sampler.next(min(options.batch_size, len(shown)))]
        sequences = [
            Response(p.prompt_ids, p.demo_ids[0], is_demo=True, truncated=False, rollout_logprobs=[], text="")
            for p in chosen
        ]
        tokens = sum(len(s.response_ids) for s in sequences)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in pack(
            sequences, config.train.tokens_per_microbatch, unweighted, model.device
        ):
            hidden_states = final_hidden_states(model, batch, config.compute_dtype)
            loss = head_of(model)(hidden_states, partial(linear_cross_entropy, labels=batch.labels, num_tokens=tokens))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        if step % _EVAL_EVERY == 0 or step == options.max_steps:
            engine.update_weights(model.state_dict().items(), step)
            found = evaluate(engine, tokenizer, held_out[:_EVAL_PROBLEMS], pool, sampling)
            accuracy = found.get("eval/accuracy", 0.0)
            print(
                f"warm start: step {step}, loss {total:.3f} nats, held-out accuracy {accuracy:.3f}",
                file=sys.stderr,
            )
            if accuracy >= options.until_accuracy:
                return
