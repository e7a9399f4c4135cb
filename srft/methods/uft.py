"""UFT (arXiv 2505.16984): RL on rollouts that go on from a hint, the beginning of a demonstration, which grows shorter.

All rollouts of a prompt begin with the same hint and are compared with each other. On what they add, GRPO; on the hint,
hint_coef times its cross-entropy::

    loss = GRPO(continuation) + hint_coef * mean_hint(-log p) - entropy_coef * mean_continuation(H)

A demonstration is cut into at most ``segments`` parts of equal length, of which the hint has k ~ Binomial(segments, q),
with q = q_low + (q_high - q_low) (1 + cos(pi t / T)) / 2 at step t, and none after T steps, which are ``hint_share`` of
the run. Values are those of the authors' script: 5 segments, q from 0.95 to 0.05, T = 300 of 500 steps, both
coefficients 0.001, advantages divided by the standard deviation, ratios clipped at 0.2, 4 rollouts a prompt; beside it
a KL of 0.001 to the model at the start, ``kl_coef``. All averages are over tokens.

Their segments are steps of a solution, which their data names; here, where a demonstration is any text, they are of
tokens. Whether the last segment, and with it the answer, may be shown depends there on the data: here all but the end
token may. Their averages are over a micro-batch, here they are over the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
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
    StepInfo,
    UpdateInfo,
    clip_share,
    compared,
    token_weights,
)
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Method(BaseMethod):
    """UFT: GRPO from a hint that grows shorter, and some likelihood of the hint."""

    needs_paired_demos: ClassVar[bool] = True
    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "sft": "sft"}
    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="hints", title="Hints", caption="Tokens of a demonstration with which rollouts begin, on average.",
            lines=(Line(key="length/prefix", label="", color="vermillion"),), ylabel="tokens",
        ),
        Curves(
            name="loss_components", title="Loss components", caption="The terms as they are added up.",
            lines=(Line(key="loss/policy", label="continuations", color="blue"),
                   Line(key="loss/sft", label="hints", color="vermillion")),
            ylabel="contribution to the loss", signed=True,
        ),
    )  # fmt: skip

    hint_coef: float = Field(0.001, ge=0)
    """Coefficient of the cross-entropy of hints."""
    hint_share: float = Field(0.6, ge=0, le=1)
    """Share of train.steps in which there are hints, rounded down."""
    q_high: float = Field(0.95, ge=0, le=1)
    """Probability of a segment to be shown, at the beginning."""
    q_low: float = Field(0.05, ge=0, le=1)
    """The same at the end of the steps with hints."""
    segments: int = Field(5, gt=0)
    """Parts of a demonstration; one of fewer tokens has as many parts as tokens."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio of rollouts is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio of rollouts is clipped above 1 + clip_high."""
    advantage_std: bool = True
    """Divide advantages by the standard deviation of the prompt's rollouts."""
    aggregation: Aggregation = "token-mean"
    """Of continuations: mean over tokens, mean over sequences of token means, mean over sequences of token sums divided
    by rollout.max_new_tokens, or sum over tokens divided by it."""
    entropy_coef: float = Field(0.001, ge=0)
    """Coefficient of the entropy bonus, a mean over tokens of continuations."""
    kl_coef: float = Field(0.0, ge=0)
    """Coefficient of the KL to the reference model on continuations, the estimate k3, weighted as the policy term. The
    authors' script has 0.001; 0 spares a frozen model in memory."""

    @property
    def needs_ref(self) -> bool:
        """For the KL."""
        return self.kl_coef > 0

    @property
    def trains_demos(self) -> bool:
        """Their beginnings alone are learned, as parts of rollouts."""
        return False

    def asks(self, now: StepInfo) -> tuple[bool, bool]:
        """Of demonstrations, their beginnings alone."""
        return True, False

    def chance(self, now: StepInfo) -> float:
        """Return q, the probability of a segment to be shown.

        Args:
            now: The step.
        """
        most = math.floor(self.hint_share * now.steps)
        if now.step > most:
            return 0.0
        return self.q_low + (self.q_high - self.q_low) * (1 + math.cos(math.pi * now.step / most)) / 2

    def prefixes(self, demo_ids: Sequence[int], rollouts: int, now: StepInfo, rng: Random) -> list[int]:
        """One hint for all rollouts of the prompt."""
        tokens = len(demo_ids) - 1
        segments = min(self.segments, tokens)
        shown = sum(rng.random() < self.chance(now) for _ in range(segments))
        return [round(shown * tokens / segments) if segments else 0] * rollouts

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts with each other."""
        return compared(group.rollouts, self.advantage_std)

    def has_gradient(self, response: Response) -> bool:
        """Where it has a hint or an advantage, or the entropy bonus or the KL are on."""
        return response.prefix_tokens > 0 or bool(response.advantage) or self.entropy_coef > 0 or self.kl_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A policy stream on continuations, a likelihood stream on hints."""
        totals = update.totals
        rl_weights = token_weights(batch, update, self.aggregation, importance=True) / max(1, totals.rollout_tokens)
        rl_weights = torch.where(batch.is_demo, 0.0, rl_weights)
        of_hint = self.hint_coef * update.scale("sft") / max(1, totals.demo_tokens)
        bonus = self.entropy_coef / max(1, totals.rollout_tokens)
        return partial(
            linear_token_loss, advantages=batch.advantages, old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs, policy_weights=rl_weights * update.scale("policy"),
            kl_weights=rl_weights * self.kl_coef * update.scale("policy") if self.kl_coef else None,
            sft_weights=torch.where(batch.is_demo, of_hint, torch.zeros_like(rl_weights)),
            entropy_weights=torch.where(batch.is_demo, 0.0, torch.full_like(rl_weights, bonus)) if bonus else None,
            clip_low=self.clip_low, clip_high=self.clip_high,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of tokens of continuations whose ratio was clipped."""
        return {"clip/share": clip_share(terms, update)}
