"""Rollouts of an older policy: how far it is from the one that learns, and what its tokens count therefore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from srft.batch import Response

# ratios outside of it are told as a share
_NEAR = (0.9, 1.1)


def weigh(sequences: Sequence[Response], step: int, cap: float, mode: Literal["truncate", "mask"]) -> dict[str, float]:
    """Fill in ``Response.importance``: exp(old_logprobs - rollout_logprobs) on tokens that were sampled, 1 elsewhere.

    With ``old_logprobs`` of the policy before the step's updates the clipped ratio of a method stays that of these
    updates, and what lies between the engine and that policy is corrected by itself, no further than ``cap``.

    Args:
        sequences: All that a step learns from, with ``old_logprobs``; modified in place.
        step: Its number.
        cap: Largest weight, > 0.
        mode: What is above counts ``cap`` times ("truncate") or 0 times ("mask").

    Returns:
        Of rollouts ``lag/mean`` and ``lag/max``, steps by which their policy was behind. Of their tokens' ratios before
        the cap ``lag/is_mean``, ``lag/is_p95``, ``lag/is_max``, ``lag/is_off``, the share outside of [0.9, 1.1], and
        ``lag/is_ess``, the effective share of the sample, (sum w)^2 / (n sum w^2); and ``lag/is_capped``, the share
        above it. Nothing where no token was sampled.
    """
    ratios: list[Tensor] = []
    for s in sequences:
        assert s.old_logprobs is not None
        s.importance = torch.ones_like(s.old_logprobs)
        if s.is_demo:
            continue
        own = slice(s.prefix_tokens, None)
        # in float64 for the tail, whose ratios have no bound
        sampled = torch.tensor(s.rollout_logprobs[own], dtype=torch.float64, device=s.old_logprobs.device)
        ratio = (s.old_logprobs[own].double() - sampled).exp()
        s.importance[own] = ratio.clamp(max=cap) if mode == "truncate" else torch.where(ratio > cap, 0.0, ratio)
        ratios.append(ratio.cpu())
    if not sum(map(len, ratios)):
        return {}
    every, behind = torch.cat(ratios), [step - 1 - s.version for s in sequences if not s.is_demo]
    return {
        "lag/mean": sum(behind) / len(behind),
        "lag/max": max(behind),
        "lag/is_mean": every.mean().item(),
        # not quantile, which takes 2^24 numbers at most
        "lag/is_p95": every.kthvalue(max(1, round(0.95 * len(every)))).values.item(),
        "lag/is_max": every.max().item(),
        "lag/is_off": ((every < _NEAR[0]) | (every > _NEAR[1])).double().mean().item(),
        "lag/is_ess": (every.sum().square() / (len(every) * every.square().sum())).item(),
        "lag/is_capped": (every > cap).double().mean().item(),
    }
