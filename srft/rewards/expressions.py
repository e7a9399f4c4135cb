"""LaTeX expressions as sympy has them, and whether two are equal: proved, never by rounding, and with bounded work."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from srft.rewards.quantities import GROUPED, MAX_NUMBER_CHARS, read_number

MAX_CHARS = 400
MAX_DEPTH = 14  # of braces
MAX_DIGITS = 20_000  # of a number that is written out
_PLACES = 60  # significant digits at which a difference is looked for before a proof of equality is

_DECIMALS = re.compile(r"(?<![0-9.])[0-9]*\.(?:[0-9]+(?:\\overline\s*\{[0-9]+\})?|\\overline\s*\{[0-9]+\})(?![0-9.])")
_PLAIN_FUNCTION = re.compile(
    r"(?<![a-zA-Z\\])(arcsin|arccos|arctan|sin|cos|tan|sec|csc|cot|log|ln|exp|pi|theta|alpha|beta|infinity)(?![a-zA-Z])"
)
# unfinished digits, bases, repeated factorials, bars of conditions, relations, dates
_NO_EXPRESSION = re.compile(
    r"\.\.\.|\\[lc]?dots|…|[0-9})]\s*_|!\s*!|\\mid|\\text|[<>#&:]|(?<!_\{[a-z])=|\\(?:le|ge|ne|approx|in|cup|pm|mp)(?![a-z])"
    # numbers side by side are no product, and a fraction after a number may be added to it
    r"|(?<![0-9.,])0[0-9]|[0-9]\s*/\s*[0-9]+\s*/\s*[0-9]|[0-9)}]'|(?<!_)[0-9]\s+[0-9]|[0-9]\s*\\frac\s*\{?[0-9]+\}?\s*\{?[0-9]|\\(?![a-zA-Z{}|])"
    # nor are they where braces of no command part them
    r"|(?<!_)(?<!frac)(?<!frac )(?<!binom)(?<!binom )[0-9]\s*\{[{(\s]*[0-9]|(?:^|[-+*/(,\s])\{[0-9.\s]+\}\s*\{?\s*[0-9]"
)
# 2^3^2 is no LaTeX, and 2^9 or 8^2 elsewhere
_TOWER = re.compile(r"\^\s*(?:\{[^{}]*\}|[0-9a-zA-Z])\s*\^")
_WORD = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]{4,}")
_NAMED_ARGUMENT = re.compile(r"\\(?:operatorname|begin|end|mathbb|mathcal)\s*\{[^}]*\}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_ROOT = re.compile(r"(?:\\sqrt|(?<![a-zA-Z\\])sqrt)\s*\(")


def _braced_root(text: str) -> str:
    """sqrt(x) and \\sqrt(x) as \\sqrt{x}."""
    while match := _ROOT.search(text):
        depth, place = 1, match.end()
        while place < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[place], 0)
            place += 1
        if depth:
            return text
        text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : place - 1]}}}{text[place:]}"
    return text


def _fraction(match: re.Match[str]) -> str:
    value = read_number(match[0])
    assert value is not None
    return rf"{{\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _in_latex(text: str) -> str | None:
    """Spell a tidy expression so that the LaTeX parser takes it as it is meant; None for what it would misread."""
    text = text.replace("{,}", ",")
    if _NO_EXPRESSION.search(text):
        return None
    text = _braced_root(text.replace("**", "^").replace("*", r"\cdot ").replace(r"\frac", r"\frac "))
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = _PLAIN_FUNCTION.sub(lambda m: r"\infty " if m[1] == "infinity" else rf"\{m[1]} ", text)
    if _WORD.search(_NAMED_ARGUMENT.sub("", text)):
        return None
    text = re.sub(r"([0-9.]+)\s*\^\s*\\circ(?![a-zA-Z])", r"(\\frac{\1 \\pi}{180})", text)
    if "°" in text or r"\circ" in text:
        return None
    text = re.sub(rf"(?<![0-9,.]){GROUPED}(?!,)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([0-9a-z])\s*([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9a-z])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9a-z])", r"\1{\2}", text)
    text = re.sub(r"\^\s*(-[0-9]+|[0-9]{2,})", r"^{\1}", text)
    if _TOWER.search(text):
        return None
    return _DECIMALS.sub(_fraction, text)


@lru_cache(maxsize=1024)
def parse(text: str) -> Any:
    """Return the sympy expression of a tidy text, unevaluated; None where it is none, or too large to work on.

    Args:
        text: From :func:`srft.rewards.answers.tidy`, without a unit.
    """
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    from sympy import Basic, E, Float, I, Integer, MatrixBase, Rational, Symbol

    if not text or len(text) > MAX_CHARS or re.search(rf"[0-9]{{{MAX_NUMBER_CHARS}}}", text):
        return None
    if (number := read_number(text)) is not None:
        return Rational(number.numerator, number.denominator)
    depth = deepest = 0
    for character in text:
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(character, 0)
        deepest = max(deepest, depth)
    latex = _in_latex(text)
    if depth or deepest > MAX_DEPTH or latex is None:
        return None
    # the parser folds capitals into small letters
    letters = set(_COMMAND.sub("", latex))
    names = sorted(c for c in letters if c.isascii() and c.isupper())
    spare = [c for c in "abcdfghjkmnpqrstuvwxyz" if c not in letters]
    if len(names) > len(spare):
        return None
    stand_ins = dict(zip(names, spare, strict=False))
    latex = re.sub(r"\\[a-zA-Z]+|[A-Z]", lambda m: m[0] if m[0][0] == "\\" else stand_ins[m[0]], latex)
    try:
        found = latex2sympy(latex, is_real=True, convert_degrees=False, normalization_config=None)
    # the parser and sympy's constructors raise anything on text that is no mathematics
    except Exception:
        return None
    if not isinstance(found, Basic) or isinstance(found, MatrixBase) or not hasattr(found, "free_symbols"):
        return None
    if found.has(Float) or _digits(found) is None:
        return None
    back = {Symbol(small, real=True): Symbol(capital, real=True) for capital, small in stand_ins.items()}
    back |= {Symbol("i", real=True): I, Symbol("e", real=True): E}
    present = {symbol: back[symbol] for symbol in found.free_symbols if symbol in back}
    return found.xreplace(present) if present else (found if found != 0 else Integer(0))


def _digits(expression: Any) -> float | None:
    """A bound of the decimal digits that evaluating takes; None where it is beyond what is worked on."""
    from sympy import Integral, Limit, Product, Sum, factorial

    if isinstance(expression, Sum | Product):
        counted = [low.is_Integer and high.is_Integer and high - low <= 200 for _, low, high in expression.limits]
        if len(counted) != 1 or not counted[0]:
            return None
    if isinstance(expression, Integral | Limit):
        return None
    if expression.is_Integer:
        return len(str(abs(int(expression)))) if abs(expression) < 10**4000 else None
    if not expression.args:
        return 20.0
    sizes = [_digits(part) for part in expression.args]
    if any(size is None for size in sizes):
        return None
    known = [size for size in sizes if size is not None]
    if expression.is_Pow or expression.func.__name__ == "exp":
        power = expression.args[-1]
        if not power.free_symbols and not (power.is_Integer and abs(power) <= 1):
            try:
                size = abs(complex(power.evalf(10)))
            except (TypeError, ValueError, OverflowError):
                return None
            known = [max(known[0], 1.0) * max(size, 1.0)]
    if isinstance(expression, factorial):
        if known[0] > 5 and not expression.args[0].free_symbols:
            return None
        try:
            count = 10.0 if expression.args[0].free_symbols else abs(float(expression.args[0].evalf(10)))
        except (TypeError, ValueError, OverflowError):
            return None
        known = [max(1.0, count) * len(str(int(max(1.0, count))))]
    total = sum(known)
    return total if total <= MAX_DIGITS else None


def equal(one: Any, other: Any) -> bool:
    """Whether two expressions are equal for all values of their variables, by a proof.

    Args:
        one: From :func:`parse`.
        other: From :func:`parse`.
    """
    from sympy import Expr, nan, oo, zoo

    if one == other:
        return True
    if not isinstance(one, Expr) or not isinstance(other, Expr):
        return False
    one, other = one.doit(), other.doit()
    if one.has(nan, zoo) or other.has(nan, zoo):
        return False
    if one == other:
        return True
    if one.has(oo) or other.has(oo) or (one.is_Rational and other.is_Rational):
        return False
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    return not _differs(one, other, symbols) and _proved(one, other)


def _differs(one: Any, other: Any, symbols: list[Any]) -> bool:
    """Whether the two are told apart by their values, relative to their size."""
    from sympy import Abs, Rational

    # signs both ways, so that sqrt(x^2) is not x; nothing special in any of the values
    draws = [(17, 13), (-23, 19), (5, 29), (-3, 31)] if symbols else [(1, 1)]
    seen = 0
    for top, bottom in draws:
        values = {s: Rational(top * (k + 2) + k, bottom) for k, s in enumerate(symbols)}
        a, b = one.subs(values).evalf(_PLACES), other.subs(values).evalf(_PLACES)
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            continue
        seen += 1
        if Abs(a - b) > Rational(1, 10 ** (_PLACES - 20)) * (Abs(a) + Abs(b)):
            return True
    return seen == 0


def _proved(one: Any, other: Any) -> bool:
    from sympy import cancel, expand, simplify, together

    difference = one - other
    for prove in (expand, lambda d: cancel(together(d)), simplify):
        try:
            if prove(difference) == 0:
                return True
        # sympy gives up in many ways; what it does not prove is not equal
        except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
            continue
    if not difference.free_symbols and difference.is_algebraic:
        return bool(difference.equals(0))
    return False
