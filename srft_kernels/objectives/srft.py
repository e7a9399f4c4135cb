"""SRFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_cu_seqlens
from ..formulas import (
    TokenFormula,
    formula,
    log_ratio_if,
    shaping,
    srft_demo,
    srft_likelihood,
    srft_ratio,
    weighted,
)
from ..presets import SRFT_PRESETS, SrftSwitches
from .base import TokenObjective, scope_mean
from .record import FINITE, NOT_NEGATIVE, POSITIVE, LossRecord

__all__ = ["SRFT", "SrftArguments", "SrftInputs", "SrftNumbers", "SrftObjective"]


# fmt: off
@formula
def srft_terms(
    logp, log_ratio, sft_share, advantage, correct, weight_entropy,
    sft_coef, sft_sign, gamma_p, gamma, rl_coef, negative_coef, max_log_ratio,
    ROLLOUT,
):
    # each term of SRFT without its weight, and its derivative by logp; the ratio; whether the last term has c
    sft, dsft, rl, drl = srft_demo(logp, advantage, weight_entropy, sft_coef, sft_sign, gamma_p, gamma)
    rollout, drollout, ratio, positive = ROLLOUT(
        logp, log_ratio, advantage, correct, weight_entropy, rl_coef, negative_coef, max_log_ratio)
    return weighted(sft_share, sft), weighted(sft_share, dsft), rl, drl, rollout, drollout, ratio, positive


@formula
def srft_sum(demo_weight, rollout_weight, sft, rl, rollout):
    # of the terms or of their derivatives
    return weighted(demo_weight, sft + rl) + weighted(rollout_weight, rollout)


@formula
def srft_token(
    logp, entropy, demo_weight, rollout_weight, entropy_weight, sft_share, advantage, correct, old_logp, scope_entropy,
    sft_coef, sft_sign, gamma_p, gamma, rl_coef, negative_coef, off_policy, own_entropy, max_log_ratio,
    ROLLOUT,
):
    sft, dsft, rl, drl, rollout, drollout, ratio, positive = srft_terms(
        logp, log_ratio_if(off_policy, logp, old_logp), sft_share, advantage, correct,
        scope_entropy + own_entropy * entropy, sft_coef, sft_sign, gamma_p, gamma, rl_coef, negative_coef,
        max_log_ratio, ROLLOUT)
    loss = srft_sum(demo_weight, rollout_weight, sft, rl, rollout) - entropy_weight * entropy
    return loss, srft_sum(demo_weight, rollout_weight, dsft, drl, drollout), -entropy_weight, ratio, ratio < 0
# fmt: on


class SrftInputs(NamedTuple):
    """What ``srft_token`` takes of each token, [n]."""

    demo_weight: Tensor
    """w / num_demo_tokens of a demonstration, else 0."""
    rollout_weight: Tensor
    """w / num_rollout_tokens of a rollout, else 0."""
    entropy_weight: Tensor
    """Of the entropy bonus."""
    sft_share: Tensor
    """The weight of the log-likelihood as a multiple of w."""
    advantage: Tensor
    """A."""
    correct: Tensor
    """1 for a token of a correct rollout, else 0."""
    old_logp: Tensor
    """0 where on-policy, and of a demonstration."""
    scope_entropy: Tensor
    """H of the weights s and c, but for the token's own."""


class SrftNumbers(NamedTuple):
    """The numbers that ``srft_token`` takes; a flag is 1.0 or 0.0."""

    sft_coef: float
    """Scale of s."""
    sft_sign: float
    """Sign of H in s."""
    gamma_p: float
    """f(p) = p / (gamma_p p + gamma), as the next."""
    gamma: float
    """See gamma_p."""
    rl_coef: float
    """Scale of c."""
    negative_coef: float
    """Scale of what has no c."""
    off_policy: float
    """There is an old log-probability."""
    own_entropy: float
    """H is the token's own."""
    max_log_ratio: float
    """Bound of the log-ratio, nats."""


class SrftArguments(NamedTuple):
    """The arguments of ``linear_srft_loss`` of its own, which says what each means, in order.

    advantages, is_demo, is_correct, cu_seqlens, old_logprobs, preset, sft_coef, rl_coef, negative_coef, max_log_ratio,
    sft_entropy_sign, entropy_scope, batch_entropy, self_rollout, demo_gamma, entropy_coef, token_weights, sft_weights,
    num_rollout_tokens, num_demo_tokens.
    """

    advantages: Tensor
    is_demo: Tensor
    is_correct: Tensor
    cu_seqlens: Tensor | None
    old_logprobs: Tensor | None
    preset: str
    sft_coef: float
    rl_coef: float
    negative_coef: float
    max_log_ratio: float
    sft_entropy_sign: int | None
    entropy_scope: str | None
    batch_entropy: float | Tensor | None
    self_rollout: str | None
    demo_gamma: float | None
    entropy_coef: float | None
    token_weights: Tensor | None
    sft_weights: Tensor | None
    num_rollout_tokens: int | Tensor | None
    num_demo_tokens: int | Tensor | None

    def switches(self) -> SrftSwitches:
        """The preset, with what the caller gave in its place."""
        check_choice("preset", self.preset, SRFT_PRESETS)
        base = SRFT_PRESETS[self.preset]
        given = {name: getattr(self, name) for name in SrftSwitches._fields}
        return base._replace(**{name: x for name, x in given.items() if x is not None})

    def check(self, labels: Tensor) -> SrftSwitches:
        """Raise ValueError unless the arguments fit together, and ``labels`` [N]; return the switches."""
        switches = self.switches()
        SRFT.check(labels, self._asdict() | switches._asdict())
        if self.batch_entropy is not None and switches.entropy_scope != "batch":
            raise ValueError(
                f'batch_entropy is read only with entropy_scope="batch", got {switches.entropy_scope!r}; drop one'
            )
        if switches.entropy_scope == "sequence":
            check_cu_seqlens(self.cu_seqlens, labels.numel(), 'entropy_scope="sequence"')
        return switches

    def numbers(self, switches: SrftSwitches) -> SrftNumbers:
        """The numbers of the formula, with ``switches`` in place of the preset."""
        gamma_p, gamma = shaping(switches.demo_gamma)
        numbers = SrftNumbers(
            sft_coef=self.sft_coef,
            sft_sign=switches.sft_entropy_sign,
            gamma_p=gamma_p,
            gamma=gamma,
            rl_coef=self.rl_coef,
            negative_coef=self.negative_coef,
            off_policy=self.old_logprobs is not None,
            own_entropy=switches.entropy_scope == "token",
            max_log_ratio=self.max_log_ratio,
        )
        return SrftNumbers(*map(float, numbers))


_WEIGHTED_TERMS = ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative")
_LOSS_TERMS = (*_WEIGHTED_TERMS, "entropy_bonus")
_FORMULAS = {
    "likelihood": TokenFormula(srft_token, srft_likelihood),
    "ratio": TokenFormula(srft_token, srft_ratio),
}
SRFT = LossRecord(
    formulas=_FORMULAS,
    terms=(
        *_WEIGHTED_TERMS,
        *(name + "_unweighted" for name in _WEIGHTED_TERMS),
        "entropy_bonus",
        "sum_weight_sft",
        "sum_weight_rl",
        "sum_entropy_demo",
        "sum_entropy_rollout",
    ),
    vectors=("advantages", "is_demo", "is_correct", "old_logprobs", "token_weights", "sft_weights"),
    required=("advantages", "is_demo", "is_correct"),
    flags=("is_demo", "is_correct"),
    choices={
        "preset": tuple(SRFT_PRESETS),
        "self_rollout": tuple(_FORMULAS),
        "sft_entropy_sign": (-1, 0, 1),
        "entropy_scope": ("token", "sequence", "batch"),
    },
    numbers={
        "sft_coef": NOT_NEGATIVE,
        "rl_coef": NOT_NEGATIVE,
        "negative_coef": NOT_NEGATIVE,
        "max_log_ratio": POSITIVE,
        "demo_gamma": NOT_NEGATIVE,
        "entropy_coef": FINITE,
    },
    counts=("batch_entropy", "num_rollout_tokens", "num_demo_tokens"),
    others=("cu_seqlens",),
)


@dataclass(frozen=True)
class SrftObjective(TokenObjective):
    """SRFT, its ``inputs`` SrftInputs and its ``params`` SrftNumbers; ``is_demo`` [n].

    Its weights take the mean entropy of ``scope``.
    """

    params: SrftNumbers
    is_demo: Tensor = field(kw_only=True)

    def _inputs(self, entropy: Tensor, rows: slice) -> SrftInputs:
        token = SrftInputs(*self.inputs[:, rows])
        if self.scope == "token":
            return token
        return token._replace(scope_entropy=scope_mean(entropy, self.valid[rows], self.scope, self.offsets, rows))

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
        zeros = torch.zeros_like(logp)

        def dlogp(s: float, c: float) -> Tensor:
            # an entropy of 0 leaves the coefficients for the weights
            numbers = self.params._replace(sft_coef=s, rl_coef=c)
            return self.formula.eager(logp, zeros, *self.inputs[:, rows], *numbers)[1]

        fixed = dlogp(0.0, 0.0)
        return fixed, [dlogp(1.0, 0.0) - fixed, dlogp(0.0, 1.0) - fixed]

    def _weights(self, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """s and c of an entropy of any shape."""
        number = self.params
        return number.sft_coef * torch.exp(number.sft_sign * entropy), number.rl_coef * torch.exp(entropy)

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """See TokenObjective; logp and entropy of ``rows``, which are one sequence, or all."""
        return list(self._weights(self._inputs(entropy, rows).scope_entropy[0]))

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; from logp and entropy of all rows."""
        token, number = self._inputs(entropy, slice(0, logp.numel())), self.params
        h = token.scope_entropy + number.own_entropy * entropy
        log_ratio = log_ratio_if.eager(number.off_policy, logp, token.old_logp)
        is_demo, is_rollout = self.is_demo & self.valid, ~self.is_demo & self.valid
        found = {}
        # an entropy of 0 and coefficients of 1 make both weights 1
        for suffix, weight_entropy, sft_coef, rl_coef, negative_coef in (
            ("", h, number.sft_coef, number.rl_coef, number.negative_coef),
            ("_unweighted", torch.zeros_like(entropy), 1.0, 1.0, 1.0),
        ):
            sft, _, rl, _, rollout, _, ratio, positive = srft_terms.eager(
                logp, log_ratio, token.sft_share, token.advantage, token.correct, weight_entropy, sft_coef,
                number.sft_sign, number.gamma_p, number.gamma, rl_coef, negative_coef, number.max_log_ratio,
                self.formula.chosen.eager,
            )  # fmt: skip
            found["demo_sft" + suffix] = weighted.eager(token.demo_weight, sft).sum()
            found["demo_rl" + suffix] = weighted.eager(token.demo_weight, rl).sum()
            rollout = weighted.eager(token.rollout_weight, rollout)
            found["rollout_positive" + suffix] = torch.where(positive, rollout, 0.0).sum()
            found["rollout_negative" + suffix] = torch.where(positive, 0.0, rollout).sum()
        found["entropy_bonus"] = -(token.entropy_weight * entropy).sum()
        s, c = self._weights(h)
        for name, chosen, x in (
            ("sum_weight_sft", is_demo, s),
            ("sum_weight_rl", is_rollout, c),
            ("sum_entropy_demo", is_demo, entropy),
            ("sum_entropy_rollout", is_rollout, entropy),
        ):
            found[name] = torch.where(chosen, x, 0.0).sum()
        terms = {name: found[name] for name in SRFT.terms}
        loss = sum((terms[name] for name in _LOSS_TERMS), start=logp.new_zeros(()))
        return loss, torch.where(is_rollout, ratio, 1.0), torch.zeros_like(is_demo), terms
