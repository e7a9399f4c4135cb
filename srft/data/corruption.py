"""Demonstrations made imperfect on purpose: a share of them, in one way, always the same ones of a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from srft.data.examples import Example
from srft.data.messages import Demo
from srft.rewards.verifiers import countdown

CorruptKind = Literal["wrong-step", "wrong-answer", "other"]

_STEP = re.compile(r"\d([-+*])(\d)=\d")  # of a chain, whatever stands between two of them
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MARK = re.compile(r"\\boxed\s*\{|<answer>|####|#(?=[-\d])")
_DRAWS = 100  # of another problem, until one has another answer


def corrupted(
    source: str, examples: Sequence[Example], share: float, kind: CorruptKind, seed: int
) -> tuple[list[Example], set[tuple[str, int]], int]:
    """Return examples of which some demonstrations are imperfect; those of a smaller share are among them.

    Args:
        source: Where they come from; demonstrations of the built-in tasks are taken apart as what they are, others as
            text with numbers in it.
        examples: Any number; those without demonstrations stay as they are.
        share: Of all demonstrations, in [0, 1]; each is chosen by itself, with this probability.
        kind: "wrong-step": one step has another result, which the later ones and the answer carry on; of "countdown",
            another operation. A demonstration without steps gets a wrong answer. "wrong-answer": the answer alone is
            another number; of "countdown", a number of the expression. "other": the demonstration of a problem that has
            another answer.
        seed: With the example's id and the place of the demonstration it decides which are chosen and what they become.

    Returns:
        (examples, changed, unchanged): id and place of what is imperfect now, and how many of those chosen are as they
        were, since no number stands in them or no problem has another answer.
    """
    worse: list[Example] = []
    changed: set[tuple[str, int]] = set()
    unchanged = 0
    for example in examples:
        demos = list(example.demos)
        for place, demo in enumerate(example.demos):
            assert isinstance(demo, str), "options refuse conversations"
            rng = random.Random(f"corrupt:{seed}:{example.id}:{place}")
            if rng.random() >= share:
                continue
            new = _other(examples, example, rng) if kind == "other" else _wrong(source, example, demo, kind, rng)
            if new is None:
                unchanged += 1
            else:
                demos[place] = new
                changed.add((example.id, place))
        worse.append(replace(example, demos=demos))
    return worse, changed, unchanged


def _wrong(source: str, example: Example, demo: str, kind: CorruptKind, rng: random.Random) -> str | None:
    if source == "countdown":
        return _wrong_expression(example, demo, kind, rng)
    if source == "chain" and kind == "wrong-step":
        return _wrong_chain(demo, rng)
    return _wrong_text(demo, kind, rng)


def _other(examples: Sequence[Example], example: Example, rng: random.Random) -> Demo | None:
    for _ in range(_DRAWS):
        other = rng.choice(examples)
        if other.demos and str(other.answer) != str(example.answer):
            return rng.choice(other.demos)
    return None


def _wrong_chain(demo: str, rng: random.Random) -> str:
    """A chain with one step's result changed and the later ones worked out from it, such that it ends elsewhere."""
    steps = list(_STEP.finditer(demo))
    wrong = []
    for place, step in enumerate(steps):
        for result in range(10):
            value, text, at = result, f"{demo[: step.end() - 1]}{result}", step.end()
            for later in steps[place + 1 :]:
                operand = int(later[2])
                after = {"+": value + operand, "-": value - operand, "*": value * operand}[later[1]] % 10
                text += f"{demo[at : later.start()]}{value}{later[1]}{operand}={after}"
                value, at = after, later.end()
            # a product with 0 hides what was wrong before it
            if str(value) != demo[-1]:
                wrong.append((place, f"{text}{demo[at:-1]}{value}"))
    # every step as often as the others, however many of its results do
    place = rng.choice(sorted({place for place, _ in wrong}))
    return rng.choice([text for at, text in wrong if at == place])


def _wrong_expression(example: Example, demo: str, kind: CorruptKind, rng: random.Random) -> str:
    if kind == "wrong-step":
        tries = [
            f"{demo[: op.start()]}{other}{demo[op.end() :]}" for op in re.finditer(r"[-+*/]", demo) for other in "+-*/"
        ]
    else:
        tries = [
            f"{demo[: at.start()]}{number}{demo[at.end() :]}"
            for at in _NUMBER.finditer(demo)
            for number in range(1, max(10, *example.row["nums"]) + 1)
        ]
    return rng.choice([text for text in tries if not countdown(text, example.answer, example.row)])


def _wrong_text(demo: str, kind: CorruptKind, rng: random.Random) -> str | None:
    """Text whose answer is another number, and of a wrong step the numbers from there on that depend on it."""
    numbers = list(_NUMBER.finditer(demo))
    if not numbers:
        return None
    marks = list(_MARK.finditer(demo))
    answer = next((n for n in numbers if marks and n.start() >= marks[-1].end()), numbers[-1])
    instead = {answer[0]: _another(answer[0], rng)}
    first = answer
    if kind == "wrong-step" and (before := [n for n in numbers if n.end() <= answer.start()]):
        results = [n for n in before if demo[: n.start()].rstrip(" $\\").endswith("=")]
        first = rng.choice(results or before)
        instead.setdefault(first[0], _another(first[0], rng))
    end = answer.end()
    tail = _NUMBER.sub(lambda n: instead.get(n[0], n[0]), demo[first.start() : end])
    return demo[: first.start()] + tail + demo[end:]


def _another(number: str, rng: random.Random) -> str:
    """A number with one digit changed, as long as it was and with no new 0 in front."""
    place = rng.choice([i for i, char in enumerate(number) if char.isdigit()])
    digits = "123456789" if place == 0 and len(number) > 1 else "0123456789"
    return number[:place] + rng.choice([d for d in digits if d != number[place]]) + number[place + 1 :]
