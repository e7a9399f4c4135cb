"""What an engine's process has in common with its trainer, pipes, and with nobody, its end: it leaves nothing behind.

The standard library alone: the Python that runs an engine need have nothing of the trainer's.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

_HEADER = struct.Struct(">Q")
_PR_SET_PDEATHSIG = 1
# the longest that anything of the engine may outlive its trainer is a few of these
_GUARD_POLL_S = 0.25


def write_message(fd: int, message: dict[str, Any], timeout_s: float | None = None) -> None:
    """Write one message: 8 bytes of length, then JSON.

    Args:
        fd: A pipe; one that does not block where there is a limit.
        message: Anything JSON can hold.
        timeout_s: Seconds the other end may take to read it; None waits for ever.

    Raises:
        BrokenPipeError: When the other end is gone.
        TimeoutError: When it took too long.
    """
    payload = json.dumps(message).encode()
    view = memoryview(_HEADER.pack(len(payload)) + payload)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while view:
        if deadline is not None and not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
            raise TimeoutError
        view = view[os.write(fd, view) :]


def read_message(fd: int, timeout_s: float | None = None) -> dict[str, Any]:
    """Read one message that ``write_message`` wrote.

    Args:
        fd: A blocking pipe.
        timeout_s: Seconds the whole message may take; None waits for ever.

    Raises:
        EOFError: When the other end is gone.
        TimeoutError: When it took too long.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    (length,) = _HEADER.unpack(_read_exactly(fd, _HEADER.size, deadline))
    return json.loads(_read_exactly(fd, length, deadline))


def _read_exactly(fd: int, count: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(fd, min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux).

    Args:
        parent_pid: The process of that thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # a parent that died before the call above sends no signal
    if os.getppid() != parent_pid:
        os._exit(1)


def leave_signals_to_the_trainer() -> None:
    """Pass over a signal that was sent to a whole job: the trainer ends this process, and its guard the group.

    The guard is forked later and inherits this.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def fork_guard(request_fd: int, reply_fd: int, folders: list[str]) -> int:
    """Fork a process that kills the whole group as soon as the trainer or this process is gone.

    A thread could not: it dies with this process, and the grandchildren would stay.

    Args:
        request_fd: A pipe that hangs up when the trainer is gone.
        reply_fd: A pipe that the guard must not keep open.
        folders: To remove then.

    Returns:
        A pipe. Once there is a byte in it, the guard notes what shared memory the group has, to remove that, too.
    """
    worker_pid = os.getpid()
    told_fd, tell_fd = os.pipe()
    if os.fork():
        os.close(told_fd)
        return tell_fd
    for fd in (reply_fd, tell_fd):
        os.close(fd)
    shared: set[Path] = set()
    waiting, gone = select.poll(), False
    # no event asked for: only the hang-up, which needs no asking, ends the wait early
    waiting.register(request_fd, 0)
    waiting.register(told_fd, select.POLLIN)
    while not gone:
        ready = dict(waiting.poll(_GUARD_POLL_S * 1000))
        gone = request_fd in ready or os.getppid() != worker_pid
        if told_fd in ready and os.read(told_fd, 1):
            shared = shared_memory_of(os.getpgrp())
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for path in shared:
        path.unlink(missing_ok=True)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("it is of the group")


def shared_memory_of(group: int) -> set[Path]:
    """Return the files in /dev/shm that processes of a group have mapped, on a system with /proc.

    Args:
        group: Its id.
    """
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                words = [line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines()]
                found |= {Path(word[5]) for word in words if len(word) == 6 and word[5].startswith("/dev/shm/")}
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return {path for path in found if path.exists()}
