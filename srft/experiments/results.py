"""What a run came to, one line of ``results.jsonl`` each, and all that tables and figures are made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from srft.disk import writing
from srft.experiments.suite import Run
from srft.record.files import open_json_lines, read_json_lines, write_json_line
from srft.section import Section

RESULTS = "results.jsonl"
_CURVES = (
    "entropy/rollout", "entropy/demo", "reward/mean", "length/mean", "weight/sft", "weight/rl", "loss/total",
    "grad_norm",
)  # fmt: skip
_MOST_POINTS = 60  # of a curve; longer ones are averaged


class Budget(Section):
    """What a run was given, with all that it started from."""

    prompts: int
    """Prompts drawn, those that gave way to others included."""
    sampled_tokens: int
    """Tokens of its rollouts; evaluation is not counted."""
    trained_tokens: int
    """Tokens of the sequences that its updates took, prompts included, each as often as it was taken."""
    updates: int
    """Optimizer updates."""
    flops: float
    """6 · parameters · trained tokens + 2 · parameters · sampled tokens: forward and backward of an update, and a
    forward pass for each sampled token. Attention, the reading of prompts, evaluation, and passes that a method makes
    besides are left out."""
    seconds: float
    """By the clock, from its first step to its last, evaluation included."""


class Result(Section):
    """One run that has ended: complete, or with an error."""

    arm: str
    """Name of its arm."""
    seed: int
    """Its seed."""
    identity: str
    """Digest of its options, as in ``suite.Run``."""
    error: str = ""
    """Why it ended early; empty of a complete run."""
    steps: int = 0
    """Steps, with those of a run that it went on from."""
    evaluations: list[tuple[int, float, float]] = []
    """Step, held-out accuracy and FLOPs so far of each evaluation."""
    entropy: tuple[float, float, float] | None = None
    """Mean entropy of rollouts, nats per token: at the first step, over all, at the last; None without rollouts."""
    means: dict[str, float] = {}
    """Mean of each metric over the steps of this run alone."""
    curves: dict[str, list[float | None]] = {}
    """Metrics by "step" and by "flops" so far, averaged over neighbouring steps."""
    budget: Budget | None = None
    """None of a run that ended early."""
    threads: int = 0
    """Threads it computed with."""
    commit: str | None = None
    """Of the checkout it ran from."""

    @property
    def key(self) -> tuple[str, int, str]:
        """As that of its ``suite.Run``."""
        return self.arm, self.seed, self.identity

    @property
    def final(self) -> float:
        """Accuracy at the last evaluation."""
        return self.evaluations[-1][1]

    @property
    def best(self) -> float:
        """The largest accuracy of any evaluation, which luck makes larger than what a model is worth."""
        return max(accuracy for _, accuracy, _ in self.evaluations)

    @property
    def area(self) -> float:
        """Mean accuracy over the FLOPs, straight lines between evaluations; over the steps of a run that has none."""
        axis = 2 if self.evaluations[-1][2] else 0
        length = self.evaluations[-1][axis] - self.evaluations[0][axis]
        if not length:
            return self.final
        pairs = zip(self.evaluations, self.evaluations[1:], strict=False)
        return sum((after[axis] - before[axis]) * (after[1] + before[1]) / 2 for before, after in pairs) / length


def read_results(out: Path) -> list[Result]:
    """Read what has ended so far, the newest line of each run; a line that a kill has torn is passed over.

    Args:
        out: The suite's folder.

    Raises:
        ValueError: When a whole line is no result.
    """
    path = out / RESULTS
    found: dict[tuple[str, int, str], Result] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        try:
            result = Result.model_validate(json.loads(line))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"{path}:{number} is no result: {'.'.join(map(str, first['loc']))}: {first['msg']}; another version "
                "wrote it, so set another --out"
            ) from None
        except ValueError:  # empty or torn
            continue
        found[result.key] = result
    return list(found.values())


def append_result(out: Path, result: Result) -> None:
    """Add a line, in one write, after whatever a kill has left.

    Args:
        out: The suite's folder.
        result: The run.

    Raises:
        WriteError: When the disk refuses.
    """
    path = out / RESULTS
    with open_json_lines(path) as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            with writing(path):
                file.write(b"\n")
        write_json_line(file, result.model_dump(mode="json"), sync=True)


def summarise(run: Run, threads: int) -> Result:
    """Read what a complete run's folder has to tell.

    Args:
        run: Its folder, and that of the run it went on from, are there.
        threads: It computed with.

    Raises:
        ValueError: When the record lacks an evaluation.
    """
    rows, budget, steps = _with_source(run)
    so_far = list(itertools.accumulate(row["flops"] for row in rows))
    rows = [row | {"flops": flops} for row, flops in zip(rows, so_far, strict=True)]
    evaluations = [
        (row["step"], row["eval/accuracy"], row["flops"]) for row in rows if row.get("eval/accuracy") is not None
    ]
    if not evaluations:
        raise ValueError(f"{run.folder} has no accuracy: the verifier judged no held-out answer")
    trained = [row for row in rows if row.get("entropy/rollout") is not None]
    entropies = [row["entropy/rollout"] for row in trained]
    return Result(
        arm=run.arm, seed=run.seed, identity=run.identity, steps=steps, evaluations=evaluations,
        entropy=(entropies[0], sum(entropies) / len(entropies), entropies[-1]) if entropies else None,
        means=_means([row for row in _rows(run) if row["step"] > 0]), curves=_thinned(rows), budget=budget,
        threads=threads, commit=_about(run.folder)["sessions"][-1].get("commit"),
    )  # fmt: skip


def _with_source(run: Run) -> tuple[list[dict[str, Any]], Budget, int]:
    """Rows, budget and steps of a run together with those of the runs it went on from."""
    rows, budget = _rows(run), _budget(run)
    if run.source is None or not run.goes_on:
        return rows, budget, rows[-1]["step"]
    before, spent, steps = _with_source(run.source)
    # where it started is where the other ended
    after = [row | {"step": row["step"] + steps} for row in rows if row["step"] > 0]
    both = Budget(**{name: getattr(spent, name) + getattr(budget, name) for name in Budget.model_fields})
    return before + after, both, steps + rows[-1]["step"]


def _rows(run: Run) -> list[dict[str, Any]]:
    """Rows of the run's own metrics, with the FLOPs of each step."""
    parameters = _about(run.folder)["summary"]["parameters"]
    return [
        row | {"flops": parameters * (6.0 * (row.get("tokens/trained") or 0) + 2.0 * (row.get("tokens/sampled") or 0))}
        for row in read_json_lines(run.folder / "metrics.jsonl")[0]
    ]


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def _budget(run: Run) -> Budget:
    rows = [row for row in _rows(run) if row["step"] > 0]
    counted = ("tokens/sampled", "tokens/trained", "updates/made", "groups/resampled")
    sampled, trained, updates, resampled = (int(sum(row.get(name) or 0 for row in rows)) for name in counted)
    return Budget(
        prompts=len(rows) * run.config.train.prompts_per_step + resampled, sampled_tokens=sampled,
        trained_tokens=trained, updates=updates, flops=sum(row["flops"] for row in rows),
        seconds=rows[-1]["time/elapsed"],
    )  # fmt: skip


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the rows that have a finite value of it."""
    names = sorted({name for row in rows for name in row if not name.startswith(("time/", "speed/", "step", "flops"))})
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def _thinned(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Curves of at most ``_MOST_POINTS`` points, each the mean over as many neighbouring steps."""
    rows = [row for row in rows if row["step"] > 0]
    per_point = -(-len(rows) // _MOST_POINTS)
    parts = [rows[start : start + per_point] for start in range(0, len(rows), per_point)]

    def mean(part: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [row[name] for row in part if row.get(name) is not None]
        return float(f"{sum(values) / len(values):.6g}") if values else None

    kept = ["step", "flops", *(name for name in _CURVES if any(row.get(name) is not None for row in rows))]
    return {name: [mean(part, name) for part in parts] for name in kept}
