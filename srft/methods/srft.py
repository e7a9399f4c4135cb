"""SRFT (arXiv 2506.19767): demonstrations and rollouts in one loss, weighted by the policy's entropy.

The paper's text, its authors' code as others report it, and an independent reproduction differ; all three are presets.
Where their losses differ token by token is a table of ``linear_srft_loss``. How tokens become a loss:

- paper: advantages are divided by the standard deviation (Eq. 7). RL terms are means over sequences of token means, as
  Eq. 3 is written; Eq. 8 to 12 show expectations of a log-likelihood and no more. That of the SFT term, a token mean,
  is our reading.
- upt: the code of the reproduction. No standard deviation; the SFT term is a token mean, the RL terms of rollouts and
  demonstrations are sums over tokens divided by its longest response, 8192, however many sequences there are. It adds
  them up over the micro-batches of a GPU, the token mean too, which here is one over the update.
- official: its authors' code, which is public and was read by third parties, not by us. They report the terms and the
  coefficients. No standard deviation and the sum divided by 8192 are inferred from LUFFY, of which it is a fork; how it
  reduces its SFT term is unknown, and a token mean is assumed.

The paper leaves open which entropy H is, and whether better use can be made of it. ``weights`` says what h is in
s = sft_coef exp(sign h) and c = rl_coef exp(h), with H_t the mean entropy of update t and
E_t = decay E_(t-1) + (1 - decay) H_t, E_1 = H_1:

- entropy: h = H of the token, of its sequence, or H_t, by ``entropy_scope``.
- ema: h = E_t. A decay of 0 is the scope "batch".
- trend: h = E_t - E'_t, the second with ``slow_entropy_decay``. While entropy is steady, s and c are sft_coef and
  rl_coef: the one form that shows what adapting does apart from what the size of the weights does. While entropy falls,
  s grows (for a sign of -1) and c shrinks: more of the demonstrations, less sharpening. Equal decays are "fixed".
- fixed: h = 0.

``target_entropy`` moves the coefficient a of the entropy bonus after each step, rather than s and c:
log a += target_rate (target_entropy - H of the rollouts). The authors' code has inherited such a controller from LUFFY,
off by default: there AdamW moves log a by the gradient (H - target) a, with H over rollouts and demonstrations. Plain
steps of log a, without a in the gradient, move as far for a small a as for a large one, and need no moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator

from srft.batch import Batch
from srft.methods import (
    Aggregation,
    BaseMethod,
    Curves,
    Figure,
    Kind,
    Line,
    Loss,
    StepInfo,
    UpdateInfo,
    compared,
    token_weights,
)
from srft.responses import Group, Response
from srft_kernels import linear_srft_loss
from srft_kernels.presets import SRFT_PRESETS


class _Preset(NamedTuple):
    """What a preset decides outside of the loss of a token."""

    advantage_std: bool
    sft_aggregation: Aggregation
    rl_aggregation: Aggregation


_PRESETS = {
    "paper": _Preset(True, "token-mean", "sequence-mean"),
    "official": _Preset(False, "token-mean", "sum"),
    "upt": _Preset(False, "token-mean", "sum"),
}
# how far the coefficient of the entropy bonus may go from where it starts, lest it wind up while H cannot follow
_MOST = 100.0
_LOSSES = (
    Line(key="loss/demo_sft", label="demo, SFT", color="vermillion"),
    Line(key="loss/demo_rl", label="demo, RL", color="purple", dashed=True),
    Line(key="loss/rollout_positive", label="rollout, right", color="blue"),
    Line(key="loss/rollout_negative", label="rollout, wrong", color="green", dashed=True),
)


class Method(BaseMethod):
    """SRFT: likelihood and advantage of demonstrations, and rollouts, with weights from the policy's entropy. Unset
    switches take the preset's value.
    """

    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="weights", title="Weights of the two losses",
            caption="As they are used: mean over demonstration and rollout tokens.",
            lines=(Line(key="weight/sft", label="SFT weight", color="vermillion"),
                   Line(key="weight/rl", label="RL weight", color="blue")),
            ylabel="mean weight of a token",
        ),
        Curves(
            name="entropy_averages", title="Entropy over steps",
            caption="Moving averages that the weights go by: of the SFT weight, and of the RL weight.",
            lines=(Line(key="entropy/ema_sft", label="SFT", color="vermillion"),
                   Line(key="entropy/ema_rl", label="RL", color="blue"),
                   Line(key="entropy/slow_sft", label="SFT, slow", color="purple", dashed=True),
                   Line(key="entropy/slow_rl", label="RL, slow", color="green", dashed=True)),
            ylabel="entropy (nats per token)",
        ),
        Curves(
            name="entropy_bonus", title="Entropy bonus", caption="Its coefficient, moved towards the target entropy.",
            lines=(Line(key="weight/entropy_bonus", label="", color="blue"),), ylabel="coefficient",
        ),
        Curves(
            name="loss_components", title="Loss components, weighted", caption="The four terms as they are added up.",
            lines=_LOSSES, ylabel="contribution to the loss", signed=True,
        ),
        Curves(
            name="loss_components_unweighted", title="Loss components, unweighted",
            caption="The terms before their weights.",
            lines=tuple(line.model_copy(update={"key": f"{line.key}_unweighted"}) for line in _LOSSES),
            ylabel="before its weight", signed=True,
        ),
    )  # fmt: skip

    takes_lag: ClassVar[bool] = True
    terms: ClassVar[Mapping[str, Kind]] = {
        "demo_sft": "sft", "demo_rl": "rl", "rollout_positive": "rl", "rollout_negative": "rl",
    }  # fmt: skip

    preset: Literal["paper", "official", "upt"] = "paper"
    """As in the paper, as in its authors' code, or as in the independent reproduction."""
    sft_coef: float = Field(0.5, ge=0)
    """Factor of the demonstration log-likelihood weight."""
    rl_coef: float = Field(0.1, ge=0)
    """Factor of the weight of correct rollouts."""
    weights: Literal["entropy", "ema", "trend", "fixed"] = "entropy"
    """What the two weights go by: "entropy", that of entropy_scope; "ema", that of the update, averaged over updates;
    "trend", a fast such average less a slow one; "fixed", nothing, so that they are sft_coef and rl_coef themselves."""
    sft_entropy_sign: Literal[-1, 1] | None = None
    """Sign of the entropy in the demonstration weight."""
    entropy_scope: Literal["token", "sequence", "batch"] | None = None
    """What the entropy in the weights is a mean over; read with weights=entropy."""
    entropy_source: Literal["both", "rollouts", "demos", "own"] = "both"
    """Whose tokens the mean entropy of an update is over, where the weights go by that; "own": those that the weight is
    for, as with the scope "sequence". An update without such tokens takes those it has."""
    entropy_decay: float = Field(0.9, ge=0, lt=1)
    """What a step keeps of the average of weights=ema, and of the fast one of weights=trend; 0.9 averages about 10."""
    slow_entropy_decay: float = Field(0.99, ge=0, lt=1)
    """The same of the slow average of weights=trend; 0.99 averages about 100 steps."""
    self_rollout: Literal["likelihood", "ratio"] | None = None
    """Form of the term on the policy's own rollouts."""
    demo_gamma: float | None = Field(None, ge=0)
    """γ of the shaping p/(p+γ) on demonstrations; 0 uses p itself."""
    entropy_coef: float | None = Field(None, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""
    target_entropy: float | None = Field(None, ge=0)
    """Mean entropy of the rollouts, in nats, towards which the coefficient of the entropy bonus is moved after every
    step, from entropy_coef and at most a hundredfold up or down; unset: it stays."""
    target_rate: float = Field(0.1, ge=0)
    """Rise of the coefficient's logarithm in a step, for each nat that the entropy is below target_entropy; with 0.1 it
    doubles in 14 steps at half a nat: slower than the noise of a step, faster than a run."""
    advantage_std: bool | None = None
    """Divide advantages by the group's standard deviation."""
    sft_aggregation: Aggregation | None = None
    """Of the demonstrations' log-likelihood: mean over all tokens, mean over sequences of token means, mean over
    sequences of token sums divided by rollout.max_new_tokens, or sum over all tokens divided by it."""
    rl_aggregation: Aggregation | None = None
    """The same for the terms with an advantage or a correctness, of rollouts and of demonstrations apart."""

    @field_validator("entropy_scope", "sft_entropy_sign")
    @classmethod
    def _is_read(cls, value: object, info: ValidationInfo) -> object:
        weights = info.data.get("weights")
        unread = weights == "fixed" or (weights != "entropy" and info.field_name == "entropy_scope")
        if value is not None and unread:
            raise ValueError(f"is not read with method.weights={weights}; leave it out")
        return value

    @field_validator("entropy_source")
    @classmethod
    def _has_a_mean(cls, value: str, info: ValidationInfo) -> str:
        weights, scope = info.data.get("weights"), info.data.get("entropy_scope")
        if value != "both" and (weights == "fixed" or (weights == "entropy" and scope != "batch")):
            raise ValueError(
                "is read with method.weights=ema or trend, or method.entropy_scope=batch, which take the mean entropy "
                "of an update; set one of them"
            )
        return value

    @field_validator("target_entropy")
    @classmethod
    def _has_a_start(cls, value: float | None, info: ValidationInfo) -> float | None:
        coef, preset = info.data.get("entropy_coef"), info.data.get("preset", "paper")
        if value is not None and not (SRFT_PRESETS[preset].entropy_coef if coef is None else coef):
            raise ValueError("moves method.entropy_coef by factors, which is 0; set it to 0.001")
        return value

    @property
    def scope(self) -> str:
        """What the entropy in the weights is a mean over, the preset's choice where none is set."""
        return self.entropy_scope or SRFT_PRESETS[self.preset].entropy_scope

    @property
    def needs_entropy(self) -> bool:
        """Whether the weights go by the mean over all micro-batches."""
        return self.weights in ("ema", "trend") or (self.weights == "entropy" and self.scope == "batch")

    def learn_from(self, group: Group) -> list[Response]:
        """Compare rollouts and demonstrations with each other."""
        preset = _PRESETS[self.preset]
        divide = preset.advantage_std if self.advantage_std is None else self.advantage_std
        return compared(group.rollouts + group.demos, divide)

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """The fused SRFT loss."""
        preset = _PRESETS[self.preset]
        sft_weights = token_weights(batch, update, self.sft_aggregation or preset.sft_aggregation)
        rl_weights = token_weights(batch, update, self.rl_aggregation or preset.rl_aggregation, importance=True)
        advantages = batch.advantages * torch.where(batch.is_demo, update.scale("demo_rl"), 1.0)
        of_token = self.weights == "entropy" and self.scope != "batch"
        sft, rl = (1.0, 1.0) if of_token else self._factors(update)
        return partial(
            linear_srft_loss, advantages=advantages, is_demo=batch.is_demo, is_correct=batch.is_correct,
            cu_seqlens=batch.loss_cu_seqlens, old_logprobs=batch.old_logprobs, preset=self.preset,
            sft_coef=self.sft_coef * sft * update.scale("demo_sft"),
            rl_coef=self.rl_coef * rl * update.scale("rollout_positive"),
            negative_coef=update.scale("rollout_negative"),
            # factors of all tokens are in the coefficients already
            sft_entropy_sign=self.sft_entropy_sign, entropy_scope=self.scope if of_token else "batch",
            batch_entropy=None if of_token else 0.0,
            self_rollout=self.self_rollout, demo_gamma=self.demo_gamma, entropy_coef=self._bonus(update.memory),
            token_weights=rl_weights, sft_weights=sft_weights,
            num_rollout_tokens=update.totals.rollout_tokens, num_demo_tokens=update.totals.demo_tokens,
        )  # fmt: skip

    def _factors(self, update: UpdateInfo) -> tuple[float, float]:
        """s / sft_coef and c / rl_coef, where every token has the same."""
        if self.weights == "fixed":
            return 1.0, 1.0
        if self.weights == "entropy":
            of_sft, of_rl = self._entropies(update)
        else:
            averages = self._averages(update)
            of_sft, of_rl = averages["entropy/ema_sft"], averages["entropy/ema_rl"]
            if self.weights == "trend":
                of_sft, of_rl = of_sft - averages["entropy/slow_sft"], of_rl - averages["entropy/slow_rl"]
        if not (math.isfinite(of_sft) and math.isfinite(of_rl)):
            # the loss is not finite either, and the update is left out
            return 1.0, 1.0
        return math.exp((self.sft_entropy_sign or SRFT_PRESETS[self.preset].sft_entropy_sign) * of_sft), math.exp(of_rl)

    def _entropies(self, update: UpdateInfo) -> tuple[float, float]:
        """Mean entropies of the update that s and c go by, nats."""
        totals, of = update.totals, update.entropies
        rollout, demo = of.get("rollout", of.get("demo", 0.0)), of.get("demo", of.get("rollout", 0.0))
        if self.entropy_source == "both":
            both = (totals.rollout_tokens * rollout + totals.demo_tokens * demo) / max(1, totals.tokens)
            return both, both
        return (
            rollout if self.entropy_source == "rollouts" else demo,
            demo if self.entropy_source == "demos" else rollout,
        )

    def _averages(self, update: UpdateInfo) -> dict[str, float]:
        """Averages over updates up to this one, by the names under which they are logged and remembered."""
        if self.weights not in ("ema", "trend"):
            return {}
        decays = {"ema": self.entropy_decay} | ({"slow": self.slow_entropy_decay} if self.weights == "trend" else {})
        averages = {}
        for weight, now in zip(("sft", "rl"), self._entropies(update), strict=True):
            for speed, decay in decays.items():
                name = f"entropy/{speed}_{weight}"
                averages[name] = decay * update.memory.get(name, now) + (1 - decay) * now
        return averages

    def _bonus(self, memory: Mapping[str, float]) -> float:
        """The coefficient of the entropy bonus."""
        coef = SRFT_PRESETS[self.preset].entropy_coef if self.entropy_coef is None else self.entropy_coef
        return memory.get("entropy_coef", coef)

    def note(self, row: Mapping[str, float], now: StepInfo) -> None:
        """Remember the averages of the entropy, and move the coefficient of its bonus."""
        names = ("entropy/ema_sft", "entropy/ema_rl", "entropy/slow_sft", "entropy/slow_rl")
        now.memory.update({name: row[name] for name in names if math.isfinite(row.get(name, math.nan))})
        entropy = row.get("entropy/rollout", math.nan)
        if self.target_entropy is not None and math.isfinite(entropy):
            start = self._bonus({})
            moved = self._bonus(now.memory) * math.exp(self.target_rate * (self.target_entropy - entropy))
            now.memory["entropy_coef"] = min(max(moved, start / _MOST), start * _MOST)

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Mean weights of the two likelihoods, and what they come from where that is no entropy of this step."""
        demos, rollouts = update.totals.demo_tokens, update.totals.rollout_tokens
        figures = {
            "weight/sft": Figure(terms["sum_weight_sft"] / max(1, demos), weight=demos),
            "weight/rl": Figure(terms["sum_weight_rl"] / max(1, rollouts), weight=rollouts),
        }
        if self.target_entropy is not None:
            figures["weight/entropy_bonus"] = Figure(self._bonus(update.memory))
        return figures | {name: Figure(value) for name, value in self._averages(update).items()}
