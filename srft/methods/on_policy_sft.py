"""On-policy SFT (arXiv 2602.13407): cross-entropy of the policy's own right answers.

Of the rollouts of a prompt those are kept that the verifier accepts and that ended before the limit, the others are
dropped: no advantage, no ratio, no KL. A mean over all tokens that are kept, so that prompts with many right answers
count more. The authors draw 32 rollouts of a prompt and allow 3,500 tokens.
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
    """On-policy SFT: cross-entropy of right rollouts that fit, without a demonstration."""

    needs_demos: ClassVar[bool] = False
    takes_lag: ClassVar[bool] = True
    terms: ClassVar[Mapping[str, Kind]] = {"sft": "sft"}

    aggregation: Aggregation = "token-mean"
    """Of what is kept: mean over all tokens, mean over sequences of token means, mean over sequences of token sums
    divided by rollout.max_new_tokens, or sum over all tokens divided by rollout.max_new_tokens."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus, a mean over the tokens that are kept."""

    def learn_from(self, group: Group) -> list[Response]:
        """Keep what is right and whole."""
        return [s for s in judged(group.rollouts) if s.is_correct and not s.truncated]

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A likelihood stream on what was kept."""
        tokens = max(1, update.totals.rollout_tokens)
        weights = token_weights(batch, update, self.aggregation, importance=True) / tokens
        return partial(
            linear_token_loss, sft_weights=weights * update.scale("sft"),
            entropy_weights=torch.full_like(weights, self.entropy_coef / tokens) if self.entropy_coef else None,
        )  # fmt: skip
