"""Verifiers: pure functions (completion, answer, row) -> reward, run by the workers of srft.rewards."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from srft.tasks import REASONING_GYM, reasoning_gym_dataset

Verifier = Callable[[str, Any, dict[str, Any]], float]

MAX_EXPRESSION_CHARS = 200  # three stack frames each at worst: nested parentheses stay within Python's limit
MAX_NUMBER_CHARS = 200  # exact arithmetic on longer literals would cost more than it can be worth


class BadGold(Exception):
    """The ground truth itself cannot be read, so the completion cannot be graded."""


def _after_thinking(text: str) -> str:
    """The part that follows the last </think>; nothing when a <think> is never closed."""
    head, closed, tail = text.rpartition("</think>")
    if closed:
        return tail
    return "" if "<think>" in text else text


_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<open>\{)|\s+(?P<bare>[^\s{}$\\]+))|\\[{}]|[{}]")


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Position and content of the last \boxed{...}, \fbox{...} or brace-less "\boxed 2", or None.

    Args:
        text: Any text; a box that is never closed does not count.
    """
    best: tuple[int, str] | None = None
    # one pass, so that a completion that opens a thousand boxes costs no more than another
    opened: list[tuple[int, int] | None] = []
    for match in _BOX_TOKEN.finditer(text):
        found = None
        if match["open"]:
            opened.append((match.start(), match.end()))
        elif match["bare"]:
            found = match.start(), match["bare"].rstrip(".,")
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened and (box := opened.pop()) is not None:
            found = box[0], text[box[1] : match.start()]
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    return best


def _marked_answer(text: str, hashes: int) -> str | None:
    r"""What the last \boxed{}, <answer></answer> or run of ``hashes`` '#' holds; None without any."""
    found = []
    if (boxed := last_boxed(text)) is not None:
        found.append(boxed)
    found += [(m.start(), m[1]) for m in re.finditer(r"<answer>(.*?)</answer>", text, re.DOTALL)]
    found += [(m.start(), m[1]) for m in re.finditer(rf"#{{{hashes},}}([^#\n]*)", text)]
    return max(found)[1].strip() if found else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def exact(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the text in the last \boxed, <answer> or after the last '#', or the last line, is the answer.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: Compared as text, without surrounding white space.
        row: Not used.
    """
    text = _after_thinking(completion)
    marked = _marked_answer(text, hashes=1)
    return float((_last_line(text) if marked is None else marked) == str(answer).strip())


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.\d+|\d+)"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-−])?[$€£]?(?P<sign2>(?<=[$€£])[-−])?"
    rf"(?:\\[dt]?frac\{{(?P<latex_num>-?\d+)\}}\{{(?P<latex_den>\d+)\}}"
    rf"|(?P<num>{_UNSIGNED})(?:\s?/\s?(?P<den>{_UNSIGNED}))?)"
    r"\s?(?P<percent>\\?%)?"
)


def _number(text: str, *, last: bool) -> set[Fraction]:
    """Values that the first or last number may stand for: itself, and a hundredth of it before a %."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return set()
    match = matches[-1 if last else 0]
    if len(match[0]) > MAX_NUMBER_CHARS:
        return set()
    value = Fraction((match["num"] or match["latex_num"]).replace(",", ""))
    denominator = match["den"] or match["latex_den"]
    if denominator is not None:
        divisor = Fraction(denominator.replace(",", ""))
        if divisor == 0:
            return set()
        value /= divisor
    if (match["sign"] is None) != (match["sign2"] is None):
        value = -value
    return {value, value / 100} if match["percent"] else {value}


def numeric(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the final number equals the answer exactly, as a fraction.

    The number is the first one in the last \boxed, <answer> or after the last "##" or longer, else the last
    one in the text. Thousands commas, currency signs, a/b, \frac{a}{b} and % are read; "50%" is 50 and 0.5.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: A number, or text whose last number counts.
        row: Not used.

    Raises:
        BadGold: If the answer holds no number.
    """
    gold = _number(str(answer), last=True)
    if not gold:
        raise BadGold(f"no number in the answer {answer!r}")
    text = _after_thinking(completion)
    marked = _marked_answer(text, hashes=2)
    return float(bool(gold & (_number(text, last=True) if marked is None else _number(marked, last=False))))


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
    text = _after_thinking(completion)
    marked = _marked_answer(text, hashes=1)
    line = _last_line(text) if marked is None else marked
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


def _squeeze(latex: str) -> str:
    return re.sub(r"\s+|\\left|\\right|\\[!,;]", "", latex.replace("dfrac", "frac").replace("tfrac", "frac"))


@lru_cache(maxsize=256)
def _parse_gold(answer: str) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    boxed = last_boxed(answer)
    latex = boxed[1] if boxed else answer.strip().strip("$")
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return tuple(parse(rf"$\boxed{{{latex}}}$", extraction_config=configs, parsing_timeout=None))


def math(completion: str, answer: Any, row: dict[str, Any]) -> float:
    r"""1 if the last \boxed{} equals the answer by math-verify, gold first; 0 without a \boxed{}.

    Args:
        completion: Text of the model, or of a demonstration.
        answer: LaTeX or plain text, in a \boxed{} or not.
        row: Not used.

    Raises:
        BadGold: If math-verify cannot read the answer.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    gold = _parse_gold(str(answer))
    if not gold:
        raise BadGold(f"math-verify cannot read the answer {answer!r}")
    boxed = last_boxed(_after_thinking(completion))
    if boxed is None:
        return 0.0
    if _squeeze(boxed[1]) == _squeeze(str(answer)):
        return 1.0
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    # the pool's deadline is the only clock: math-verify's own runs on SIGALRM and would end in a plain 0
    predicted = parse(
        rf"$\boxed{{{boxed[1]}}}$",
        extraction_config=[config],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return float(verify(list(gold), predicted, timeout_seconds=None))


def _reasoning_gym(name: str) -> Verifier:
    dataset = reasoning_gym_dataset(name, size=1, seed=0)

    def verify(completion: str, answer: Any, row: dict[str, Any]) -> float:
        text = _after_thinking(completion)
        tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        return float(dataset.score_answer((tagged[-1] if tagged else text).strip(), row))

    return verify


def _custom(spec: str) -> Verifier:
    path, _, function = spec.rpartition(":")
    file = Path(path)
    sys.path.insert(0, str(file.resolve().parent))
    module_spec = importlib.util.spec_from_file_location(f"srft_custom_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # dataclasses and pickle look the module up by name
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    verifier = getattr(module, function, None)
    if not callable(verifier):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{path} has no function {function!r}; it has: {', '.join(names) or 'none'}")
    _check_signature(spec, verifier)
    return verifier


_SIGNATURE = "def reward(completion, answer, row) -> float"


def _check_signature(spec: str, verifier: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with (completion, answer, row), knowing other trainers' rewards."""
    try:
        signature = inspect.signature(verifier)
    except (TypeError, ValueError):
        # something built in: only calling it can tell
        return
    name, names = spec.rpartition(":")[2], set(signature.parameters)
    if names & {"solution_str", "data_source"}:
        call = "row.get('data_source'), completion, answer, row.get('extra_info')"
        raise ValueError(
            f"{spec} has verl's signature {signature}; write {_SIGNATURE}: return {name}({call}), where a score in a "
            "dict is returned as a number, and set reward.kind to it"
        )
    if names & {"completions", "prompts", "queries", "responses"}:
        raise ValueError(
            f"{spec} takes whole batches, as TRL's rewards do, {signature}; it is called once a completion here: write "
            f"{_SIGNATURE}: return {name}(completions=[completion], answer=[answer])[0], with what else it needs, and "
            "set reward.kind to it"
        )
    try:
        signature.bind("completion", "answer", {})
    except TypeError as error:
        raise ValueError(f"{spec} has the signature {signature}, expected {_SIGNATURE} ({error})") from None
    if inspect.iscoroutinefunction(verifier):
        raise ValueError(f"{spec} is an async function; write {_SIGNATURE}, which may call asyncio.run inside")


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "countdown": countdown, "math": math}


def check_kind(kind: str) -> None:
    """Refuse a verifier name that cannot be right, without loading anything.

    Args:
        kind: "exact", "numeric", "countdown", "math", "reasoning_gym:<task>" or "path/to/file.py:function".

    Raises:
        ValueError: On an unknown name or a missing file.
    """
    if kind in VERIFIERS or (kind.startswith(REASONING_GYM) and len(kind) > len(REASONING_GYM)):
        return
    path, colon, function = kind.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"reward {kind!r}: no such file {path}")
        if not function.isidentifier():
            raise ValueError(
                f"reward {kind!r}: {function!r} is not a function name; write path/to/file.py:function"
            )
        return
    near = difflib.get_close_matches(kind, VERIFIERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown reward {kind!r}; {hint}choose from {', '.join(VERIFIERS)}, reasoning_gym:<task>, "
        "path/to/file.py:function"
    )


def load_verifier(kind: str) -> Verifier:
    """Return the verifier of that name, imported and warmed up so that its first item is as fast as the rest.

    Args:
        kind: As in :func:`check_kind`.

    Raises:
        ValueError: On an unknown name, a missing file, function, package or task.
    """
    check_kind(kind)
    if kind.startswith(REASONING_GYM):
        return _reasoning_gym(kind.removeprefix(REASONING_GYM))
    if kind not in VERIFIERS:
        return _custom(kind)
    if kind == "math":
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ValueError("the math reward needs math-verify: pip install 'srft[train]'") from error
        # it warns once that its timeouts are off and logs every formula that it cannot read
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
        math(r"\boxed{\frac{1}{2}}", "0.5", {})
    return VERIFIERS[kind]
