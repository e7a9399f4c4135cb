"""DFT (arXiv 2508.05629): SFT whose token losses are weighted by the token's own probability.

The loss of a demonstration token is -sg(p) log p: the gradient of SFT is a policy gradient with a weight of 1 / p,
which the factor takes away. A mean over tokens, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from srft.batch import Batch
from srft.methods import Aggregation, BaseMethod, Kind, Loss, UpdateInfo, judged, token_weights
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Method(BaseMethod):
    """DFT: cross-entropy of the demonstrations, each token weighted by its probability."""

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
        """A likelihood stream with the factor p."""
        tokens = max(1, update.totals.demo_tokens)
        weights = token_weights(batch, update, self.aggregation) / tokens
        return partial(
            linear_token_loss, sft_weights=weights * update.scale("sft"), sft_prob_factor="p",
            entropy_weights=torch.full_like(weights, self.entropy_coef / tokens) if self.entropy_coef else None,
        )  # fmt: skip
