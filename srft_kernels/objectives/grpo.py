"""The GRPO family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_cu_seqlens
from ..formulas import (
    TokenFormula,
    cispo_policy,
    clip_policy,
    formula,
    heard_log_ratio,
    k3,
    log_ratio_if,
    policy_factor,
    reinforce_policy,
    weighted,
)
from .base import TokenObjective, local_offsets
from .policy import clip_counts, moving, policy_log_ratio, sequence_derivative, shared_by_sequence
from .record import ABOVE_ONE, FINITE, NOT_NEGATIVE, POSITIVE, LossRecord

__all__ = ["GRPO", "GrpoArguments", "GrpoInputs", "GrpoNumbers", "GrpoObjective"]


# fmt: off
@formula
def grpo_token(
    logp, entropy, weight, advantage, old_logp, ref_logp, rollout_weight,
    clip_low, clip_high, dual_clip, off_policy, kl_coef, with_ref, entropy_coef, max_log_ratio,
    POLICY,
):
    log_ratio = heard_log_ratio(logp, advantage, old_logp, rollout_weight, off_policy, max_log_ratio)
    policy, dpolicy, ratio, clipped = POLICY(
        logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio)
    kl, dkl = k3(logp, log_ratio_if(with_ref, ref_logp, logp), max_log_ratio)
    factor = policy_factor(advantage, rollout_weight)
    loss = weighted(weight, weighted(factor, policy) + kl_coef * kl - entropy_coef * entropy)
    dlogp = weighted(weight, weighted(factor, dpolicy) + kl_coef * dkl)
    return loss, dlogp, -weight * entropy_coef, ratio, clipped
# fmt: on


class GrpoInputs(NamedTuple):
    """What ``grpo_token`` takes of each token, [n]."""

    weight: Tensor
    """w / num_tokens."""
    advantage: Tensor
    """A."""
    old_logp: Tensor
    """0 where on-policy."""
    ref_logp: Tensor
    """0 where there is no reference model."""
    rollout_weight: Tensor
    """rho."""


class GrpoNumbers(NamedTuple):
    """The numbers that ``grpo_token`` takes; a flag is 1.0 or 0.0."""

    clip_low: float
    """The ratio is kept above 1 - clip_low."""
    clip_high: float
    """The ratio is kept below 1 + clip_high."""
    dual_clip: float
    """Largest ratio for a negative advantage; inf for none."""
    off_policy: float
    """There is an old log-probability."""
    kl_coef: float
    """Weight of k3."""
    with_ref: float
    """There is a log-probability of the reference model."""
    entropy_coef: float
    """Weight of the entropy bonus."""
    max_log_ratio: float
    """Bound of log-ratios, nats."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The last arguments of a policy term."""
        return self.clip_low, self.clip_high, self.dual_clip, self.max_log_ratio


class GrpoArguments(NamedTuple):
    """The arguments of ``linear_grpo_loss`` of its own, which says what each means, in order.

    advantages, old_logprobs, loss_type, clip_low, clip_high, dual_clip, max_log_ratio, ref_logprobs, kl_coef,
    rollout_weights, entropy_coef, cu_seqlens, token_weights, num_tokens.
    """

    advantages: Tensor
    old_logprobs: Tensor | None
    loss_type: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    max_log_ratio: float
    ref_logprobs: Tensor | None
    kl_coef: float
    rollout_weights: Tensor | None
    entropy_coef: float
    cu_seqlens: Tensor | None
    token_weights: Tensor | None
    num_tokens: int | Tensor | None

    def check(self, labels: Tensor) -> None:
        """Raise ValueError unless the arguments fit together, and ``labels`` [N]."""
        GRPO.check(labels, self._asdict())
        if self.kl_coef != 0 and self.ref_logprobs is None:
            raise ValueError(f"ref_logprobs is required by kl_coef={self.kl_coef}; pass it or set kl_coef=0")
        if self.loss_type == "gspo":
            check_cu_seqlens(self.cu_seqlens, labels.numel(), 'loss_type="gspo"')

    def numbers(self) -> GrpoNumbers:
        """The numbers of the formula."""
        numbers = GrpoNumbers(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=math.inf if self.dual_clip is None else self.dual_clip,
            off_policy=self.old_logprobs is not None,
            kl_coef=self.kl_coef,
            with_ref=self.ref_logprobs is not None and self.kl_coef != 0,
            entropy_coef=self.entropy_coef,
            max_log_ratio=self.max_log_ratio,
        )
        return GrpoNumbers(*map(float, numbers))


_CLIP = TokenFormula(grpo_token, clip_policy)
_FORMULAS = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "gspo"), _CLIP),
    "cispo": TokenFormula(grpo_token, cispo_policy),
    "reinforce": TokenFormula(grpo_token, reinforce_policy),
}
GRPO = LossRecord(
    formulas=_FORMULAS,
    terms=("policy", "kl", "entropy_bonus", "clip_low_sum", "clip_high_sum", "sum_entropy"),
    vectors=("advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "token_weights"),
    required=("advantages",),
    choices={"loss_type": tuple(_FORMULAS)},
    numbers={
        "clip_low": POSITIVE,
        "clip_high": POSITIVE,
        "dual_clip": ABOVE_ONE,
        "max_log_ratio": POSITIVE,
        "kl_coef": NOT_NEGATIVE,
        "entropy_coef": FINITE,
    },
    optional=("dual_clip",),
    counts=("num_tokens",),
    others=("cu_seqlens",),
)


@dataclass(frozen=True)
class GrpoObjective(TokenObjective):
    """GRPO family, its ``inputs`` GrpoInputs and its ``params`` GrpoNumbers; GSPO is scope "sequence"."""

    params: GrpoNumbers

    def _token(self, rows: slice) -> GrpoInputs:
        return GrpoInputs(*self.inputs[:, rows])

    def _log_ratio(self, logp: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """See ``policy_log_ratio``."""
        token, number = self._token(rows), self.params
        return policy_log_ratio(
            logp, token.advantage, token.old_logp, token.rollout_weight, number.off_policy, number.max_log_ratio,
            self.valid[rows], local_offsets(self.offsets, rows) if self.scope == "sequence" else None,
        )  # fmt: skip

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """See TokenObjective; the tokens of a sequence share the gradient of its ratio equally."""
        if self.scope == "token":
            return super().coefficients(logp, entropy, rows)
        dlogp = self._sequence_derivative(logp, rows) + self._kl_derivative(logp, rows)
        return dlogp, -self._token(rows).weight * self.params.entropy_coef if self.entropy_grad else None

    def _sequence_derivative(self, logp: Tensor, rows: slice) -> Tensor:
        """Derivative of the policy term by each logp: one number a sequence, 0 at tokens that do not move."""
        token = self._token(rows)
        log_ratio, heard_of, factor = self._log_ratio(logp, rows)
        dpolicy = sequence_derivative(self.formula.chosen, log_ratio, token.advantage, *self.params.bounds)
        share = weighted.eager(token.weight * factor, dpolicy)
        return shared_by_sequence(share, heard_of, logp, local_offsets(self.offsets, rows))

    def _kl_derivative(self, logp: Tensor, rows: slice) -> Tensor:
        token, number = self._token(rows), self.params
        dkl = k3.eager(logp, log_ratio_if.eager(number.with_ref, token.ref_logp, logp), number.max_log_ratio)[1]
        return weighted.eager(token.weight, number.kl_coef * dkl)

    @property
    def deferred(self) -> int:
        """See TokenObjective."""
        return int(self.scope == "sequence")

    @property
    def products(self) -> int:
        """See TokenObjective."""
        return self.deferred + (self.params.kl_coef != 0)

    def parts(self, logp: Tensor, rows: slice) -> tuple[Tensor | None, list[Tensor]]:
        """See TokenObjective; the KL is a token's own, the policy term its sequence's."""
        kl = self._kl_derivative(logp, rows) if self.params.kl_coef != 0 else None
        return kl, [moving(self._log_ratio(logp, rows)[1], logp).to(logp.dtype)]

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """See TokenObjective; logp and entropy of ``rows``, which are one sequence."""
        # 0 at tokens that do not count, and the same elsewhere
        derivative = self._sequence_derivative(logp, rows)
        return [derivative.sum() / moving(self._log_ratio(logp, rows)[1], logp).sum().clamp(min=1)]

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; from logp and entropy of all rows."""
        token, number = GrpoInputs(*self.inputs), self.params
        log_ratio, heard_of, factor = self._log_ratio(logp, slice(0, logp.numel()))
        policy, _, ratio, clipped = self.formula.chosen.eager(logp, log_ratio, token.advantage, *number.bounds)
        kl, _ = k3.eager(logp, log_ratio_if.eager(number.with_ref, token.ref_logp, logp), number.max_log_ratio)
        terms = {
            "policy": weighted.eager(token.weight * factor, policy).sum(),
            "kl": number.kl_coef * weighted.eager(token.weight, kl).sum(),
            "entropy_bonus": -number.entropy_coef * (token.weight * entropy).sum(),
        }
        loss = terms["policy"] + terms["kl"] + terms["entropy_bonus"]
        clipped = clipped & self.valid & (factor != 0)
        terms |= clip_counts(clipped, ratio, loss.dtype)
        terms["sum_entropy"] = entropy.sum()
        return loss, torch.where(heard_of, ratio, 1.0), clipped, terms
