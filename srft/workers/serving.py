"""The other side of a pool's pipe: load what the process is for, then do one item after the other; imports no torch."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

_Loaded = TypeVar("_Loaded")
PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, even in the middle of one long C call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _leave_signals_to_the_trainer() -> None:
    """Pass over a signal that was sent to the trainer's whole group or job: the trainer ends this process.

    What the user's code starts is not spared, whether it was forked from this process or runs another program.
    """
    own = os.getpid()

    def pass_over(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_over)


def _fork_guard(descriptor: int) -> None:
    """Fork a process that kills this one's group when this one is gone, so that what its code started goes too.

    It is no child of this process, since that code may wait for all of those.
    """
    if sys.platform != "linux":
        return
    worker = os.pidfd_open(os.getpid())
    between = os.fork()
    if between:
        os.close(worker)
        os.waitpid(between, 0)
        return
    if os.fork():
        os._exit(0)
    os.close(descriptor)  # the trainer takes its end for that of the worker
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    select.select([worker], [], [])
    os.killpg(0, signal.SIGKILL)


def serve(
    load: Callable[[str], _Loaded], do: Callable[[_Loaded, Any], Any], about: Callable[[_Loaded], str] = lambda _: ""
) -> None:
    """Load, say ("ready", about it) or ("failed", reason); answer items by ("done", result) until the pipe closes.

    Args:
        load: Called with what the pool tells the module.
        do: Called with what was loaded and an item; what it raises ends the process.
        about: What the pool is to know of what was loaded.
    """
    argument, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _die_with(parent)
    _leave_signals_to_the_trainer()
    _fork_guard(descriptor)
    connection = Connection(descriptor)
    try:
        loaded = load(argument)
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", about(loaded)))
    own = os.getpid()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        done = do(loaded, item)
        if os.getpid() != own:
            # forked by the user's code, which came back here: a second answer would be taken for that of the next item
            os._exit(0)
        connection.send(("done", done))
