"""The ranks of a run on one machine: started with ``train.ranks=N``, ended together, and nothing left behind.

Imports the standard library alone, as ``stop`` does, so that the process that waits for the ranks stays small.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections import deque
from pathlib import Path
from types import FrameType
from typing import IO, Any

from srft.stop import ALARMED, LAUNCHER, ONE_SIGNAL_S, SIGNALS

TOKEN = "SRFT_TOKEN"
"""Environment variable by which everything that a run started is found."""
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
# a rank that has found an error leaves the others so long to say the same
_PATIENCE_S = 5.0
# ranks that stop save together: once one of them has ended, the others are as good as done
_SAVING_S = 60.0
_SWEEP_S = 10.0
_LINES_KEPT = 20
_MAX_RANKS = 1024
_LAST_WORDS = ("error:", "stopped by ", "ended by ")


def share_cores() -> None:
    """Let threads that wait for one another sleep, here, in ranks and in engines, unless the environment says how.

    By default they spin: beside a busy process of somebody else a step of two threads on two cores took 2.5 times as
    long, and asleep 1.5 times; on quiet cores both took the same. Read when torch is loaded, so it comes before that.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def start_ranks(arguments: list[str]) -> None:
    """Start the ranks that the options ask for, wait for them, and leave with their status; in a rank return at once.

    A run of one process, and what torchrun started, return as well. Nothing is checked but ``train.ranks``: every rank
    reads its options itself.

    Args:
        arguments: The command line's words.

    Raises:
        SystemExit: In the process that started ranks, always.
    """
    if "RANK" in os.environ:
        _end_with_parent()
        return
    asked = _ranks_asked(arguments)
    if asked > 1 and not {"-h", "--help"} & set(arguments):
        if asked > _MAX_RANKS:
            sys.exit(_error(f"train.ranks={asked} is more than {_MAX_RANKS} on one machine; for several use torchrun"))
        sys.exit(_Job(asked, [sys.executable, *sys.orig_argv[1:]]).run())


class _Rank:
    """One process of a run; what it writes to stderr is passed on, with its number before it unless it is the first."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str]) -> None:
        self.number = number
        self.process = subprocess.Popen(
            command,
            env=environment | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if number else None,
            stderr=subprocess.PIPE,
        )
        self.said: deque[str] = deque(maxlen=_LINES_KEPT)
        """Its last lines on stdout, which nobody sees unless it fails."""
        self.last_words: list[str] = []
        """Why it ends, as it says itself; the first rank's are enough where others say the same."""
        streams = (self.process.stdout, self.process.stderr)
        self.streams: dict[IO[bytes], bytes] = {stream: b"" for stream in streams if stream is not None}
        """What it writes to, with the beginning of the next line."""
        for stream in self.streams:
            os.set_blocking(stream.fileno(), False)

    def read(self, stream: IO[bytes], *, shown: bool) -> bool:
        """Take what has been written to a stream, and show it; False at its end."""
        try:
            part = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        *lines, rest = (self.streams[stream] + part).split(b"\n")
        if not part and rest:
            lines, rest = [*lines, rest], b""
        self.streams[stream] = rest
        for line in lines:
            text = line.decode(errors="replace")
            if stream is self.process.stdout:
                self.said.append(text)
                continue
            if self.last_words or text.startswith(_LAST_WORDS):
                self.last_words.append(text)
            if shown and not (self.last_words and self.number):
                self.show(text)
        return bool(part)

    def show(self, line: str) -> None:
        """Write a line of this rank to the terminal."""
        _write(f"[rank {self.number}] {line}" if self.number else line)

    def says(self, other: _Rank) -> bool:
        """Whether it says all that another does."""
        return "\n".join(self.last_words).startswith("\n".join(other.last_words))

    def end(self) -> str:
        """How it ended."""
        code = self.process.returncode
        if code >= 0:
            return f"with exit status {code}"
        hint = " (which is also how the kernel ends a process when memory runs out)" if code == -signal.SIGKILL else ""
        return f"by {signal.Signals(-code).name}{hint}"


class _Job:
    """All ranks of a run, from their start until nothing of them is left."""

    def __init__(self, size: int, command: list[str]) -> None:
        self._token = uuid.uuid4().hex
        self._port = _reserved_port()
        self._signals: list[tuple[int, float]] = []
        self._asked: tuple[int, float] | None = None
        self._kill_at: float | None = None
        self._failed: _Rank | None = None
        self._stopped = self._alarmed = False
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        environment = self._environment(size)
        self._selector = selectors.DefaultSelector()
        self._ranks: list[_Rank] = []
        try:
            for number in range(size):
                self._ranks.append(rank := _Rank(number, command, environment))
                for stream in rank.streams:
                    self._selector.register(stream, selectors.EVENT_READ, rank)
        except OSError as error:
            self._end_all()
            sys.exit(_error(f"rank {len(self._ranks)} of {size} cannot be started: {error}"))

    def run(self) -> int:
        """Wait until all have ended; return the exit status."""
        running = list(self._ranks)
        while running:
            written = self._selector.select(_POLL_S)
            ended = [rank for rank in running if rank.process.poll() is not None]
            running = [rank for rank in running if rank not in ended]
            self._look_at(ended)
            self._read(written)
            self._obey_signals(running)
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                break
        self._end_all()
        while written := self._selector.select(0.0):
            self._read(written)
        return self._status()

    def _environment(self, size: int) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // size) if hasattr(os, "sched_getaffinity") else 1
        return {"OMP_NUM_THREADS": str(threads)} | os.environ | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port.getsockname()[1]),
            LAUNCHER: str(os.getpid()),
            TOKEN: self._token,
        }  # fmt: skip

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append((number, time.monotonic()))

    def _obey_signals(self, running: list[_Rank]) -> None:
        """Pass the first signal on, once; let a second end everything."""
        while self._signals:
            number, when = self._signals.pop(0)
            if self._asked is None:
                self._asked = number, when
                for rank in running:
                    rank.process.send_signal(number)
            # as in one process: `timeout` and closing terminals send several that are one
            elif number != getattr(signal, "SIGHUP", None) and when - self._asked[1] >= ONE_SIGNAL_S:
                self._kill_at = 0.0

    def _look_at(self, ended: list[_Rank]) -> None:
        """Decide from the ranks that have just ended how long the others have."""
        # a rank that has just begun does not handle it yet
        wanted = () if self._asked is None else (128 + self._asked[0], -self._asked[0])
        # the others fail in their next collective, often before this one is seen: what was killed came first
        codes = [(rank, rank.process.returncode) for rank in ended]
        for rank, code in sorted(codes, key=lambda pair: (pair[1] not in wanted, pair[1] >= 0)):
            if code in wanted:
                self._stopped = True  # one that was told later may fail in a collective without it
                self._hurry(_SAVING_S)
            elif code == ALARMED:
                self._alarmed = True
                self._hurry(_SAVING_S)
            elif code and self._failed is None and (code == 2 or not self._stopped):
                self._failed = rank
                self._hurry(_PATIENCE_S if code == 2 else 0.0)

    def _hurry(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._kill_at = until if self._kill_at is None else min(self._kill_at, until)

    def _read(self, written: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in written:
            rank: _Rank = key.data
            if not rank.read(key.fileobj, shown=self._tells(rank)):  # type: ignore[arg-type]
                self._selector.unregister(key.fileobj)

    def _tells(self, rank: _Rank) -> bool:
        """Whether there is more to what a rank says than that it misses one that was killed, in many lines."""
        return self._failed in (None, rank) or self._failed.process.returncode >= 0

    def _end_all(self) -> None:
        """Kill what is left of the ranks, then all that has their token: engines, reward workers, what these began."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
        deadline = time.monotonic() + _SWEEP_S
        while (left := _marked(f"{TOKEN}={self._token}".encode())) and time.monotonic() < deadline:
            for pid in left:
                _kill(pid)
            time.sleep(_POLL_S)
        self._port.close()

    def _status(self) -> int:
        """Say what went wrong, and return the status to leave with."""
        first, *others = self._ranks
        for rank in others:
            if not first.says(rank) and self._tells(rank):
                for line in rank.last_words:
                    rank.show(line)
        if self._failed is None:
            return self._status_of_stop()
        failed, code = self._failed, self._failed.process.returncode
        if code == 2 and not failed.last_words:  # a rank that leaves the reason to another
            failed = next((rank for rank in self._ranks if rank.last_words), failed)
        if code != 2 or not first.last_words or not all(map(first.says, others)):
            for line in failed.said:
                failed.show(line)
            _write(
                f"rank {failed.number} of {len(self._ranks)} ended {failed.end()}, so the others were ended; "
                "train.resume=true goes on from the newest checkpoint"
            )
        return code if code > 0 else 128 - code

    def _status_of_stop(self) -> int:
        if self._asked is None:
            return ALARMED if self._alarmed else 0
        name = signal.Signals(self._asked[0]).name
        if any(rank.process.returncode == -signal.SIGKILL for rank in self._ranks):
            _write(f"ended by {name} before every rank had stopped by itself")
        return 128 + self._asked[0]


def _ranks_asked(arguments: list[str]) -> int:
    """What the options say, read without their checks: those need torch, and seconds."""
    asked = 1
    for argument in arguments:
        try:
            is_file = argument.endswith(".toml") and "=" not in argument
            tree = tomllib.loads(Path(argument).read_text() if is_file else argument.strip().removeprefix("--"))
        except (OSError, ValueError):
            continue  # `load_config` says what is wrong with it
        section: Any = tree.get("train")
        if isinstance(section, dict) and isinstance(ranks := section.get("ranks"), int):
            asked = ranks
    return asked


def _reserved_port() -> socket.socket:
    """A socket that keeps a port from others until the store of the process group listens there, as it may."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _end_with_parent() -> None:
    """Let this rank end when the process that started it is gone, however that ended."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        end_with(int(launcher))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _watch(os.getppid())
    # whatever else set the variables of a rank may have ended by right


def end_with(parent: int) -> None:
    """Let this process end, by SIGKILL, when the one that started it is gone, however that ended.

    Args:
        parent: Process id of that one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
    _watch(parent)


def _watch(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _marked(mark: bytes) -> list[int]:
    """Other live processes whose environment holds this, on a system with /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # of a zombie it is empty
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _error(text: str) -> int:
    _write(f"error: {text}")
    return 2


def _write(line: str) -> None:
    """Write to stderr in one piece; a terminal that is gone does not end the run."""
    try:
        os.write(2, f"{line}\n".encode(errors="replace"))
    except OSError:
        pass
