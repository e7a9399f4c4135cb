"""The process that answers one turn at a time; started by srft.environments.pool, imports no torch."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srft.environments.kinds import Environment, Maker, load_environment, told
from srft.workers.serving import serve


@dataclass
class _Open:
    """The conversations that this process takes part in.

    Args:
        maker: Of an environment.
        file: That it is in, None where it is built in.
        batch: The one that they are of.
        talks: By key, each with the turns that it has answered.
    """

    maker: Maker
    file: Path | None
    batch: int = -1
    talks: dict[int, tuple[Environment, int]] = field(default_factory=dict)


def _load(name: str) -> _Open:
    maker, path = load_environment(name), name.rpartition(":")[0]
    return _Open(maker, Path(path).resolve() if path else None)


class _Unfit(Exception):
    """What an environment has returned is nothing that it may."""


def _text(said: Any) -> str | None:
    if said is None:
        return None
    if not isinstance(said, str):
        raise _Unfit(f"step must return text or None, got {type(said).__name__} {reprlib.repr(said)}")
    # the trainer has no class of the user's
    text = str.__str__(said)
    if text.encode(errors="replace").decode() != text:
        raise _Unfit(
            f"step must return text that UTF-8 can hold, got {reprlib.repr(text)}; decode what it is read from with "
            'errors="replace"'
        )
    return text


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _Unfit(f"reward must return a finite number, got {type(value).__name__} {reprlib.repr(value)}")
    return number


_Item = tuple[int, int, list[str], Any, dict[str, Any], bool]


def _answer(still: _Open, item: _Item) -> tuple[str | None, float, str, str]:
    """What is said to the last of these turns, or the reward once they are all; text, reward, status and message.

    Turns that another process had heard, which is gone, are played again.
    """
    batch, key, texts, answer, row, is_over = item
    if batch != still.batch:
        still.batch, still.talks = batch, {}
    said: Any = None
    try:
        environment, heard = still.talks[key] if key in still.talks else (still.maker(answer, row), 0)
        for text in texts[heard:]:
            said = environment.step(text)
        still.talks[key] = (environment, len(texts))
        if is_over:
            return None, _number(environment.reward()), "ok", ""  # type: ignore[attr-defined]
        return _text(said), 0.0, "ok", ""
    except _Unfit as error:
        return None, 0.0, "raised", str(error)
    # whatever code of the user's raises ends the run, with its place; sys.exit and a cancelled task are no Exception
    except BaseException as error:
        return None, 0.0, "raised", told(error, still.file)


def _about(still: _Open) -> str:
    return "judges" if hasattr(still.maker, "reward") else ""


if __name__ == "__main__":
    serve(_load, _answer, _about)
