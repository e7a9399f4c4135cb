"""The number that a text of sentences ends in."""

from __future__ import annotations

import re

from srft.rewards.answers import tidy
from srft.rewards.quantities import Quantity, read_quantity
from srft.rewards.units import unit_of
from srft.rewards.words import CHANGES, bounds, denies, part_scripts


def last_quantity(text: str) -> Quantity | None:
    """Return the last number of a text of sentences; None if what holds the last digit is no plain number.

    Args:
        text: A completion that marks no answer.
    """
    line = next((line for line in reversed(text.splitlines()) if re.search(r"[0-9½⅓⅔¼¾⅛]", line)), "")
    line = part_scripts(re.sub("[½⅓⅔¼¾⅛]", lambda m: tidy(m[0]), line))
    if stated := list(_STATED.finditer(line)):
        return read_quantity(_END_OF_STATEMENT.split(stated[-1]["what"])[0])
    if "=" not in line and not re.search(r"(?<![\\\w])[^\W\d_]{2,}", line):
        return read_quantity(line.lstrip("# "))
    words = line.split()
    place = next((i for i in reversed(range(len(words))) if re.search(r"[0-9]", words[i])), None)
    if place is None:
        return None
    before, word, after = words[:place], words[place].rpartition(">>")[2], words[place + 1 : place + 4]
    if re.fullmatch(r"[0-9]+/[0-9]+[.,;!?]*", word) and before and re.fullmatch(r"[-$]?[0-9]+", before[-1]):
        word = f"{before.pop()} {word}"
    if re.match(r"10\s*(?:\^|\*\*)", word) and len(before) > 1 and before[-1] in _TIMES_SIGNS:
        # 5 x 10^3
        word = f"{before[-2]} {before[-1]} {word}"
        before = before[:-2]
    head, equals, tail = word.rpartition("=")
    if equals:
        before, word = [*before, *head.replace("=", " = ").split(), "="], tail
    previous = before[-1] if before else ""
    if previous in _OPERATORS or (following := after[0] if after else "") in _OPERATORS or following == "=":
        return None
    if _COMPOUND.search(" ".join(before)) or _is_second_unit(before, after):
        return None
    joined = {"or", "to", "through"}
    if {"between", "either", "both"} & {name.lower() for name in before}:
        joined.add("and")
    if previous.lower() in joined and re.search(r"[0-9]", " ".join(before[-4:])):
        return None
    # a list, of numbers or of choices
    if re.fullmatch(r"[a-zA-Z]*[(\[{]*[-$]?(?:[0-9][0-9.,/]*[0-9,;]|[0-9])", previous):
        return None
    if re.fullmatch(r"[A-J][).:]", previous) and any(re.fullmatch(r"[A-J][).:]", w) for w in before[:-1]):
        return None
    word = re.sub(r"^(?:\\[(\[]|[#(\[\"'*])+|(?:\\[)\]]|[?)\]\"'*])+(?=[.,;:]*$)", "", word)
    clause = _END_OF_CLAUSE.split(" ".join(before))[-1].split()[-3:]
    if denies(" ".join(clause)) or bounds(" ".join(clause[-2:])):
        return None
    if previous.lower().strip("$(*") in CHANGES | {"minus", "negative"} or _COMMAND.match(previous):
        word = f"{previous} {word}"
    ended = word[-1:] in ".?!;:,"
    found = read_quantity(word if ended else " ".join([word, *after]))
    if previous == "=" and len(before) > 1 and before[-3:-2] in (["="], []) and found is not None:
        # x = 5 = 7
        other = read_quantity(before[-2])
        return found if other is None or other.equals(found) else None
    return found


def _is_second_unit(before: list[str], after: list[str]) -> bool:
    """Whether a number with a unit stands before one with another: "2 hours (and) 30 minutes"."""
    *_, number, unit = ["", "", *(word for word in before if word != "and")]
    its_own = after[0].strip(".,;:!?") if after else ""
    return bool(re.fullmatch(r"[0-9][0-9.,/]*", number) and unit_of([unit]) and unit_of([its_own]))


# another number stands before, and one of the two is the answer, or what comes of both
_COMPOUND = re.compile(
    r"[0-9]\S*(?:\s+[^\s.,;:!?]+){0,2}\s+(?:or|oder|ou|o|или)(?:\s+[^\s.,;:!?]+){0,2}$"
    r"|[0-9]\S*(?:\s+[^\s.,;:!?]+)?\s+(?:out of|(?:divided|multiplied) by|times)$",
    re.IGNORECASE,
)
_COMMAND = re.compile(r"\$?\\(?!\(|\[|approx)")
_STATED = re.compile(r"\banswer\b(?:(?!\banswer\b)[^:=0-9]){0,40}?(?:\bis\b|:|=)(?P<what>.*[0-9].*)", re.IGNORECASE)
_END_OF_STATEMENT = re.compile(r"\.\s+(?=[A-Z])|,?\s+(?:because|since|as)\s")
_END_OF_CLAUSE = re.compile(r"[.,;:!?]\s")
_TIMES_SIGNS = {"*", "x", "×", "·", r"\times", r"\cdot"}
_OPERATORS = _TIMES_SIGNS | set(r"+ / ^ - − – — ± % : ∙ • ÷ ** < > <= >= ≤ ≥ ≠ != \le \ge \ne \neq".split())
