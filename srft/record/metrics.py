"""Numbers that describe a step: plain reductions over its groups and its losses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from srft.batch import Batch, Group
from srft.methods import BaseMethod, Figure, UpdateInfo
from srft_kernels import PolicyLoss

# what stands before the slash, or alone, in names of a row that are no method's
_EVERY_RUNS = ("step", "lr", "grad_norm", "canary", "eval", "groups", "length", "mismatch", "reward", "time", "tokens")


class Clock:
    """Adds up the seconds spent in the named parts of a step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the body of a ``with`` statement.

        Args:
            part: Name of the part.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return ``time/<part>`` for each part and ``time/step`` for all since the start, in seconds."""
        return {f"time/{k}": v for k, v in self._parts.items()} | {
            "time/step": time.perf_counter() - self._start
        }


def combined(updates: Sequence[Mapping[str, Figure]]) -> dict[str, float]:
    """Make one row of the figures of a step's updates, each by its nature.

    Args:
        updates: In order; an update without rollouts, or without demonstrations, lacks the figures of these.

    Returns:
        Every name that any of them has. A number that is not finite stays visible in what it enters.
    """
    row = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        figures = [update[name] for update in updates if name in update]
        assert len({figure.by for figure in figures}) == 1
        values, total = [figure.value for figure in figures], sum(figure.weight for figure in figures)
        if figures[0].by == "last":
            row[name] = values[-1]
        elif figures[0].by == "max":
            # max() of Python forgets a NaN that is not the first
            row[name] = math.nan if any(map(math.isnan, values)) else max(values)
        elif total:
            row[name] = sum(f.value * f.weight for f in figures if f.weight) / total
        else:
            row[name] = sum(values) / len(values)
    return row


def group_metrics(groups: list[Group]) -> dict[str, float]:
    """Describe rewards, lengths and what the groups have to teach.

    Args:
        groups: With rewards.

    Returns:
        Shares in [0, 1], lengths in tokens, counts; rollout entries only where there are rollouts, rewards only
        of what was judged.
    """
    rollouts = [s for g in groups for s in g.rollouts]
    demos = [s for g in groups for s in g.demos]
    metrics: dict[str, float] = {}
    if accepted := [s.reward for s in demos if s.is_judged]:
        metrics["reward/demo"] = sum(accepted) / len(accepted)
    judged = [(g, [s for s in g.rollouts if s.is_judged]) for g in groups]
    judged = [(g, members) for g, members in judged if members]
    if judged:
        rewards = torch.tensor([s.reward for _, members in judged for s in members], dtype=torch.float64)
        wrong = [g for g, members in judged if not any(s.is_correct for s in members)]
        metrics |= {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "groups/all_right": sum(all(s.is_correct for s in members) for _, members in judged) / len(judged),
            "groups/all_wrong": len(wrong) / len(judged),
            "groups/rescued_by_demo": sum(any(s.is_correct for s in g.demos) for g in wrong) / len(judged),
        }
    if rollouts:
        metrics |= {
            "length/mean": sum(len(s.response_ids) for s in rollouts) / len(rollouts),
            "length/truncated": sum(s.truncated for s in rollouts) / len(rollouts),
        }
    everything = rollouts + demos
    metrics["reward/unjudged"] = sum(not s.is_judged for s in everything)
    metrics["reward/timeouts"] = sum(s.status == "timeout" for s in everything)
    metrics["reward/errors"] = sum(s.status in ("error", "bad_gold") for s in everything)
    metrics["tokens/step"] = sum(len(s) for s in everything)
    return metrics


def loss_metrics(
    method: BaseMethod, batches: list[Batch], outputs: list[PolicyLoss], update: UpdateInfo
) -> dict[str, Figure]:
    """Sum the micro-batches' loss terms, average entropies and weights by source, and note each sequence's entropy.

    Args:
        method: Adds its own figures.
        batches: The micro-batches; their sequences' ``entropy`` is filled in.
        outputs: What the fused loss returned for each.
        update: The update as a whole.

    Returns:
        ``loss/*`` in nats, ``entropy/*`` in nats per token, the method's own, and the rollout mismatch in nats.
    """
    totals = update.totals
    terms: dict[str, float] = {}
    mismatch: list[torch.Tensor] = []
    for batch, out in zip(batches, outputs, strict=True):
        for name, value in out.terms.items():
            terms[name] = terms.get(name, 0.0) + value.item()
        for sequence, place in batch.responses():
            sequence.entropy = out.entropy[place].mean().item()
        sampled_by = out.logprobs if batch.old_logprobs is None else batch.old_logprobs
        mismatch.append((sampled_by - batch.rollout_logprobs)[~batch.is_demo].abs())
    entropy = torch.cat([out.entropy for out in outputs])
    is_demo = torch.cat([batch.is_demo for batch in batches])
    metrics = {"loss/total": Figure(sum(out.loss.item() for out in outputs))}
    metrics |= {
        f"loss/{name}": Figure(value) for name, value in terms.items() if not name.startswith(("sum_", "clip_"))
    }
    for source, mask, tokens in (
        ("rollout", ~is_demo, totals.rollout_tokens),
        ("demo", is_demo, totals.demo_tokens),
    ):
        if tokens:
            metrics[f"entropy/{source}"] = Figure(entropy[mask].mean().item(), weight=tokens)
    metrics |= _own_figures(method, terms, update, set(metrics))
    if totals.rollout_tokens:
        gaps = torch.cat(mismatch)
        metrics["mismatch/mean"] = Figure(gaps.mean().item(), weight=totals.rollout_tokens)
        metrics["mismatch/max"] = Figure(gaps.max().item(), "max")
    return metrics


def _own_figures(
    method: BaseMethod, terms: Mapping[str, float], update: UpdateInfo, taken: set[str]
) -> dict[str, Figure]:
    """The method's figures, none of which may hide another."""
    figures = method.figures(terms, update)
    for name, figure in figures.items():
        if not isinstance(figure, Figure):
            raise ValueError(
                f"figures of method.name={method.name} must be of srft.methods.Figure, got {figure!r} for {name}; "
                f"return Figure({figure!r})"
            )
        if name in taken or name.partition("/")[0] in _EVERY_RUNS:
            raise ValueError(
                f"figures of method.name={method.name} has {name}, a name of what every run logs; rename it"
            )
    return figures


def sample_rows(groups: list[Group], most: int = 4) -> list[dict[str, Any]]:
    """Return the first groups' members as rows of the sample table.

    Args:
        groups: With rewards and advantages.
        most: Groups shown.
    """
    return [
        {
            "id": group.prompt.example.id,
            "prompt": group.prompt.example.prompt,
            "completion": s.text,
            "demo": s.is_demo,
            "reward": s.reward,
            "status": s.status,
            "message": s.message,
            "advantage": s.advantage,
            "entropy": s.entropy,
            "answer": str(group.prompt.example.answer),
        }
        for group in groups[:most]
        for s in (*group.rollouts[:3], *group.demos)
    ]
