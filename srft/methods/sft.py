"""SFT: the likelihood of demonstrations; on request held to a reference model.

SFT_KL is a baseline of the SRFT paper (arXiv 2506.19767), which gives lambda = 0.2 for the KL between policy and base
model. Direction and estimator are not stated. Here it is ``kl_coef`` times k3 of the demonstrations' own tokens,
exp(ref - logp) - (ref - logp) - 1: 0 where the two models agree and positive elsewhere, but no unbiased estimate of the
KL in either direction, since neither model has sampled these tokens.
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
    kl_coef: float = Field(0.0, ge=0)
    """Coefficient of the penalty k3 towards the reference model, weighted as the likelihood; 0.2 is SFT_KL."""

    @property
    def needs_ref(self) -> bool:
        """For the KL."""
        return self.kl_coef > 0

    def learn_from(self, group: Group) -> list[Response]:
        """Learn from the demonstrations, whatever their reward."""
        return judged(group.demos)

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """Cross-entropy as REINFORCE with advantage 1, which also returns log-probabilities and entropy."""
        return partial(
            linear_grpo_loss, advantages=torch.ones_like(batch.advantages), loss_type="reinforce",
            entropy_coef=self.entropy_coef, ref_logprobs=batch.ref_logprobs, kl_coef=self.kl_coef,
            token_weights=token_weights(batch, update, self.aggregation) * update.scale("sft"),
            num_tokens=update.totals.demo_tokens,
        )  # fmt: skip
