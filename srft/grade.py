"""Grade a file of answers and completions, or the answers of a set: ``python -m srft.grade answers.jsonl``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srft.data.columns import has_column, lookup
from srft.data.files import read_files
from srft.disk import WriteError
from srft.evaluation.golds import answer_of, check_golds, golds_of_file, golds_of_set, told
from srft.record.files import json_line, write_atomically
from srft.rewards.kinds import check_kind
from srft.rewards.pool import RewardPool, RewardResult

_BATCH = 4096  # completions handed to the pool at once
_PAIRS = 300_000
_FAULTS = {
    "bad_gold": "answers that cannot be read", "timeout": "timeouts", "error": "errors", "unjudged": "unjudged",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Where a row holds what is graded.

    Args:
        completion: Column or dotted path of the text, or of a list of texts.
        answer: Of the ground truth.
        expected: Of a verdict to compare with, true or false; None where there is none.
        after: A text of which the last in the column stands before the answer; None where the column is the answer.
    """

    completion: str = "completion"
    answer: str = "answer"
    expected: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    Args:
        place: Where its row stands.
        result: What the verifier says.
        expected: What the row says; None where it says nothing.
    """

    place: str
    result: RewardResult
    expected: bool | None = None

    @property
    def is_right(self) -> bool:
        """Whether the completion earns at least half of the reward."""
        return self.result.value >= 0.5


def grade_file(path: str, kind: str, columns: Columns, *, workers: int = 2, deadline_s: float = 5.0) -> list[Grade]:
    """Grade every completion of a file.

    Args:
        path: A file as of ``data.train``, a folder or a glob.
        kind: The verifier, as of ``reward.kind``.
        columns: Where its rows hold what is graded.
        workers: Processes that judge, > 0.
        deadline_s: Seconds for one completion, after which it counts as a timeout, > 0.

    Raises:
        ValueError: On an unknown verifier, a file that cannot be read, or a row that lacks a column.
    """
    check_kind(kind)
    items: list[tuple[str, Any, dict[str, Any]]] = []
    places: list[tuple[str, bool | None]] = []
    for place, row in read_files(path, "test", None):
        for column in filter(None, (columns.completion, columns.expected)):
            if not has_column(row, column):
                raise ValueError(
                    f"{place}: no column {column!r}, got {', '.join(row)}; name them by --completion, --answer and "
                    "--expected"
                )
        answer = answer_of(place, row, columns.answer, columns.after)
        said = lookup(row, columns.completion)
        texts = said if isinstance(said, list) else [said]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{place}: a completion is text, got {type(wrong[0]).__name__} {wrong[0]!r:.80}")
        expected = _verdict(place, columns.expected, lookup(row, columns.expected)) if columns.expected else None
        items += [(text, answer, row) for text in texts]
        places += [(place, expected)] * len(texts)
    results: list[RewardResult] = []
    with RewardPool(kind, workers, deadline_s) as pool:
        for first in range(0, len(items), _BATCH):
            results += pool.score(items[first : first + _BATCH], may_fail=True)
    return [Grade(place, result, expected) for (place, expected), result in zip(places, results, strict=True)]


def _verdict(place: str, column: str, value: Any) -> bool | None:
    """The verdict of a row, which a CSV file has as a text."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False, "": None}.get(value.strip().lower(), value)
    if value is None:
        return None
    if isinstance(value, str) or value not in (0, 1):
        raise ValueError(f"{place}: {column} is true, false, 1 or 0, got {value!r:.80}")
    return bool(value)


def summary(grades: Sequence[Grade]) -> list[str]:
    """Return what a person reads of the grades, in lines: shares, faults, and where they differ from what is expected.

    Args:
        grades: From ``grade_file``.
    """
    right = sum(grade.is_right for grade in grades)
    lines = [f"{right} of {len(grades)} right, {right / max(1, len(grades)):.1%}"]
    counts = Counter[str](grade.result.status for grade in grades)
    lines += [f"{counts[status]} {words}" for status, words in _FAULTS.items() if counts[status]]
    lines += [
        f"  {grade.place}: {grade.result.status} {grade.result.message}".rstrip()
        for grade in [grade for grade in grades if grade.result.status not in ("ok", "unjudged")][:5]
    ]
    compared = [grade for grade in grades if grade.expected is not None]
    if compared:
        differ = [grade for grade in compared if grade.is_right != grade.expected]
        same = len(compared) - len(differ)
        lines.append(f"{same} of {len(compared)} as expected, {same / len(compared):.2%}")
        lines += [f"  {g.place}: {'right' if g.is_right else 'wrong'}, expected the other" for g in differ[:20]]
        if len(differ) > 20:
            lines.append(f"  and {len(differ) - 20} more")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Grade files or the answers of sets, print what came of it, and write each verdict where that is asked for.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    given = _parser().parse_args(argv)
    try:
        if given.gold:
            _grade_golds(given)
        else:
            _grade_files(given)
    except (ValueError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srft.grade",
        description="Grade files of answers and completions; or, with --gold, the answers of sets against themselves "
        "and each other.",
    )
    parser.add_argument("files", nargs="+", metavar="file", help="jsonl, json, csv, parquet, arrow; with --gold a set")
    parser.add_argument(
        "--gold", action="store_true",
        help="each answer of a set, as of srft.evaluate, as a completion of its own problem and of the others",
    )  # fmt: skip
    parser.add_argument("--kind", help="verifier, as reward.kind has them (default: math, or the set's)")
    parser.add_argument(
        "--completion", action="append", metavar="COLUMN",
        help="column, or dotted path, of the text or texts; again for another (default: completion)",
    )  # fmt: skip
    parser.add_argument("--answer", metavar="COLUMN", help="column of the ground truth (default: answer, or the set's)")
    parser.add_argument("--answer-after", metavar="TEXT", help="what stands before the answer in its column")
    parser.add_argument(
        "--expected", action="append", metavar="COLUMN", help="column of a verdict to compare with, one a --completion"
    )
    parser.add_argument(
        "--pairs", type=int, default=_PAIRS,
        help=f"of --gold, most pairs of a set's answers, drawn where it has more (default: {_PAIRS})",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes that judge (default: 2)")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for one completion (default: 5)")
    parser.add_argument("--out", type=Path, help="write the verdicts to this jsonl")
    return parser


def _grade_files(given: argparse.Namespace) -> None:
    completions = given.completion or ["completion"]
    expected = given.expected or [None] * len(completions)
    if len(expected) != len(completions):
        raise ValueError(f"give --expected as often as --completion, {len(completions)} times, got {len(expected)}")
    if given.out is not None and not given.out.absolute().parent.is_dir():
        raise ValueError(f"--out {given.out}: there is no folder {given.out.absolute().parent}; make it first")
    grades: list[Grade] = []
    for file in given.files:
        for completion, verdict in zip(completions, expected, strict=True):
            columns = Columns(completion, given.answer or "answer", verdict, given.answer_after)
            found = grade_file(
                file, given.kind or "math", columns, workers=given.workers, deadline_s=given.deadline
            )
            if len(completions) > 1:
                found = [replace(grade, place=f"{grade.place}, {completion}") for grade in found]
            grades += found
    print("\n".join(summary(grades)), flush=True)
    if given.out is not None:
        rows = ({"place": g.place, "value": g.result.value, "status": g.result.status, "message": g.result.message}
                for g in grades)  # fmt: skip
        write_atomically(given.out, "".join(map(json_line, rows)))


def _grade_golds(given: argparse.Namespace) -> None:
    if given.completion or given.expected or given.out:
        raise ValueError("--gold takes the answers themselves; leave out --completion, --expected and --out")
    if given.answer is None and (given.kind or given.answer_after):
        raise ValueError("--gold takes a set with the verifier that it has; for a file of your own give --answer, too")
    if given.pairs < 0:
        raise ValueError(f"--pairs is 0 or more, got {given.pairs}")
    for word in given.files:
        if given.answer is None:
            kind, golds = golds_of_set(word)
        else:
            kind = given.kind or "math"
            golds = golds_of_file(word, kind, given.answer, given.answer_after)

        def say(done: int, of: int, name: str = word) -> None:
            print(f"{name}: {done} of {of} pairs", file=sys.stderr)

        check = check_golds(
            golds, kind, most=given.pairs, workers=given.workers, deadline_s=given.deadline, say=say
        )
        print("\n".join([f"{word}, {kind}:", *told(check)]), flush=True)


if __name__ == "__main__":
    main()
