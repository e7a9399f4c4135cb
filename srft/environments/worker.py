"""The process that answers one turn at a time; started by srft.environments.pool, imports no torch."""

from __future__ import annotations

import math
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


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"reward must return a finite number, got {value!r:.80}")
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
    # whatever code of the user's raises is told with its place, and ends the run
    except Exception as error:
        return None, 0.0, "raised", told(error, still.file)
    if said is not None and not isinstance(said, str):
        return None, 0.0, "raised", f"step must return text or None, got {type(said).__name__} {said!r:.80}"
    return said, 0.0, "ok", ""


def _about(still: _Open) -> str:
    return "judges" if hasattr(still.maker, "reward") else ""


if __name__ == "__main__":
    serve(_load, _answer, _about)
