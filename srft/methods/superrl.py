"""SuperRL (arXiv 2506.01096): reinforcement learning where a prompt's rollouts earn anything, SFT where none does.

With c = 1 where the largest reward of a prompt's rollouts is above 0, else 0, the loss of the prompt is c L_PG +
(1 - c) L_SFT, and that of the update the mean over its prompts. L_PG is GRPO's and L_SFT the cross-entropy, each a mean
over the prompt's responses of token means: how the authors reduce them is not known to us, and this way every prompt
counts once. The paper also has a gate on the largest advantage, which sends prompts without a contrast to SFT, those
that are solved too, and a soft one, exp(-2 s1) L_PG + exp(-2 s2) L_SFT + s1 + s2 with learned s1 and s2, which is not
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from srft.batch import Batch
from srft.curves import DEMO_SHARE, RL_AND_SFT
from srft.methods import (
    BaseMethod,
    Curves,
    Figure,
    Kind,
    Loss,
    UpdateInfo,
    clip_share,
    compared,
    demo_share,
    judged,
    sft_and_rl,
    token_weights,
)
from srft.responses import Group, Response


class Method(BaseMethod):
    """SuperRL: GRPO on prompts whose rollouts earn a reward, SFT on the demonstrations of the others."""

    needs_paired_demos: ClassVar[bool] = True
    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "sft": "sft"}
    curves: ClassVar[tuple[Curves, ...]] = (RL_AND_SFT, DEMO_SHARE)

    gate: Literal["reward", "advantage"] = "reward"
    """What must be above 0 for some rollout of a prompt, or its demonstrations are learned from."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio of rollouts is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio of rollouts is clipped above 1 + clip_high."""
    advantage_std: bool = True
    """Divide advantages by the standard deviation of the prompt's rollouts."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """The rollouts, compared with each other, or the demonstrations, whatever their reward."""
        rollouts = compared(group.rollouts, self.advantage_std)
        if any((s.reward if self.gate == "reward" else s.advantage) > 0 for s in rollouts):
            return rollouts
        return judged(group.demos)

    def has_gradient(self, response: Response) -> bool:
        """Of demonstrations, of rollouts with an advantage, and of all with an entropy bonus."""
        return response.is_demo or bool(response.advantage) or self.entropy_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A clipped stream on rollouts, a likelihood stream on demonstrations, each by its prompts' share."""
        totals, share = update.totals, demo_share(update)
        weights = token_weights(batch, update, "sequence-mean", importance=True)
        rl_weights = weights * (1 - share) / max(1, totals.rollout_tokens)
        sft_weights = weights * share / max(1, totals.demo_tokens)
        return sft_and_rl(
            batch, update, rl_weights=rl_weights, sft_weights=sft_weights, entropy_coef=self.entropy_coef,
            clip_low=self.clip_low, clip_high=self.clip_high,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of prompts that teach by demonstrations, and share of rollout tokens whose ratio was clipped."""
        return {"weight/demo_share": Figure(demo_share(update)), "clip/share": clip_share(terms, update)}
