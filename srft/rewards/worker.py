"""The process that grades one completion at a time; started by srft.rewards.pool, imports no torch."""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import sys
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from srft.rewards.answers import BadGold
from srft.rewards.kinds import load_verifier
from srft.rewards.verifiers import Verifier

PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, even in the middle of one long C call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _leave_signals_to_the_trainer() -> None:
    """Pass over a signal that was sent to the trainer's whole group or job: the trainer ends this process.

    What a verifier starts is not spared, whether it was forked from this process or runs another program.
    """
    own = os.getpid()

    def pass_over(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_over)


def _fork_guard(descriptor: int) -> None:
    """Fork a process that kills this one's group when this one is gone, so that what a verifier started goes too.

    It is no child of this process, since a verifier may wait for all of those.
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


def _number(value: Any) -> float:
    """Read what a verifier returned; numpy and torch scalars are numbers, a text or a container is not."""
    if isinstance(value, str | bytes | list | tuple | dict | set):
        hint = ""
        if isinstance(value, dict) and value:
            hint = f"; return one of its values, such as result[{next(iter(value))!r}]"
        elif isinstance(value, list | tuple):
            hint = "; it is called with one completion at a time"
        raise TypeError(f"the reward must return a number or None, got {type(value).__name__} {value!r:.80}{hint}")
    return float(value)


def _grade(verifier: Verifier, item: tuple) -> tuple[float, str, str]:
    try:
        returned = verifier(*item)
        if returned is None:
            return 0.0, "unjudged", "the reward returned None"
        value = _number(returned)
    except BadGold as error:
        return 0.0, "bad_gold", str(error)
    # whatever a verifier raises on a model's text is that item's result, not the run's end
    except Exception as error:
        return 0.0, "error", f"{type(error).__name__}: {error}"
    if not math.isfinite(value):
        return 0.0, "error", f"the verifier returned {value}"
    return value, "ok", ""


def main() -> None:
    """Load the verifier and say ("ready", "") or ("failed", reason); then grade until the pipe closes."""
    kind, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _die_with(parent)
    _leave_signals_to_the_trainer()
    _fork_guard(descriptor)
    connection = Connection(descriptor)
    try:
        verifier = load_verifier(kind)
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", ""))
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(("graded", _grade(verifier, item)))


if __name__ == "__main__":
    main()
