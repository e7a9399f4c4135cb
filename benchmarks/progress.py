"""What a measurement does now and about how long it still takes, said from the first second on."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

Pair = tuple[str, str]  # loss, variant


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """A line for each step before it starts, an estimate of the time left, and a limit of time if there is one."""

    def __init__(self, minutes: float = 0, say: Callable[[str], None] = _to_stderr):
        """Start the clock; 0 minutes are no limit."""
        if not (math.isfinite(minutes) and minutes >= 0):
            raise ValueError(f"minutes must be a number >= 0 (0: no limit), got {minutes}")
        self.minutes = minutes
        self._say, self._start = say, time.monotonic()
        self._todo: list[tuple[Pair, int]] = []
        self._rates: dict[Pair, float] = {}  # seconds a token of the last call

    def say(self, text: str) -> None:
        """One line, with the time since the start."""
        self._say(f"[{_clock(time.monotonic() - self._start)}] {text}")

    def over(self, seconds: float = 0) -> bool:
        """Whether the limit has passed, or would within ``seconds``."""
        return self.minutes > 0 and time.monotonic() - self._start + seconds > 60 * self.minutes

    def plan(self, calls: list[tuple[Pair, int]]) -> None:
        """The calls still to come, each with its number of tokens."""
        self._todo = calls

    def left(self, calls: list[tuple[Pair, int]] | None = None) -> float | None:
        """About how many seconds ``calls``, by default all that are planned, take; None before the first call."""
        if not self._rates:
            return None
        mean = sum(self._rates.values()) / len(self._rates)
        return sum(self._rates.get(pair, mean) * tokens for pair, tokens in (self._todo if calls is None else calls))

    @contextlib.contextmanager
    def step(self, text: str, pair: Pair, tokens: int) -> Iterator[None]:
        """Say ``text`` and the time left, and learn from the time that the body takes."""
        left = self.left()
        estimate = "" if left is None else f"; about {_clock(left)} left"
        began = time.monotonic()
        if left is not None and self.over(left):
            time_left = max(0.0, 60 * self.minutes - (began - self._start))
            estimate = f"; about {_clock(left)} of work and {_clock(time_left)} of time left"
        self.say(f"{text}{estimate}")
        try:
            yield
        finally:
            self._rates[pair] = (time.monotonic() - began) / tokens
            if (pair, tokens) in self._todo:
                self._todo.remove((pair, tokens))

    def drop(self, pair: Pair) -> None:
        """Take out what was planned for a variant that is left out."""
        self._todo = [call for call in self._todo if call[0] != pair]
