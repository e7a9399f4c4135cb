"""The general token loss: a weight of each token for each of five terms."""

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
    fixed_factor,
    formula,
    heard_log_ratio,
    k3,
    log_ratio_if,
    policy_factor,
    reinforce_policy,
    shaped,
    shaping,
    weighted,
)
from .base import TokenObjective, local_offsets, scope_mean
from .policy import clip_counts, moving, policy_log_ratio, sequence_derivative, shared_by_sequence
from .record import ABOVE_ONE, POSITIVE, LossRecord

__all__ = ["STREAMS", "StreamArguments", "StreamInputs", "StreamNumbers", "StreamObjective"]

# name: (by_p, by_rest) of ``fixed_factor``
PROB_FACTORS = {"one": (0.0, 0.0), "p": (1.0, 0.0), "p(1-p)": (1.0, 1.0)}
_WEIGHTS = ("policy_weights", "sft_weights", "shaped_weights", "kl_weights", "entropy_weights")
# argument, weights that cannot do without it
_NEEDED = (("advantages", "policy_weights"), ("advantages", "shaped_weights"), ("ref_logprobs", "kl_weights"))
# argument, what it is where it is left out, weights without which it says nothing
_READ_WITH = (
    ("policy", "clip", "policy_weights"),
    ("dual_clip", None, "policy_weights"),
    ("policy_entropy_coefs", None, "policy_weights"),
    ("policy_prob_factor", "one", "policy_weights"),
    ("sft_entropy_coefs", None, "sft_weights"),
    ("sft_prob_factor", "one", "sft_weights"),
    ("shaping_gamma", None, "shaped_weights"),
)


# fmt: off
@formula
def stream_terms(
    logp, entropy, policy, dpolicy, policy_weight, sft_weight, shaped_weight, kl_weight, entropy_weight, advantage,
    ref_logp, policy_entropy_coef, sft_entropy_coef, scope_entropy, max_log_ratio, with_ref, own_entropy,
    policy_by_p, policy_by_rest, sft_by_p, sft_by_rest, gamma_p, gamma,
):
    # each term and its derivative by logp; of the entropy bonus the term alone
    h = scope_entropy + own_entropy * entropy
    policy_scale = weighted(
        policy_factor(advantage, policy_weight),
        fixed_factor(policy_entropy_coef, h, logp, policy_by_p, policy_by_rest))
    sft_scale = weighted(sft_weight, fixed_factor(sft_entropy_coef, h, logp, sft_by_p, sft_by_rest))
    shaped_scale = policy_factor(advantage, shaped_weight)
    rl, drl = shaped(logp, advantage, gamma_p, gamma)
    kl, dkl = k3(logp, log_ratio_if(with_ref, ref_logp, logp), max_log_ratio)
    return (
        weighted(policy_scale, policy), weighted(policy_scale, dpolicy), weighted(sft_scale, -logp), -sft_scale,
        weighted(shaped_scale, rl), weighted(shaped_scale, drl), weighted(kl_weight, kl), weighted(kl_weight, dkl),
        -weighted(entropy_weight, entropy),
    )


@formula
def stream_token(
    logp, entropy, policy_weight, sft_weight, shaped_weight, kl_weight, entropy_weight, advantage, old_logp, ref_logp,
    policy_entropy_coef, sft_entropy_coef, scope_entropy,
    clip_low, clip_high, dual_clip, max_log_ratio, off_policy, with_ref, own_entropy,
    policy_by_p, policy_by_rest, sft_by_p, sft_by_rest, gamma_p, gamma,
    POLICY,
):
    log_ratio = heard_log_ratio(logp, advantage, old_logp, policy_weight, off_policy, max_log_ratio)
    policy, dpolicy, ratio, clipped = POLICY(
        logp, log_ratio, advantage, clip_low, clip_high, dual_clip, max_log_ratio)
    policy, dpolicy, sft, dsft, rl, drl, kl, dkl, bonus = stream_terms(
        logp, entropy, policy, dpolicy, policy_weight, sft_weight, shaped_weight, kl_weight, entropy_weight, advantage,
        ref_logp, policy_entropy_coef, sft_entropy_coef, scope_entropy, max_log_ratio, with_ref, own_entropy,
        policy_by_p, policy_by_rest, sft_by_p, sft_by_rest, gamma_p, gamma)
    return policy + sft + rl + kl + bonus, dpolicy + dsft + drl + dkl, -entropy_weight, ratio, clipped
# fmt: on


class StreamInputs(NamedTuple):
    """What ``stream_token`` takes of each token, [n]; 0 stands for what is absent."""

    policy_weight: Tensor
    """a."""
    sft_weight: Tensor
    """b."""
    shaped_weight: Tensor
    """d."""
    kl_weight: Tensor
    """k."""
    entropy_weight: Tensor
    """e."""
    advantage: Tensor
    """A."""
    old_logp: Tensor
    """Before this update, nats."""
    ref_logp: Tensor
    """Of the reference model, nats."""
    policy_entropy_coef: Tensor
    """u of g_a."""
    sft_entropy_coef: Tensor
    """u of g_b."""
    scope_entropy: Tensor
    """H of the factors, but for the token's own."""


class StreamNumbers(NamedTuple):
    """The numbers that ``stream_token`` takes; a flag is 1.0 or 0.0."""

    clip_low: float
    """The ratio is kept above 1 - clip_low."""
    clip_high: float
    """The ratio is kept below 1 + clip_high."""
    dual_clip: float
    """Largest ratio for a negative advantage; inf for none."""
    max_log_ratio: float
    """Bound of log-ratios, nats."""
    off_policy: float
    """There is an old log-probability."""
    with_ref: float
    """There is a log-probability of the reference model."""
    own_entropy: float
    """H is the token's own."""
    policy_by_p: float
    """See ``fixed_factor``, as for the next three."""
    policy_by_rest: float
    """Of g_a."""
    sft_by_p: float
    """Of g_b."""
    sft_by_rest: float
    """Of g_b."""
    gamma_p: float
    """f(p) = p / (gamma_p p + gamma), as the next."""
    gamma: float
    """See gamma_p."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The last arguments of a policy term."""
        return self.clip_low, self.clip_high, self.dual_clip, self.max_log_ratio


class StreamArguments(NamedTuple):
    """The arguments of ``linear_token_loss`` of its own, which says what each means, in order.

    advantages, old_logprobs, ref_logprobs, policy_weights, sft_weights, shaped_weights, kl_weights, entropy_weights,
    policy, clip_low, clip_high, dual_clip, max_log_ratio, policy_entropy_coefs, sft_entropy_coefs, policy_prob_factor,
    sft_prob_factor, shaping_gamma, entropy_scope, batch_entropy, cu_seqlens.
    """

    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    policy_weights: Tensor | None
    sft_weights: Tensor | None
    shaped_weights: Tensor | None
    kl_weights: Tensor | None
    entropy_weights: Tensor | None
    policy: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    max_log_ratio: float
    policy_entropy_coefs: Tensor | None
    sft_entropy_coefs: Tensor | None
    policy_prob_factor: str
    sft_prob_factor: str
    shaping_gamma: float | None
    entropy_scope: str
    batch_entropy: float | Tensor | None
    cu_seqlens: Tensor | None

    def check(self, labels: Tensor) -> None:
        """Raise ValueError unless the arguments fit together, and ``labels`` [N]."""
        STREAMS.check(labels, self._asdict())
        if all(getattr(self, name) is None for name in _WEIGHTS):
            raise ValueError(f"one of {', '.join(_WEIGHTS)} must be given, got None for all; each brings its term")
        for needed, by in _NEEDED:
            if getattr(self, needed) is None and getattr(self, by) is not None:
                raise ValueError(f"{needed} is required by {by}; pass it or drop {by}")
        for name, absent, by in _READ_WITH:
            value = getattr(self, name)
            # a tensor is not compared: it was given
            if (isinstance(value, Tensor) or value != absent) and getattr(self, by) is None:
                raise ValueError(f"{name} is read only with {by}; pass {by} or drop {name}")
        if self.batch_entropy is not None and self.entropy_scope != "batch":
            raise ValueError(
                f'batch_entropy is read only with entropy_scope="batch", got {self.entropy_scope!r}; drop one'
            )
        if self.policy == "gspo":
            check_cu_seqlens(self.cu_seqlens, labels.numel(), 'policy="gspo"')
        if self.mean_over() == "sequence":
            check_cu_seqlens(self.cu_seqlens, labels.numel(), 'entropy_scope="sequence"')

    def mean_over(self) -> str:
        """What H of the factors is a mean over in this call; "given" where it is none of its own."""
        if self.policy_entropy_coefs is None and self.sft_entropy_coefs is None:
            return "given"
        return self.entropy_scope if self.batch_entropy is None else "given"

    def numbers(self) -> StreamNumbers:
        """The numbers of the formula."""
        policy_by_p, policy_by_rest = PROB_FACTORS[self.policy_prob_factor]
        sft_by_p, sft_by_rest = PROB_FACTORS[self.sft_prob_factor]
        gamma_p, gamma = shaping(self.shaping_gamma)
        numbers = StreamNumbers(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=math.inf if self.dual_clip is None else self.dual_clip,
            max_log_ratio=self.max_log_ratio,
            off_policy=self.old_logprobs is not None,
            with_ref=self.kl_weights is not None,
            own_entropy=self.mean_over() == "token",
            policy_by_p=policy_by_p,
            policy_by_rest=policy_by_rest,
            sft_by_p=sft_by_p,
            sft_by_rest=sft_by_rest,
            gamma_p=gamma_p,
            gamma=gamma,
        )
        return StreamNumbers(*map(float, numbers))


_FORMULAS = {
    "clip": TokenFormula(stream_token, clip_policy),
    "cispo": TokenFormula(stream_token, cispo_policy),
    "reinforce": TokenFormula(stream_token, reinforce_policy),
    "gspo": TokenFormula(stream_token, clip_policy),
}
STREAMS = LossRecord(
    formulas=_FORMULAS,
    terms=("policy", "sft", "shaped", "kl", "entropy_bonus", "clip_low_sum", "clip_high_sum", "sum_entropy"),
    vectors=(
        "advantages", "old_logprobs", "ref_logprobs", *_WEIGHTS, "policy_entropy_coefs", "sft_entropy_coefs"
    ),
    choices={
        "policy": tuple(_FORMULAS),
        "policy_prob_factor": tuple(PROB_FACTORS),
        "sft_prob_factor": tuple(PROB_FACTORS),
        "entropy_scope": ("token", "sequence", "batch"),
    },
    numbers={
        "clip_low": POSITIVE,
        "clip_high": POSITIVE,
        "dual_clip": ABOVE_ONE,
        "max_log_ratio": POSITIVE,
        "shaping_gamma": POSITIVE,
    },
    optional=("dual_clip", "shaping_gamma"),
    counts=("batch_entropy",),
    others=("cu_seqlens",),
)  # fmt: skip


class _Terms(NamedTuple):
    """What ``stream_terms`` gives of each token: the terms and their derivatives by logp, [n]."""

    policy: Tensor
    dpolicy: Tensor
    sft: Tensor
    dsft: Tensor
    shaped: Tensor
    dshaped: Tensor
    kl: Tensor
    dkl: Tensor
    entropy_bonus: Tensor


class _Policy(NamedTuple):
    """The ratio and the policy term of each token, but for its weight, [n]; see ``policy_log_ratio``."""

    heard_of: Tensor
    factor: Tensor
    term: Tensor
    dterm: Tensor
    ratio: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class StreamObjective(TokenObjective):
    """The general token loss, its ``inputs`` StreamInputs and its ``params`` StreamNumbers.

    ``mean_over`` is what the H of the factors is a mean over, as StreamArguments says; ``sequence_policy`` says that
    the ratio is a sequence's; ``scope`` is the larger of the two. ``has_fixed`` says that a term beside the policy's
    has a gradient by logp, ``fixed_waits`` that this gradient reads an entropy.
    """

    params: StreamNumbers
    mean_over: str = "token"
    sequence_policy: bool = False
    has_fixed: bool = True
    fixed_waits: bool = True

    def _inputs(self, entropy: Tensor, rows: slice) -> StreamInputs:
        token = StreamInputs(*self.inputs[:, rows])
        if self.mean_over in ("token", "given"):
            return token
        return token._replace(scope_entropy=scope_mean(entropy, self.valid[rows], self.mean_over, self.offsets, rows))

    def _offsets(self, rows: slice) -> Tensor | None:
        return local_offsets(self.offsets, rows) if self.sequence_policy else None

    def _policy(self, logp: Tensor, rows: slice) -> _Policy:
        token, number = StreamInputs(*self.inputs[:, rows]), self.params
        log_ratio, heard_of, factor = policy_log_ratio(
            logp, token.advantage, token.old_logp, token.policy_weight, number.off_policy, number.max_log_ratio,
            self.valid[rows], self._offsets(rows),
        )  # fmt: skip
        term, dterm, ratio, clipped = self.formula.chosen.eager(logp, log_ratio, token.advantage, *number.bounds)
        if self.sequence_policy:
            dterm = sequence_derivative(self.formula.chosen, log_ratio, token.advantage, *number.bounds)
        return _Policy(heard_of, factor, term, dterm, ratio, clipped)

    def _terms(self, logp: Tensor, entropy: Tensor, rows: slice, policy: _Policy) -> _Terms:
        """Every term of ``rows``, which are whole scopes."""
        token, number = self._inputs(entropy, rows), self.params
        terms = stream_terms.eager(
            logp, entropy, policy.term, policy.dterm, token.policy_weight, token.sft_weight, token.shaped_weight,
            token.kl_weight, token.entropy_weight, token.advantage, token.ref_logp, token.policy_entropy_coef,
            token.sft_entropy_coef, token.scope_entropy, number.max_log_ratio, number.with_ref, number.own_entropy,
            number.policy_by_p, number.policy_by_rest, number.sft_by_p, number.sft_by_rest, number.gamma_p,
            number.gamma,
        )  # fmt: skip
        found, offsets = _Terms(*terms), self._offsets(rows)
        if offsets is None:
            return found
        shared = shared_by_sequence(found.dpolicy, policy.heard_of, logp, offsets)
        return found._replace(dpolicy=shared)

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """See TokenObjective; the tokens of a sequence share the gradient of its ratio equally."""
        if not self.sequence_policy:
            return super().coefficients(logp, entropy, rows)
        found = self._terms(logp, entropy, rows, self._policy(logp, rows))
        dlogp = found.dpolicy + found.dsft + found.dshaped + found.dkl
        return dlogp, -StreamInputs(*self.inputs[:, rows]).entropy_weight if self.entropy_grad else None

    @property
    def deferred(self) -> int:
        """See TokenObjective; one for the ratio of a sequence."""
        return int(self.sequence_policy and self.scope == "sequence" and not self.fixed_waits)

    @property
    def products(self) -> int:
        """See TokenObjective."""
        return self.deferred + self.has_fixed

    def parts(self, logp: Tensor, rows: slice) -> tuple[Tensor | None, list[Tensor]]:
        """See TokenObjective; the policy term is a sequence's, all others are a token's own."""
        policy = self._policy(logp, rows)
        fixed = None
        if self.has_fixed:
            found = self._terms(logp, torch.zeros_like(logp), rows, policy)
            fixed = found.dsft + found.dshaped + found.dkl
        return fixed, [moving(policy.heard_of, logp).to(logp.dtype)]

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """See TokenObjective; logp and entropy of ``rows``, which are one sequence."""
        policy = self._policy(logp, rows)
        derivative = self._terms(logp, entropy, rows, policy).dpolicy
        # 0 at tokens that do not move, and the same elsewhere
        return [derivative.sum() / moving(policy.heard_of, logp).sum().clamp(min=1)]

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; from logp and entropy of all rows."""
        rows = slice(0, logp.numel())
        policy = self._policy(logp, rows)
        found = self._terms(logp, entropy, rows, policy)
        terms = {name: getattr(found, name).sum() for name in ("policy", "sft", "shaped", "kl", "entropy_bonus")}
        loss = sum(terms.values(), start=logp.new_zeros(()))
        clipped = policy.clipped & self.valid & (policy.factor != 0)
        terms |= clip_counts(clipped, policy.ratio, loss.dtype)
        terms["sum_entropy"] = entropy.sum()
        return loss, torch.where(policy.heard_of, policy.ratio, 1.0), clipped, terms
