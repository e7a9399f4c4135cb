"""The problems of a run, and what a checkpoint remembers of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.data.examples import Example, digests
from srft.policy.checkpoint import read_state


@dataclass(frozen=True)
class Problems:
    """What a run trains and evaluates on, as read.

    Args:
        train: Training examples.
        held_out: Evaluation examples, none of them in ``train``.
        reward: The verifier's kind.
    """

    train: list[Example]
    held_out: list[Example]
    reward: str


def data_state(problems: Problems) -> dict[str, Any]:
    """Return what a checkpoint remembers of the data, to refuse a resume on other rows.

    Args:
        problems: From ``read_problems``.
    """
    with_rows = problems.reward not in ("exact", "numeric", "math")
    train = digests(problems.train, with_rows=with_rows)
    return {
        "rows": len(train),
        "train": hashlib.sha256("".join(train).encode()).hexdigest(),
        "held_out": digests(problems.held_out, with_rows=with_rows),
    }


def refuse_other_data(config: Config, now: dict[str, Any], checkpoint: Path | None) -> None:
    """Check that a resumed run has the rows that its checkpoint was made on.

    Args:
        config: The whole configuration.
        now: ``data_state`` of the problems as read.
        checkpoint: Holds ``data_state`` when it was made; None for a run from the start.

    Raises:
        ValueError: Naming the source whose rows are other ones.
    """
    if checkpoint is None:
        return
    stored = read_state(checkpoint)["data"]
    if (stored["rows"], stored["train"]) != (now["rows"], now["train"]):
        counts = f"{stored['rows']} problems then, {now['rows']} now" if stored["rows"] != now["rows"] else "other ones"
        raise ValueError(
            f"data.train={config.data.train} does not hold the rows that {checkpoint} was made on ({counts}); restore "
            "them, or set another name"
        )
    # data.eval_limit may change: the first problems must be the same
    if any(old != new for old, new in zip(stored["held_out"], now["held_out"], strict=False)):
        raise ValueError(
            f"data.eval={config.data.eval or config.data.train} does not hold the held-out rows that {checkpoint} was "
            "judged on; restore them, or set another name"
        )
