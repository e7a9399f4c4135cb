"""What a loss says of itself: its formulas, terms and arguments, for the checks, torch.compile, reference and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .._checks import check_bool, check_choice, check_count, check_required, check_vectors
from .._numbers import is_number
from ..formulas import TokenFormula

__all__ = ["ABOVE_ONE", "FINITE", "NOT_NEGATIVE", "POSITIVE", "SHARE", "LossRecord", "Range"]


class Range(NamedTuple):
    """The numbers that an argument may be."""

    text: str
    """What they are, after "must be"."""
    holds: Callable[[float], bool]
    """Whether a number is one of them."""


POSITIVE = Range("a number > 0", lambda x: x > 0)
ABOVE_ONE = Range("a number > 1", lambda x: x > 1)
NOT_NEGATIVE = Range("a finite number >= 0", lambda x: 0 <= x < math.inf)
FINITE = Range("a finite number", math.isfinite)
SHARE = Range("a number in [0, 1]", lambda x: 0 <= x <= 1)


class LossRecord(NamedTuple):
    """A loss by name: every argument of its own stands in one of the fields after ``terms``."""

    formulas: Mapping[str, TokenFormula]
    """Choice of the caller: formula of a token."""
    terms: tuple[str, ...]
    """Keys of PolicyLoss.terms, in order; none where the op returns the loss alone."""
    vectors: tuple[str, ...]
    """Arguments [N]; None where absent."""
    required: tuple[str, ...] = ()
    """Vectors that may not be None."""
    flags: tuple[str, ...] = ()
    """Vectors of bool."""
    choices: Mapping[str, tuple[object, ...]] = {}
    """Arguments that are one of a few values."""
    numbers: Mapping[str, Range] = {}
    """Arguments that are numbers."""
    optional: tuple[str, ...] = ()
    """Numbers that are absent where they are None."""
    counts: tuple[str, ...] = ()
    """Arguments that are numbers >= 0 or 0-d tensors of one; None where absent."""
    others: tuple[str, ...] = ()
    """Arguments that the loss looks at itself."""

    def check(self, labels: Tensor, given: Mapping[str, Any]) -> None:
        """Raise ValueError unless each of the arguments ``given`` is in its range, for ``labels`` [N]."""
        for name, allowed in self.choices.items():
            check_choice(name, given[name], allowed)
        for name in self.required:
            check_required(name, given[name])
        if isinstance(labels, Tensor):
            check_vectors(labels, **{name: given[name] for name in self.vectors})
        check_bool(**{name: given[name] for name in self.flags})
        for name, allowed_numbers in self.numbers.items():
            value = given[name]
            if value is None and name in self.optional:
                continue
            if not is_number(value) or not allowed_numbers.holds(value):
                remedy = "; None turns it off" if name in self.optional else ""
                raise ValueError(f"{name} must be {allowed_numbers.text}, got {value!r}{remedy}")
        for name in self.counts:
            check_count(name, given[name])
