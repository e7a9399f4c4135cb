"""LUFFY (arXiv 2504.14945): off-policy guidance, demonstrations as rollouts of a policy that is not known.

Rollouts and demonstrations of a prompt are one group. A rollout counts -A r; a demonstration -A f(p) with f(p) = p /
(p + gamma), the ratio to a behaviour policy of probability 1, shaped so that unlikely tokens keep a gradient.

The authors' code and their script of the main run decide what the paper leaves open: advantages are not divided by the
standard deviation, the ratio of rollouts is not clipped, tokens are summed and divided by the longest response, and the
coefficient of the entropy bonus is 0.001, where the paper says 0.01. The paper divides by the number of tokens of both
kinds together, which is ``aggregation`` "token-mean"; it clips the ratio, which ``clip_low`` and ``clip_high`` do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from srft.batch import Batch
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
    token_weights,
)
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Method(BaseMethod):
    """LUFFY: demonstrations in the group of the rollouts, with a shaped probability in place of a ratio."""

    needs_paired_demos: ClassVar[bool] = True
    takes_lag: ClassVar[bool] = True
    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="loss_components", title="Loss components", caption="The terms as they are added up.",
            lines=(Line(key="loss/policy", label="rollouts", color="blue"),
                   Line(key="loss/shaped", label="demonstrations", color="vermillion")),
            ylabel="contribution to the loss", signed=True,
        ),
    )  # fmt: skip

    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "shaped": "rl"}

    gamma: float = Field(0.1, ge=0)
    """γ of the shaping p/(p+γ) on demonstrations; 0 uses p itself."""
    clip_low: float | None = Field(None, gt=0)
    """The ratio of rollouts is clipped below 1 - clip_low; unset: it is not."""
    clip_high: float | None = Field(None, gt=0)
    """The ratio of rollouts is clipped above 1 + clip_high; unset: it is not."""
    advantage_std: bool = False
    """Divide advantages by the group's standard deviation."""
    aggregation: Aggregation = "sum"
    """Of all tokens, rollouts and demonstrations together: sum divided by rollout.max_new_tokens, mean over tokens,
    mean over sequences of token means, or mean over sequences of token sums divided by rollout.max_new_tokens."""
    entropy_coef: float = Field(0.001, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """Compare rollouts and demonstrations with each other."""
        return compared(group.rollouts + group.demos, self.advantage_std)

    def has_gradient(self, response: Response) -> bool:
        """Where it has an advantage, or there is an entropy bonus."""
        return bool(response.advantage) or self.entropy_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A policy stream on rollouts, a shaped one on demonstrations."""
        tokens = max(1, update.totals.tokens)
        weights = token_weights(batch, update, self.aggregation, together=True, importance=True) / tokens
        return partial(
            linear_token_loss, advantages=batch.advantages, old_logprobs=batch.old_logprobs,
            policy_weights=torch.where(batch.is_demo, 0.0, weights * update.scale("policy")),
            shaped_weights=torch.where(batch.is_demo, weights * update.scale("shaped"), 0.0),
            shaping_gamma=self.gamma or None,
            entropy_weights=torch.full_like(weights, self.entropy_coef / tokens) if self.entropy_coef else None,
            clip_low=math.inf if self.clip_low is None else self.clip_low,
            clip_high=math.inf if self.clip_high is None else self.clip_high,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of rollout tokens whose ratio was clipped."""
        return {"clip/share": clip_share(terms, update)}
