"""Liger beside the heads named after its own: whether it is there, and how near to it they are."""

from __future__ import annotations

import importlib.util

import pytest

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel, which the peers' lock installs"
)


def assert_same(actual, expected, tolerance):
    """Every result differs by at most ``tolerance`` of its largest value, or of 0.1 where that is smaller."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        error = (actual[name].double() - x.double()).abs().max()
        assert error <= tolerance * max(x.abs().max(), 0.1), f"{name}: {error:.2e}, values up to {x.abs().max():.2e}"
