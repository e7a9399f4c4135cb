"""Verifiers: pure functions (completion, answer, row) -> reward, run by the workers of srft.rewards.pool."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from srft.rewards.answers import (
    BadGold,
    after_thinking,
    final_box,
    gold_text,
    half_width,
    last_boxed,
    last_line,
    marked_answer,
    printed,
)
from srft.rewards.arithmetic import evaluate_expression
from srft.rewards.math_answers import MAX_CHARS, read
from srft.rewards.math_nodes import Literal, Words, same, squeeze
from srft.rewards.quantities import Quantity, read_quantity
from srft.rewards.sentences import last_quantity

Verifier = Callable[[str, Any, dict[str, Any]], float]


# a chain ends in "#8"; GSM8K in "#### 8", where headings, "## Step 2" or "## 2. Add", are no answer
_HASH = re.compile(r"#+([^#\n]*)")
_NUMBER_AFTER_HASHES = re.compile(
    r"(?<!#)#{2,}+(?![ \t]*[0-9]+[.)][ \t]+[^\s])"
    r"([ \t]*(?:[-+−$€£¥\\.(\[{*0-9½⅓⅔¼¾⅛]|[A-Za-z][ \t]*=|[^#\n]*\b(?i:answer)[^#\n]*[0-9½⅓⅔¼¾⅛])[^#\n]*)"
)


def exact(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the text in the last \boxed, <answer> or after the last '#', or the last line, is the answer.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: Compared as text, without surrounding white space. What programs print of one number or boolean is
            the same text: 18 and 18.0, 1e-05 and 0.00001, true and True; 07 and 7 are not.
        row: Not used.

    Raises:
        BadGold: If there is no answer: null, NaN, or empty.
    """
    wanted = {printed(gold_text(answer))}
    if not isinstance(answer, str | bytes) and callable(convert := getattr(answer, "tolist", None)):
        answer = convert()
    if isinstance(answer, list | tuple):
        wanted |= {str(list(answer)), json.dumps(answer, ensure_ascii=False, default=str)}
    text = after_thinking(completion)
    marked = marked_answer(text, _HASH)
    return float(printed(last_line(text) if marked is None else marked) in wanted)


@lru_cache(maxsize=256)
def _gold_quantity(answer: str) -> Quantity:
    marked = marked_answer(answer, _NUMBER_AFTER_HASHES)
    quantity = read_quantity(answer if marked is None else marked)
    if quantity is None:
        what = "no one number" if re.search(r"[0-9]", answer) else "no number"
        raise BadGold(f"{what} in the answer {answer!r:.200}")
    return quantity


def numeric(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the final number equals the answer exactly, as a fraction.

    The number is what the last \boxed, <answer> or line after "##" or longer states, else the last one in the text.
    Thousands, currency signs and units, a/b, \frac{a}{b}, mixed and repeating numbers, exponents and % are read;
    "50%" is 50 and 0.5. Several numbers, ranges, times and expressions are none.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: A number, or text that states one number.
        row: Not used.

    Raises:
        BadGold: If the answer states no number, or several.
    """
    gold = _gold_quantity(gold_text(answer))
    text = half_width(after_thinking(completion))
    marked = marked_answer(text, _NUMBER_AFTER_HASHES)
    found = last_quantity(text) if marked is None else read_quantity(marked)
    return float(found is not None and gold.equals(found))


_EQUATION_LABEL = re.compile(r"(?:answer|equation|expression)\s*(?:is)?\s*:?\s*(?=[-\d(])", re.IGNORECASE)


def countdown(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the final expression makes the target out of the given numbers, each used at most once.

    The expression stands in the last <answer>, \boxed or after the last '#', else on the last line, where a
    label such as "answer:" or "the final equation is" is cut off. An equation with the target on one side is
    read too.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: The target, where the row has none.
        row: Its ``nums`` are the numbers, its ``target`` the target.

    Raises:
        BadGold: If the numbers or the target cannot be read.
    """
    try:
        available = Counter(Fraction(str(number)) for number in row["nums"])
        target = Fraction(str(row.get("target", answer)))
    except (KeyError, TypeError, ValueError) as error:
        raise BadGold(
            f"a countdown row needs nums and target, got {row.get('nums')!r}, {answer!r}"
        ) from error
    text = after_thinking(completion)
    marked = marked_answer(text, _HASH)
    line = last_line(text) if marked is None else marked
    labels = list(_EQUATION_LABEL.finditer(line))
    sides = (line[labels[-1].end() :] if labels else line).strip().rstrip(".").strip("$ ").split("=")
    try:
        values = [evaluate_expression(side) for side in sides]
    except (ValueError, ZeroDivisionError):
        return 0.0
    if any(value != target for value, _ in values) or len(values) > 2:
        return 0.0
    used = max((numbers for _, numbers in values), key=len)
    # the other side may only state the target
    if len(values) == 2 and min(len(numbers) for _, numbers in values) != 1:
        return 0.0
    return float(not Counter(used) - available)


# a problem has many completions, and those of one policy often say the same
_read = lru_cache(maxsize=1024)(read)


def _gold_answer(answer: str) -> Any:
    boxed = last_boxed(answer)
    found = _read(boxed[1] if boxed else answer)
    # a sentence can be copied but not judged
    if found is None or (isinstance(found, Words | Literal) and len(found.text.split()) > 8):
        raise BadGold(f"the answer cannot be read as mathematics or a few words: {answer!r:.200}")
    return found


def math(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the last \boxed{} is the same mathematics as the answer; 0 without a \boxed{}.

    Numbers are compared exactly and expressions by proof, with math-verify's parser and sympy. Lists and sets have no
    order, points and intervals have one; an interval is the same as its inequality; "x =" and a unit may be left out
    but not changed; several answers are no answer where one is asked for.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: LaTeX or plain text, in a \boxed{} or not; a list of several is their set.
        row: Not used.

    Raises:
        BadGold: If the answer cannot be read.
    """
    if isinstance(answer, list | tuple) and len(answer) > 1:
        answer = ", ".join(map(gold_text, answer))
    answer = gold_text(answer)
    gold = _gold_answer(answer)
    boxed = final_box(after_thinking(completion))
    if boxed is None or len(boxed[1]) > MAX_CHARS:
        return 0.0
    inner = last_boxed(answer)
    if squeeze(boxed[1]) == squeeze(inner[1] if inner else answer):
        return 1.0
    found = _read(boxed[1])
    return float(found is not None and same(gold, found))


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "countdown": countdown, "math": math}
ANSWER_ALONE = ("exact", "numeric", "math")  # those that never look at the rest of the row
