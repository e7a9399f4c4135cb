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
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from srft.batch import Batch, Group, Response
from srft.methods import Aggregation, BaseMethod, Curves, Figure, Kind, Line, Loss, UpdateInfo, compared, token_weights
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
            caption="What entropy makes of them: mean over demonstration and rollout tokens.",
            lines=(Line(key="weight/sft", label="SFT weight", color="vermillion"),
                   Line(key="weight/rl", label="RL weight", color="blue")),
            ylabel="mean weight of a token",
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

    terms: ClassVar[Mapping[str, Kind]] = {
        "demo_sft": "sft", "demo_rl": "rl", "rollout_positive": "rl", "rollout_negative": "rl",
    }  # fmt: skip

    preset: Literal["paper", "official", "upt"] = "paper"
    """As in the paper, as in its authors' code, or as in the independent reproduction."""
    sft_coef: float = Field(0.5, ge=0)
    """Factor of the demonstration log-likelihood weight."""
    rl_coef: float = Field(0.1, ge=0)
    """Factor of the weight of correct rollouts."""
    sft_entropy_sign: Literal[-1, 1] | None = None
    """Sign of the entropy in the demonstration weight."""
    entropy_scope: Literal["token", "sequence", "batch"] | None = None
    """What the entropy in the weights is a mean over."""
    self_rollout: Literal["likelihood", "ratio"] | None = None
    """Form of the term on the policy's own rollouts."""
    demo_gamma: float | None = Field(None, ge=0)
    """γ of the shaping p/(p+γ) on demonstrations; 0 uses p itself."""
    entropy_coef: float | None = Field(None, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""
    advantage_std: bool | None = None
    """Divide advantages by the group's standard deviation."""
    sft_aggregation: Aggregation | None = None
    """Of the demonstrations' log-likelihood: mean over all tokens, mean over sequences of token means, mean over
    sequences of token sums divided by rollout.max_new_tokens, or sum over all tokens divided by it."""
    rl_aggregation: Aggregation | None = None
    """The same for the terms with an advantage or a correctness, of rollouts and of demonstrations apart."""

    @property
    def scope(self) -> str:
        """What the entropy in the weights is a mean over, the preset's choice where none is set."""
        return self.entropy_scope or SRFT_PRESETS[self.preset].entropy_scope

    @property
    def needs_entropy(self) -> bool:
        """With the "batch" scope, weights use the mean over all micro-batches."""
        return self.scope == "batch"

    def learn_from(self, group: Group) -> list[Response]:
        """Compare rollouts and demonstrations with each other."""
        preset = _PRESETS[self.preset]
        divide = preset.advantage_std if self.advantage_std is None else self.advantage_std
        return compared(group.rollouts + group.demos, divide)

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """The fused SRFT loss."""
        preset = _PRESETS[self.preset]
        sft_weights = token_weights(batch, update, self.sft_aggregation or preset.sft_aggregation)
        rl_weights = token_weights(batch, update, self.rl_aggregation or preset.rl_aggregation)
        is_ratio = (self.self_rollout or SRFT_PRESETS[self.preset].self_rollout) == "ratio"
        negative = update.scale("rollout_negative")
        # a token weight of 0 would take the token out of the means of the entropy, too
        is_wrong = ~batch.is_demo & ~batch.is_correct & (not is_ratio)
        rl_weights = torch.where(is_wrong, rl_weights * max(negative, 1e-20), rl_weights)
        of_rollout = torch.where(batch.advantages < 0, negative if is_ratio else 1.0, 1.0)
        advantages = batch.advantages * torch.where(batch.is_demo, update.scale("demo_rl"), of_rollout)
        return partial(
            linear_srft_loss, advantages=advantages, is_demo=batch.is_demo, is_correct=batch.is_correct,
            cu_seqlens=batch.loss_cu_seqlens, old_logprobs=batch.old_logprobs, preset=self.preset,
            sft_coef=self.sft_coef, rl_coef=self.rl_coef * update.scale("rollout_positive"),
            sft_entropy_sign=self.sft_entropy_sign, entropy_scope=self.entropy_scope, batch_entropy=update.entropy,
            self_rollout=self.self_rollout, demo_gamma=self.demo_gamma, entropy_coef=self.entropy_coef,
            token_weights=rl_weights, sft_weights=sft_weights * update.scale("demo_sft"),
            num_rollout_tokens=update.totals.rollout_tokens, num_demo_tokens=update.totals.demo_tokens,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Mean weights of the two likelihoods."""
        demos, rollouts = update.totals.demo_tokens, update.totals.rollout_tokens
        return {
            "weight/sft": Figure(terms["sum_weight_sft"] / max(1, demos), weight=demos),
            "weight/rl": Figure(terms["sum_weight_rl"] / max(1, rollouts), weight=rollouts),
        }
