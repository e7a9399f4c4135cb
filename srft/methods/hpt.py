"""HPT (arXiv 2509.04419): a prompt teaches by its demonstration where its rollouts fail, by its rollouts elsewhere.

With P the share of a prompt's rollouts that are right, a prompt with P <= ``gate`` counts sft_coef times the token mean
of -log p over its demonstration, in the place of all its rollouts; any other counts its rollouts' sum over tokens of
-A r, divided by the longest response. The loss is the mean over prompts.

From the authors' code are a gate of 0 (0.25 for Llama), the coefficient of 1 (0.3 for models of 1.5B), advantages
without the standard deviation, no clip, the division by the longest response, and an entropy bonus of 0.001. It takes
the token mean of demonstrations by micro-batch and adds these up, which is a sum over prompts as long as a micro-batch
has one demonstration at most; here it is that sum however the batch is split. It leaves out updates with a gradient
norm above 80, which ``train.grad_clip`` bounds here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

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
    """HPT: SFT on the demonstrations of prompts whose rollouts fail, policy gradient on the rollouts of others."""

    needs_paired_demos: ClassVar[bool] = True
    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "sft": "sft"}
    curves: ClassVar[tuple[Curves, ...]] = (RL_AND_SFT, DEMO_SHARE)

    gate: float = Field(0.0, ge=0, le=1)
    """Largest share of right rollouts with which a prompt teaches by its demonstrations."""
    sft_coef: float = Field(1.0, ge=0)
    """Factor of SFT."""
    clip_low: float | None = Field(None, gt=0)
    """The ratio of rollouts is clipped below 1 - clip_low; unset: it is not."""
    clip_high: float | None = Field(None, gt=0)
    """The ratio of rollouts is clipped above 1 + clip_high; unset: it is not."""
    advantage_std: bool = False
    """Divide advantages by the standard deviation of the prompt's rollouts."""
    entropy_coef: float = Field(0.001, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """The rollouts, compared with each other, or the demonstrations, whatever their reward."""
        rollouts = judged(group.rollouts)
        if sum(s.is_correct for s in rollouts) <= self.gate * len(rollouts):
            return judged(group.demos)
        return compared(rollouts, self.advantage_std)

    def has_gradient(self, response: Response) -> bool:
        """Of demonstrations, of rollouts with an advantage, and of all with an entropy bonus."""
        return response.is_demo or bool(response.advantage) or self.entropy_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A policy stream on rollouts, a likelihood stream on demonstrations, each by its prompts' share."""
        totals, share = update.totals, demo_share(update)
        sft_weights = token_weights(batch, update, "sequence-mean") / max(1, totals.demo_tokens)
        # of a prompt the sum over its rollouts, where "constant" takes their mean
        rl_weights = token_weights(batch, update, "constant", importance=True) / max(1, totals.rollout_tokens)
        rl_weights = rl_weights * update.rollouts_per_prompt * (1 - share)
        return sft_and_rl(
            batch, update, rl_weights=rl_weights, sft_weights=sft_weights * self.sft_coef * share,
            entropy_coef=self.entropy_coef, clip_low=self.clip_low, clip_high=self.clip_high,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of prompts that teach by demonstrations, and share of rollout tokens whose ratio was clipped."""
        return {"weight/demo_share": Figure(demo_share(update)), "clip/share": clip_share(terms, update)}
