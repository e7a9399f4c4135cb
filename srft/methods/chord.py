"""CHORD (arXiv 2508.11408): (1 - mu) L_GRPO + mu L_SFT, with control of SFT as a whole and by token.

- CHORD-mu: mu falls along a cosine from 0.9 to 0.05 over 200 steps, after a linear warm-up if one is set; SFT is plain.
- CHORD-phi: mu stays at 0.1; each demonstration token counts p (1 - p), without a gradient, so that those the policy is
  sure of, either way, count little.

GRPO compares rollouts alone. Values and schedule are those of the authors' code, Trinity-RFT, for which both terms are
token means; it takes them by micro-batch, here they are over the update. It standardises advantages, clips at 0.2 on
both sides and has no KL. How many demonstrations join how many rollouts, a fifth there, is up to the options of train.
"""

from __future__ import annotations

import math
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
    Line,
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
    """CHORD: (1 - mu) GRPO on rollouts + mu SFT on demonstrations, by a schedule of mu or by token."""

    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "sft": "sft"}
    curves: ClassVar[tuple[Curves, ...]] = (
        RL_AND_SFT,
        Curves(
            name="mu", title="Share of SFT", caption="What SFT is multiplied by; GRPO has the rest of 1.",
            lines=(Line(key="weight/mu", label="", color="vermillion"),), ylabel="mu",
        ),
    )  # fmt: skip

    phi: bool = False
    """CHORD-phi: a demonstration token counts p (1 - p), and mu is constant where it is not set."""
    mu_peak: float | None = Field(None, ge=0, le=1)
    """Share of SFT at the first step after the warm-up; unset: 0.9, with phi 0.1."""
    mu_valley: float | None = Field(None, ge=0, le=1)
    """Share of SFT from the end of the decay on; unset: 0.05, with phi 0.1."""
    mu_warmup_steps: int = Field(0, ge=0)
    """Steps over which it rises from 0."""
    mu_decay_steps: int = Field(200, ge=0)
    """Steps over which it then falls, along a cosine."""
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

    def share(self, step: int) -> float:
        """Return mu, the share of SFT.

        Args:
            step: From 1; the schedule counts those before it.
        """
        peak, valley = (0.1, 0.1) if self.phi else (0.9, 0.05)
        peak = peak if self.mu_peak is None else self.mu_peak
        valley = valley if self.mu_valley is None else self.mu_valley
        done = step - 1
        if done < self.mu_warmup_steps:
            return peak * done / self.mu_warmup_steps
        done -= self.mu_warmup_steps
        if done >= self.mu_decay_steps:
            return valley
        return valley + (peak - valley) * (1 + math.cos(math.pi * done / self.mu_decay_steps)) / 2

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A clipped stream on rollouts, a likelihood stream on demonstrations."""
        totals, mu = update.totals, self.share(update.step)
        rl_weights = token_weights(batch, update, self.rl_aggregation, importance=True)
        rl_weights = rl_weights * (1 - mu) / max(1, totals.rollout_tokens)
        sft_weights = token_weights(batch, update, self.sft_aggregation) * mu / max(1, totals.demo_tokens)
        return sft_and_rl(
            batch, update, rl_weights=rl_weights, sft_weights=sft_weights, entropy_coef=self.entropy_coef,
            clip_low=self.clip_low, clip_high=self.clip_high, sft_prob_factor="p(1-p)" if self.phi else "one",
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of SFT, and share of rollout tokens whose ratio was clipped."""
        return {"weight/mu": Figure(self.share(update.step)), "clip/share": clip_share(terms, update)}
