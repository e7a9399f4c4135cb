"""The page of a run: one file without scripts or outside references, made from what lies in the run folder.

``python -m srft.report runs/<name>`` makes plots and page again, also while the run goes on or after a crash.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.disk import WriteError, writing
from srft.record.log import read_json_lines, write_atomically
from srft.record.screen import format_count, format_seconds, tokens_per_second
from srft.report import page
from srft.report.plots import PANELS, TIMES, draw_plots, points, seconds_by_part, smoothing_width

_FIRST_AND_LAST_STEPS = 5  # single steps are noisy: first and last are means over this many rows


@dataclass(frozen=True)
class Fact:
    """One line of the final table.

    Args:
        label: What it is about, with its unit.
        first: Value at the start of the run; empty where there is nothing to tell, as for the others.
        best: Best value and its step.
        last: Value at the end.
    """

    label: str
    first: str
    best: str
    last: str


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Args:
        run_dir: The folder.
        title: A few words that name the run.
        status: One sentence: how far it came.
        rows: Metric rows in order of step.
        samples: Sample rows in order of step.
        about: ``run.json``; empty when there is none.
        config_text: Resolved configuration as TOML; empty when there is none.
        facts: First, best and last values of what matters.
        places: (label, text) of run time and files.
        warnings: Sentences on what is wrong with the record.
    """

    run_dir: Path
    title: str
    status: str
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    about: dict[str, Any]
    config_text: str
    facts: list[Fact]
    places: list[tuple[str, str]]
    warnings: list[str]


def load_record(run_dir: Path) -> RunRecord:
    """Read a run folder; every file in it may be missing.

    Args:
        run_dir: The folder of the run, complete or not.

    Raises:
        ValueError: When there is no such folder.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is no folder; give the folder of a run, such as runs/demo")
    rows, broken_rows = read_json_lines(run_dir / "metrics.jsonl")
    samples, broken_samples = read_json_lines(run_dir / "samples.jsonl")
    rows.sort(key=lambda row: row["step"])
    samples.sort(key=lambda row: row["step"])
    about_path, config_path = run_dir / "run.json", run_dir / "config.toml"
    about = json.loads(about_path.read_text()) if about_path.exists() else {}
    done = rows[-1]["step"] if rows else 0
    total = about.get("total_steps", done)
    return RunRecord(
        run_dir=run_dir,
        title=about.get("title", run_dir.resolve().name),
        status=f"Complete: {total} steps" if done >= total else f"{done} of {total} steps",
        rows=rows,
        samples=samples,
        about=about,
        config_text=config_path.read_text() if config_path.exists() else "",
        facts=_facts(rows),
        places=_places(run_dir, rows, about),
        warnings=_warnings(rows, len(broken_rows) + len(broken_samples)),
    )


def build_report(run_dir: Path) -> RunRecord:
    """Draw ``plots/`` and write ``report.html`` from what lies in the run folder.

    Args:
        run_dir: The folder of the run, complete or not.

    Returns:
        What was read, for a table of it.

    Raises:
        ValueError: When there is no such folder.
        WriteError: When the disk refuses.
    """
    run_dir = Path(run_dir)
    record = load_record(run_dir)
    with writing(run_dir / "plots"):
        svgs = draw_plots(record.rows, run_dir / "plots")
    captions = {panel.name: (panel.title, panel.caption) for panel in PANELS}
    figures = [(*captions[name], svg) for name, svg in svgs.items()]
    html = page.render(
        title=record.title,
        status=record.status,
        cards=_cards(record),
        figures=figures,
        smoothing_width=smoothing_width(record.rows),
        samples=record.samples,
        warnings=record.warnings,
        said=record.about.get("said", []),
        config_text=record.config_text,
        sessions=record.about.get("sessions", []),
        facts=[(fact.label, fact.first, fact.best, fact.last) for fact in record.facts],
        places=record.places,
    )
    write_atomically(run_dir / "report.html", html)
    return record


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[Fact]:
    facts = []
    scored = [row for row in rows if isinstance(row.get("eval/accuracy"), int | float)]
    if scored:
        best = max(scored, key=lambda row: row["eval/accuracy"])
        shown = (scored[0], best, scored[-1])
        facts.append(
            Fact("eval accuracy (at step)", *(_percent(row) + f" at {row['step']}" for row in shown))
        )
        if any(map(_interval, shown)):
            facts.append(Fact("  its 95% interval", *map(_interval, shown)))
    for key, label, has_best in (
        ("reward/mean", "training reward", True), ("entropy/rollout", "entropy, rollouts (nats)", False),
        ("entropy/demo", "entropy, demonstrations (nats)", False), ("weight/sft", "SFT weight", False),
        ("weight/rl", "RL weight", False), ("loss/total", "loss", False),
        ("length/mean", "completion length (tokens)", False),
    ):  # fmt: skip
        steps, values = points(rows, key)
        if values.size:
            few = max(1, min(_FIRST_AND_LAST_STEPS, values.size // 2))
            spec = ".0f" if key == "length/mean" else ".3f"
            top = f"{values.max():{spec}} at {steps[values.argmax()]:.0f}" if has_best else ""
            facts.append(Fact(label, f"{values[:few].mean():{spec}}", top, f"{values[-few:].mean():{spec}}"))
    return facts


def _percent(row: Mapping[str, Any]) -> str:
    return f"{row['eval/accuracy']:.1%}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("eval/ci_low"), row.get("eval/ci_high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _places(
    run_dir: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> list[tuple[str, str]]:
    places: list[tuple[str, str]] = []
    elapsed = [row["time/elapsed"] for row in rows if isinstance(row.get("time/elapsed"), int | float)]
    split = [seconds_by_part(row) for row in rows]
    sums = {name: sum(parts[name] for parts in split) for name, _ in TIMES}
    total = sum(sums.values())
    if elapsed or total:
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in sums.items() if value)
        places.append(("run time", format_seconds(elapsed[-1] if elapsed else total)))
        if shares:
            places.append(("time split", shares))
    places += [(str(label), str(value)) for label, value in about.get("summary", {}).items()]
    places.append(("page", str(run_dir / "report.html")))
    if rows:
        places.append(("plots", str(run_dir / "plots")))
    places.append(("metrics", str(run_dir / "metrics.jsonl")))
    return places


def _warnings(rows: Sequence[Mapping[str, Any]], broken: int) -> list[str]:
    warnings = []
    if broken:
        warnings.append(
            f"Lines of metrics.jsonl and samples.jsonl that are no JSON and are left out: {broken}."
        )
    for key in sorted({key for row in rows for key, value in row.items() if value is None}):
        steps = [row["step"] for row in rows if key in row and row[key] is None]
        warnings.append(f"Not finite: {key}, at {len(steps)} of {len(rows)} steps, first at step {steps[0]}.")
    for key, what in (("reward/timeouts", "hit the deadline"), ("reward/errors", "failed")):
        count = points(rows, key)[1].sum()
        if count:
            warnings.append(f"Completions whose verification {what}, which count as wrong: {count:.0f}.")
    if unjudged := points(rows, "reward/unjudged")[1].sum():
        warnings.append(f"Completions that the reward did not judge, which took no part: {unjudged:.0f}.")
    return warnings


def _cards(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return (label, headline, line below) of the numbers that open the page."""
    cards = []
    by_label = {fact.label: fact for fact in record.facts}
    scored = [row for row in record.rows if isinstance(row.get("eval/accuracy"), int | float)]
    if scored:
        first, last = scored[0], scored[-1]
        best = max(scored, key=lambda row: row["eval/accuracy"])
        below = f"best {_percent(best)} at step {best['step']}"
        if _interval(last):
            below = f"95% interval {_interval(last)}; {below}"
        change = f"{_percent(first)} → {_percent(last)}" if first is not last else _percent(last)
        cards.append(("Eval accuracy", change, below))
    for label, title, below in (
        ("training reward", "Training reward", "means of the first and last steps"),
        ("entropy, rollouts (nats)", "Entropy, rollouts", "nats per token, first and last steps"),
        ("entropy, demonstrations (nats)", "Entropy, demonstrations", "nats per token, first and last steps"),
        ("loss", "Loss", "means of the first and last steps"),
    ):  # fmt: skip
        if label in by_label and len(cards) < 4:
            cards.append((title, f"{by_label[label].first} → {by_label[label].last}", below))
    run_time = dict(record.places).get("run time")
    if run_time:
        rates = [rate for row in record.rows if (rate := tokens_per_second(row)) is not None]
        below = f"{format_count(sum(rates) / len(rates))} tokens per second" if rates else record.status
        cards.append(("Run time", run_time, below))
    return cards


def main(argv: Sequence[str] | None = None) -> None:
    """Make plots and page of run folders again.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m srft.report", description="Draw a run's plots and page.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder of a run, complete or not: runs/demo")
    parsed = parser.parse_args(argv)
    for run_dir in parsed.run_dir:
        try:
            record = build_report(run_dir)
        except (ValueError, WriteError) as error:
            parser.error(str(error))
        print(f"{record.title}: {record.status}. {run_dir / 'report.html'}")


if __name__ == "__main__":
    main()
