"""Means over seeds and their 95 % intervals, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        half: Half the width of its 95 % interval; None of a single value, which has none.
        count: Values it is of.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval, the mean where there is none."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval, the mean where there is none."""
        return self.mean + (self.half or 0.0)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of independent values and its 95 % interval, mean ± t · s / sqrt(n); None of no values.

    Args:
        values: One of each seed.
    """
    if not values:
        return None
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, None, 1)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return Estimate(mean, t_quantile(0.975, n - 1) * spread / math.sqrt(n), n)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution, within 1e-12 of itself or 1e-12.

    Args:
        probability: In (0.5, 1).
        degrees: Degrees of freedom, >= 1.
    """
    assert 0.5 < probability < 1 and degrees >= 1
    low, high = 0.0, 1.0
    while _central(high, degrees) < 2 * probability - 1:
        high *= 2
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        if _central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central(t: float, degrees: int) -> float:
    """The probability of -t < T < t, of which whole degrees make a finite sum (Abramowitz and Stegun 26.7.3, 4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if degrees == 1:
        total = 0.0
    for k in range(2 if odd else 1, degrees - 2, 2):
        term *= k / (k + 1) * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
