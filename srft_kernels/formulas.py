"""Every loss formula, once, for device and host.

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

__all__ = ["Formula", "TokenFormula"]


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


def _formula(function: Callable[..., Any]) -> Formula:
    """Compile ``function`` for the device and attach its torch form as ``.eager``."""
    eager = types.FunctionType(function.__code__, _EAGER_NAMES, function.__name__)
    _EAGER_NAMES[function.__name__] = eager
    device: Any = function if triton is None else triton.jit(function)
    device.eager = eager
    return cast(Formula, device)


# --- ratios: max_log_ratio bounds them above and below, and a ratio at a bound does not move with logp ---


@_formula
def log_ratio_if(present, logp, other):
    # exactly 0 where the other is absent, also for a logp of -inf, and between two of -inf
    return tl.where((present > 0) & (logp != other), logp - other, 0.0)


@_formula
def heard(factor, log_ratio, max_log_ratio):
    # where a factor of 0 multiplies all that the log-ratio does, one beyond the bound, or NaN, is not heard of
    return (factor != 0) | ((log_ratio < max_log_ratio) & (log_ratio > -max_log_ratio))


@_formula
def beyond(log_ratio, max_log_ratio):
    return (log_ratio > max_log_ratio) | (log_ratio < -max_log_ratio)


@_formula
def bounded(log_ratio, max_log_ratio):
    below = tl.where(log_ratio < -max_log_ratio, -max_log_ratio, log_ratio)
    return tl.where(log_ratio > max_log_ratio, max_log_ratio, below)


@_formula
def still(logp, log_ratio, max_log_ratio):
    # a ratio at a bound, or of a logp of -inf: its derivative is 0
    return beyond(log_ratio, max_log_ratio) | (logp < -1e30)


# --- policy terms: (loss, dloss/dlogp, ratio, clipped); log_ratio is logp - old_logp, or its sequence mean
# (GSPO) ---


@_formula
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


@_formula
def cispo_policy(logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio):
    # -clip(sg r) A logp: the clip bounds the weight of the token, never removes its gradient direction
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    kept = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    clipped = ((ratio < low) | (ratio > high) | beyond(log_ratio, max_log_ratio)) & (advantage != 0)
    return -kept * advantage * logp, -kept * advantage, ratio, clipped


@_formula
def reinforce_policy(logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio):
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    return -advantage * logp, -advantage, ratio, ratio < 0


@_formula
def k3(logp, log_ratio, max_log_ratio):
    # log_ratio = ref_logp - logp; the derivative is with respect to logp
    held = bounded(log_ratio, max_log_ratio)
    ratio = tl.exp(held)
    return ratio - held - 1.0, tl.where(still(logp, log_ratio, max_log_ratio), 0.0, 1.0 - ratio)


@_formula
def policy_factor(advantage, rollout_weight):
    # 0 where either of them takes the policy term out, whatever the other is
    return tl.where(advantage != 0, rollout_weight, 0.0)


@_formula
def weighted(weight, x):
    # a weight of 0 keeps out what is infinite or NaN
    return tl.where(weight != 0, weight * x, 0.0)


@_formula
def shaped(logp, advantage, gamma_p, gamma):
    # -A f(p) with f(p) = p / (gamma_p p + gamma)
    p = tl.exp(logp)
    shape = gamma_p * p + gamma
    return -advantage * p / shape, -advantage * p * gamma / (shape * shape)


@_formula
def fixed_factor(entropy_coef, weight_entropy, logp, by_p, by_rest):
    # exp(u H), times p for by_p = 1, times 1 - p for by_rest = 1, too; no gradient goes through it
    p = tl.exp(logp)
    return tl.exp(weighted(entropy_coef, weight_entropy)) * (1.0 - by_p + by_p * p * (1.0 - by_rest * p))


# --- SRFT terms ---


@_formula
def srft_demo(logp, advantage, weight_entropy, sft_coef, sft_sign, gamma_p, gamma):
    # -s logp and -A f(p), with s = sft_coef exp(sign H)
    weight = sft_coef * tl.exp(sft_sign * weight_entropy)
    rl, drl = shaped(logp, advantage, gamma_p, gamma)
    return weighted(weight, -logp), -weight, rl, drl


@_formula
def srft_likelihood(logp, log_ratio, advantage, correct, weight_entropy, rl_coef, max_log_ratio):
    # -c logp for a correct rollout, +logp for an incorrect one, with c = rl_coef exp(H)
    sign = tl.where(correct > 0, -rl_coef * tl.exp(weight_entropy), 1.0)
    return weighted(sign, logp), sign, tl.exp(bounded(log_ratio, max_log_ratio)), correct > 0


@_formula
def srft_ratio(logp, log_ratio, advantage, correct, weight_entropy, rl_coef, max_log_ratio):
    # -A r c for A > 0 and -A r otherwise
    log_ratio = tl.where(heard(advantage, log_ratio, max_log_ratio), log_ratio, 0.0)
    ratio = tl.exp(bounded(log_ratio, max_log_ratio))
    weight = tl.where(advantage > 0, rl_coef * tl.exp(weight_entropy), 1.0)
    loss = tl.where(advantage != 0, -advantage * ratio * weight, 0.0)
    return loss, tl.where(still(logp, log_ratio, max_log_ratio), 0.0, loss), ratio, advantage > 0


# fmt: off
# --- whole tokens: (loss, dloss/dlogp, dloss/dentropy, ratio, clipped) ---
# off_policy and with_ref are 1.0, or 0.0 where the log-probability is absent.


@_formula
def cross_entropy_token(logp, entropy, weight):
    return -weight * logp, -weight, 0.0, 1.0, False


@_formula
def heard_log_ratio(logp, advantage, old_logp, rollout_weight, off_policy, max_log_ratio):
    log_ratio = log_ratio_if(off_policy, logp, old_logp)
    factor = policy_factor(advantage, rollout_weight)
    return tl.where(heard(factor, log_ratio, max_log_ratio), log_ratio, 0.0)


@_formula
def _grpo_sum(
    logp, entropy, policy, dpolicy, weight, advantage, ref_logp, rollout_weight,
    kl_coef, with_ref, entropy_coef, max_log_ratio,
):
    kl, dkl = k3(logp, log_ratio_if(with_ref, ref_logp, logp), max_log_ratio)
    factor = policy_factor(advantage, rollout_weight)
    loss = weighted(weight, weighted(factor, policy) + kl_coef * kl - entropy_coef * entropy)
    return loss, weighted(weight, weighted(factor, dpolicy) + kl_coef * dkl), -weight * entropy_coef


@_formula
def grpo_token(
    logp, entropy, weight, advantage, old_logp, ref_logp, rollout_weight,
    clip_low, clip_high, dual_clip, off_policy, kl_coef, with_ref, entropy_coef, max_log_ratio,
    POLICY: tl.constexpr,
):
    log_ratio = heard_log_ratio(logp, advantage, old_logp, rollout_weight, off_policy, max_log_ratio)
    policy, dpolicy, ratio, clipped = POLICY(
        logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio)
    loss, dlogp, dentropy = _grpo_sum(
        logp, entropy, policy, dpolicy, weight, advantage, ref_logp, rollout_weight,
        kl_coef, with_ref, entropy_coef, max_log_ratio)
    return loss, dlogp, dentropy, ratio, clipped


@_formula
def srft_terms(
    logp, log_ratio, sft_share, advantage, correct, weight_entropy,
    sft_coef, sft_sign, gamma_p, gamma, rl_coef, max_log_ratio,
    ROLLOUT: tl.constexpr,
):
    # each term of SRFT without its weight, and its derivative by logp; the ratio; whether the last term has c
    sft, dsft, rl, drl = srft_demo(logp, advantage, weight_entropy, sft_coef, sft_sign, gamma_p, gamma)
    rollout, drollout, ratio, positive = ROLLOUT(
        logp, log_ratio, advantage, correct, weight_entropy, rl_coef, max_log_ratio)
    return weighted(sft_share, sft), weighted(sft_share, dsft), rl, drl, rollout, drollout, ratio, positive


@_formula
def srft_sum(demo_weight, rollout_weight, sft, rl, rollout):
    # of the terms or of their derivatives
    return weighted(demo_weight, sft + rl) + weighted(rollout_weight, rollout)


@_formula
def srft_token(
    logp, entropy, demo_weight, rollout_weight, entropy_weight, sft_share, advantage, correct, old_logp, scope_entropy,
    sft_coef, sft_sign, gamma_p, gamma, rl_coef, off_policy, own_entropy, max_log_ratio,
    ROLLOUT: tl.constexpr,
):
    sft, dsft, rl, drl, rollout, drollout, ratio, positive = srft_terms(
        logp, log_ratio_if(off_policy, logp, old_logp), sft_share, advantage, correct,
        scope_entropy + own_entropy * entropy, sft_coef, sft_sign, gamma_p, gamma, rl_coef, max_log_ratio, ROLLOUT)
    loss = srft_sum(demo_weight, rollout_weight, sft, rl, rollout) - entropy_weight * entropy
    return loss, srft_sum(demo_weight, rollout_weight, dsft, drl, drollout), -entropy_weight, ratio, ratio < 0


@_formula
def stream_terms(
    logp, entropy, policy, dpolicy, policy_scale, sft_scale, shaped_weight, kl_weight, entropy_weight,
    advantage, ref_logp, gamma_p, gamma, with_ref, max_log_ratio,
):
    # each term of the general loss and its derivative by logp; of the entropy bonus the term alone
    shaped_factor = policy_factor(advantage, shaped_weight)
    rl, drl = shaped(logp, advantage, gamma_p, gamma)
    kl, dkl = k3(logp, log_ratio_if(with_ref, ref_logp, logp), max_log_ratio)
    return (
        weighted(policy_scale, policy), weighted(policy_scale, dpolicy), weighted(sft_scale, -logp), -sft_scale,
        weighted(shaped_factor, rl), weighted(shaped_factor, drl), weighted(kl_weight, kl), weighted(kl_weight, dkl),
        -weighted(entropy_weight, entropy),
    )


@_formula
def stream_token(
    logp, entropy, policy_weight, sft_weight, shaped_weight, kl_weight, entropy_weight, advantage, old_logp, ref_logp,
    policy_entropy_coef, sft_entropy_coef, scope_entropy,
    clip_low, clip_high, dual_clip, max_log_ratio, off_policy, with_ref, own_entropy,
    policy_by_p, policy_by_rest, sft_by_p, sft_by_rest, gamma_p, gamma,
    POLICY: tl.constexpr,
):
    weight_entropy = scope_entropy + own_entropy * entropy
    log_ratio = heard_log_ratio(logp, advantage, old_logp, policy_weight, off_policy, max_log_ratio)
    policy, dpolicy, ratio, clipped = POLICY(
        logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio)
    factor = policy_factor(advantage, policy_weight)
    policy_fixed = fixed_factor(policy_entropy_coef, weight_entropy, logp, policy_by_p, policy_by_rest)
    sft_fixed = fixed_factor(sft_entropy_coef, weight_entropy, logp, sft_by_p, sft_by_rest)
    policy, dpolicy, sft, dsft, rl, drl, kl, dkl, bonus = stream_terms(
        logp, entropy, policy, dpolicy, weighted(factor, policy_fixed), weighted(sft_weight, sft_fixed),
        shaped_weight, kl_weight, entropy_weight, advantage, ref_logp, gamma_p, gamma, with_ref, max_log_ratio)
    return policy + sft + rl + kl + bonus, dpolicy + dsft + drl + dkl, -entropy_weight, ratio, clipped


# fmt: on
