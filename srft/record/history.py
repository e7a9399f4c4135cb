"""A run as its folder tells it: rows and samples, first and last values, where the time went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srft.curves import Curves
from srft.record.files import read_json_lines
from srft.record.text import format_seconds

Rows = Sequence[Mapping[str, Any]]

PARTS = ("rollout", "reward", "train", "sync", "eval", "other")
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
        alarms: Rows of ``alarms.jsonl`` in order of step.
        about: ``run.json``; empty when there is none.
        config_text: Resolved configuration as TOML; empty when there is none.
        facts: First, best and last values of what matters.
        places: (label, text) of run time and files.
        warnings: Sentences on what is wrong with the record.
        curves: Figures of the run's method, from ``run.json``.
    """

    run_dir: Path
    title: str
    status: str
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    about: dict[str, Any]
    config_text: str
    facts: list[Fact]
    places: list[tuple[str, str]]
    warnings: list[str]
    curves: list[Curves]


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
    alarms, broken_alarms = read_json_lines(run_dir / "alarms.jsonl")
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
        alarms=alarms,
        about=about,
        config_text=config_path.read_text() if config_path.exists() else "",
        facts=_facts(rows),
        places=_places(run_dir, rows, alarms, about),
        warnings=_warnings(rows, len(broken_rows) + len(broken_samples) + len(broken_alarms)),
        curves=[Curves.model_validate(figure) for figure in about.get("curves", [])],
    )


def tokens_per_second(row: Mapping[str, Any]) -> float | None:
    """Return the tokens a step trained on by its seconds without evaluation; None where either is unknown.

    Args:
        row: One row of ``metrics.jsonl``.
    """
    tokens = row.get("tokens/step")
    seconds = (row.get("time/step") or 0.0) - (row.get("time/eval") or 0.0)
    return tokens / seconds if tokens and seconds > 0 else None


def points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values, [n] each, at which a metric was recorded with a finite value.

    Args:
        rows: Metric rows in order of step.
        key: Name of the metric.
    """
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def seconds_by_part(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of one step by part; what the parts do not explain is "other".

    Args:
        row: One metric row; whether ``time/step`` includes the evaluation is inferred from its size.
    """
    parts = {name: float(row.get(f"time/{name}") or 0.0) for name in PARTS if name != "other"}
    step = float(row.get("time/step") or 0.0)
    explained = sum(parts.values())
    if step < explained:
        explained -= parts["eval"]
    return {**parts, "other": max(0.0, step - explained)}


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[Fact]:
    facts = []
    if shown := first_best_last(rows):
        facts.append(
            Fact("eval accuracy (at step)", *(percent(row) + f" at {row['step']}" for row in shown))
        )
        if any(map(interval, shown)):
            facts.append(Fact("  its 95% interval", *map(interval, shown)))
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


def first_best_last(rows: Rows) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the rows of the first, the best and the last evaluation; None when none had an accuracy.

    Args:
        rows: Metric rows in order of step.
    """
    scored = [row for row in rows if isinstance(row.get("eval/accuracy"), int | float)]
    if not scored:
        return None
    return scored[0], max(scored, key=lambda row: row["eval/accuracy"]), scored[-1]


def percent(row: Mapping[str, Any]) -> str:
    """Return the evaluation accuracy of a row as a percentage.

    Args:
        row: One metric row, with an accuracy.
    """
    return f"{row['eval/accuracy']:.1%}"


def interval(row: Mapping[str, Any]) -> str:
    """Return the 95% interval of that accuracy, in percent; empty where there is none.

    Args:
        row: One metric row.
    """
    low, high = row.get("eval/ci_low"), row.get("eval/ci_high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _places(run_dir: Path, rows: Rows, alarms: Rows, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    places: list[tuple[str, str]] = []
    if alarms:
        places.append(("alarms", ", ".join(f"{row.get('alarm')} at step {row['step']}" for row in alarms)))
    elapsed = [row["time/elapsed"] for row in rows if isinstance(row.get("time/elapsed"), int | float)]
    split = [seconds_by_part(row) for row in rows]
    sums = {name: sum(parts[name] for parts in split) for name in PARTS}
    total = sum(sums.values())
    if elapsed or total:
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in sums.items() if value)
        places.append(("run time", format_seconds(elapsed[-1] if elapsed else total)))
        if shares:
            places.append(("time split", shares))
    if sentence := _speed(rows):
        places.append(("training speed", sentence))
    if sentence := _syncs(rows):
        places.append(("weights to the engine", sentence))
    places += [(str(label), str(value)) for label, value in about.get("summary", {}).items()]
    places.append(("page", str(run_dir / "report.html")))
    if rows:
        places.append(("plots", str(run_dir / "plots")))
    places.append(("metrics", str(run_dir / "metrics.jsonl")))
    return places


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how fast training was in the middle of its steps, beside its plan; empty where nobody knows."""
    known = [row for row in rows if row.get("speed/mfu") is not None]
    if not known:
        return ""
    shares = [row["speed/mfu"] for row in known]
    sentence = f"{np.median(shares):.1%} of the peak of the devices' products"
    times = [row["time/train"] / row["speed/planned_s"] for row in known if row.get("speed/planned_s")]
    return sentence + (f"; {np.median(times):.1f} times as long as planned" if times else "")


def _syncs(rows: Rows) -> str:
    """Return what an update of the engine's weights is and takes, in the middle; empty where there was none."""
    known = [row for row in rows if row.get("sync/bytes") and row.get("time/weights") is not None]
    if not known:
        return ""
    size, seconds = (np.median([row[key] for row in known]) for key in ("sync/bytes", "time/weights"))
    return f"{size / 1e6:,.1f} MB in {seconds:.3g} s"


def _warnings(rows: Sequence[Mapping[str, Any]], broken: int) -> list[str]:
    warnings = []
    if broken:
        warnings.append(
            f"Lines of metrics.jsonl, samples.jsonl and alarms.jsonl that are no JSON and are left out: {broken}."
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
