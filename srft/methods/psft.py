"""PSFT (arXiv 2508.17784): SFT in a trust region, the clipped objective of PPO on demonstrations with A = 1.

The loss of a token is -min(r, 1 + clip_high) with r = p / p_old, p_old being the policy before the step's updates: a
token that these have made 1.28 times as likely has no gradient any more. A mean over tokens, and an upper bound of
0.28, as in the authors' script; its lower bound of 0.2 and its dual clip of 10 say nothing where no advantage is
negative. Its steps have eight updates (``train.updates_per_step``): in a step of one r is 1, and the gradient SFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from srft.batch import Batch
from srft.methods import Aggregation, BaseMethod, Figure, Kind, Loss, UpdateInfo, clip_share, judged, token_weights
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Method(BaseMethod):
    """PSFT: demonstrations as rollouts with advantage 1, whose ratio to the policy before the step is clipped."""

    needs_rollouts: ClassVar[bool] = False
    terms: ClassVar[Mapping[str, Kind]] = {"sft": "sft"}

    clip_high: float = Field(0.28, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    aggregation: Aggregation = "token-mean"
    """Mean over all tokens, mean over sequences of token means, mean over sequences of token sums divided by
    rollout.max_new_tokens, or sum over all tokens divided by rollout.max_new_tokens."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """Learn from the demonstrations, whatever their reward."""
        return judged(group.demos)

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A clipped stream with an advantage of 1."""
        tokens = max(1, update.totals.demo_tokens)
        weights = token_weights(batch, update, self.aggregation) / tokens
        return partial(
            linear_token_loss, advantages=torch.ones_like(weights), old_logprobs=batch.old_logprobs,
            policy_weights=weights * update.scale("sft"), clip_high=self.clip_high,
            entropy_weights=torch.full_like(weights, self.entropy_coef / tokens) if self.entropy_coef else None,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of demonstration tokens whose ratio was clipped."""
        return {"clip/share": clip_share(terms, update, update.totals.demo_tokens)}
