"""A loss on [N] vectors: its formula, inputs and scalars, and what one token sees of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .formulas import (
    Formula,
    cispo_policy,
    cispo_token,
    clip_policy,
    clip_token,
    heard,
    k3,
    log_ratio_if,
    policy_factor,
    reinforce_policy,
    reinforce_token,
    srft_demo,
    srft_likelihood,
    srft_likelihood_token,
    srft_ratio,
    srft_ratio_token,
    weighted,
)

__all__ = ["CallableObjective", "GrpoObjective", "SrftObjective", "TokenObjective"]

# loss_type or self_rollout -> (formula of a whole token, formula of its policy term)
GRPO_FORMULAS = {
    "grpo": (clip_token, clip_policy),
    "bnpo": (clip_token, clip_policy),
    "dr_grpo": (clip_token, clip_policy),
    "dapo": (clip_token, clip_policy),
    "gspo": (clip_token, clip_policy),
    "cispo": (cispo_token, cispo_policy),
    "reinforce": (reinforce_token, reinforce_policy),
}
SRFT_FORMULAS = {
    "likelihood": (srft_likelihood_token, srft_likelihood),
    "ratio": (srft_ratio_token, srft_ratio),
}
SRFT_LOSS_TERMS = ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative", "entropy_bonus")


def sequence_mean(values: Tensor, valid: Tensor, offsets: Tensor) -> Tensor:
    """Mean of ``values`` over the valid tokens of each token's own sequence, [n]; differentiable.

    Args:
        values: [n] floating point.
        valid: [n] bool, the tokens that count.
        offsets: [B+1] int64, on the device of ``values``; sequence b is ``offsets[b]:offsets[b+1]``.
    """
    if values.numel() == 0:
        return values
    # float64: segment_reduce adds one by one
    masked = torch.where(valid, values, 0.0).double()
    sums = torch.segment_reduce(masked, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    counts = torch.segment_reduce(valid.double(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    positions = torch.arange(values.numel(), device=values.device)
    own = torch.searchsorted(offsets, positions, right=True) - 1
    return (sums / counts.clamp(min=1))[own].to(values.dtype)


def _local_offsets(offsets: Tensor | None, rows: slice) -> Tensor:
    assert offsets is not None
    return (offsets - rows.start).clamp(0, rows.stop - rows.start)


@dataclass(frozen=True)
class TokenObjective:
    """A loss that is a sum over tokens; the objectives below change what one token sees of the others.

    ``inputs`` [K, n] and ``params`` are the arguments of ``formula`` after logp and entropy; ``valid`` [n]
    marks the tokens that count. ``scope`` says what must be known before a gradient: "token" nothing,
    "sequence" the statistics of the sequence, whose bounds are ``offsets`` [B+1], "batch" those of every row.
    Without ``entropy_grad`` the derivative by the entropy is zero.
    """

    formula: Formula
    inputs: Tensor
    params: tuple[float, ...]
    valid: Tensor
    scope: str = "token"
    offsets: Tensor | None = None
    entropy_grad: bool = False

    @property
    def deferred(self) -> int:
        """Scalars that the statistics of a scope decide, where coefficients are linear in them; else 0."""
        return 0

    @property
    def products(self) -> int:
        """Parts of the coefficients in ``parts``, the fixed one included."""
        return 0

    def parts(self, logp: Tensor, rows: slice) -> tuple[Tensor | None, list[Tensor]]:
        """Coefficients by ``logp`` of ``rows`` as fixed + sum_k scalar_k scaled_k: fixed (None for 0) and scaled."""
        raise AssertionError("only a scope of several tokens has parts")

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """The scalars [] of ``parts`` from logp and entropy of ``rows``, which are a whole scope."""
        raise AssertionError("only a scope of several tokens has scalars")

    def _inputs(self, logp: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return self.inputs[:, rows]

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Derivatives of the loss by logp and entropy of ``rows``; None for no entropy gradient."""
        inputs = self._inputs(logp, entropy, rows)
        _, dlogp, dentropy, _, _ = self.formula.eager(logp, entropy, *inputs, *self.params)
        return dlogp, dentropy if self.entropy_grad else None

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Loss [], ratio [n], clipped [n] and terms, from logp and entropy of all rows."""
        loss = self.formula.eager(logp, entropy, *self.inputs, *self.params)[0].sum()
        return loss, torch.ones_like(logp), torch.zeros_like(self.valid), {}


@dataclass(frozen=True)
class GrpoObjective(TokenObjective):
    """GRPO family, ``policy`` its policy term; GSPO is scope "sequence", with a mean log-ratio."""

    policy: Formula = clip_policy

    def _log_ratio(self, logp: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The log-ratio of each token, whether its own is part of it, and what multiplies the policy term [n]."""
        _, advantage, old_logp, _, rollout_weight = self.inputs[:, rows]
        off_policy, max_log_ratio = self.params[3], self.params[7]
        log_ratio = log_ratio_if.eager(off_policy, logp, old_logp)
        factor = policy_factor.eager(advantage, rollout_weight)
        heard_of = heard.eager(factor, log_ratio, max_log_ratio) & self.valid[rows]
        if self.scope == "sequence":
            # inf - inf is NaN
            log_ratio = log_ratio.clamp(-1e30, 1e30)
            log_ratio = sequence_mean(log_ratio, heard_of, _local_offsets(self.offsets, rows))
        return torch.where(heard_of, log_ratio, 0.0), heard_of, factor

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """See TokenObjective; the tokens of a sequence share the gradient of its ratio equally."""
        if self.scope == "token":
            return super().coefficients(logp, entropy, rows)
        entropy_coef = self.params[6]
        dlogp = self._sequence_derivative(logp, rows) + self._kl_derivative(logp, rows)
        return dlogp, -self.inputs[0, rows] * entropy_coef if self.entropy_grad else None

    def _moves(self, logp: Tensor, rows: slice) -> Tensor:
        """Tokens with which the ratio of their sequence moves."""
        return self._log_ratio(logp, rows)[1] & (logp > -torch.inf)

    def _sequence_derivative(self, logp: Tensor, rows: slice) -> Tensor:
        """Derivative of the policy term by each logp: one number a sequence, 0 at tokens that do not count."""
        weight, advantage = self.inputs[:2, rows]
        clip_low, clip_high, dual_clip, *_, max_log_ratio = self.params
        log_ratio, counted, factor = self._log_ratio(logp, rows)
        # of the sequence, so that the logp of one token is no matter
        _, dpolicy, _, _ = self.policy.eager(
            torch.zeros_like(logp), log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio
        )
        share = weighted.eager(weight * factor, dpolicy)
        mean = sequence_mean(share, counted, _local_offsets(self.offsets, rows))
        return torch.where(self._moves(logp, rows), mean, 0.0)

    def _kl_derivative(self, logp: Tensor, rows: slice) -> Tensor:
        weight, _, _, ref_logp, _ = self.inputs[:, rows]
        kl_coef, with_ref, _, max_log_ratio = self.params[4:]
        dkl = k3.eager(logp, log_ratio_if.eager(with_ref, ref_logp, logp), max_log_ratio)[1]
        return weighted.eager(weight, kl_coef * dkl)

    @property
    def deferred(self) -> int:
        """See TokenObjective."""
        return int(self.scope == "sequence")

    @property
    def products(self) -> int:
        """See TokenObjective."""
        return self.deferred + (self.params[4] != 0)

    def parts(self, logp: Tensor, rows: slice) -> tuple[Tensor | None, list[Tensor]]:
        """See TokenObjective; the KL is a token's own, the policy term its sequence's."""
        kl = self._kl_derivative(logp, rows) if self.params[4] != 0 else None
        return kl, [self._moves(logp, rows).to(logp.dtype)]

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """See TokenObjective; logp and entropy of ``rows``, which are one sequence."""
        # 0 at tokens that do not count, and the same elsewhere
        derivative = self._sequence_derivative(logp, rows)
        return [derivative.sum() / self._moves(logp, rows).sum().clamp(min=1)]

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; from logp and entropy of all rows."""
        weight, advantage, _, ref_logp, _ = self.inputs
        clip_low, clip_high, dual_clip, _, kl_coef, with_ref, entropy_coef, max_log_ratio = self.params
        log_ratio, heard_of, factor = self._log_ratio(logp, slice(0, logp.numel()))
        policy, _, ratio, clipped = self.policy.eager(
            logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio
        )
        kl, _ = k3.eager(logp, log_ratio_if.eager(with_ref, ref_logp, logp), max_log_ratio)
        terms = {
            "policy": weighted.eager(weight * factor, policy).sum(),
            "kl": kl_coef * weighted.eager(weight, kl).sum(),
            "entropy_bonus": -entropy_coef * (weight * entropy).sum(),
        }
        loss = terms["policy"] + terms["kl"] + terms["entropy_bonus"]
        clipped = clipped & self.valid & (factor != 0)
        terms["clip_low_sum"] = (clipped & (ratio < 1)).sum().to(loss.dtype)
        terms["clip_high_sum"] = (clipped & (ratio > 1)).sum().to(loss.dtype)
        terms["sum_entropy"] = entropy.sum()
        return loss, torch.where(heard_of, ratio, 1.0), clipped, terms


@dataclass(frozen=True)
class SrftObjective(TokenObjective):
    """SRFT, ``rollout`` its rollout term, ``is_demo`` [n]; its weights take the mean entropy of ``scope``."""

    rollout: Formula = srft_likelihood
    is_demo: Tensor = field(kw_only=True)

    def _inputs(self, logp: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        # the last input, scope_entropy, is known only now
        inputs, valid = self.inputs[:, rows], self.valid[rows]
        if self.scope == "token":
            return inputs
        if self.scope == "sequence":
            mean = sequence_mean(entropy, valid, _local_offsets(self.offsets, rows))
        else:
            mean = (torch.where(valid, entropy, 0.0).sum() / valid.sum().clamp(min=1)).expand(entropy.shape)
        return torch.cat([inputs[:-1], mean[None]])

    @property
    def deferred(self) -> int:
        """See TokenObjective: the weights s and c."""
        return 2 * (self.scope != "token")

    @property
    def products(self) -> int:
        """See TokenObjective."""
        return self.deferred + 1

    def parts(self, logp: Tensor, rows: slice) -> tuple[Tensor | None, list[Tensor]]:
        """See TokenObjective: a coefficient is linear in s and c, so its values at 0 and 1 tell the parts."""
        _, sft_sign, gamma_p, gamma, _, *rest = self.params
        zeros = torch.zeros_like(logp)

        def dlogp(sft_weight: float, rl_weight: float) -> Tensor:
            weights = (sft_weight, sft_sign, gamma_p, gamma, rl_weight, *rest)
            return self.formula.eager(logp, zeros, *self.inputs[:, rows], *weights)[1]

        fixed = dlogp(0.0, 0.0)
        return fixed, [dlogp(1.0, 0.0) - fixed, dlogp(0.0, 1.0) - fixed]

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """See TokenObjective; logp and entropy of ``rows``, which are one sequence, or all."""
        sft_coef, sft_sign, _, _, rl_coef, *_ = self.params
        mean = self._inputs(logp, entropy, rows)[-1][0]
        return [sft_coef * torch.exp(sft_sign * mean), rl_coef * torch.exp(mean)]

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; from logp and entropy of all rows."""
        demo_weight, rollout_weight, entropy_weight, advantage, correct, old_logp, scope_entropy = (
            self._inputs(logp, entropy, slice(0, logp.numel()))
        )
        sft_coef, sft_sign, gamma_p, gamma, rl_coef, off_policy, own_entropy, max_log_ratio = self.params
        weight_entropy = scope_entropy + own_entropy * entropy
        log_ratio = log_ratio_if.eager(off_policy, logp, old_logp)
        is_demo, is_rollout = self.is_demo & self.valid, ~self.is_demo & self.valid
        terms = {}
        # an entropy of 0 and coefficients of 1 make both weights 1
        for suffix, h, sft_scale, rl_scale in (
            ("", weight_entropy, sft_coef, rl_coef),
            ("_unweighted", torch.zeros_like(entropy), 1.0, 1.0),
        ):
            sft, _, rl, _ = srft_demo.eager(logp, advantage, h, sft_scale, sft_sign, gamma_p, gamma)
            rollout, _, ratio, positive = self.rollout.eager(
                logp, log_ratio, advantage, correct, h, rl_scale, max_log_ratio
            )
            terms["demo_sft" + suffix] = weighted.eager(demo_weight, sft).sum()
            terms["demo_rl" + suffix] = weighted.eager(demo_weight, rl).sum()
            rollout = weighted.eager(rollout_weight, rollout)
            terms["rollout_positive" + suffix] = torch.where(positive, rollout, 0.0).sum()
            terms["rollout_negative" + suffix] = torch.where(positive, 0.0, rollout).sum()
        terms["entropy_bonus"] = -(entropy_weight * entropy).sum()
        loss = sum(terms[name] for name in SRFT_LOSS_TERMS)
        terms["sum_weight_sft"] = torch.where(
            is_demo, sft_coef * torch.exp(sft_sign * weight_entropy), 0.0
        ).sum()
        terms["sum_weight_rl"] = torch.where(is_rollout, rl_coef * torch.exp(weight_entropy), 0.0).sum()
        terms["sum_entropy_demo"] = torch.where(is_demo, entropy, 0.0).sum()
        terms["sum_entropy_rollout"] = torch.where(is_rollout, entropy, 0.0).sum()
        return loss, torch.where(is_rollout, ratio, 1.0), torch.zeros_like(is_demo), terms


class CallableObjective:
    """A user's loss of the vectors logprobs [N] and entropy [N], differentiated by autograd.

    The loss keeps its graph, for the gradients of other tensors that it reads. Backward runs through all of it, so that
    those of logprobs and entropy, which are taken at once, come a second time and end in two leaves that nobody has.
    """

    scope = "batch"
    entropy_grad = True
    deferred = products = 0

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], put: Callable, take: Callable):
        """Wrap ``objective``; ``put`` maps computed rows to [N], ``take`` maps [N] back."""
        self._objective, self._put, self._take = objective, put, take
        self._grad_enabled = torch.is_grad_enabled()
        self._loss: Tensor | None = None

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See TokenObjective; ``rows`` are all rows."""
        leaves = [self._put(x).detach().requires_grad_() for x in (logp, entropy)]
        self._loss = loss = self._call(*leaves)
        grads: tuple[Tensor | None, ...] = (None, None)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        dlogp, dentropy = (
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        )
        return self._take(dlogp), self._take(dentropy)

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; logp and entropy of all rows."""
        loss = self._loss
        if loss is None:
            loss = self._call(self._put(logp), self._put(entropy))
        return loss, torch.ones_like(logp), torch.zeros_like(logp, dtype=torch.bool), {}

    def _call(self, logp: Tensor, entropy: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._grad_enabled):
            loss = self._objective(logp, entropy)
            # a loss that is itself a parameter is not handed out
            loss = loss.clone() if isinstance(loss, Tensor) and loss.is_leaf else loss
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"objective must return a 0-d tensor, got {got}; reduce it with .sum() or .mean()"
            )
        return loss
