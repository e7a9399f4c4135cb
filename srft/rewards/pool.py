"""Grades completions in processes that cannot hang the run: a hard deadline per item, then SIGKILL."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from srft.rewards.kinds import check_kind

STARTUP_SECONDS = 120.0
_DIED = "the worker died twice on this item"
_KILLED_STARTS = 3  # processes that the kernel may end while they load, before the run ends too
_DEATHS = 8  # a verifier that has ended its process on so many items and graded none ends the run
Item = tuple[str, Any, dict[str, Any]]


@dataclass(frozen=True)
class RewardResult:
    """The grade of one completion.

    Args:
        value: 0 or 1 from the built-in verifiers, any finite float from others; 0 unless ``status`` is "ok".
        status: "ok"; "unjudged": the verifier returned None; "timeout": killed at the deadline; "error": the
            verifier raised, or its process died twice; "bad_gold": the ground truth cannot be read.
        message: What went wrong, empty for "ok".
    """

    value: float
    status: Literal["ok", "unjudged", "timeout", "error", "bad_gold"]
    message: str = ""


class Judge(Protocol):
    """What gives answers their grades: a ``RewardPool``, or what stands before one."""

    def score(self, items: Sequence[Item]) -> list[RewardResult]:
        """Return the grade of each answer, in order.

        Args:
            items: (completion, answer, row) each.
        """


class _Worker:
    """One child process, its pipe, and the item that it is on."""

    def __init__(self, kind: str) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)])
        with theirs:
            # not multiprocessing: its spawn imports the parent's main module, torch and all, into each worker
            self.process = subprocess.Popen(
                [sys.executable, "-m", "srft.rewards.worker", kind, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # its own group: an interrupt at the keyboard is ours, and what a verifier starts ends with it
                process_group=0,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    def event(self) -> tuple[str, Any] | None:
        """What has come from the child, ("died", "") or ("late", ""); None while it is within its time."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            return "died", ""
        return ("late", "") if time.monotonic() >= self.deadline else None

    def kill(self, *, ended: bool = False) -> str:
        """End the process, wait for it, and say how it ended."""
        self.connection.close()
        if ended:
            # its pipe closes a moment before it can be waited for, and the moment has the reason
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1.0)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self._exit_code()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _exit_code(self) -> int:
        """Wait for the killed process without the lock of ``Popen``: a signal that raised inside its poll() kept it."""
        if self.process.returncode is None:
            try:
                _, status = os.waitpid(self.process.pid, 0)
                self.process.returncode = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # that poll() had its status, and lost it
                self.process.returncode = -signal.SIGKILL
        return self.process.returncode


class RewardPool:
    """Worker processes that share one verifier; started by the first use, or by ``prewarm``.

    Args:
        kind: "exact", "numeric", "countdown", "math", "reasoning_gym:<task>" or "path/to/file.py:function",
            where function(completion, answer, row) returns a float, or None for a completion that it does
            not judge.
        workers: Number of processes, >= 1.
        deadline_s: Seconds that one item may run, > 0; the start of a process does not count.

    Raises:
        ValueError: On an unknown verifier, a missing file, or a bad number.
    """

    def __init__(self, kind: str, workers: int, deadline_s: float) -> None:
        if workers < 1 or deadline_s <= 0:
            raise ValueError(
                f"a reward pool needs workers >= 1 and deadline_s > 0, got {workers} and {deadline_s}"
            )
        check_kind(kind)
        self.kind = kind
        self.deadline_s = deadline_s
        self.counts: Counter[str] = Counter()
        self._graded = False
        self._killed_starts = 0
        self._size = workers
        self._workers: list[_Worker] = []
        self._closed = False
        self._lock = threading.Lock()

    def prewarm(self) -> None:
        """Start every worker and wait until each has loaded the verifier.

        Raises:
            ValueError: If the verifier cannot be loaded, with the worker's reason.
        """
        with self._lock, self._all_or_nothing():
            while len(self._workers) < self._size or any(not worker.ready for worker in self._workers):
                self._start_missing()
                self._collect({}, deque(), set())

    def score(self, items: Sequence[Item], *, may_fail: bool = False) -> list[RewardResult]:
        """Grade (completion text, answer, row) triples; result ``i`` belongs to item ``i``.

        Args:
            items: Any number of triples; answer and row must be picklable.
            may_fail: Return the results of a batch on which the verifier failed throughout, instead of raising.

        Raises:
            ValueError: If the verifier cannot be loaded, if it fails on a whole batch, or if the pool is closed.
        """
        results: dict[int, RewardResult] = {}
        queue = deque(range(len(items)))
        retried: set[int] = set()
        with self._lock, self._all_or_nothing():
            while len(results) < len(items):
                self._start_missing()
                for worker in list(self._workers):
                    if queue and worker.ready and worker.item is None:
                        self._hand_out(worker, queue, items)
                self._collect(results, queue, retried)
                if not (may_fail or self._graded) and len(results) >= _DEATHS:
                    # each death costs two starts of a process: nobody should wait for a whole batch of them
                    if all(result.message.startswith(_DIED) for result in results.values()):
                        self._stop_if_useless(list(results.values()))
        ordered = [results[index] for index in range(len(items))]
        self.counts.update(result.status for result in ordered)
        if not may_fail:
            self._stop_if_useless(ordered)
        return ordered

    def _stop_if_useless(self, results: list[RewardResult]) -> None:
        """Refuse to go on with a verifier that has failed on all of its first items, or on a whole batch of several."""
        failed = [result for result in results if result.status not in ("ok", "unjudged")]
        if len(failed) < len(results) or not results:
            self._graded = True
            return
        broken = len(failed) > 1 and all(result.status == "error" for result in failed)
        if broken or not self._graded:
            what = {"timeout": "hit its deadline", "bad_gold": "could not read the answer"}
            raise ValueError(
                f"reward {self.kind!r} {what.get(failed[0].status, 'failed')} on all of the first "
                f"{len(failed)} items of a batch, the first with: {failed[0].message}"
            )

    def close(self) -> None:
        """Kill the workers; safe to call twice."""
        self._closed = True
        self._kill_all()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave no worker in the middle of an item when a call is cut short."""
        if self._closed:
            raise ValueError("this reward pool is closed")
        try:
            yield
        except BaseException:
            self._kill_all()
            raise

    def _kill_all(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    def _start_missing(self) -> None:
        """Fill the pool up, dropping idle workers that ended by themselves."""
        for worker in [
            w for w in self._workers if w.ready and w.item is None and w.process.poll() is not None
        ]:
            self._workers.remove(worker)
            worker.kill()
        while len(self._workers) < self._size:
            self._workers.append(_Worker(self.kind))

    def _hand_out(self, worker: _Worker, queue: deque[int], items: Sequence[Item]) -> None:
        index = queue.popleft()
        worker.item = index
        worker.deadline = time.monotonic() + self.deadline_s
        try:
            worker.connection.send(tuple(items[index]))
        except OSError:
            # it ended while idle: the item is not to blame
            self._workers.remove(worker)
            worker.kill()
            queue.appendleft(index)

    def _collect(self, results: dict[int, RewardResult], queue: deque[int], retried: set[int]) -> None:
        """Wait for the next answer, death or deadline, and enter every one that is due."""
        busy = [worker for worker in self._workers if not worker.ready or worker.item is not None]
        if not busy:
            return
        nearest = min(worker.deadline for worker in busy)
        wait([worker.connection for worker in busy], timeout=max(0.0, nearest - time.monotonic()))
        for worker in busy:
            event = worker.event()
            if event is None:
                continue
            if not worker.ready:
                self._finish_start(worker, *event)
                continue
            index, worker.item = worker.item, None
            assert index is not None
            if event[0] == "graded":
                results[index] = RewardResult(*event[1])
                continue
            self._workers.remove(worker)
            end = worker.kill(ended=event[0] == "died")
            if event[0] == "late":
                results[index] = RewardResult(0.0, "timeout", f"killed after {self.deadline_s:g} s")
            elif index in retried:
                results[index] = RewardResult(0.0, "error", f"{_DIED}: {end}")
            else:
                retried.add(index)
                queue.appendleft(index)

    def _finish_start(self, worker: _Worker, event: str, reason: str) -> None:
        if event == "ready":
            worker.ready = True
            return
        self._workers.remove(worker)
        end = worker.kill(ended=event == "died")
        if event == "failed":
            raise ValueError(f"reward {self.kind!r} cannot be loaded: {reason}")
        if end == signal.SIGKILL.name and event == "died" and self._killed_starts < _KILLED_STARTS:
            self._killed_starts += 1
            return
        what = f"took more than {STARTUP_SECONDS:g} s" if event == "late" else f"ended with {end}"
        raise ValueError(f"reward {self.kind!r} cannot be loaded: its worker {what} while loading")
