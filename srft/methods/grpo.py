"""GRPO and its kin: the policy's own rollouts, each compared with those of the same prompt.

``prob_clip`` is the test of SRFT's paper (A.2) whether RL needs the gradients of tokens that are likely anyway: with
0.5, 0.8 and 0.9 its accuracy is much as without. How it is done is not in the paper; leaving such tokens out is what
LUFFY's code, of which SRFT's is a fork, calls all_max_clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from srft.batch import Batch
from srft.methods import Aggregation, BaseMethod, Figure, Kind, Loss, UpdateInfo, clip_share, compared, token_weights
from srft.responses import Group, Response
from srft_kernels import linear_grpo_loss


class Method(BaseMethod):
    """GRPO: a clipped policy gradient on rollouts, without a demonstration."""

    needs_demos: ClassVar[bool] = False
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl"}
    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2

    loss_type: Literal["grpo", "gspo", "cispo", "reinforce"] = "grpo"
    """The token term; bnpo, dr_grpo and dapo are this one with another aggregation, std and clip range."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    prob_clip: float | None = Field(None, gt=0, lt=1)
    """Tokens that were more likely than this when they were sampled are left out of the policy term, whose denominators
    stay; unset: none. The probability is that before the step's updates where it is known, else the engine's."""
    advantage_std: bool = True
    """Divide advantages by the group's standard deviation."""
    aggregation: Aggregation = "token-mean"
    """Mean over all tokens, mean over sequences of token means, mean over sequences of token sums divided by
    rollout.max_new_tokens, or sum over all tokens divided by rollout.max_new_tokens."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus, weighted as the policy term."""
    kl_coef: float = Field(0.0, ge=0)
    """Coefficient of the KL to the reference model, the estimate k3, weighted as the policy term; the paper of GRPO has
    0.04, most recipes since have none."""

    @property
    def needs_ref(self) -> bool:
        """For the KL."""
        return self.kl_coef > 0

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts with each other."""
        return compared(group.rollouts, self.advantage_std)

    def has_gradient(self, response: Response) -> bool:
        """Where it has an advantage, or the entropy bonus or the KL are on."""
        return bool(response.advantage) or self.entropy_coef > 0 or self.kl_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """The fused loss of this ``loss_type``."""
        advantages = batch.advantages
        if self.prob_clip is not None:
            sampled_at = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
            advantages = torch.where(sampled_at > math.log(self.prob_clip), 0.0, advantages)
        return partial(
            linear_grpo_loss, advantages=advantages, old_logprobs=batch.old_logprobs,
            loss_type=self.loss_type, clip_low=self.clip_low, clip_high=self.clip_high,
            rollout_weights=batch.importance, entropy_coef=self.entropy_coef, cu_seqlens=batch.loss_cu_seqlens,
            ref_logprobs=batch.ref_logprobs, kl_coef=self.kl_coef,
            token_weights=token_weights(batch, update, self.aggregation) * update.scale("policy"),
            num_tokens=update.totals.rollout_tokens,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of tokens whose ratio was clipped."""
        return {"clip/share": clip_share(terms, update)}
