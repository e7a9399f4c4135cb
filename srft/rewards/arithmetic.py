"""Arithmetic of numbers as people write it, exact."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_EXPRESSION_CHARS = 200  # three stack frames each at worst: nested parentheses stay within Python's limit


def evaluate_expression(text: str) -> tuple[Fraction, list[Fraction]]:
    """Exact value of an arithmetic expression, and the number literals in it.

    Args:
        text: Decimal literals, + - * / (also × · ÷ −), unary minus, parentheses; at most 200 characters.

    Raises:
        ValueError: On anything else, powers and implicit products included.
        ZeroDivisionError: On a division by zero.
    """
    text = text.translate(str.maketrans("×·÷−", "**/-"))
    if len(text) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"an expression of {len(text)} characters, at most {MAX_EXPRESSION_CHARS} are read")
    tokens = re.findall(r"\d+(?:\.\d+)?|[-+*/()]|\S", text)[::-1]
    numbers: list[Fraction] = []

    def take() -> str:
        return tokens.pop() if tokens else ""

    def factor() -> Fraction:
        token = take()
        if token == "-":
            return -factor()
        if token == "(":
            value = total()
            if take() != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        if not token[:1].isdecimal() or not token.isascii():
            raise ValueError(f"expected a number, got {token!r}")
        numbers.append(Fraction(token))
        return numbers[-1]

    def product() -> Fraction:
        value = factor()
        while tokens and tokens[-1] in "*/":
            value = value * factor() if take() == "*" else value / factor()
        return value

    def total() -> Fraction:
        value = product()
        while tokens and tokens[-1] in "+-":
            value = value + product() if take() == "+" else value - product()
        return value

    value = total()
    if tokens:
        raise ValueError(f"unexpected {tokens[-1]!r}")
    return value, numbers
