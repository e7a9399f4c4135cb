"""The structure of mathematical answers, and when two of them say the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from srft.rewards.answers import tidy
from srft.rewards.expressions import equal, parse
from srft.rewards.quantities import Quantity


@dataclass(frozen=True)
class Scalar:
    """A number or expression.

    Args:
        text: As it was written, of an expression without percent sign and unit.
        quantity: Where it is a plain number.
        percent: Whether a percent sign follows.
        unit: In one spelling, "" without one.
    """

    text: str
    quantity: Quantity | None = None
    percent: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Words:
    """A text answer or the letter of a choice."""

    text: str


@dataclass(frozen=True)
class Literal:
    """What is understood only as the text that it is."""

    text: str


@dataclass(frozen=True)
class Items:
    """Several answers together.

    Args:
        kind: In no order "bare" or "set"; a point or an interval "()", "[]", "(]" or "[)"; of intervals "union".
        items: The answers.
        name: Of the variable, where they come from an inequality.
    """

    kind: str
    items: tuple[Any, ...]
    name: str = ""


@dataclass(frozen=True)
class Relation:
    """Two sides of an equation or inequality.

    Args:
        sign: "=", "<", "<=" or "!=".
        left: One side.
        right: The other side.
        name: The left side's text where it only names the right side, "" otherwise.
    """

    sign: str
    left: Any
    right: Any
    name: str = ""


@dataclass(frozen=True)
class Matrix:
    """A matrix or a vector.

    Args:
        rows: Of entries.
        bars: Whether it is a determinant.
    """

    rows: tuple[tuple[Any, ...], ...]
    bars: bool


Node = Scalar | Words | Literal | Items | Relation | Matrix


def squeeze(text: str) -> str:
    """Return a text without the spaces that mean nothing; "1 1/2" and "1, 234" keep theirs.

    Args:
        text: A whole answer.
    """
    text = re.sub(r"(?<=[0-9A-Za-z.])\s+(?=[0-9A-Za-z.])|(?<=[0-9],)\s+(?=[0-9]{3}(?![0-9]))", "\0", tidy(text))
    text = re.sub(r"\s+", "", text).replace("{,}", ",")
    return re.sub(r"([_^])\{([0-9A-Za-z])\}(?![0-9A-Za-z])", r"\1\2", text)


def _value(scalar: Scalar) -> Any:
    from sympy import Rational

    if scalar.quantity is not None:
        return Rational(scalar.quantity.value.numerator, scalar.quantity.value.denominator)
    return parse(tidy(scalar.text))


def has_variables(node: Any) -> bool:
    """Whether an answer is an expression with a variable in it.

    Args:
        node: Any answer.
    """
    if not isinstance(node, Scalar) or node.quantity is not None:
        return False
    value = parse(tidy(node.text))
    return value is not None and bool(value.free_symbols)


def close(one: Any, other: Any) -> bool:
    """Whether two constants are within a twentieth of each other, as a number and its rounding are.

    Args:
        one: Any answer; only a constant is close to anything.
        other: Any answer.
    """
    if not isinstance(one, Scalar) or not isinstance(other, Scalar):
        return False
    a, b = _value(one), _value(other)
    if a is None or b is None or a.free_symbols or b.free_symbols:
        return False
    return bool(abs((a - b).evalf(20)) * 20 <= abs(a.evalf(20)))


def same(gold: Any, found: Any) -> bool:
    """Whether two answers say the same.

    Args:
        gold: From :func:`srft.rewards.math_answers.read`.
        found: As ``gold``.
    """
    if isinstance(gold, Relation) and isinstance(found, Relation):
        return _same_relation(gold, found)
    if isinstance(gold, Relation) and gold.name:
        return same(gold.right, found)
    if isinstance(found, Relation) and found.name:
        return same(gold, found.right)
    if isinstance(gold, Items) and isinstance(found, Items):
        return _same_items(gold, found)
    for one, other in ((gold, found), (found, gold)):
        if isinstance(one, Items) and one.kind == "set" and len(one.items) == 1:
            return same(one.items[0], other) if one is gold else same(other, one.items[0])
    if isinstance(gold, Scalar) and isinstance(found, Scalar):
        return _same_scalar(gold, found)
    if isinstance(gold, Matrix) and isinstance(found, Matrix):
        if gold.bars != found.bars or [len(row) for row in gold.rows] != [len(row) for row in found.rows]:
            return False
        pairs = zip(sum(gold.rows, ()), sum(found.rows, ()), strict=True)
        return all(same(one, other) for one, other in pairs)
    # "C" is a choice here and a constant there
    if {type(gold), type(found)} == {Words, Scalar}:
        return False
    return type(gold) is type(found) and gold == found


def _may_be_product(scalar: Scalar) -> bool:
    """Whether a letter alone, outside of a text, follows the number: "6m" is six metres, or six times a variable."""
    return scalar.quantity is not None and re.search(r"[^a-zA-Z\\][a-zA-Z]$", scalar.text.strip()) is not None


def _same_scalar(gold: Scalar, found: Scalar) -> bool:
    if _may_be_product(gold) and not (found.quantity and found.quantity.unit):
        # a variable cannot be left out
        gold = Scalar(gold.text)
    if gold.quantity is not None and found.quantity is not None:
        return gold.quantity.equals(found.quantity)
    if gold.unit and found.unit and gold.unit != found.unit:
        return False
    one, other = _value(gold), _value(found)
    if one is None or other is None:
        return squeeze(gold.text) == squeeze(found.text)
    if equal(one, other):
        return True
    from sympy import pi

    for scalar, value, against in ((gold, one, other), (found, other, one)):
        counterpart = found if scalar is gold else gold
        if scalar.percent and not counterpart.percent and equal(value / 100, against):
            return True
        if scalar.unit == "degree" and not counterpart.unit and equal(value * pi / 180, against):
            return True
    return False


def _same_items(gold: Items, found: Items) -> bool:
    if gold.name and found.name and gold.name != found.name:
        return False
    free = {"bare", "set"}
    if len(gold.items) != len(found.items):
        return False
    named = {item.name for item in gold.items if isinstance(item, Relation) and item.name}
    if len(named) > 1 and not all(isinstance(item, Relation) for item in found.items):
        # "3, 2" does not say which of x and y is which
        return False
    if gold.kind == found.kind == "union" or (gold.kind in free and found.kind in free):
        left = list(found.items)
        for item in gold.items:
            place = next((k for k, other in enumerate(left) if same(item, other)), None)
            if place is None:
                return False
            del left[place]
        return True
    if gold.kind != found.kind:
        # "1, 2" may be a point as well, "x = 1, y = 2" has said what is what
        if (gold.kind, found.kind) != ("bare", "()") or any(isinstance(item, Relation) for item in gold.items):
            return False
    return all(same(one, other) for one, other in zip(gold.items, found.items, strict=True))


def _same_relation(gold: Relation, found: Relation) -> bool:
    if gold.name and found.name:
        functions = {"y", "f(x)"}
        if gold.name != found.name and not {gold.name, found.name} <= functions:
            return False
        return same(gold.right, found.right)
    from sympy import simplify

    nodes = (gold.left, gold.right, found.left, found.right)
    sides: list[Any] = [_value(node) if isinstance(node, Scalar) else None for node in nodes]
    if gold.sign != found.sign or any(side is None for side in sides):
        return False
    one, other = sides[0] - sides[1], sides[2] - sides[3]
    if one == 0 or simplify(other) == 0:
        return False
    ratio = simplify(one / other)
    if ratio.free_symbols or not ratio.is_number or ratio.is_zero is not False:
        return False
    return bool(gold.sign in ("=", "!=") or ratio.is_positive) and equal(one, ratio * other)
