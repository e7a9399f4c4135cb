"""RL with an SFT loss: L_GRPO of rollouts + sft_coef L_SFT of demonstrations, the plain sum that others improve on.

It is the single-stage control of the SRFT paper (Fig. 5, "L_SFT + L_RL"), whose GRPO divides advantages by the standard
deviation, and a baseline of LUFFY's (arXiv 2504.14945), with a coefficient of 1. Advantages compare rollouts alone.

With the defaults it is ``grpo`` plus ``sft``, both token means. LUFFY's script has advantage_std=false,
rl_aggregation="sum" and no clip; its SFT term is a token mean of a micro-batch and its RL term a sum over one, so that
their balance there depends on how the batch is split, which no option here repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from srft.batch import Batch
from srft.curves import RL_AND_SFT
from srft.methods import (
    Aggregation,
    BaseMethod,
    Curves,
    Figure,
    Kind,
    Loss,
    UpdateInfo,
    clip_share,
    compared,
    judged,
    sft_and_rl,
    token_weights,
)
from srft.responses import Group, Response


class Method(BaseMethod):
    """RL with an SFT loss: GRPO on rollouts + SFT on demonstrations, as they are."""

    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "sft": "sft"}
    curves: ClassVar[tuple[Curves, ...]] = (RL_AND_SFT,)

    sft_coef: float = Field(1.0, ge=0)
    """Factor of SFT."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio of rollouts is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio of rollouts is clipped above 1 + clip_high."""
    advantage_std: bool = True
    """Divide advantages by the standard deviation of the prompt's rollouts."""
    sft_aggregation: Aggregation = "token-mean"
    """Of demonstrations: mean over tokens, mean over sequences of token means, mean over sequences of token sums
    divided by rollout.max_new_tokens, or sum over tokens divided by it."""
    rl_aggregation: Aggregation = "token-mean"
    """The same of rollouts."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts with each other; demonstrations are learned from whatever their reward."""
        return compared(group.rollouts, self.advantage_std) + judged(group.demos)

    def has_gradient(self, response: Response) -> bool:
        """Of demonstrations, of rollouts with an advantage, and of all with an entropy bonus."""
        return response.is_demo or bool(response.advantage) or self.entropy_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A clipped stream on rollouts, a likelihood stream on demonstrations."""
        totals = update.totals
        rl_weights = token_weights(batch, update, self.rl_aggregation, importance=True) / max(1, totals.rollout_tokens)
        sft_weights = token_weights(batch, update, self.sft_aggregation) * self.sft_coef / max(1, totals.demo_tokens)
        return sft_and_rl(
            batch, update, rl_weights=rl_weights, sft_weights=sft_weights, entropy_coef=self.entropy_coef,
            clip_low=self.clip_low, clip_high=self.clip_high,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of rollout tokens whose ratio was clipped."""
        return {"clip/share": clip_share(terms, update)}
