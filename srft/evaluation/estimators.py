"""What the answers to a set amount to: accuracy, pass@k, and intervals by resampling its problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Tally:
    """The answers to one problem, counted.

    Args:
        drawn: How many there are.
        judged: Those that the verifier took a view of.
        right: Those that earn at least half of the reward.
        cut: Those that the limit of tokens cut.
        timeouts: Those whose judging ran into its deadline, which count as wrong.
        tokens: Of all of them together.
    """

    drawn: int
    judged: int
    right: int
    cut: int
    timeouts: int
    tokens: int


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] and the ends of its 95 % interval.

    Args:
        value: The mean over problems.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def accuracy(tallies: Sequence[Tally]) -> Share | None:
    """Return the mean over problems of the share of right answers: avg@n, of one answer each pass@1.

    Args:
        tallies: One of each problem; those of which no answer was judged are left out. None where that leaves none.
    """
    return _mean([tally.right / tally.judged for tally in tallies if tally.judged])


def pass_at(tallies: Sequence[Tally], k: int) -> Share | None:
    """Return the mean over problems of the chance that one of k answers is right.

    Args:
        tallies: One of each problem; those with fewer judged answers than k are left out. None where that leaves none.
        k: Answers that one would draw, >= 1.
    """
    return _mean([pass_at_k(tally.right, tally.judged, k) for tally in tallies if tally.judged >= k])


def pass_at_k(right: int, drawn: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k answers is right: 1 - C(n - c, k) / C(n, k).

    Args:
        right: c, right answers, in [0, n].
        drawn: n, answers drawn.
        k: In [1, n].
    """
    assert 0 <= right <= drawn and 1 <= k <= drawn
    return 1.0 - math.comb(drawn - right, k) / math.comb(drawn, k)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean, over resamples of the problems with replacement.

    It tells what the figure might be on other problems like these, answered as these were. Where all problems came out
    alike it has no width, however few they are.

    Args:
        values: One figure of each problem, at least one.
        seed: Of the resampling.
    """
    # problems of one value are alike: to count how often a value comes up is to resample problems
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=_RESAMPLES)
    low, high = np.quantile(drawn @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> Share | None:
    return Share(math.fsum(values) / len(values), *bootstrap_interval(values)) if values else None
