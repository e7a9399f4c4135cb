"""What a run shows in the terminal: a live display on a TTY, plain lines anywhere else.

Training must not stop because nobody reads its output any more: a closed or broken stdout mutes the screen.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from srft.record.history import RunRecord, tokens_per_second
from srft.record.text import UNPRINTABLE, format_count, format_seconds

_LINES_PER_RUN = 20
_MAX_SECONDS_BETWEEN_LINES = 60.0
_STEPS_FOR_ETA = 20


def _beside_plan(row: Mapping[str, Any]) -> str:
    """Say how long training took beside what the plan allows for it, and what share of the device's peak that is."""
    parts = []
    if row.get("speed/mfu") is not None:
        parts.append(f"{row['speed/mfu']:.0%} of peak")
    if row.get("speed/planned_s") is not None:
        parts.append(f"train {format_seconds(row['time/train'])}, planned {format_seconds(row['speed/planned_s'])}")
    return f" ({', '.join(parts)})" if parts else ""


class Screen:
    """The terminal side of a run log.

    Args:
        total_steps: Steps of the complete run.
        quiet: Show nothing at all.
    """

    def __init__(self, total_steps: int, *, quiet: bool) -> None:
        self._total = total_steps
        self._out = None if quiet else sys.stdout
        if self._out is not None and self._out.closed:
            self._out = None
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        self._fancy = self._out is not None and self._out.isatty() and not dumb
        self._live: Live | None = None
        self._steps_per_line = max(1, total_steps // _LINES_PER_RUN)
        self._last_line = (-self._steps_per_line, 0.0)  # step and time of the last plain line
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=_STEPS_FOR_ETA + 1)
        self._last_eval: tuple[float, int] | None = None

    def start(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin to show a run.

        Args:
            title: A few words that name the run.
            rows: Metrics of the steps before a resume.
        """
        for row in rows:
            self._remember_eval(row)
        done = rows[-1]["step"] if rows else 0
        self._arrivals.append((done, time.monotonic()))
        self.say(title)
        if self._fancy:
            self._guard(lambda: self._start_live(done))

    def say(self, sentence: str) -> None:
        """Print one line, above the live display if there is one.

        Args:
            sentence: Shown as it is: no markup, no control characters.
        """
        line = UNPRINTABLE.sub(" ", " ".join(sentence.splitlines()))
        if self._live is not None:
            live = self._live
            self._guard(lambda: live.console.print(Text(line)))
        else:
            self._write(line + "\n")

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the newest metrics.

        Args:
            row: One row of ``metrics.jsonl``.
        """
        step = row["step"]
        self._remember_eval(row)
        self._arrivals.append((step, time.monotonic()))
        if self._live is not None:
            self._progress.update(self._task, completed=step, left=self._time_left())
            self._status.plain = "  " + "   ".join(self._facts(row))
            self._guard(self._live.refresh)
        elif self._line_is_due(row):
            self._last_line = (step, time.monotonic())
            width = len(str(self._total))
            facts = [f"step {step:>{width}}/{self._total}", *self._facts(row)]
            self._write("  ".join([*facts, self._time_left()]).rstrip() + "\n")

    def stop(self) -> None:
        """End the live display and leave the terminal clean; safe to call twice."""
        if self._live is not None:
            self._guard(self._live.stop)
            self._live = None

    def table(self, record: RunRecord) -> None:
        """Print the final table: what was learned, where the time went, where the files are.

        Args:
            record: The run as read back from its folder.
        """
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in ("first", "best", "last"):
            table.add_column(heading, justify="right")
        for fact in record.facts:
            table.add_row(fact.label, fact.first, fact.best, fact.last)
        places = Table.grid(padding=(0, 2))
        for label, value in record.places:
            places.add_row(label, Text(value, overflow="fold"))
        self._write(self._render(Group(Text(record.status + ".", style="bold"), table, places)))

    def _start_live(self, done: int) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"), expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=self._total, completed=done, left="")
        self._status = Text("  waiting for the first step", style="dim", no_wrap=True, overflow="ellipsis")
        console = Console(file=self._out, force_terminal=True, highlight=False)
        self._live = Live(Group(self._progress, self._status), console=console, refresh_per_second=4)
        self._live.start()

    def _facts(self, row: Mapping[str, Any]) -> list[str]:
        """Return the row's main numbers as short phrases, those it lacks left out."""
        facts = []
        if row.get("reward/mean") is not None:
            facts.append(f"reward {row['reward/mean']:.3f}")
        elif row.get("loss/total") is not None:
            facts.append(f"loss {row['loss/total']:.3f}")
        if self._last_eval is not None:
            value, step = self._last_eval
            facts.append(f"eval {value:.3f}" + ("" if step == row["step"] else f" (step {step})"))
        entropies = [
            f"{row[f'entropy/{name}']:.2f} {name}" for name in ("rollout", "demo")
            if row.get(f"entropy/{name}") is not None
        ]  # fmt: skip
        if entropies:
            facts.append("entropy " + ", ".join(entropies))
        rate = tokens_per_second(row)
        if rate is not None:
            facts.append(f"{format_count(rate)} tok/s{_beside_plan(row)}")
        return facts

    def _remember_eval(self, row: Mapping[str, Any]) -> None:
        if row.get("eval/accuracy") is not None:
            self._last_eval = (row["eval/accuracy"], row["step"])

    def _time_left(self) -> str:
        (first_step, first), (step, now) = self._arrivals[0], self._arrivals[-1]
        if step <= first_step or step >= self._total:
            return ""
        return format_seconds((now - first) / (step - first_step) * (self._total - step)) + " left"

    def _line_is_due(self, row: Mapping[str, Any]) -> bool:
        step, (last_step, last_time) = row["step"], self._last_line
        return (
            step >= self._total
            or "eval/accuracy" in row
            or step - last_step >= self._steps_per_line
            or time.monotonic() - last_time >= _MAX_SECONDS_BETWEEN_LINES
        )

    def _render(self, renderable: RenderableType) -> str:
        """Return what rich makes of it: colours on a terminal only, plain box characters where needed."""
        buffer = io.StringIO()
        console = Console(
            file=buffer, force_terminal=self._fancy, no_color=not self._fancy, highlight=False,
            color_system="auto" if self._fancy else None, width=None if self._fancy else 100,
        )  # fmt: skip
        console.print(renderable)
        return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())

    def _write(self, text: str) -> None:
        if self._out is None or self._out.closed:
            return
        out = self._out
        encoding = getattr(out, "encoding", None) or "utf-8"
        safe = text.encode(encoding, "replace").decode(encoding)
        self._guard(lambda: (out.write(safe), out.flush()))

    def _guard(self, action: Callable[[], object]) -> None:
        """Run an action that writes to the terminal; when its reader has gone, show nothing from then on."""
        try:
            action()
        except OSError:
            self._mute()

    def _mute(self) -> None:
        out, self._out, self._live, self._fancy = self._out, None, None, False
        assert out is not None
        try:
            # nor may a print elsewhere in the process, or the interpreter's last flush, fail from now on
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, out.fileno())
            os.close(devnull)
        except io.UnsupportedOperation:  # a stream without a file descriptor keeps nothing to flush
            return
