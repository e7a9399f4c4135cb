"""The figures of an evaluation, as rows of text: which Markdown, the terminal and the page have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.evaluation.estimators import Share, accuracy, pass_at
from srft.evaluation.overlap import USUAL_N
from srft.evaluation.paper import ELSEWHERE, MATHEMATICS, TABLE_2, published
from srft.evaluation.record import Answered, read_settings, tally_of
from srft.evaluation.sets import SETS
from srft.report.table import Table
from srft.report.table import markdown as as_markdown

_NONE = "–"
_AS_IN_THE_PAPER = {"temperature": 0.6, "max_new_tokens": 8192}


@dataclass(frozen=True)
class SetResult:
    """What a set came to.

    Args:
        name: The set's.
        about: What ``evaluation.json`` says of it.
        answered: Its answers.
        accuracy: avg@n, or pass@1 where one answer was drawn; None where none was judged.
        passes: pass@k by k.
    """

    name: str
    about: Mapping[str, Any]
    answered: Answered
    accuracy: Share | None
    passes: Mapping[int, Share | None]

    @property
    def metric(self) -> str:
        """What the accuracy is called."""
        samples = self.about["asked"]["samples"]
        return f"avg@{samples}" if samples > 1 else "pass@1"

    @property
    def differs(self) -> list[str]:
        """What was asked otherwise than in the paper's Table 2, in words; of its sets alone."""
        known, asked = SETS.get(self.name), self.about["asked"]
        if known is None:
            return []
        found = [f"{asked[key]} for {usual} of {key}" for key, usual in _AS_IN_THE_PAPER.items() if asked[key] != usual]
        if asked["samples"] != known.samples:
            found.append(f"{asked['samples']} answers for {known.samples}")
        missing = self.about["rows"] - len(self.answered.rows)
        return found + ([f"{missing} of {self.about['rows']} problems not answered"] if missing else [])


def read_results(folder: Path, ks: Sequence[int] = ()) -> list[SetResult]:
    """Return what every set of an evaluation's folder came to, the paper's in its order and then the others.

    Args:
        folder: The evaluation's.
        ks: Of pass@k; a set has those up to its number of answers, and that number.

    Raises:
        ValueError: When a file of the folder cannot be read.
    """
    about = read_settings(folder).get("sets", {})
    order = [*(name for name in SETS if name in about), *(name for name in about if name not in SETS)]
    results = []
    for name in order:
        answered = Answered(folder, name)
        tallies = [tally_of(row) for row in answered.rows.values()]
        samples = about[name]["asked"]["samples"]
        own = sorted({k for k in (*ks, samples) if 1 < k <= samples})
        passes = {k: pass_at(tallies, k) for k in own}
        results.append(SetResult(name, about[name], answered, accuracy(tallies), passes))
    return results


def make_tables(results: Sequence[SetResult], model: str) -> list[Table]:
    """Return the figures of the sets, and the paper's rows beside those that it has.

    Args:
        results: From ``read_results``.
        model: What was evaluated.
    """
    ks = sorted({k for result in results for k in result.passes})
    tables = [
        Table(
            "Accuracy", "In percent, with the 95 % interval over resamples of the problems (bootstrap). avg@n is the "
            "mean of n answers to each problem, pass@k the unbiased chance that one of k is right.",
            ["set", "problems", "measure", "accuracy", "interval", *(f"pass@{k}" for k in ks), "cut off", "timeouts",
             "tokens"],
            [_row(result, ks) for result in results],
        )
    ]  # fmt: skip
    ours = {r.name: 100 * r.accuracy.value for r in results if r.accuracy is not None}
    names = [name for name in (*MATHEMATICS, *ELSEWHERE) if name in ours]
    if names:
        tables.append(_beside_the_paper(ours, names, model))
    if rows := [row for result in results for row in _overlap_rows(result)]:
        tables.append(
            Table(
                "Contamination", f"Problems that share {USUAL_N} words in a row with a training set, and accuracy in "
                "percent on the problems that do not.",
                ["set", "training set", "share some", "at least half", "accuracy", "of the others"], rows,
            )
        )  # fmt: skip
    return tables


def _overlap_rows(result: SetResult) -> list[list[str]]:
    rows = []
    for source, shares in result.about.get("overlaps", {}).items():
        others = [tally_of(row) for name, row in result.answered.rows.items() if name not in shares]
        rows.append(
            [result.about["title"], source, str(len(shares)), str(sum(share >= 0.5 for share in shares.values())),
             _percent(result.accuracy), _percent(accuracy(others))]
        )  # fmt: skip
    return rows


def _row(result: SetResult, ks: Sequence[int]) -> list[str]:
    tallies = [tally_of(row) for row in result.answered.rows.values()]
    drawn = max(1, sum(t.drawn for t in tallies))
    share = result.accuracy
    return [
        result.about["title"], f"{len(tallies)} of {result.about['rows']}", result.metric, _percent(share),
        f"{100 * share.low:.1f} to {100 * share.high:.1f}" if share else _NONE,
        *(_percent(result.passes.get(k)) for k in ks), f"{sum(t.cut for t in tallies) / drawn:.1%}",
        str(sum(t.timeouts for t in tallies)), f"{sum(t.tokens for t in tallies) / drawn:.0f}",
    ]  # fmt: skip


def _beside_the_paper(ours: Mapping[str, float], names: Sequence[str], model: str) -> Table:
    averages = {"average": MATHEMATICS, "average elsewhere": ELSEWHERE}
    shown = {title: of for title, of in averages.items() if set(of) <= set(names)}

    def row(title: str, values: Mapping[str, float]) -> list[str]:
        means = (sum(values[name] for name in of) / len(of) for of in shown.values())
        return [title, *(f"{values[name]:.1f}" for name in names), *(f"{mean:.1f}" for mean in means)]

    return Table(
        "Beside the paper", "Rows of Table 2 of arXiv 2506.19767, which are of Qwen2.5-Math-7B; averages where all "
        "their sets are there.",
        ["", *(SETS[name].title for name in names), *shown],
        [row(model, ours), *(row(title, published(title)) for title in TABLE_2)],
    )  # fmt: skip


def warnings(results: Sequence[SetResult]) -> list[str]:
    """Return a sentence on each set that was asked otherwise than in the paper, and on answers that nobody can read.

    Args:
        results: From ``read_results``.
    """
    said = []
    for result in results:
        title = result.about["title"]
        if result.differs:
            said.append(f"{title} is not as in the paper: {'; '.join(result.differs)}.")
        if left_out := result.about["left_out"]:
            first = next(iter(left_out))
            said.append(f"{title} leaves out {len(left_out)} problems, the first is {first}: {left_out[first]}.")
    return said


def markdown(title: str, tables: Sequence[Table], sentences: Sequence[str]) -> str:
    """Return the tables as a Markdown document.

    Args:
        title: Its heading.
        tables: From ``make_tables``.
        sentences: From ``warnings``.
    """
    parts = [f"# {title}", *(f"**Note:** {sentence}" for sentence in sentences)]
    parts += [as_markdown(table) for table in tables]
    return "\n\n".join(parts) + "\n"


def _percent(share: Share | None) -> str:
    return _NONE if share is None else f"{100 * share.value:.1f}"
