"""The ratio of a policy term, of a token or of its sequence, and the gradient that a sequence shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import Formula, heard, log_ratio_if, policy_factor
from .base import sequence_mean

__all__ = ["clip_counts", "moving", "policy_log_ratio", "sequence_derivative", "shared_by_sequence"]


def policy_log_ratio(
    logp: Tensor,
    advantage: Tensor,
    old_logp: Tensor,
    weight: Tensor,
    off_policy: float,
    max_log_ratio: float,
    valid: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-ratio of each token, whether its own is part of it, and what multiplies the policy term, [n] each.

    Args:
        logp: [n].
        advantage: [n].
        old_logp: [n], read where ``off_policy`` is 1.
        weight: [n], of the policy term.
        off_policy: 1 or 0.
        max_log_ratio: Bound of the log-ratio.
        valid: [n] bool, the tokens that count.
        offsets: [B+1] bounds of the sequences whose mean log-ratio each token gets; None for its own.
    """
    log_ratio = log_ratio_if.eager(off_policy, logp, old_logp)
    factor = policy_factor.eager(advantage, weight)
    heard_of = heard.eager(factor, log_ratio, max_log_ratio) & valid
    if offsets is not None:
        # inf - inf is NaN
        log_ratio = sequence_mean(log_ratio.clamp(-1e30, 1e30), heard_of, offsets)
    return torch.where(heard_of, log_ratio, 0.0), heard_of, factor


def sequence_derivative(policy: Formula, log_ratio: Tensor, advantage: Tensor, *bounds: float) -> Tensor:
    """Derivative [n] of a ``policy`` term by the ``log_ratio`` [n] of its sequence; the logp of a token is no matter.

    Args:
        policy: The term.
        log_ratio: [n], of each token's sequence.
        advantage: [n].
        *bounds: clip_low, clip_high, dual_clip and max_log_ratio.
    """
    return policy.eager(torch.zeros_like(log_ratio), log_ratio, advantage, *bounds)[1]


def shared_by_sequence(share: Tensor, heard_of: Tensor, logp: Tensor, offsets: Tensor) -> Tensor:
    """What each logp [n] has of the derivatives by the mean log-ratio of its sequence: as much as any other.

    Args:
        share: [n] derivative of each token's term, weight included.
        heard_of: [n] bool, the tokens whose log-ratio is part of their sequence's.
        logp: [n].
        offsets: [B+1] bounds of the sequences.
    """
    return torch.where(moving(heard_of, logp), sequence_mean(share, heard_of, offsets), 0.0)


def moving(heard_of: Tensor, logp: Tensor) -> Tensor:
    """Tokens [n] with which the ratio of their sequence moves: ``heard_of`` and not of a ``logp`` of -inf."""
    return heard_of & (logp > -torch.inf)


def clip_counts(clipped: Tensor, ratio: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The terms that count ``clipped`` [n] tokens with a ``ratio`` [n] below and above 1, in ``dtype``."""
    return {
        "clip_low_sum": (clipped & (ratio < 1)).sum().to(dtype),
        "clip_high_sum": (clipped & (ratio > 1)).sum().to(dtype),
    }
