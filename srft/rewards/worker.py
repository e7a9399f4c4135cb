"""The process that grades one completion at a time; started by srft.rewards.pool, imports no torch."""

from __future__ import annotations

import math
from typing import Any

from srft.rewards.answers import BadGold
from srft.rewards.kinds import load_verifier
from srft.rewards.verifiers import Verifier
from srft.workers.serving import serve


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


if __name__ == "__main__":
    serve(load_verifier, _grade)
