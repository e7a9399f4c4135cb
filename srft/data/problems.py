"""The problems of a run: which are the same, which are held out, and what a checkpoint remembers of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from srft.data.examples import Example
from srft.data.schemas import detect_schema
from srft.rewards.verifiers import ANSWER_ALONE


@dataclass(frozen=True)
class Problems:
    """What a run trains and evaluates on, as read.

    Args:
        train: Training examples.
        held_out: Evaluation examples, none of them in ``train``.
        reward: The verifier's kind.
        demos: Examples with the demonstrations of a set of their own, none of them held out; empty where there is none.
    """

    train: list[Example]
    held_out: list[Example]
    reward: str
    demos: list[Example] = field(default_factory=list)


def drop_shared(examples: Iterable[Example], seen: Iterable[Example]) -> list[Example]:
    """Return the examples whose problem is in no example of ``seen``.

    Args:
        examples: Usually the evaluation set.
        seen: Usually the training set.
    """
    known = {_problem_key(example) for example in seen}
    return [example for example in examples if _problem_key(example) not in known]


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split off the last tenth of the problems, at least one: every row of theirs leaves the training set.

    Args:
        examples: Of two problems at least; several rows may be of one problem.

    Returns:
        (training examples, one held-out example of each problem), both in order.

    Raises:
        ValueError: When there is only one problem.
    """
    keys = [_problem_key(example) for example in examples]
    last = dict(zip(reversed(keys), reversed(examples), strict=True))
    if len(last) < 2:
        name = examples[0].id.rpartition(":")[0]
        raise ValueError(f"{name} has one problem, and needs one more to hold out; add rows or set data.eval")
    kept_out = dict(list(last.items())[: max(1, len(last) // 10)])
    training = [example for key, example in zip(keys, examples, strict=True) if key not in kept_out]
    return training, list(kept_out.values())[::-1]


def _problem_key(example: Example) -> str:
    """What makes two problems the same: what the layout says of it, else the prompt."""
    identity = detect_schema(example.row).identity
    return json.dumps(example.prompt if identity is None else identity(example.row), default=str)


def data_state(problems: Problems) -> dict[str, Any]:
    """Return what a checkpoint remembers of the data, by which a resume tells other rows.

    Args:
        problems: From ``read_problems``.
    """
    with_rows = problems.reward not in ANSWER_ALONE
    train = digests(problems.train, with_rows=with_rows)
    demos = digests(problems.demos, with_rows=with_rows)
    return {
        "rows": len(train),
        "train": hashlib.sha256("".join(train).encode()).hexdigest(),
        "demos": hashlib.sha256("".join(demos).encode()).hexdigest() if demos else None,
        "held_out": digests(problems.held_out, with_rows=with_rows),
    }


def digests(examples: Iterable[Example], *, with_rows: bool) -> list[str]:
    """Return a short digest of each example: its id, prompt, answer and demonstrations.

    Args:
        examples: Any number.
        with_rows: Whether the whole row counts, as for a verifier that looks at it.
    """
    facts = ([e.id, e.prompt, e.answer, e.demos, e.row if with_rows else None] for e in examples)
    texts = (json.dumps(fact, default=str, sort_keys=True) for fact in facts)
    return [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]
