"""Countdown in a few bytes: the numbers and the target, answered by an expression that makes the one of the others."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
_MOST_DRAWS = 40  # for each further demonstration, before another problem is drawn


class _Term(NamedTuple):
    """A part of an expression: how it is written, what it is worth, and how tightly its last operation binds."""

    text: str
    value: int
    binds: int


def countdown_problem(
    rng: random.Random, *, min_numbers: int, max_numbers: int, largest: int, max_target: int, demos: int
) -> dict[str, Any]:
    """Draw numbers with a target that they make, and some of the expressions that make it.

    The target is the value of a random expression, so that among those that make it each is drawn as often as it comes
    up. Every demonstration uses all the numbers, in whole numbers above 0 at every operation.

    Args:
        rng: Advanced by the draw.
        min_numbers: Fewest numbers, >= 2.
        max_numbers: Most numbers, >= ``min_numbers``.
        largest: Numbers are from 1 to this.
        max_target: Largest target; it is none of the numbers.
        demos: Distinct demonstrations.
    """
    while True:
        numbers = [rng.randint(1, largest) for _ in range(rng.randint(min_numbers, max_numbers))]
        first = _expression(rng, numbers)
        target = first.value
        if target > max_target or target in numbers:
            continue
        found = {first.text: None}  # in the order in which they come up
        for _ in range(_MOST_DRAWS * (demos - 1)):
            if len(found) == demos:
                break
            another = _expression(rng, numbers)
            if another.value == target:
                found[another.text] = None
        if len(found) == demos:
            prompt = f"{' '.join(map(str, numbers))}:{target}="
            return {"prompt": prompt, "nums": numbers, "target": target, "demo": list(found)}


def problem_text(row: dict[str, Any]) -> str:
    """Return what the order of the numbers does not change.

    Args:
        row: From ``countdown_problem``.
    """
    return f"{sorted(row['nums'])}:{row['target']}"


def _expression(rng: random.Random, numbers: list[int]) -> _Term:
    """A random expression of all the numbers, with no parentheses but those it needs."""
    terms = [_Term(str(number), number, 3) for number in numbers]
    while len(terms) > 1:
        a, b = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        possible = "+*" + "-" * (a.value > b.value) + "/" * (a.value % b.value == 0)
        terms.append(_joined(a, rng.choice(possible), b))
    return terms[0]


def _joined(a: _Term, op: str, b: _Term) -> _Term:
    binds = _BINDS[op]
    value = {"+": a.value + b.value, "-": a.value - b.value, "*": a.value * b.value, "/": a.value // b.value}[op]
    left = f"({a.text})" if a.binds < binds else a.text
    # a-(b+c) and a/(b*c) need theirs, a+(b+c) and a*(b*c) do not
    right = f"({b.text})" if b.binds < binds or (b.binds == binds and op in "-/") else b.text
    return _Term(f"{left}{op}{right}", value, binds)
