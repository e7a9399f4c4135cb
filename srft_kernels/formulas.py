"""The formulas that losses are made of, once, for device and host.

A formula is a scalar function of one token: it takes the log-probability and the entropy of the token, its
inputs and the loss parameters, and returns the loss together with its closed-form derivatives. It is written
against ``tl``; the same code object also runs on torch vectors, with ``tl`` meaning ``torch``, as
``formula.eager``. Only functions that mean the same in both (exp, where) may be used. The row kernel inlines
the device form, the CPU path calls the eager form, and the reference differentiates the eager *loss* by
autograd, so each derivative is checked against the loss written above it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

__all__ = ["Formula", "TokenFormula", "formula", "shaping"]


def _where(condition: Tensor | bool, x: Tensor, y: Tensor | float) -> Tensor:
    """``tl.where`` of the eager form, where a loss parameter is a Python number."""
    if isinstance(condition, bool):
        return x if condition else torch.zeros_like(x) + y
    return torch.where(condition, x, y)


_EAGER_TL = types.SimpleNamespace(exp=torch.exp, where=_where)
_EAGER_NAMES: dict[str, object] = {"tl": _EAGER_TL, "__builtins__": __builtins__}


class Formula(Protocol):
    """A formula in both forms: the object itself is the device form."""

    eager: Callable[..., Any]
    """Torch form, of vectors [n] and numbers."""

    def __call__(self, *args: Any) -> Any:
        """Device form, inside a kernel; ``args`` are scalars of one token."""


class TokenFormula(NamedTuple):
    """The formula of a whole token and, where it has a term that several losses choose, that term."""

    token: Formula
    """Returns (loss, dloss/dlogp, dloss/dentropy, ratio, clipped)."""
    term: Formula | None = None
    """The last argument of ``token``, compiled in."""

    @property
    def chosen(self) -> Formula:
        """``term``, where there is one."""
        assert self.term is not None
        return self.term

    def eager(self, *args: Any) -> Any:
        """Torch form; ``args`` are vectors [n] and numbers, all but the term."""
        return self.token.eager(*args) if self.term is None else self.token.eager(*args, self.term.eager)


def formula(function: Callable[..., Any]) -> Formula:
    """Compile ``function`` for the device and attach its torch form as ``.eager``."""
    eager = types.FunctionType(function.__code__, _EAGER_NAMES, function.__name__)
    _EAGER_NAMES[function.__name__] = eager
    # Triton's interpreter looks for its language among the globals of a device function that does not name it, too
    function.__globals__.setdefault("tl", tl)
    device: Any = function if triton is None else triton.jit(function)
    device.eager = eager
    return cast(Formula, device)


def shaping(gamma: float | None) -> tuple[float, float]:
    """(gamma_p, gamma) of ``shaped`` for f(p) = p / (p + ``gamma``), or for 0 and None f(p) = p."""
    return (1.0, gamma) if gamma else (0.0, 1.0)


# ratios: max_log_ratio bounds them above and below, and a ratio at a bound does not move with logp


@formula
def log_ratio_if(present, logp, other):
    # exactly 0 where the other is absent, also for a logp of -inf, and between two of -inf
    return tl.where((present > 0) & (logp != other), logp - other, 0.0)


@formula
def heard(factor, log_ratio, max_log_ratio):
    # where a factor of 0 multiplies all that the log-ratio does, one beyond the bound, or NaN, is not heard of
    return (factor != 0) | ((log_ratio < max_log_ratio) & (log_ratio > -max_log_ratio))


@formula
def beyond(log_ratio, max_log_ratio):
    return (log_ratio > max_log_ratio) | (log_ratio < -max_log_ratio)


@formula
def bounded(log_ratio, max_log_ratio):
    below = tl.where(log_ratio < -max_log_ratio, -max_log_ratio, log_ratio)
    return tl.where(log_ratio > max_log_ratio, max_log_ratio, below)


@formula
def still(logp, log_ratio, max_log_ratio):
    # a ratio at a bound, or of a logp of -inf: its derivative is 0
    return beyond(log_ratio, max_log_ratio) | (logp < -1e30)


# policy terms: (loss, dloss/dlogp, ratio, clipped); log_ratio is logp - old_logp, or its sequence mean
# (GSPO) ---


@formula
def clip_policy(logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio):
    # -min(r A, clip(r) A); with A < 0 the ratio also stops at dual_clip, so one token's loss is bounded by -A
    # dual_clip
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    below = (advantage < 0) & (ratio < low)
    above = (advantage > 0) & (ratio > high)
    far = (advantage < 0) & (ratio > dual_clip)
    clipped = below | above | far | (still(logp, log_ratio, max_log_ratio) & (advantage != 0))
    kept = tl.where(below, low, tl.where(above, high, tl.where(far, dual_clip, ratio)))
    return -kept * advantage, tl.where(clipped, 0.0, -ratio * advantage), ratio, clipped


@formula
def cispo_policy(logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio):
    # -clip(sg r) A logp: the clip bounds the weight of the token, never removes its gradient direction
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    kept = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    clipped = ((ratio < low) | (ratio > high) | beyond(log_ratio, max_log_ratio)) & (advantage != 0)
    return -kept * advantage * logp, -kept * advantage, ratio, clipped


@formula
def reinforce_policy(logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio):
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    return -advantage * logp, -advantage, ratio, ratio < 0


@formula
def k3(logp, log_ratio, max_log_ratio):
    # log_ratio = ref_logp - logp; the derivative is with respect to logp
    held = bounded(log_ratio, max_log_ratio)
    ratio = tl.exp(held)
    return ratio - held - 1.0, tl.where(still(logp, log_ratio, max_log_ratio), 0.0, 1.0 - ratio)


@formula
def policy_factor(advantage, rollout_weight):
    # 0 where either of them takes the policy term out, whatever the other is
    return tl.where(advantage != 0, rollout_weight, 0.0)


@formula
def heard_log_ratio(logp, advantage, old_logp, rollout_weight, off_policy, max_log_ratio):
    log_ratio = log_ratio_if(off_policy, logp, old_logp)
    factor = policy_factor(advantage, rollout_weight)
    return tl.where(heard(factor, log_ratio, max_log_ratio), log_ratio, 0.0)


@formula
def weighted(weight, x):
    # a weight of 0 keeps out what is infinite or NaN
    return tl.where(weight != 0, weight * x, 0.0)


@formula
def shaped(logp, advantage, gamma_p, gamma):
    # -A f(p) with f(p) = p / (gamma_p p + gamma)
    p = tl.exp(logp)
    shape = gamma_p * p + gamma
    return -advantage * p / shape, -advantage * p * gamma / (shape * shape)


@formula
def fixed_factor(entropy_coef, weight_entropy, logp, by_p, by_rest):
    # exp(u H), times p for by_p = 1, times 1 - p for by_rest = 1, too; no gradient goes through it
    p = tl.exp(logp)
    return tl.exp(weighted(entropy_coef, weight_entropy)) * (1.0 - by_p + by_p * p * (1.0 - by_rest * p))


# SRFT terms


@formula
def srft_demo(logp, advantage, weight_entropy, sft_coef, sft_sign, gamma_p, gamma):
    # -s logp and -A f(p), with s = sft_coef exp(sign H)
    weight = sft_coef * tl.exp(sft_sign * weight_entropy)
    rl, drl = shaped(logp, advantage, gamma_p, gamma)
    return weighted(weight, -logp), -weight, rl, drl


@formula
def srft_likelihood(logp, log_ratio, advantage, correct, weight_entropy, rl_coef, negative_coef, max_log_ratio):
    # -c logp for a correct rollout, +negative_coef logp for an incorrect one, with c = rl_coef exp(H)
    sign = tl.where(correct > 0, -rl_coef * tl.exp(weight_entropy), negative_coef)
    return weighted(sign, logp), sign, tl.exp(bounded(log_ratio, max_log_ratio)), correct > 0


@formula
def srft_ratio(logp, log_ratio, advantage, correct, weight_entropy, rl_coef, negative_coef, max_log_ratio):
    # -A r c for A > 0 and -A r negative_coef otherwise
    log_ratio = tl.where(heard(advantage, log_ratio, max_log_ratio), log_ratio, 0.0)
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    weight = tl.where(advantage > 0, rl_coef * tl.exp(weight_entropy), negative_coef)
    loss = tl.where(advantage != 0, -advantage * ratio * weight, 0.0)
    return loss, tl.where(still(logp, log_ratio, max_log_ratio), 0.0, loss), ratio, advantage > 0
