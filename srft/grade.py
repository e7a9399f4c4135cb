"""Grade a file of answers and completions: ``python -m srft.grade answers.jsonl``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.data.columns import has_column, lookup
from srft.data.files import read_files
from srft.disk import WriteError
from srft.record.files import json_line, write_atomically
from srft.rewards.kinds import check_kind
from srft.rewards.pool import RewardPool, RewardResult

_BATCH = 4096  # completions handed to the pool at once
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
    """

    completion: str = "completion"
    answer: str = "answer"
    expected: str | None = None


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
        for column in filter(None, (columns.completion, columns.answer, columns.expected)):
            if not has_column(row, column):
                raise ValueError(
                    f"{place}: no column {column!r}, got {', '.join(row)}; name them by --completion, --answer and "
                    "--expected"
                )
        said = lookup(row, columns.completion)
        texts = said if isinstance(said, list) else [said]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{place}: a completion is text, got {type(wrong[0]).__name__} {wrong[0]!r:.80}")
        expected = lookup(row, columns.expected) if columns.expected else None
        if expected is not None and expected not in (0, 1):
            raise ValueError(f"{place}: {columns.expected} is true, false, 1 or 0, got {expected!r:.80}")
        items += [(text, lookup(row, columns.answer), row) for text in texts]
        places += [(place, None if expected is None else bool(expected))] * len(texts)
    results: list[RewardResult] = []
    with RewardPool(kind, workers, deadline_s) as pool:
        for first in range(0, len(items), _BATCH):
            results += pool.score(items[first : first + _BATCH], may_fail=True)
    return [Grade(place, result, expected) for (place, expected), result in zip(places, results, strict=True)]


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
    """Grade a file, print what came of it, and write each verdict where that is asked for.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m srft.grade", description="Grade a file of answers and completions."
    )
    parser.add_argument("file", help="jsonl, json, csv, parquet or arrow")
    parser.add_argument("--kind", default="math", help="verifier, as reward.kind has them (default: math)")
    parser.add_argument("--completion", default="completion", help="column, or dotted path, of the text or texts")
    parser.add_argument("--answer", default="answer", help="column of the ground truth")
    parser.add_argument("--expected", help="column of a verdict to compare with")
    parser.add_argument("--workers", type=int, default=2, help="processes that judge (default: 2)")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for one completion (default: 5)")
    parser.add_argument("--out", type=Path, help="write the verdicts to this jsonl")
    given = parser.parse_args(argv)
    columns = Columns(given.completion, given.answer, given.expected)
    try:
        grades = grade_file(given.file, given.kind, columns, workers=given.workers, deadline_s=given.deadline)
        if given.out is not None:
            rows = ({"place": g.place, "value": g.result.value, "status": g.result.status, "message": g.result.message}
                    for g in grades)  # fmt: skip
            write_atomically(given.out, "".join(map(json_line, rows)))
    except (ValueError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(summary(grades)))


if __name__ == "__main__":
    main()
