"""What a suite shows while it runs: a display on a terminal, a line for each run that ends anywhere else."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from srft.experiments.results import Result
from srft.experiments.suite import Run
from srft.record.text import UNPRINTABLE, format_seconds

_TAIL_BYTES = 1 << 14
_REFRESH_S = 1.0


class Board:
    """Progress over all runs of a suite; a context manager. It has no thread, for the runs are forked beside it.

    Args:
        runs: All of them.
        done: Results of those that had ended before.
        jobs: Runs at once.
    """

    def __init__(self, runs: Sequence[Run], done: Sequence[Result], jobs: int) -> None:
        self._runs, self._jobs = runs, jobs
        self._steps = {run.key: run.config.train.steps for run in runs}
        self._ended = {result.key for result in done}
        # of those that ended before, the seconds without the start
        self._seconds: dict[str, deque[float]] = {}
        for result in done:
            if result.budget and result.steps:
                self._learn_pace(result.arm, result.budget.seconds / result.steps)
        self._began: dict[tuple[str, int, str], float] = {}
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Board:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self.say(f"{len(self._ended)} of {len(self._runs)} runs have ended; {self._jobs} at once.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print one line.

        Args:
            sentence: Shown as it is: no markup, no control characters.
        """
        line = UNPRINTABLE.sub(" ", " ".join(sentence.splitlines()))
        self._console.print(Text(line), soft_wrap=True)
        sys.stdout.flush()

    def begin(self, run: Run) -> None:
        """Note that a run has begun.

        Args:
            run: The run.
        """
        self._began[run.key] = time.monotonic()

    def end(self, run: Run, result: Result) -> None:
        """Note that a run has ended, and say what came of it.

        Args:
            run: The run.
            result: Complete or with an error.
        """
        now = time.monotonic()
        took = now - self._began.pop(run.key, now)
        self._ended.add(run.key)
        self._drawn = 0.0
        if not result.error:
            self._learn_pace(run.arm, took / self._steps[run.key])
        came_to = f"error: {result.error}" if result.error else f"accuracy {result.final:.3f}, best {result.best:.3f}"
        parts = [f"[{len(self._ended)}/{len(self._runs)}] {run.arm}, seed {run.seed}: {came_to}", format_seconds(took)]
        self.say("; ".join([*parts, *([left] if (left := self._time_left()) else [])]))

    def refresh(self) -> None:
        """Draw the display anew, if there is one and a second has passed."""
        if self._live is None or time.monotonic() - self._drawn < _REFRESH_S:
            return
        self._drawn = time.monotonic()
        total = sum(self._steps.values())
        running = [(run, last_row(run.folder)) for run in self._runs if run.key in self._began]
        now = sum(self._steps[key] for key in self._ended) + sum(row.get("step", 0) for _, row in running)
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(f"{len(self._ended)}/{len(self._runs)} runs", ProgressBar(total, now), self._time_left())
        body = Table.grid(padding=(0, 2))
        for run, row in running:
            facts = [f"{row[key]:.3f} {name}" for key, name in (("reward/mean", "reward"), ("entropy/rollout", "H"))
                     if row.get(key) is not None]  # fmt: skip
            body.add_row(
                f"  {run.arm}", f"seed {run.seed}", f"step {row.get('step', 0)}/{self._steps[run.key]}", *facts
            )
        self._live.update(Group(head, body), refresh=True)

    def _learn_pace(self, arm: str, seconds_per_step: float) -> None:
        self._seconds.setdefault(arm, deque(maxlen=8)).append(seconds_per_step)

    def _time_left(self) -> str:
        """How long the rest takes at the pace of what has ended, the same arm's where it is known."""
        known = [pace for paces in self._seconds.values() for pace in paces]
        if not known:
            return ""
        left = 0.0
        for run in self._runs:
            if run.key not in self._ended:
                paces = self._seconds.get(run.arm, known)
                spent = time.monotonic() - self._began[run.key] if run.key in self._began else 0.0
                left += max(0.0, self._steps[run.key] * sum(paces) / len(paces) - spent)
        return f"{format_seconds(left / self._jobs)} left" if left else ""


def last_row(folder: Path) -> Mapping[str, Any]:
    """Return the last whole row of a run's metrics; empty where there is none yet.

    Args:
        folder: The run's.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    try:
        return json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
