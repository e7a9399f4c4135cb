"""Numbers that describe a step: plain reductions over its groups and its losses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from srft.batch import Batch
from srft.methods import BaseMethod, Figure, UpdateInfo
from srft.policy.parallel import ALONE, World
from srft.responses import Group, Response
from srft_kernels import PolicyLoss

# what stands before the slash, or alone, in names of a row that are no method's
_EVERY_RUNS = ("step", "lr", "grad_norm", "grad", "canary", "engine", "eval", "groups", "lag", "length", "logprob",
                "mismatch", "ratio", "reward", "sync", "time", "tokens", "updates", "speed")
# of ratios: those farther from 1 than this factor are its tail
_TAIL = math.log(2)


class Clock:
    """Adds up the seconds spent in the named parts of a step, and lets the other ranks know which this one is in.

    Args:
        world: The ranks.
        step: Its number.
    """

    def __init__(self, world: World = ALONE, step: int = 0) -> None:
        self._world, self._step = world, step
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the body of a ``with`` statement.

        Args:
            part: Name of the part.
        """
        start = time.perf_counter()
        self._world.at(f"step {self._step}, {part}")
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
            row[name] = _largest(values)
        elif total:
            row[name] = sum(f.value * f.weight for f in figures if f.weight) / total
        else:
            row[name] = sum(values) / len(values)
    return row


class _Outcome(NamedTuple):
    """What the metrics of a step say of a response."""

    reward: float
    status: str
    is_correct: bool
    is_judged: bool
    truncated: bool
    tokens: int
    response_tokens: int
    prefix_tokens: int
    turns: int


def _outcome(s: Response) -> _Outcome:
    return _Outcome(
        s.reward, s.status, s.is_correct, s.is_judged, s.truncated, len(s), s.num_own, s.prefix_tokens,
        len(s.spans[::2])
    )


def _outcomes(groups: Sequence[Group]) -> list[tuple[list[_Outcome], list[_Outcome]]]:
    return [([_outcome(s) for s in g.rollouts], [_outcome(s) for s in g.demos]) for g in groups]


def group_metrics(
    groups: Sequence[Group], world: World = ALONE, gave_way: Sequence[Group] = ()
) -> dict[str, float]:
    """Describe rewards, lengths and what the groups have to teach.

    Args:
        groups: With rewards; those of this rank.
        world: The ranks, whose groups are described together.
        gave_way: Groups in whose place some of these came. Rewards, shares and lengths are over them, too: over all
            that the policy was asked.

    Returns:
        Shares in [0, 1], lengths in tokens, counts; rollout entries only where there are rollouts, rewards only
        of what was judged.
    """
    of_ranks = world.gather((_outcomes(groups), _outcomes(gave_way)))
    taken = [group for kept, _ in of_ranks for group in kept]
    every = taken + [group for _, others in of_ranks for group in others]
    rollouts = [s for of_group, _ in every for s in of_group]
    demos = [s for _, of_group in every for s in of_group]
    metrics: dict[str, float] = {}
    if accepted := [s.reward for s in demos if s.is_judged]:
        metrics["reward/demo"] = sum(accepted) / len(accepted)
    judged = [([s for s in of_group if s.is_judged], shown) for of_group, shown in every]
    judged = [(members, shown) for members, shown in judged if members]
    if judged:
        rewards = torch.tensor([s.reward for members, _ in judged for s in members], dtype=torch.float64)
        wrong = [shown for members, shown in judged if not any(s.is_correct for s in members)]
        metrics |= {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "groups/all_right": sum(all(s.is_correct for s in members) for members, _ in judged) / len(judged),
            "groups/all_wrong": len(wrong) / len(judged),
            "groups/rescued_by_demo": sum(any(s.is_correct for s in shown) for shown in wrong) / len(judged),
            "groups/alike": sum(len({s.reward for s in members}) == 1 for members, _ in judged) / len(judged),
        }
    if rollouts:
        metrics |= {
            "length/mean": sum(s.response_tokens for s in rollouts) / len(rollouts),
            "length/truncated": sum(s.truncated for s in rollouts) / len(rollouts),
            "groups/resampled": len(every) - len(taken),
        }
    if any(s.prefix_tokens for s in rollouts):
        metrics["length/prefix"] = sum(s.prefix_tokens for s in rollouts) / len(rollouts)
        if unaided := [s.reward for s in rollouts if s.is_judged and not s.prefix_tokens]:
            metrics["reward/unaided"] = sum(unaided) / len(unaided)
    if rollouts and any(s.turns for s in (*rollouts, *demos)):
        metrics["length/turns"] = sum(max(1, s.turns) for s in rollouts) / len(rollouts)
    everything = rollouts + demos
    metrics["reward/unjudged"] = sum(not s.is_judged for s in everything)
    metrics["reward/timeouts"] = sum(s.status == "timeout" for s in everything)
    metrics["reward/errors"] = sum(s.status in ("error", "bad_gold") for s in everything)
    metrics["tokens/sampled"] = sum(s.response_tokens - s.prefix_tokens for s in rollouts)
    passed_on = [s for both in taken for of_kind in both for s in of_kind]
    metrics["tokens/step"] = sum(s.tokens for s in passed_on)
    metrics["tokens/counted"] = sum(s.response_tokens for s in passed_on)
    # what attention grows with
    metrics["tokens/squared"] = sum(s.tokens**2 for s in passed_on)
    return metrics


class _Sums(NamedTuple):
    """What one rank's micro-batches give, for the figures of the whole update."""

    loss: float
    terms: dict[str, float]
    # mean and number of tokens, of rollouts and of demonstrations
    entropy: tuple[tuple[float, int], tuple[float, int]]
    # the same of right rollouts, wrong ones, and demonstrations
    logprobs: tuple[tuple[float, int], ...]
    mismatch: tuple[float, int]
    largest_mismatch: float
    # means over rollout tokens of what lies between policy and frozen models, by metric name
    distances: dict[str, tuple[float, int]]
    # of |log ratio|: share in the tail and number of tokens, and the largest; no tokens where nothing is old
    ratio_tail: tuple[float, int]
    largest_ratio: float


def loss_metrics(
    method: BaseMethod, batches: list[Batch], outputs: list[PolicyLoss], update: UpdateInfo, world: World = ALONE
) -> dict[str, Figure]:
    """Sum the micro-batches' loss terms, average entropies and weights by source, and note each sequence's entropy.

    Args:
        method: Adds its own figures.
        batches: This rank's micro-batches; their sequences' ``entropy``, ``entropies`` and ``logprobs`` are filled in.
        outputs: What the fused loss returned for each.
        update: The update as a whole.
        world: The ranks.

    Returns:
        ``loss/*`` in nats, but for terms of a kind that the update lacks; ``entropy/*`` and ``logprob/*`` in nats per
        token, the method's own, and of rollouts the mismatch in nats, unless they have an importance, and, where old
        log-probabilities are known, the ratio to them: ``ratio/tail``, the share of tokens with a ratio outside of
        [1/2, 2], and ``ratio/max``, the largest |log ratio| in nats. ``kl/reference`` and ``kl/teacher`` where there
        are such models: the mean of log p - log p of theirs over rollout tokens, nats, an estimate of KL(policy ||
        theirs). The same on every rank. Losses and shares are of all tokens of the update; all other means are over
        those of the micro-batches, which lack the sequences that the loss gives no gradient, and are absent where there
        are none.
    """
    every = world.gather(_sums(batches, outputs))
    totals = update.totals
    terms: dict[str, float] = {}
    for of_rank in every:
        for name, value in of_rank.terms.items():
            terms[name] = terms.get(name, 0.0) + value
    metrics = {"loss/total": Figure(sum(of_rank.loss for of_rank in every))}
    lacking = set(method.terms.values()) - method.kinds_in(totals)
    metrics |= {
        f"loss/{name}": Figure(value)
        for name, value in terms.items()
        if not name.startswith(("sum_", "clip_")) and (value or method.terms.get(name) not in lacking)
    }
    for kind, source in enumerate(("rollout", "demo")):
        if tokens := sum(x.entropy[kind][1] for x in every):
            metrics[f"entropy/{source}"] = Figure(_mean([x.entropy[kind] for x in every]), weight=tokens)
    for name in sorted({name for of_rank in every for name in of_rank.distances}):
        parts = [of_rank.distances.get(name, (0.0, 0)) for of_rank in every]
        if tokens := sum(tokens for _, tokens in parts):
            metrics[name] = Figure(_mean(parts), weight=tokens)
    for kind, source in enumerate(("right", "wrong", "demo")):
        if tokens := sum(x.logprobs[kind][1] for x in every):
            metrics[f"logprob/{source}"] = Figure(_mean([x.logprobs[kind] for x in every]), weight=tokens)
    if tokens := sum(x.ratio_tail[1] for x in every):
        metrics["ratio/tail"] = Figure(_mean([x.ratio_tail for x in every]), weight=tokens)
        metrics["ratio/max"] = Figure(_largest([x.largest_ratio for x in every]), "max")
    metrics |= _own_figures(method, terms, update, set(metrics))
    # of an older policy's rollouts it would be the lag; the canary goes on comparing the engine
    behind = any(batch.importance is not None for batch in batches)
    if not behind and (tokens := sum(x.mismatch[1] for x in every)):
        metrics["mismatch/mean"] = Figure(_mean([x.mismatch for x in every]), weight=tokens)
        metrics["mismatch/max"] = Figure(_largest([x.largest_mismatch for x in every]), "max")
    return metrics


def _sums(batches: list[Batch], outputs: list[PolicyLoss]) -> _Sums:
    terms: dict[str, float] = {}
    none = torch.zeros(0)
    mismatch, moved, entropy, logprobs = [none], [none], [none], [none]
    is_demo, is_correct = [none.bool()], [none.bool()]
    distances: dict[str, list[torch.Tensor]] = {}
    for batch, out in zip(batches, outputs, strict=True):
        for name, value in out.terms.items():
            terms[name] = terms.get(name, 0.0) + value.item()
        if batch.is_empty:
            continue
        for sequence, place in batch.responses():
            sequence.logprobs, sequence.entropies = out.logprobs[place].detach(), out.entropy[place].detach()
            sequence.entropy = sequence.entropies.mean().item()
        sampled_by = out.logprobs if batch.old_logprobs is None else batch.old_logprobs
        mismatch.append((sampled_by - batch.rollout_logprobs)[~batch.is_demo].abs().cpu())
        for name, theirs in (("kl/reference", batch.ref_logprobs), ("kl/teacher", batch.teacher_logprobs)):
            if theirs is not None:
                distances.setdefault(name, []).append((sampled_by - theirs)[~batch.is_demo].cpu())
        if batch.old_logprobs is not None:
            moved.append((out.logprobs - batch.old_logprobs)[~batch.is_demo].abs().cpu())
        entropy.append(out.entropy.cpu())
        logprobs.append(out.logprobs.cpu())
        is_demo.append(batch.is_demo.cpu())
        is_correct.append(batch.is_correct.cpu())
    gaps, ratios, of_token, logp = (torch.cat(x) for x in (mismatch, moved, entropy, logprobs))
    demo, right = torch.cat(is_demo), torch.cat(is_correct)
    return _Sums(
        loss=sum(out.loss.item() for out in outputs),
        terms=terms,
        entropy=(_mean_of(of_token[~demo]), _mean_of(of_token[demo])),
        logprobs=(_mean_of(logp[~demo & right]), _mean_of(logp[~demo & ~right]), _mean_of(logp[demo])),
        mismatch=_mean_of(gaps),
        largest_mismatch=gaps.max().item() if len(gaps) else 0.0,
        distances={name: _mean_of(torch.cat(parts)) for name, parts in distances.items()},
        # a NaN is in no tail and in the largest
        ratio_tail=_mean_of((ratios > _TAIL).float()),
        largest_ratio=ratios.max().item() if len(ratios) else 0.0,
    )


def _mean_of(x: torch.Tensor) -> tuple[float, int]:
    return (x.mean().item() if len(x) else 0.0), len(x)


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """Of means over so many values each."""
    filled = [part for part in parts if part[1]]
    if len(filled) == 1:
        return filled[0][0]
    return sum(mean * count for mean, count in filled) / sum(count for _, count in filled)


def _largest(values: Sequence[float]) -> float:
    # max() of Python forgets a NaN that is not the first
    return math.nan if any(map(math.isnan, values)) else max(values)


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
        most: Groups shown of those with rollouts, and of those without.
    """
    chosen = [g for g in groups if g.rollouts][:most] + [g for g in groups if not g.rollouts][:most]
    return [
        {
            "id": group.prompt.example.id,
            "prompt": group.prompt.example.prompt,
            "completion": s.transcript or s.text,
            "demo": s.is_demo,
            "reward": s.reward,
            "status": s.status,
            "message": s.message,
            "advantage": s.advantage,
            "entropy": s.entropy,
            "answer": str(group.prompt.example.answer),
        }
        for group in chosen
        for s in (*group.rollouts[:3], *group.demos)
    ]
