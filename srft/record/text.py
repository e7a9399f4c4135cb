"""Numbers and texts as a person reads them, in the terminal and on the page."""

from __future__ import annotations

import re

# control characters but tab and line feed, halves of surrogate pairs, and the two that are no characters
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def format_seconds(seconds: float) -> str:
    """Return a duration in two units at most: ``42s``, ``3m 05s``, ``7h 12m``.

    Args:
        seconds: >= 0.
    """
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def format_count(value: float) -> str:
    """Return a count in three figures: ``840``, ``1.9k``, ``23k``, ``1.2M``.

    Args:
        value: >= 0.
    """
    for limit, unit in ((999.5, ""), (999.5e3, "k"), (float("inf"), "M")):
        if value < limit:
            scaled = value / {"": 1, "k": 1e3, "M": 1e6}[unit]
            return f"{scaled:.1f}{unit}" if unit and scaled < 9.95 else f"{scaled:.0f}{unit}"
    raise AssertionError("unreachable: the last limit is infinite")
