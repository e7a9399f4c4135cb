"""ReLIFT (arXiv 2506.07527): RL on rollouts, interleaved with SFT on the prompts that no rollout solved.

A step is one of GRPO: -A r, advantages without division by the standard deviation, ratios that are not clipped, tokens
summed and divided by the longest response. Demonstrations of prompts without a right rollout go to a buffer. Once it
holds ``buffer_size`` of them the step makes one more update, of cross-entropy on that many of the newest, which leave
the buffer: a token mean, with an entropy bonus of 0.001. What is older waits, at most as many again; beyond that the
oldest are dropped, so that a checkpoint, which has the buffer, stays small.

The authors' code changed over time. What is above was read at commit eb95454f; another script of theirs clips at 0.2
and 0.28, has no bonus, and learns 64 demonstrations at a time of steps of 128 prompts. There the updates of SFT have an
optimizer of their own, at the rate of RL, 1e-6. Here both share one, as in every method: a second one is two more
copies of the weights in memory. So the moments of AdamW are those of both. ``train.sft_lr_scale`` sets a rate for SFT,
and ``train.grad_clip`` the norm at which gradients are clipped, 0.7 there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

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
    judged,
    sft_and_rl,
    token_weights,
)
from srft.responses import Group, Response


class Method(BaseMethod):
    """ReLIFT: GRPO, and now and then an update of SFT on demonstrations of what no rollout solved."""

    needs_paired_demos: ClassVar[bool] = True
    takes_lag: ClassVar[bool] = True
    fewest_rollouts: ClassVar[int] = 2
    terms: ClassVar[Mapping[str, Kind]] = {"policy": "rl", "sft": "sft"}
    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="loss_components", title="Loss components", caption="Of the two kinds of updates.",
            lines=(Line(key="loss/policy", label="GRPO", color="blue"),
                   Line(key="loss/sft", label="SFT", color="vermillion")),
            ylabel="loss", signed=True,
        ),
    )  # fmt: skip

    buffer_size: int | None = Field(None, gt=0)
    """Demonstrations of an update of SFT; unset: as many as a step has prompts, which is 128 in the paper."""
    clip_low: float | None = Field(None, gt=0)
    """The ratio of rollouts is clipped below 1 - clip_low; unset: it is not."""
    clip_high: float | None = Field(None, gt=0)
    """The ratio of rollouts is clipped above 1 + clip_high; unset: it is not."""
    advantage_std: bool = False
    """Divide advantages by the standard deviation of the prompt's rollouts."""
    rl_aggregation: Aggregation = "sum"
    """Of rollouts: sum over tokens divided by rollout.max_new_tokens, mean over tokens, mean over sequences of token
    means, or mean over sequences of token sums divided by rollout.max_new_tokens."""
    sft_aggregation: Aggregation = "token-mean"
    """The same of demonstrations."""
    entropy_coef: float = Field(0.001, ge=0)
    """Coefficient of the entropy bonus of both kinds of updates, a mean over tokens."""

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts with each other."""
        return compared(group.rollouts, self.advantage_std)

    @property
    def counts_prompts(self) -> bool:
        """Where they are the size of the buffer."""
        return self.buffer_size is None

    def further(self, groups: Sequence[Group], now: StepInfo, gather: Callable[[Any], list[Any]]) -> list[Response]:
        """Fill ``buffer``, of prompts and demonstrations as tokens, and empty it of the newest once they are enough."""
        unsolved = [demo for g in groups if _is_unsolved(g) for demo in judged(g.demos)]
        found = gather((len(groups), [_as_stored(demo) for demo in unsolved]))
        size = self.buffer_size or sum(prompts for prompts, _ in found)
        # in an order that does not depend on the ranks
        buffer = now.memory.get("buffer", []) + sorted(ids for _, demos in found for ids in demos)
        rest, newest = (buffer[:-size], buffer[-size:]) if len(buffer) >= size else (buffer, [])
        now.memory["buffer"] = rest[-size:]
        return [
            Response(prompt, demo, True, False, [], "", spans=sum(spans, [])) for prompt, demo, *spans in newest
        ]

    def has_gradient(self, response: Response) -> bool:
        """Of demonstrations, of rollouts with an advantage, and of all with an entropy bonus."""
        return response.is_demo or bool(response.advantage) or self.entropy_coef > 0

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """A policy stream on rollouts, a likelihood stream on demonstrations; an update has one of them."""
        totals = update.totals
        rl_weights = token_weights(batch, update, self.rl_aggregation, importance=True) / max(1, totals.rollout_tokens)
        sft_weights = token_weights(batch, update, self.sft_aggregation) / max(1, totals.demo_tokens)
        return sft_and_rl(
            batch, update, rl_weights=rl_weights, sft_weights=sft_weights, entropy_coef=self.entropy_coef,
            clip_low=self.clip_low, clip_high=self.clip_high,
        )  # fmt: skip

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Share of rollout tokens whose ratio was clipped, and demonstrations that wait."""
        waiting = Figure(len(update.memory.get("buffer", [])), "last")
        return {"clip/share": clip_share(terms, update), "buffer/demos": waiting}


def _as_stored(demo: Response) -> list[list[int]]:
    return [demo.prompt_ids, demo.response_ids, *([demo.spans] if demo.spans else [])]


def _is_unsolved(group: Group) -> bool:
    members = judged(group.rollouts)
    return bool(members) and not any(member.is_correct for member in members)
