"""Prefix-RFT (arXiv 2507.01679): of a prompt's rollouts one goes on from the beginning of a demonstration.

The N - 1 others are compared with each other. The one that was begun, of reward R, teaches twice: its prefix has the
advantage R - mean(R of the others), what it adds has the advantage R, as the authors' code has it where a prefix has a
single continuation. All tokens then have the clipped term of PPO, prefixes too, whose ratio is to the policy before the
step; for a negative advantage no ratio counts for more than 3. Of a prefix only the tokens with the highest entropy are
learned.

The prefix has floor(l n) of a demonstration's n tokens, at least one and never the last, with l ~ U(low, high); low
falls along a cosine. Bounds, shares and schedules are settings of scripts that are not public. Here:

- high 0.95, and low from 0.95 to 0.05 over the run, so that it begins with nearly whole demonstrations and in the end
  meets beginnings of nearly every length;
- a fifth of a prefix's tokens is learned, the share of those that arXiv 2506.01939 finds to decide a solution;
- the clip is 0.2 on both sides, for prefixes too, for which the code can have another.

Two things differ from the code: it ranks the entropies of a micro-batch's prefixes together, which would depend on the
split, here each prefix is ranked by itself, by entropies before the step. And a second form there gives a single
continuation the advantage 0, which its prefix is then measured by: ``continuation`` "zero" is that of the continuation
alone. Advantages are not divided by the standard deviation, tokens of both kinds have one mean, with an entropy bonus
of 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from statistics import fmean
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from srft.batch import Batch
from srft.methods import (
    Aggregation,
    BaseMethod,
    Curves,
    Figure,
    Kind,
    Line,
    Loss,
    StepInfo,
    UpdateInfo,
    clip_share,
    compared,
    judged,
    token_weights,
)
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Method(BaseMethod):
    """Prefix-RFT: GRPO in which one rollout of a prompt goes on from the beginning of a demonstration."""

    needs_paired_demos: ClassVar[bool] = True
    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 3
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "prefix": "rl"}
    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="unaided", title="Reward", caption="Of all rollouts, and of those that nothing was shown.",
            lines=(Line(key="reward/mean", label="all", color="grey"),
                   Line(key="reward/unaided", label="unaided", color="blue")),
            ylabel="mean reward",
        ),
        Curves(
            name="prefixes", title="Prefixes", caption="Tokens of a demonstration in a rollout, on average over all.",
            lines=(Line(key="length/prefix", label="", color="vermillion"),), ylabel="tokens",
        ),
    )  # fmt: skip

    high: float = Field(0.95, gt=0, le=1)
    """Largest share of a demonstration with which a rollout begins."""
    low_first: float = Field(0.95, ge=0, le=1)
    """Smallest share, at the first step."""
    low_last: float = Field(0.05, ge=0, le=1)
    """Smallest share, from the end of the decay on."""
    decay_share: float = Field(1.0, gt=0, le=1)
    """Share of train.steps over which it falls, along a cosine."""
    prefix_top: float = Field(0.2, gt=0, le=1)
    """Share of a prefix's tokens that are learned, those with the highest entropy, rounded up."""
    continuation: Literal["reward", "zero"] = "reward"
    """Advantage of what follows a prefix."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: float = Field(3.0, gt=1)
    """Largest ratio that counts for a negative advantage."""
    advantage_std: bool = False
    """Divide the advantages of the rollouts that nothing was shown by their standard deviation."""
    aggregation: Aggregation = "token-mean"
    """Of all tokens together: mean over tokens, mean over sequences of token means, mean over sequences of token sums
    divided by rollout.max_new_tokens, or sum over tokens divided by it. A prefix is a sequence by itself."""
    entropy_coef: float = Field(0.001, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens."""

    @property
    def needs_old(self) -> bool:
        """The entropies of a prefix decide what of it is learned."""
        return True

    @property
    def trains_demos(self) -> bool:
        """Their beginnings alone are learned, as parts of rollouts."""
        return False

    def asks(self, now: StepInfo) -> tuple[bool, bool]:
        """Of demonstrations, their beginnings alone."""
        return True, False

    def low(self, now: StepInfo) -> float:
        """Return the smallest share of a demonstration with which a rollout begins.

        Args:
            now: The step; the schedule counts those before it.
        """
        done = min(1.0, (now.step - 1) / (self.decay_share * now.steps))
        return self.low_last + (self.low_first - self.low_last) * (1 + math.cos(math.pi * done)) / 2

    def prefixes(self, demo_ids: Sequence[int], rollouts: int, now: StepInfo, rng: Random) -> list[int]:
        """One prefix, for the last rollout; none where a demonstration has but one token."""
        share = rng.uniform(min(self.low(now), self.high), self.high)
        return [0] * (rollouts - 1) + [min(max(1, math.floor(share * len(demo_ids))), len(demo_ids) - 1)]

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts that nothing was shown with each other, and a prefix with their mean."""
        members = compared([r for r in group.rollouts if not r.prefix_tokens], self.advantage_std)
        if not members:
            return []
        begun, mean = judged([r for r in group.rollouts if r.prefix_tokens]), fmean(r.reward for r in members)
        for response in begun:
            response.prefix_advantage = response.reward - mean
            response.advantage = response.reward if self.continuation == "reward" else 0.0
        return members + begun

    def has_gradient(self, response: Response) -> bool:
        """Where it or its prefix has an advantage, or there is an entropy bonus."""
        return bool(response.advantage or response.prefix_advantage) or self.entropy_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A clipped stream on all tokens but those of a prefix that the policy is sure of."""
        tokens = max(1, update.totals.tokens)
        weights = token_weights(batch, update, self.aggregation, together=True, importance=True) / tokens
        of_kind = torch.where(batch.is_demo, update.scale("prefix"), update.scale("policy"))
        return partial(
            linear_token_loss, advantages=batch.advantages, old_logprobs=batch.old_logprobs,
            policy_weights=weights * of_kind * self._learned(batch),
            entropy_weights=torch.full_like(weights, self.entropy_coef / tokens) if self.entropy_coef else None,
            clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip,
        )  # fmt: skip

    def _learned(self, batch: Batch) -> Tensor:
        """[N] bool: all but the tokens of a prefix that are not among its most uncertain."""
        learned = torch.ones_like(batch.is_demo)
        for response, place in batch.responses():
            if n := response.prefix_tokens:
                assert batch.old_entropy is not None
                least = batch.old_entropy[place][:n].topk(n - math.ceil(self.prefix_top * n), largest=False).indices
                learned[place.start + least] = False
        return learned

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of tokens whose ratio was clipped, those of prefixes among them."""
        return {"clip/share": clip_share(terms, update, update.totals.tokens)}
