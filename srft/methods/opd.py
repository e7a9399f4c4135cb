"""On-policy distillation: on the policy's own rollouts, a teacher says of every token how much it likes it.

    A_n = sg[ log pi_T(y_n) - log pi_theta(y_n) ],    loss = mean over rollout tokens of -A_n log pi_theta(y_n)

which is the gradient of the reverse KL(pi_theta || pi_T) token by token, by its estimate k1, without what a token does
to those after it: the form of Thinking Machines' text "On-Policy Distillation" (2025) and of the trainers since. GKD
(arXiv 2306.13649) has whole distributions, of which nothing but the sampled token is known here. pi_theta is the policy
before the step's updates as the trainer computes it, not the engine's number. Both are at rollout.temperature.

Beside it is what SRFT (arXiv 2506.19767) learns from, each with a factor: the reward of a rollout, whose advantage is
added to that of each of its tokens; the log-likelihood of demonstrations with SRFT's weight exp(-+H); and their
advantage times p. We know of no source that mixes the last two with a teacher, so that their factors are 0 unless set.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

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
    judged,
    token_weights,
)
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Distillation(BaseMethod):
    """A teacher's say on rollouts, with SRFT's terms beside it: all but who the teacher is."""

    takes_lag: ClassVar[bool] = True
    terms: ClassVar[Mapping[str, Kind]] = {"teacher": "rl", "rewards": "rl", "sft": "sft", "demo_rl": "rl"}
    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="teacher", title="Distance from the teacher",
            caption="Mean of log p - log p of the teacher over rollout tokens, an estimate of the KL.",
            lines=(Line(key="kl/teacher", label="", color="blue"),), ylabel="nats per token", signed=True,
        ),
    )  # fmt: skip

    teacher_coef: float = Field(1.0, ge=0)
    """Factor of the teacher's advantage."""
    bound: float = Field(20.0, gt=0)
    """Largest |log pi_T - log pi_theta| of a token, in nats; it keeps a token that the teacher excludes from drowning
    all others."""
    policy: Literal["reinforce", "clip"] = "reinforce"
    """The token term: -A log p, or the clipped ratio, which differs once a step has several updates."""
    clip_low: float = Field(0.2, gt=0)
    """clip: the ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """clip: the ratio is clipped above 1 + clip_high."""
    rl_coef: float | None = Field(None, ge=0)
    """Factor of the advantage that a rollout's reward has over those of its prompt. Unset: 0, rewards are only logged,
    but 1 in opd without a teacher, where nothing else is to be learned."""
    advantage_std: bool = True
    """Divide advantages of rewards by the standard deviation."""
    aggregation: Aggregation = "token-mean"
    """Of rollouts: mean over tokens, mean over sequences of token means, mean over sequences of token sums divided by
    rollout.max_new_tokens, or sum over tokens divided by it."""
    sft_coef: float = Field(0.0, ge=0)
    """Factor of the demonstrations' log-likelihood; 0.5 in SRFT."""
    sft_entropy_sign: Literal[-1, 0, 1] = -1
    """Sign of the entropy in the weight of that term, a mean over the demonstration, as in SRFT's paper; 0: plain."""
    demo_rl_coef: float = Field(0.0, ge=0)
    """Factor of the demonstrations' own advantage, times p, as in SRFT; above 0 demonstrations join the comparison."""
    demo_aggregation: Aggregation = "token-mean"
    """As ``aggregation``, of both terms of demonstrations."""

    @property
    def trains_demos(self) -> bool:
        """For the terms of demonstrations."""
        return self.sft_coef > 0 or self.demo_rl_coef > 0

    @property
    def needs_demos(self) -> bool:  # type: ignore[override]
        """For the same."""
        return self.trains_demos

    @property
    def fewest_rollouts(self) -> int:  # type: ignore[override]
        """Rewards are compared with each other; a teacher needs no comparison."""
        return 2 if self.rewards > 0 and not self.demo_rl_coef else 1

    @property
    def rewards(self) -> float:
        """The factor of rewards in use."""
        return self.rl_coef or 0.0

    @property
    def needs_old(self) -> bool:
        """log pi_theta, of which the advantage is made."""
        return True

    def learn_from(self, group: Group) -> list[Response]:
        """Compare rewards where they count; where not, a rollout need not be judged to be learned from."""
        if self.demo_rl_coef:
            return compared(group.rollouts + group.demos, self.advantage_std)
        rollouts = compared(group.rollouts, self.advantage_std) if self.rewards else group.rollouts
        return rollouts + (judged(group.demos) if self.sft_coef else [])

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A policy stream on rollouts, a likelihood and a shaped stream on demonstrations."""
        assert batch.teacher_logprobs is not None and batch.old_logprobs is not None
        totals, is_demo = update.totals, batch.is_demo
        liking = (batch.teacher_logprobs - batch.old_logprobs).clamp(-self.bound, self.bound)
        rewards = self.rewards * update.scale("rewards") * batch.advantages
        advantages = self.teacher_coef * update.scale("teacher") * liking + rewards
        weights = token_weights(batch, update, self.aggregation, importance=True) / max(1, totals.rollout_tokens)
        of_demos = token_weights(batch, update, self.demo_aggregation) / max(1, totals.demo_tokens)
        sft_weights = torch.where(is_demo, of_demos * self.sft_coef * update.scale("sft"), 0.0)
        shaped_weights = torch.where(is_demo, of_demos * self.demo_rl_coef * update.scale("demo_rl"), 0.0)
        return partial(
            linear_token_loss, advantages=torch.where(is_demo, batch.advantages, advantages),
            old_logprobs=batch.old_logprobs, policy=self.policy,
            policy_weights=torch.where(is_demo, 0.0, weights), clip_low=self.clip_low, clip_high=self.clip_high,
            sft_weights=sft_weights if self.sft_coef else None,
            shaped_weights=shaped_weights if self.demo_rl_coef else None,
            sft_entropy_coefs=torch.full_like(weights, self.sft_entropy_sign) if self.sft_coef else None,
            entropy_scope="sequence", cu_seqlens=batch.loss_cu_seqlens,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of rollout tokens whose ratio was clipped."""
        return {"clip/share": clip_share(terms, update)}


class Method(Distillation):
    """OPD: a teacher's log-probabilities of the policy's own tokens are their advantages."""

    teacher: str | None = None
    """Folder or hub id of a causal LM with the policy's tokenizer, held in fp32; unset: the policy as the run
    starts, or model.reference, which hold it back while it learns from rewards."""

    @property
    def rewards(self) -> float:
        """The factor of rewards in use."""
        return 1.0 if self.rl_coef is None and self.teacher is None else super().rewards

    @property
    def taught_by(self) -> str | None:
        """The teacher, or the reference."""
        if self.teacher is None:
            return "reference"
        folder = Path(self.teacher).expanduser()
        return str(folder.resolve()) if folder.is_dir() else self.teacher
