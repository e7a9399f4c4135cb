"""The problems of a run, and what a checkpoint remembers of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from srft.data.examples import Example, digests


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
    """Return what a checkpoint remembers of the data, by which a resume tells other rows.

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
