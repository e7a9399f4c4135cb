"""SIGTERM, Ctrl-C and a closed terminal: the run ends where its state is whole, so that it can be saved and go on.

Imports the standard library alone, and quickly: ``srft.train`` calls ``leave_at_once`` before its other imports.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
# `timeout` and some shells signal a process and then its group: what comes within this time is one signal
ONE_SIGNAL_S = 0.1
ALARMED = 3
"""Exit status of a run that an alarm ended."""
LAUNCHER = "SRFT_LAUNCHER"
"""Environment variable that holds the process id of what started a rank."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end; like Ctrl-C, it is no failure that could be handled and passed over.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """What a shell reports for a process that this signal ended."""


class StopSignals:
    """While entered, the first signal raises ``Stopped`` in the main thread, and a second ends the process at once.

    Between ``hold`` and ``release`` the first one waits. A signal that was ignored before, as under nohup, stays so.
    In a thread other than the main one nothing is changed, since only that one receives signals.

    Ranks of one run are told at different moments, and one that left alone would leave the others in a collective: from
    the first ``agree`` on, a signal to any of them waits until all are at the next ``agree`` or ``release``, where all
    raise ``Stopped``. Of ranks that ``launch`` started, the launcher takes the second signal and ends them.

    Args:
        largest: Returns the largest of the ranks' numbers to each of them, a collective; None in a run of one process,
            where ``agree`` does nothing.
    """

    def __init__(self, largest: Callable[[int], int] | None = None) -> None:
        self._largest = largest
        self._together = False
        self._number: int | None = None
        self._since = 0.0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if (handler := signal.getsignal(number)) != signal.SIG_IGN:
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From here on a first signal waits for ``release``."""
        self._held = True

    def release(self) -> None:
        """From here on a signal stops the run again; of many ranks all must come here.

        Raises:
            Stopped: When one has been waiting.
        """
        self._held = False
        self.agree()
        if self._number is not None and not self._together:
            raise Stopped(self._number)

    def agree(self) -> None:
        """Let the ranks stop together, at a point of a step to which all come; nothing in a run of one process.

        Raises:
            Stopped: On every rank, when a signal has reached any.
        """
        if self._largest is None:
            return
        self._together = True
        # a signal between this call and its answer is for the next one
        if number := self._largest(self._number or 0):
            raise Stopped(number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._number is None:
            self._number, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                notice = "stopping where the run can go on from; a second signal ends it at once"
                os.write(2, f"{signal.Signals(number).name}: {notice}\n".encode())
            if not (self._held or self._together):
                raise Stopped(number)
        elif LAUNCHER in os.environ:
            return
        # a terminal that closes may send several
        elif number != getattr(signal, "SIGHUP", None) and time.monotonic() - self._since >= ONE_SIGNAL_S:
            _leave(number)


@contextmanager
def ends_in_a_line(*errors: type[Exception]) -> Iterator[None]:
    """Turn what ends a command that goes on where it was into a line and an exit status.

    Args:
        errors: Those of which the user is told; 2. A signal is 128 and its number.

    Raises:
        SystemExit: On one of them, or a signal.
    """
    try:
        yield
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        print(f"{stopped}; the same command goes on from here", file=sys.stderr)
        sys.exit(stopped.exit_code)


def leave_at_once() -> None:
    """Let a signal end the process without a word more than its name, while there is nothing to save or to end."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: _leave(number))


def _leave(number: int) -> None:
    """End without unwinding; the engine and the reward workers end with the process, however it ends."""
    os.write(2, f"ended by {signal.Signals(number).name}\n".encode())
    if sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty():
        os.write(1, b"\x1b[?25h")  # a live display hides the cursor
    os._exit(128 + number)
