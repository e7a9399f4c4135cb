"""Whether a verifier knows the answers of a set: each against itself, and against those of other problems."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from srft.data.columns import Row, has_column, lookup
from srft.data.files import read_files
from srft.data.messages import texts_of
from srft.evaluation.sets import read_set
from srft.options import load_config
from srft.rewards.answers import BadGold, gold_text
from srft.rewards.math_answers import read
from srft.rewards.math_nodes import Items, Matrix, Relation, Scalar
from srft.rewards.pool import Item, RewardPool, RewardResult
from srft.rewards.verifiers import ANSWER_ALONE

_BATCH = 16384  # pairs handed to the pool at once


@dataclass(frozen=True)
class Gold:
    """The answer of a problem.

    Args:
        place: Id of the problem, or where its row stands.
        text: The answer as text.
        completion: What states it: the answer as it is marked, or a demonstration where more than the answer is judged.
        answer: As the verifier gets it.
        row: As the verifier gets it.
    """

    place: str
    text: str
    completion: str
    answer: Any
    row: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Answers of two problems, different as texts, of which one earns a reward where the other is asked for.

    Args:
        gold: What is asked for.
        said: What earns the reward.
        both: Whether it earns one the other way round, too.
    """

    gold: Gold
    said: Gold
    both: bool


@dataclass(frozen=True)
class Check:
    """What a verifier makes of the answers of a set.

    Args:
        kind: The verifier.
        count: Answers.
        refused: Those that are not right against themselves.
        pairs: Ordered pairs of answers that are different texts, each text of the first problem that has it.
        tried: Of these pairs.
        accepted: Those that earn a reward; of two that are each other's turned round, one.
        faults: Pairs by status, of those that have no verdict.
    """

    kind: str
    count: int
    refused: list[tuple[Gold, RewardResult]]
    pairs: int
    tried: int
    accepted: list[Pair]
    faults: Counter[str]

    @property
    def rewards(self) -> int:
        """Ordered pairs that earn a reward."""
        return sum(2 if pair.both else 1 for pair in self.accepted)


def answer_of(place: str, row: Row, column: str, after: str | None = None) -> Any:
    """Return the answer of a row.

    Args:
        place: Where the row stands.
        row: Any.
        column: Column, or dotted path, of the answer.
        after: A text of which the last in the column stands before the answer; None where the column is the answer.

    Raises:
        ValueError: When the row lacks the column, or that text.
    """
    if not has_column(row, column):
        raise ValueError(f"{place}: no column {column!r}, got {', '.join(row)}; name it by --answer")
    answer = lookup(row, column)
    if after is None:
        return answer
    _, mark, answer = str(answer).rpartition(after)
    if not mark:
        raise ValueError(f"{place}: no {after!r} in column {column!r}, got {answer!r:.80}; change --answer-after")
    return answer


def golds_of_set(word: str) -> tuple[str, list[Gold]]:
    """Return the verifier of a set, and its answers.

    Args:
        word: As of ``srft.evaluation.sets.read_set``.

    Raises:
        ValueError: On an unknown name, a source that cannot be read, or a row that lacks something.
    """
    chosen = read_set(word, load_config([]), use_demo=True)
    return chosen.reward, [
        _gold(e.id, e.answer, e.row, chosen.reward, [texts_of(demo)[-1] for demo in e.demos]) for e in chosen.examples
    ]


def golds_of_file(path: str, kind: str, column: str, after: str | None = None) -> list[Gold]:
    """Return the answers of a file whose layout nobody knows.

    Args:
        path: A file, a folder or a glob.
        kind: The verifier.
        column: Column, or dotted path, of the answers.
        after: As of ``answer_of``.

    Raises:
        ValueError: On a file that cannot be read, or a row that lacks the column.
    """
    golds = []
    for place, row in read_files(path, "test", None):
        golds.append(_gold(place, answer_of(place, row, column, after), row, kind, []))
    return golds


def _gold(place: str, answer: Any, row: dict[str, Any], kind: str, demos: Sequence[str]) -> Gold:
    several = kind == "math" and isinstance(answer, list | tuple) and len(answer) > 1
    try:
        text = ", ".join(map(gold_text, answer)) if several else gold_text(answer)
    except BadGold:
        text = str(answer)
    if kind in ANSWER_ALONE:
        return Gold(place, text, rf"\boxed{{{text}}}" if kind == "math" else f"<answer>{text}</answer>", answer, {})
    return Gold(place, text, demos[0] if demos else f"<answer>{text}</answer>", answer, row)


def check_golds(
    golds: Sequence[Gold], kind: str, *, most: int, workers: int, deadline_s: float, say: Callable[[int, int], None]
) -> Check:
    """Judge each answer as a completion of its own problem, and of those problems whose answer is another text.

    Args:
        golds: At least one.
        kind: The verifier.
        most: Pairs of different texts that are tried, drawn where there are more, always the same ones.
        workers: Processes that judge, > 0.
        deadline_s: Seconds for one of them, > 0.
        say: Told how many pairs are done, and of how many, after each batch but the last.
    """
    with RewardPool(kind, workers, deadline_s) as pool:
        own = pool.score([(gold.completion, gold.answer, gold.row) for gold in golds], may_fail=True)
        refused = [(gold, result) for gold, result in zip(golds, own, strict=True) if result.value < 0.5]
        distinct: dict[str, Gold] = {}
        for gold, result in zip(golds, own, strict=True):
            if result.status != "bad_gold":
                distinct.setdefault(gold.text, gold)
        texts = list(distinct.values())
        pairs = len(texts) * (len(texts) - 1)
        numbers = range(pairs) if pairs <= most else sorted(random.Random(0).sample(range(pairs), most))
        rewarded: list[tuple[int, int]] = []
        faults: Counter[str] = Counter()
        for first in range(0, len(numbers), _BATCH):
            batch = list(_places(numbers[first : first + _BATCH], len(texts)))
            items: list[Item] = [(texts[said].completion, texts[g].answer, texts[g].row) for g, said in batch]
            results = pool.score(items, may_fail=True)
            rewarded += [place for place, result in zip(batch, results, strict=True) if result.value >= 0.5]
            faults.update(result.status for result in results if result.status != "ok")
            if first + _BATCH < len(numbers):
                say(first + _BATCH, len(numbers))
    turned = {(said, gold) for gold, said in rewarded}
    accepted = [
        Pair(texts[gold], texts[said], (gold, said) in turned)
        for gold, said in rewarded
        if (gold, said) not in turned or gold < said
    ]
    return Check(kind, len(golds), refused, pairs, len(numbers), accepted, faults)


def _places(numbers: Sequence[int], texts: int) -> Iterator[tuple[int, int]]:
    """Of ordered pairs, counted through, the places of the two, which are never the same."""
    for number in numbers:
        one, other = divmod(number, texts - 1)
        yield one, other + (other >= one)


def told(check: Check) -> list[str]:
    """Return both figures, and all that is not as it should be, in lines.

    Args:
        check: From ``check_golds``.
    """
    right = check.count - len(check.refused)
    lines = [f"{right} of {check.count} right against themselves, {right / max(1, check.count):.1%}"]
    for gold, result in check.refused:
        why = "earns nothing" if result.status == "ok" else f"{result.status} {result.message}"
        lines.append(f"  {gold.place}: {_short(gold.text)} {why}")
    drawn = "" if check.tried == check.pairs else f" drawn from {check.pairs}"
    lines.append(f"{check.rewards} of {check.tried} pairs of different texts{drawn} earn a reward")
    lines += [f"  {count} {status}" for status, count in check.faults.items()]
    for pair in check.accepted:
        gold, said = pair.gold, pair.said
        ways = "both ways" if pair.both else f"where {_short(gold.text)} is asked for"
        as_what = f", read as {_reading(read(gold.text))} | {_reading(read(said.text))}" if check.kind == "math" else ""
        lines.append(f"  {gold.place} {_short(gold.text)}, {said.place} {_short(said.text)}: {ways}{as_what}")
    return lines


def _short(text: str) -> str:
    """A text in one line, as it stands: escapes would hide what LaTeX it is."""
    return f"`{' '.join(text.split()):.200}`"


def _reading(node: Any) -> str:
    """How an answer is understood, in short."""
    if isinstance(node, Scalar):
        number = node.text if node.quantity is None else str(node.quantity.value)
        return " ".join(filter(None, [number, "%" * node.percent, node.unit]))
    if isinstance(node, Items):
        inner = ", ".join(map(_reading, node.items))
        return f"{node.kind[0]}{inner}{node.kind[1]}" if len(node.kind) == 2 else f"{node.kind} {{{inner}}}"
    if isinstance(node, Relation):
        return f"{_reading(node.left)} {node.sign} {_reading(node.right)}"
    if isinstance(node, Matrix):
        return "; ".join(", ".join(map(_reading, row)) for row in node.rows)
    return "nothing" if node is None else f"{node.text!r}"
