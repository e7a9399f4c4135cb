"""Rollouts of an older policy: how far it is from the one that learns, and what its tokens count therefore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from srft.batch import Batch
from srft.policy.parallel import ALONE, World
from srft.responses import Response

# ratios outside of it are told as a share
_NEAR = (0.9, 1.1)


def weigh(sequences: Sequence[Response], cap: float, mode: Literal["truncate", "mask"]) -> None:
    """Fill in ``Response.importance``: exp(old_logprobs - rollout_logprobs) on tokens that were sampled, 1 elsewhere.

    With ``old_logprobs`` of the policy before the step's updates the clipped ratio of a method stays that of these
    updates, and what lies between the engine and that policy is corrected by itself, no further than ``cap``.

    Args:
        sequences: With ``old_logprobs``; modified in place.
        cap: Largest weight, > 0.
        mode: What is above counts ``cap`` times ("truncate") or 0 times ("mask").
    """
    for s in sequences:
        assert s.old_logprobs is not None
        s.importance = torch.ones_like(s.old_logprobs)
        if not s.is_demo:
            ratio = _ratios(s)
            weights = ratio.clamp(max=cap) if mode == "truncate" else torch.where(ratio > cap, 0.0, ratio)
            s.importance[s.prefix_tokens :] = weights


def weigh_scored(batch: Batch, scores: tuple[Tensor, Tensor], cap: float, mode: Literal["truncate", "mask"]) -> None:
    """Note what the policy says of a micro-batch before the step's only update, and what its tokens count therefore.

    Args:
        batch: Its sequences are filled in as it is: ``old_logprobs``, ``old_entropy`` and ``importance``.
        scores: [N] log-probabilities and entropies.
        cap: As for ``weigh``.
        mode: As for ``weigh``.
    """
    batch.old_logprobs, batch.old_entropy = scores
    batch.importance = torch.ones_like(batch.old_logprobs)
    if batch.is_empty:
        return
    for s, place in batch.responses():
        s.old_logprobs, s.old_entropy = batch.old_logprobs[place], batch.old_entropy[place]
    weigh(batch.sequences, cap, mode)
    for s, place in batch.responses():
        assert s.importance is not None
        batch.importance[place] = s.importance


def lag_figures(sequences: Sequence[Response], step: int, cap: float, world: World = ALONE) -> dict[str, float]:
    """Tell how far behind the rollouts of a step were.

    Args:
        sequences: All that this rank learned from, with ``old_logprobs``.
        step: Its number.
        cap: As for ``weigh``.
        world: The ranks, whose rollouts are described together.

    Returns:
        Of the tokens of rollouts ``lag/mean`` and ``lag/max``, steps by which the policy that sampled them was behind,
        and ``lag/older``, the share of those that were sampled by another than the one before the step. Of their ratios
        before the cap ``lag/is_mean``, ``lag/is_p95``, ``lag/is_max``, ``lag/is_off``, the share outside of [0.9, 1.1],
        and ``lag/is_ess``, the effective share of the sample, (sum w)^2 / (n sum w^2); and ``lag/is_capped``, the share
        above it. Nothing where no token was sampled.
    """
    rollouts = [s for s in sequences if not s.is_demo]
    ratios = [torch.zeros(0, dtype=torch.float64), *(_ratios(s).cpu() for s in rollouts)]
    behind = [(step - 1 - version, tokens) for s in rollouts for version, tokens in s.versions]
    return _described(torch.cat(ratios), behind, cap, world)


def _ratios(s: Response) -> Tensor:
    """Of the tokens of a rollout that were sampled; in float64 for the tail, which has no bound."""
    assert s.old_logprobs is not None
    own = slice(s.prefix_tokens, None)
    sampled = torch.tensor(s.rollout_logprobs[own], dtype=torch.float64, device=s.old_logprobs.device)
    return (s.old_logprobs[own].double() - sampled).exp()


def _described(own: Tensor, behind: list[tuple[int, int]], cap: float, world: World) -> dict[str, float]:
    """The figures of every rank's ratios, [tokens] fp64, and of the steps by which so many of its tokens are behind."""
    off, capped = (own < _NEAR[0]) | (own > _NEAR[1]), own > cap
    sums = [x.sum().item() for x in (own, own.square(), off, capped)]
    lags = sum(steps * tokens for steps, tokens in behind), sum(tokens for steps, tokens in behind if steps)
    every = world.sum([len(own), *sums, *lags])
    if not (count := int(every[0])):
        return {}
    tokens, total, squares, far, above, steps, older = torch.tensor(every, dtype=torch.float64)
    # the 95th percentile is the least of so many, the largest, of which one rank may have all
    beyond = count - max(1, round(0.95 * count)) + 1
    largest = torch.cat(world.gather(own.topk(min(beyond, len(own))).values)).topk(beyond).values
    figures = {
        "mean": steps / tokens, "older": older / tokens, "is_mean": total / tokens, "is_p95": largest[-1],
        "is_max": largest[0], "is_off": far / tokens, "is_ess": total.square() / (tokens * squares),
        "is_capped": above / tokens,
    }  # fmt: skip
    told = {f"lag/{name}": figure.item() for name, figure in figures.items()}
    return told | {"lag/max": world.largest(max((steps for steps, _ in behind), default=0))}
