"""Intervals over seeds, against tables and against a computation by hand."""

from __future__ import annotations

import math

import pytest

from srft.experiments.statistics import Estimate, estimate, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062047362), (2, 4.3026527297), (3, 3.1824463053), (4, 2.7764451052), (9, 2.2621571628),
     (30, 2.0422724563)],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    """Of 97.5 %, for odd and even degrees of freedom, which have sums of their own."""
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-9)


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.999])
def test_quantiles_of_t_in_closed_form(probability: float) -> None:
    """With one degree of freedom it is Cauchy's distribution; with two it has a closed form."""
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-10)
    a = 4 * probability * (1 - probability)
    assert t_quantile(probability, 2) == pytest.approx(2 * (probability - 0.5) * math.sqrt(2 / a), rel=1e-10)


def test_interval_by_hand() -> None:
    """Of 1, 2, 3, 4: mean 2.5, s^2 = 5/3, t(3) = 3.18245."""
    e = estimate([1.0, 2.0, 3.0, 4.0])
    assert e is not None and e.count == 4 and e.mean == 2.5
    assert e.half == pytest.approx(3.1824463053 * math.sqrt(5 / 3) / 2, abs=1e-9)
    assert (e.low, e.high) == (e.mean - e.half, e.mean + e.half)


def test_few_values() -> None:
    """One value has no interval, none has no mean, and equal ones an interval of no width."""
    assert estimate([]) is None
    assert estimate([0.3]) == Estimate(0.3, None, 1)
    assert estimate([0.25, 0.25, 0.25]) == Estimate(0.25, 0.0, 3)
