"""From LaTeX or plain text to the structure of an answer: lists, intervals, points, relations, matrices, words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from srft.rewards.answers import tidy
from srft.rewards.expressions import parse
from srft.rewards.math_nodes import (
    Items,
    Literal,
    Matrix,
    Node,
    Relation,
    Scalar,
    Words,
    close,
    has_variables,
    same,
    squeeze,
)
from srft.rewards.quantities import GROUPED, read_number, read_quantity, unit_after

MAX_CHARS = 1000
MAX_ITEMS = 40


_TOKEN = re.compile(
    r"\\begin\s*\{[a-zA-Z*]+\}|\\end\s*\{[a-zA-Z*]+\}|\\(?:[lr]brace|[lr]angle)(?![a-zA-Z])|\\[{}]|\\[a-zA-Z]+|\\\\|[()\[\]{}]"
    r"|\b(?:and|or)\b|[<>]=?|!=|[,;=&]"
)
_SIGNS = {"=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", r"\le": "<=", r"\ge": ">=", r"\ne": "!=",
          r"\neq": "!=", r"\lt": "<", r"\gt": ">"}  # fmt: skip
_LISTING = {",", ";", "and", "or", r"\lor", r"\land", r"\vee", r"\wedge"}
_NAME = re.compile(
    r"(?:\\text\s*\{[^{}0-9]*\}|\\?[A-Za-z]+(?:\s+[A-Za-z]+)*)(?:\s*_\s*(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?(?:'|\(\s*[a-z]\s*\))?"
)
_FUNCTIONS = re.compile(r"\\?(?:sin|cos|tan|log|ln|sqrt|exp|frac|pi|infty|mathbb)(?![a-z])")
_CHOICE = re.compile(
    r"(?:(?i:option|choice|(?:the )?(?:correct |final )?answer(?: is)?)[: ]\s*)?"
    r"(?:\\text\s*\{\s*)?\(?\s*(?:\\text\s*\{\s*)?\(?\s*([A-J])\s*[).:]?\s*\}?\s*\)?\s*\}?"
)
_CHOICE_AND_TEXT = re.compile(r"(?:\\text\s*\{\s*\(?|\()([A-J])\)\s*\}?\s*(.+)|([A-J])[).:]\s+(.+)", re.DOTALL)
# beside a choice: another one, or what is said of it
_OTHER_CHOICE = re.compile(
    r"^(?:or|and|not|nor|but|is|isn't)(?!\w)|^(?:wrong|incorrect|false)$|^[A-J]$|[,;/|]\s*\(?[A-J]\)?\s*(?:[,;/|]|$)|(?<![\w'])[A-J][).:]|\b(?:or|and|not|nor)\s+(?:[a-z]+\s+)?\(?[A-J](?!\w)"
)
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{([pbvBV]?)(?:matrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\1(?:matrix|array)\}\s*[)\]]?", re.DOTALL
)
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|['.\-])*(?:\s+[^\W\d_](?:[^\W\d_]|['.\-])*)*")
_THOUSANDS = re.compile(rf"(?<![0-9.,]){GROUPED}(?!,[0-9])")


def _split(text: str, signs: Sequence[str] | set[str] | dict[str, str]) -> tuple[list[str], list[str]]:
    """Parts of a text between the given signs outside of all brackets, and the signs."""
    parts, found, depth, start = [], [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "([{" or token in (r"\{", r"\lbrace", r"\langle") or token.startswith(r"\begin"):
            depth += 1
        elif token in ")]}" or token in (r"\}", r"\rbrace", r"\rangle") or token.startswith(r"\end"):
            depth -= 1
        elif depth == 0 and token in signs:
            parts.append(text[start : match.start()].strip())
            found.append(token)
            start = match.end()
    return [*parts, text[start:].strip()], found


def is_balanced(text: str) -> bool:
    """Whether every bracket of a text is closed, whatever closes it: [0, 1) is.

    Args:
        text: LaTeX or plain text.
    """
    depth = braces = 0
    for token in re.findall(r"\\[{}]|[()\[\]{}]", text):
        depth += {"(": 1, "[": 1, r"\{": 1, ")": -1, "]": -1, r"\}": -1}.get(token, 0)
        braces += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0 or braces < 0:
            return False
    return depth == 0 and braces == 0


def read(text: str, depth: int = 0) -> Node | None:
    """Return the structure of an answer; None of nothing, of too much, and of brackets that are not closed.

    Args:
        text: LaTeX or plain text, as it stands in a box.
        depth: Of the nesting, given to itself.
    """
    if len(text) > MAX_CHARS or depth > 6:
        return None
    text = re.sub(r"\\text\s*\{\s*,\s*\}", ", ", tidy(text))
    text = re.sub(r"\\text\s*\{\s*,?\s*(and|or)\s*\}", r" \1 ", text)
    while match := re.fullmatch(r"\\text\s*\{([^{}]*)\}|\{([^{}]*)\}|\\boxed\s*\{(.*)\}", text, re.DOTALL):
        text = tidy(next(part for part in match.groups() if part is not None))
    text = re.sub(r"^=\s*", "", text)
    # "C)" closes what it has not opened
    if choice := _choice(text, depth):
        return choice
    if not is_balanced(text) or not any(map(str.isalnum, text)):
        return None
    for reader in (_matrix, _union, _number, _named_number, _listing, _relation, _enclosed, _either_sign):
        if (found := reader(text, depth)) is not None:
            return found
    return _words(text) or _expression(text)


def _choice(text: str, _depth: int) -> Node | None:
    if match := _CHOICE.fullmatch(text):
        return Words(match[1])
    match = _CHOICE_AND_TEXT.fullmatch(text)
    if match is None:
        return None
    beside = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", match[2] or match[4]).strip()
    # "(A) + B" is mathematics
    if _OTHER_CHOICE.search(beside) or not re.match(r"[\w$\\]", beside):
        return None
    return Words(match[1] or match[3])


def _matrix(text: str, depth: int) -> Node | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    entries = [tuple(read(entry, depth + 1) for entry in row.split("&")) for row in rows]
    if not entries or len({len(row) for row in entries}) > 1 or any(entry is None for row in entries for entry in row):
        return None
    return Matrix(tuple(entries), match[1] in ("v", "V") and bool(match[1]))


def _union(text: str, depth: int) -> Node | None:
    parts, signs = _split(text, {r"\cup"})
    if not signs:
        return None
    name, parts[0] = _member(parts[0])
    items = tuple(read(part, depth + 1) for part in parts)
    return Items("union", items, name) if all(isinstance(item, Items) for item in items) else Literal(text)


def _member(text: str) -> tuple[str, str]:
    """The variable and the set of "x \\in [0, 1]", no variable and the text of anything else."""
    match = re.match(r"([a-zA-Z])\s*\\in(?![a-z])\s*", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _number(text: str, _depth: int) -> Node | None:
    if re.search(r"[=<>]|\\(?:le|ge|ne|lt|gt|in|approx)(?![a-z])", text):
        return None
    quantity = read_quantity(text)
    return Scalar(text, quantity, quantity.percent, quantity.unit) if quantity else None


def _is_name(text: str) -> bool:
    if re.fullmatch(r"\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)", text):
        # (y, x) = (1, 2) is another point than (1, 2)
        letters = re.findall("[a-z]", text)
        return letters == sorted(letters)
    return _NAME.fullmatch(text) is not None and not _FUNCTIONS.search(text)


def _named_number(text: str, _depth: int) -> Node | None:
    name, sign, value = text.partition("=")
    if not sign or not _is_name(name.strip()) or "=" in value:
        return None
    quantity = read_quantity(value)
    if quantity is None:
        return None
    return Relation("=", Scalar(name.strip()), Scalar(value, quantity, quantity.percent, quantity.unit), name.strip())


def _items(parts: list[str], depth: int) -> tuple[Any, ...] | None:
    items = tuple(read(part, depth + 1) for part in parts[: MAX_ITEMS + 1])
    return None if len(items) > MAX_ITEMS or any(item is None for item in items) else items


def _listing(text: str, depth: int) -> Node | None:
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    parts, signs = _split(text, _LISTING)
    if not signs:
        return None
    items = _items([part for part in parts if part], depth)
    if items is None:
        return Literal(text)
    either = set(signs) <= {"or", r"\lor", r"\vee"}
    if either and all(same(items[0], item) for item in items[1:]):
        # one answer in two spellings
        return items[0]
    names = {item.name for item in items if isinstance(item, Relation) and item.name}
    if len(names) == 1 and isinstance(items[0], Relation):
        # "x = 1 or x = 2" and "x = 1, 2" are two values of x
        items = tuple(item.right if isinstance(item, Relation) and item.name else item for item in items)
    intervals = [item for item in items if isinstance(item, Items) and item.name]
    if len(intervals) == len(items) and len({item.name for item in intervals}) == 1:
        if not either:
            return Literal(text)
        return Items("union", items, intervals[0].name)
    return Items("bare", items) if len(items) > 1 else items[0]


def _relation(text: str, depth: int) -> Node | None:
    first, approximated = _split(text, {r"\approx"})
    if approximated:
        # the first says it exactly, the others its digits
        nodes = [read(side, depth + 1) for side in first]
        return nodes[0] if all(close(nodes[0], node) for node in nodes[1:]) else Literal(text)
    sides, signs = _split(text, _SIGNS)
    if not signs:
        return None
    kinds = [_SIGNS[sign] for sign in signs]
    nodes = [read(side, depth + 1) for side in sides]
    if any(node is None for node in nodes):
        return Literal(text)
    if set(kinds) == {"="}:
        return _equation(sides, nodes, text)
    if kinds[0] in (">", ">="):
        sides, nodes, kinds = sides[::-1], nodes[::-1], kinds[::-1]
        kinds = [{">": "<", ">=": "<="}.get(kind, kind) for kind in kinds]
    if not set(kinds) <= {"<", "<="}:
        return Relation(kinds[0], nodes[0], nodes[1]) if len(kinds) == 1 else Literal(text)
    below, above = Scalar(r"-\infty"), Scalar(r"\infty")
    if len(sides) == 2 and _is_name(sides[0]) and not _is_name(sides[1]):
        return Items("(" + (")" if kinds[0] == "<" else "]"), (below, nodes[1]), sides[0])
    if len(sides) == 2 and _is_name(sides[1]):
        return Items(("(" if kinds[0] == "<" else "[") + ")", (nodes[0], above), sides[1])
    if len(sides) == 3 and _is_name(sides[1]):
        ends = ("(" if kinds[0] == "<" else "[") + (")" if kinds[1] == "<" else "]")
        return Items(ends, (nodes[0], nodes[2]), sides[1])
    return Relation(kinds[0], nodes[0], nodes[1]) if len(sides) == 2 else Literal(text)


def _equation(sides: list[str], nodes: list[Any], text: str) -> Node | None:
    """An equation, or the value that a chain of equal sides states; None of sides that contradict each other."""
    named = [side for side in sides if _is_name(side)]
    values = [node for side, node in zip(sides, nodes, strict=True) if not _is_name(side)]
    if not named and len(sides) == 2 and any(has_variables(node) for node in nodes):
        return Relation("=", nodes[0], nodes[1])
    if not values:
        return Relation("=", nodes[0], nodes[1], sides[0]) if len(sides) == 2 else Literal(text)
    if any(not same(values[0], value) for value in values[1:]):
        return Literal(text)
    if not named:
        return values[-1]
    return Relation("=", Scalar(named[0]), values[-1], named[0])


def _enclosed(text: str, depth: int) -> Node | None:
    name, text = _member(text)
    if re.fullmatch(r"\\mathbb\s*\{R\}", text):
        return Items("()", (Scalar(r"-\infty"), Scalar(r"\infty")), name)
    opening = re.match(r"\\(?:\{|lbrace|langle)|[(\[]", text)
    closing = re.search(r"(?:\\(?:\}|rbrace|rangle)|[)\]])$", text)
    if opening is None or closing is None:
        return None
    inner = text[opening.end() : closing.start()]
    if not is_balanced(inner):
        return None
    ends = opening[0].replace(r"\lbrace", r"\{") + closing[0].replace(r"\rbrace", r"\}")
    if re.search(r"(?<!\\)\||\\mid|:", inner):
        return Literal(text)
    if ", " in inner:
        inner = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), inner)
    parts, signs = _split(inner, {",", ";"})
    if ends == "()" and not signs:
        return read(inner, depth + 1) if _choice(inner, depth) or not re.search(r"[a-zA-Z]", inner) else None
    items = _items(parts, depth)
    if items is None:
        return Literal(text)
    if ends == r"\{\}":
        distinct: list[Any] = []
        for item in items:
            if not any(same(item, other) for other in distinct):
                distinct.append(item)
        return Items("set", tuple(distinct), name)
    kind = {r"\langle\rangle": "()"}.get(ends, ends)
    return Items(kind, items, name) if kind in ("()", "[]", "(]", "[)") else Literal(text)


def _either_sign(text: str, depth: int) -> Node | None:
    if len(re.findall(r"\\(?:pm|mp)(?![a-z])", text)) != 1:
        return None
    sides = [re.sub(r"\\(?:pm|mp)(?![a-z])", sign, text) for sign in "+-"]
    items = _items([side.lstrip("+ ") for side in sides], depth)
    return Items("bare", items) if items else None


def _words(text: str) -> Node | None:
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace("\\ ", " ").strip(" .")
    if _WORDS.fullmatch(plain) is None or _FUNCTIONS.match(plain) or (len(plain) == 1 and "\\text" not in text):
        return None
    if re.fullmatch("[abcdkmnpqrstuvwxyz]{2,3}", plain) and plain == text:
        # a product of variables, in any order
        return None
    plain = " ".join(plain.replace(".", "").split())
    return Words(plain.casefold() if len(plain) > 3 or plain.casefold() in ("yes", "no", "odd") else plain)


def _expression(text: str) -> Node:
    body, percent, unit = unit_after(text)
    # a plain number with what may stand beside it has been read already, or refused for it
    if parse(body) is None or (body != text and read_number(body) is not None):
        return Literal(squeeze(text))
    return Scalar(body, None, percent, unit)
