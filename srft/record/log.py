"""The record of a run: metrics, samples and alarms as JSON lines, what the terminal shows, the page at the end.

A run folder is readable while the run goes on and after it was killed at any point: every row is one line,
written by one system call, and at most the last line is torn. A resumed run sets that and later rows aside,
so that there is one row a step.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from srft.alarms import Alarm, Watch
from srft.curves import Curves
from srft.disk import WriteError, writing
from srft.record.environment import describe_environment
from srft.record.files import (
    open_json_lines,
    read_json_lines,
    set_aside_after,
    strict,
    write_atomically,
    write_json_line,
)
from srft.record.history import RunRecord
from srft.record.screen import Screen
from srft.record.trackers import Tracker

RECORDS = ("metrics", "samples", "alarms", "problems")
"""Names of the JSON-lines files of a run."""


class NoLog:
    """The record as ranks other than the first have it: nothing is written or shown.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.last_step = -1
        """Of no row."""

    def say(self, sentence: str) -> None:
        """Nothing; as for the rest.

        Args:
            sentence: For the first rank.
        """

    def metrics(self, values: Mapping[str, float | int]) -> list[Alarm]:
        """Nothing.

        Args:
            values: For the first rank.
        """
        return []

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Nothing.

        Args:
            step: For the first rank.
            rows: Likewise.
        """

    def problems(self, step: int, of: str, counts: Mapping[str, Sequence[int]]) -> None:
        """Nothing.

        Args:
            step: For the first rank.
            of: Likewise.
            counts: Likewise.
        """

    def finish(self, summary: Mapping[str, object]) -> None:
        """Nothing.

        Args:
            summary: For the first rank.
        """


class RunLog:
    """Writes a run's folder and shows its progress; a context manager, used by one process of a run.

    Args:
        run_dir: The run's folder; created when missing.
        total_steps: Steps the run will have when it is complete, >= 0.
        config_text: The resolved configuration as TOML; kept as ``config.toml`` and shown on the page.
        title: A few words that name the run.
        resume_step: Step of the checkpoint the run goes on from; later rows are set aside. None starts anew.
        report: Draws the plots and the page of a folder, and returns what it read there; called by ``finish``.
        curves: Figures of the run's method; kept in ``run.json``, so that the page needs no code of the method.
        quiet: Show nothing; the files are written all the same.
        trackers: Get every row, too.
        watch: Gets every row, those before a resume included; what it says is shown and kept in ``alarms.jsonl``.

    Raises:
        ValueError: When the folder holds a run already and ``resume_step`` is None, or a count is negative.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        config_text: str,
        title: str,
        resume_step: int | None,
        report: Callable[[Path], RunRecord],
        curves: Sequence[Curves] = (),
        quiet: bool = False,
        trackers: Sequence[Tracker] = (),
        watch: Watch | None = None,
    ) -> None:
        if total_steps < 0:
            raise ValueError(f"total_steps must be >= 0, got {total_steps}")
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step must be None or >= 0, got {resume_step}")
        self.run_dir = Path(run_dir)
        self._total_steps = total_steps
        self._config_text = config_text
        self._title = title
        self._resume_step = resume_step
        self._report = report
        self._curves = curves
        self._trackers = trackers
        self._watch = watch
        self._screen = Screen(total_steps, quiet=quiet)
        self._last_step = -1
        self._nonfinite: set[str] = set()
        self._finished = False

    def __enter__(self) -> RunLog:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics_path, *others = (self.run_dir / f"{name}.jsonl" for name in RECORDS)
        moved = self._prepare(metrics_path, *others)
        rows, _ = read_json_lines(metrics_path)
        if self._watch is not None:
            for row in rows:
                self._watch.see(row)
        self._last_step = rows[-1]["step"] if rows else -1
        self._start = time.monotonic() - (rows[-1].get("time/elapsed") or 0.0 if rows else 0.0)
        self._metrics_file = open_json_lines(metrics_path)
        self._samples_file, self._alarms_file, self._problems_file = map(open_json_lines, others)
        self._write_about()
        self._screen.start(self._title, rows)
        if self._resume_step is not None:
            aside = f"; {moved} later or broken lines are in *.discarded.jsonl" if moved else ""
            self.say(f"Resuming after step {self._resume_step}{aside}.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.stop()
        for tracker in self._trackers:
            tracker.close()
        for file in (self._metrics_file, self._samples_file, self._alarms_file, self._problems_file):
            # what ended the run tells more than that the disk refuses here too
            with suppress(WriteError) if error is not None else nullcontext(), writing(Path(file.name)), file:
                os.fsync(file.fileno())
        if not self._finished:
            self._screen.say(
                f"Stopped after step {max(self._last_step, 0)} of {self._total_steps}. "
                f"For plots and page of what there is: python -m srft.report {shlex.quote(str(self.run_dir))}"
            )

    @property
    def last_step(self) -> int:
        """Step of the last row in ``metrics.jsonl``, -1 when there is none."""
        return self._last_step

    def say(self, sentence: str) -> None:
        """Print one plain sentence; it is kept in ``run.json`` and shown on the page.

        Args:
            sentence: One line of text, shown as it is.
        """
        self._about["said"].append(sentence)
        self._save_about()
        self._screen.say(sentence)

    def metrics(self, values: Mapping[str, float | int]) -> list[Alarm]:
        """Append one row to ``metrics.jsonl`` and update the display.

        Non-finite values are written as null and announced the first time their key has one. The row gains
        ``time/elapsed``: seconds this run has taken so far, those before a resume included.

        Args:
            values: Numbers by name; ``step`` must be larger than that of the row before.

        Returns:
            The alarms that the row raises.

        Raises:
            ValueError: When ``step`` is missing or does not grow, or a value is not a plain number.
        """
        step = values.get("step")
        if not isinstance(step, Integral) or step <= self._last_step:
            raise ValueError(
                f"metrics need an integer step above {self._last_step}, the last one logged, got {step!r}; "
                "put everything of one step into one call"
            )
        for key, value in values.items():
            if not isinstance(value, Real):
                kind = type(value).__name__
                raise ValueError(f"metric {key} must be a number, got {kind}; call .item() on tensors")
        row: dict[str, Any] = {key: strict(value) for key, value in values.items()}
        row.setdefault("time/elapsed", round(time.monotonic() - self._start, 3))
        write_json_line(self._metrics_file, row)
        for tracker in self._trackers:
            tracker.write(row)
        self._last_step = int(step)
        fresh = {key for key, value in row.items() if value is None} - self._nonfinite
        if fresh:
            self._nonfinite |= fresh
            self._screen.say(f"Step {step}: {', '.join(sorted(fresh))} not finite, logged as null.")
        self._screen.update(row)
        alarms = [] if self._watch is None else self._watch.see(row)
        for alarm in alarms:
            write_json_line(self._alarms_file, alarm.as_row())
            self._screen.say(alarm.sentence())
        return alarms

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Append completions of one step to ``samples.jsonl``.

        Args:
            step: The step they were drawn at.
            rows: One mapping each with ``prompt``, ``completion``, ``demo`` (bool), ``reward``, ``status``
                ("ok", "unjudged", "timeout", "error" or "bad_gold"), ``message`` (what went wrong), ``advantage``,
                ``entropy`` (nats) and ``answer``.
        """
        for row in rows:
            write_json_line(self._samples_file, {"step": step, **row})

    def problems(self, step: int, of: str, counts: Mapping[str, Sequence[int]]) -> None:
        """Append to ``problems.jsonl`` which problems were right at one step.

        A step may have two lines of a kind where a signal came between an evaluation and its row; the later one counts.

        Args:
            step: At which they were asked.
            of: "training", "held-out", or the name of a further set; they share no problem, though they may share ids.
            counts: From ``problems.trained_on``, or ``problems.Verdicts``.
        """
        write_json_line(self._problems_file, {"step": step, "of": of, "problems": counts})

    def finish(self, summary: Mapping[str, object]) -> None:
        """Draw the plots and ``report.html``, and print the final table; also right after an interruption.

        Args:
            summary: Further facts by label, such as where the last checkpoint lies; numbers or text.
        """
        self._finished = True
        self._about["summary"] = strict(summary)
        self._save_about()
        self._screen.stop()
        self._screen.table(self._report(self.run_dir))

    def _prepare(self, metrics_path: Path, *others: Path) -> int:
        """Make the folder fit to append to; return how many lines were set aside."""
        config_path = self.run_dir / "config.toml"
        moved = 0
        if self._resume_step is None:
            if metrics_path.exists() and metrics_path.stat().st_size:
                raise ValueError(f"{self.run_dir} already holds a run; resume it or choose another folder")
        else:
            moved = sum(set_aside_after(path, self._resume_step) for path in (metrics_path, *others))
            if config_path.exists() and config_path.read_text() != self._config_text:
                os.replace(config_path, self.run_dir / f"config.until-step-{self._resume_step}.toml")
        write_atomically(config_path, self._config_text)
        return moved

    def _write_about(self) -> None:
        """Start or continue ``run.json``: title, sentences, and one entry a session."""
        path = self.run_dir / "run.json"
        sessions: list[object] = []
        if self._resume_step is not None and path.exists():
            sessions = json.loads(path.read_text())["sessions"]
        sessions.append({"resume_step": self._resume_step, **describe_environment()})
        self._about: dict[str, Any] = {
            "title": self._title,
            "total_steps": self._total_steps,
            "said": [],
            "summary": {},
            "curves": [figure.model_dump(mode="json") for figure in self._curves],
            "sessions": sessions,
        }
        self._save_about()

    def _save_about(self) -> None:
        write_atomically(self.run_dir / "run.json", json.dumps(self._about, indent=2) + "\n")
