"""Numbers as people have them: numpy's scalars, and arrays of no dimension, are Python numbers at the public door."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def plain(value: Any) -> Any:
    """``value``, a numpy scalar or 0-d array as a Python number, also as a field of a named tuple."""
    # without an import: the package does not need numpy
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(plain, value))
    return value


def plain_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The ``plain`` of each argument of a call."""
    return [plain(x) for x in args], {name: plain(x) for name, x in kwargs.items()}


def plain_numbers(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, called with the ``plain`` of its arguments."""
    call: Any = function

    @functools.wraps(function)
    def converted(*args: P.args, **kwargs: P.kwargs) -> R:
        positional, named = plain_arguments(args, kwargs)
        return call(*positional, **named)

    return converted


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float; a bool counts nothing and measures nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool)
