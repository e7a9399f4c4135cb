"""SFT: the likelihood of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from srft.batch import Batch, Group, Response
from srft.methods import Aggregation, BaseMethod, Kind, Loss, UpdateInfo, judged, token_weights
from srft_kernels import linear_grpo_loss


class Method(BaseMethod):
    """SFT: cross-entropy of the demonstrations, without a rollout."""

    needs_rollouts: ClassVar[bool] = False
    terms: ClassVar[Mapping[str, Kind]] = {"sft": "sft"}

    aggregation: Aggregation = "token-mean"
    """Mean over all tokens, mean over sequences of token means, mean over sequences of token sums divided by
    rollout.max_new_tokens, or sum over all tokens divided by rollout.max_new_tokens."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """Learn from the demonstrations, whatever their reward."""
        return judged(group.demos)

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """Cross-entropy as REINFORCE with advantage 1, which also returns log-probabilities and entropy."""
        return partial(
            linear_grpo_loss, advantages=torch.ones_like(batch.advantages), loss_type="reinforce",
            entropy_coef=self.entropy_coef,
            token_weights=token_weights(batch, update, self.aggregation) * update.scale("sft"),
            num_tokens=update.totals.demo_tokens,
        )  # fmt: skip
