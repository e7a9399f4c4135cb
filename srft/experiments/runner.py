"""Makes the runs of a suite, several at once, each once: killed at any moment, it goes on where it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from srft.experiments.board import Board
from srft.experiments.children import Child
from srft.experiments.results import Result, append_result, read_results, summarise
from srft.experiments.suite import Run
from srft.stop import ONE_SIGNAL_S, SIGNALS, Stopped

_POLL_S = 0.1
Key = tuple[str, int, str]


def make_runs(runs: Sequence[Run], out: Path, jobs: int, threads: int) -> list[Result]:
    """Make what of these runs has no result yet.

    Args:
        runs: From ``suite.plan_runs``.
        out: The suite's folder, locked by the caller.
        jobs: Runs at once, >= 1.
        threads: Threads of each, >= 1.

    Returns:
        The result of every run; those that an error ended have that.

    Raises:
        Stopped: On a signal, once every run has saved and ended; a second signal kills them.
        WriteError: When the disk refuses.
    """
    wanted = {run.key for run in runs}
    results = {result.key: result for result in read_results(out) if result.key in wanted and not result.error}
    waiting = [run for run in runs if run.key not in results]
    if not waiting:
        return list(results.values())
    with Board(runs, list(results.values()), jobs) as board, _Signals() as signals:
        running: dict[Key, tuple[Run, Child]] = {}
        try:
            while waiting or running:
                while not signals.first and len(running) < jobs and (run := _next(waiting, results)):
                    waiting.remove(run)
                    child = _begin(run, results, threads)
                    if isinstance(child, Child):
                        board.begin(run)
                        running[run.key] = run, child
                    else:
                        _end(run, child, out, results, board)
                if signals.first and not running:
                    break
                for run, child in [pair for pair in running.values() if pair[1].has_ended()]:
                    del running[run.key]
                    if not (signals.first and child.status):
                        _end(run, _result(run, child, threads), out, results, board)
                signals.pass_on([child for _, child in running.values()])
                board.refresh()
                time.sleep(_POLL_S)
        finally:
            for _, child in running.values():
                child.send(signal.SIGKILL)
    if signals.first and len(results) < len(runs):
        raise Stopped(signals.first)
    return list(results.values())


def _next(waiting: Sequence[Run], results: Mapping[Key, Result]) -> Run | None:
    """The first run that waits for no other."""
    return next((run for run in waiting if run.source is None or run.source.key in results), None)


def _begin(run: Run, results: Mapping[Key, Result], threads: int) -> Child | Result:
    """Start a run, or say why it cannot be."""
    source = results[run.source.key] if run.source is not None else None
    if source is not None and source.error:
        return _failed(run, f"arm {source.arm} gave it nothing to start from", threads)
    try:
        words = run.command(source.means if source is not None else {})
    except ValueError as error:
        return _failed(run, str(error), threads)
    return Child(words, run.folder.with_suffix(".log"), threads, run.config.train.ranks or 1)


def _result(run: Run, child: Child, threads: int) -> Result:
    if child.status:
        return _failed(run, child.last_words(), threads)
    try:
        return summarise(run, threads)
    except ValueError as error:
        return _failed(run, str(error), threads)


def _failed(run: Run, error: str, threads: int) -> Result:
    return Result(arm=run.arm, seed=run.seed, identity=run.identity, error=error, threads=threads)


def _end(run: Run, result: Result, out: Path, results: dict[Key, Result], board: Board) -> None:
    append_result(out, result)
    results[run.key] = result
    board.end(run, result)


class _Signals:
    """While entered, signals are noted: the first is passed on to every run, a second kills them."""

    def __init__(self) -> None:
        self.first = 0
        """Number of the first, 0 while there is none."""
        self._since, self._passed, self._again = 0.0, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) != signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self, children: Sequence[Child]) -> None:
        """Let the runs know what has come since.

        Args:
            children: Those that run.
        """
        if self._again or (self.first and not self._passed):
            self._passed = True
            for child in children:
                child.send(signal.SIGKILL if self._again else self.first)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.first:
            self.first, self._since = number, time.monotonic()
            notice = "stopping where every run can go on from; a second signal ends them at once"
            os.write(2, f"{signal.Signals(number).name}: {notice}\n".encode())
        elif time.monotonic() - self._since >= ONE_SIGNAL_S and number != getattr(signal, "SIGHUP", None):
            self._again = True
