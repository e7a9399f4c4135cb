"""Worker processes that cannot hang the run: a hard deadline per item, then SIGKILL."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

STARTUP_SECONDS = 120.0
DIED = "the worker died twice on this item"
_KILLED_STARTS = 3  # processes that the kernel may end while they load, before the run ends too
_Result = TypeVar("_Result")


class Worker:
    """One child process, its pipe, and the item that it is on.

    Args:
        module: Run as its program: calls ``serving.serve``.
        argument: What the module is told.
        slot: Its place in the pool.
    """

    def __init__(self, module: str, argument: str, slot: int) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)])
        with theirs:
            # not multiprocessing: its spawn imports the parent's main module, torch and all, into each worker
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, argument, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # its own group: an interrupt at the keyboard is ours, and what the user's code starts ends with it
                process_group=0,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        self.slot = slot
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    def event(self) -> tuple[str, Any] | None:
        """Return what has come from the child, ("died", "") or ("late", ""); None while it is within its time."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            return "died", ""
        return ("late", "") if time.monotonic() >= self.deadline else None

    def kill(self, *, ended: bool = False) -> str:
        """End the process, wait for it, and say how it ended.

        Args:
            ended: Whether it is known to have ended by itself.
        """
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


@dataclass
class Batch(Generic[_Result]):
    """Items that a pool works on together, and what has become of them.

    Args:
        items: In order; more may be added.
        results: By place among the items.
        queue: Places of those that no worker has.
        retried: Places of those whose worker has died once.
    """

    items: list[Any] = field(default_factory=list)
    results: dict[int, _Result] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    retried: set[int] = field(default_factory=set)

    def add(self, items: Sequence[Any]) -> None:
        """Put further items last.

        Args:
            items: What the workers take.
        """
        self.queue.extend(range(len(self.items), len(self.items) + len(items)))
        self.items += items


class WorkerPool(ABC, Generic[_Result]):
    """Worker processes that do the same with every item; started by the first use, or by ``prewarm``.

    Args:
        module: Run by each worker: calls ``serving.serve``.
        argument: What the module is told.
        about: What is loaded, as errors name it.
        workers: Number of processes, >= 1.
        deadline_s: Seconds that one item may run, > 0; the start of a process does not count.

    Raises:
        ValueError: On a bad number.
    """

    def __init__(self, module: str, argument: str, about: str, workers: int, deadline_s: float) -> None:
        if workers < 1 or not 0 < deadline_s < float("inf"):
            raise ValueError(f"{about} needs workers >= 1 and a finite deadline_s > 0, got {workers} and {deadline_s}")
        self._module, self._argument, self._about = module, argument, about
        self.deadline_s = deadline_s
        self._killed_starts = 0
        self._size = workers
        self._workers: list[Worker] = []
        self._closed = False
        self._lock = threading.Lock()

    @abstractmethod
    def _result(self, payload: Any) -> _Result:
        """What a worker has sent of an item."""

    @abstractmethod
    def _failure(self, status: Literal["timeout", "error"], message: str) -> _Result:
        """What an item comes to whose worker was killed at its deadline, or died twice."""

    def _loaded(self, about: str) -> None:
        """Take up what a worker says of what it has loaded."""

    def _takes(self, worker: Worker, item: Any) -> bool:
        """Whether an item may go to a worker."""
        return True

    def prewarm(self) -> None:
        """Start every worker and wait until each has loaded what it is for.

        Raises:
            ValueError: If that cannot be loaded, with the worker's reason.
        """
        with self.held():
            while len(self._workers) < self._size or any(not worker.ready for worker in self._workers):
                self._start_missing()
                self._collect(Batch())

    def _run(self, items: Sequence[Any], after: Callable[[dict[int, _Result]], None] | None = None) -> list[_Result]:
        """The result of each item, in order; ``after`` is told what there is after every event."""
        batch: Batch[_Result] = Batch()
        batch.add(items)
        with self.held():
            while len(batch.results) < len(items):
                self.turn(batch)
                if after is not None:
                    after(batch.results)
        return [batch.results[index] for index in range(len(items))]

    def turn(self, batch: Batch[_Result], bell: socket.socket | None = None) -> None:
        """Give idle workers what is in the queue, wait until something becomes of an item, and enter that.

        Args:
            batch: Modified in place; whoever has ``held`` the pool brings the same one until it is done with it.
            bell: Ends the wait early when something can be read from it.

        Raises:
            ValueError: If what the workers are for cannot be loaded.
        """
        self._start_missing()
        for worker in list(self._workers):
            if batch.queue and worker.ready and worker.item is None:
                self._hand_out(worker, batch)
        self._collect(batch, bell)

    def close(self) -> None:
        """Kill the workers; safe to call twice."""
        self._closed = True
        self._kill_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the workers for a batch, and leave none in the middle of an item when that is cut short.

        Raises:
            ValueError: If the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._about}: its pool is closed")
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
        for slot in sorted(set(range(self._size)) - {worker.slot for worker in self._workers}):
            self._workers.append(Worker(self._module, self._argument, slot))

    def _hand_out(self, worker: Worker, batch: Batch[_Result]) -> None:
        index = next((index for index in batch.queue if self._takes(worker, batch.items[index])), None)
        if index is None:
            return
        batch.queue.remove(index)
        worker.item = index
        worker.deadline = time.monotonic() + self.deadline_s
        try:
            worker.connection.send(tuple(batch.items[index]))
        except OSError:
            # it ended while idle: the item is not to blame
            self._workers.remove(worker)
            worker.kill()
            batch.queue.appendleft(index)

    def _collect(self, batch: Batch[_Result], bell: socket.socket | None = None) -> None:
        """Wait for the next answer, death or deadline, and enter every one that is due."""
        busy = [worker for worker in self._workers if not worker.ready or worker.item is not None]
        if not busy:
            return
        nearest = min(worker.deadline for worker in busy)
        rung = [] if bell is None else [bell]
        wait([*rung, *(worker.connection for worker in busy)], timeout=max(0.0, nearest - time.monotonic()))
        for worker in busy:
            event = worker.event()
            if event is None:
                continue
            if not worker.ready:
                self._finish_start(worker, *event)
                continue
            index, worker.item = worker.item, None
            assert index is not None
            if event[0] == "done":
                batch.results[index] = self._result(event[1])
                continue
            self._workers.remove(worker)
            end = worker.kill(ended=event[0] == "died")
            if event[0] == "late":
                batch.results[index] = self._failure("timeout", f"killed after {self.deadline_s:g} s")
            elif index in batch.retried:
                batch.results[index] = self._failure("error", f"{DIED}: {end}")
            else:
                batch.retried.add(index)
                batch.queue.appendleft(index)

    def _finish_start(self, worker: Worker, event: str, reason: str) -> None:
        if event == "ready":
            worker.ready = True
            self._loaded(reason)
            return
        self._workers.remove(worker)
        end = worker.kill(ended=event == "died")
        if event == "failed":
            raise ValueError(f"{self._about} cannot be loaded: {reason}")
        if end == signal.SIGKILL.name and event == "died" and self._killed_starts < _KILLED_STARTS:
            self._killed_starts += 1
            return
        what = f"took more than {STARTUP_SECONDS:g} s" if event == "late" else f"ended with {end}"
        raise ValueError(f"{self._about} cannot be loaded: its worker {what} while loading")
