"""Tasks that need no download: chains of single-digit arithmetic, and every task of reasoning-gym."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from srft.rewards.gym import reasoning_gym_dataset

BUILTIN_TASKS = ("chain",)
CHAIN_ALPHABET = "0123456789+-*=;#"
EVAL_SHARE = 8  # one problem text in this many belongs to evaluation


def in_eval_split(text: str) -> bool:
    """Whether a problem text belongs to evaluation: a fixed function of it, so that splits cannot overlap.

    Args:
        text: The problem.
    """
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % EVAL_SHARE == 0


def chain_problem(rng: random.Random, min_ops: int, max_ops: int) -> dict[str, str]:
    """Draw one chain of + - * on digits, read strictly left to right, every value taken modulo 10.

    Args:
        rng: Advanced by the draw.
        min_ops: Fewest operations, >= 1.
        max_ops: Most operations, >= ``min_ops``.
    """
    value = rng.randrange(10)
    text, steps = str(value), ""
    for _ in range(rng.randint(min_ops, max_ops)):
        op, operand = rng.choice("+-*"), rng.randrange(10)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % 10
        text += f"{op}{operand}"
        steps += f"{value}{op}{operand}={result};"
        value = result
    return {"prompt": text + "=", "demo": f"{steps}#{value}", "answer": str(value)}


def chain_rows(
    count: int, *, split: str, seed: int, min_ops: int = 2, max_ops: int = 4
) -> list[dict[str, str]]:
    """Return ``count`` chain problems of one split, row ``i`` of training depending on (seed, i) alone.

    Args:
        count: Number of rows, >= 1.
        split: "train", or anything else for evaluation. No text is in both; evaluation texts are distinct.
        seed: Stream of problems.
        min_ops: Fewest operations in a chain, >= 1.
        max_ops: Most operations in a chain, >= ``min_ops``.

    Raises:
        ValueError: On an empty range of lengths, or when that many distinct evaluation problems do not exist.
    """
    if not 1 <= min_ops <= max_ops:
        raise ValueError(f"task chain needs 1 <= min_ops <= max_ops, got min_ops={min_ops} max_ops={max_ops}")
    wants_eval = split != "train"
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    index = 0
    while len(rows) < count:
        rng = random.Random(f"chain:{seed}:{wants_eval}:{index}")
        index += 1
        row = chain_problem(rng, min_ops, max_ops)
        while in_eval_split(row["prompt"]) != wants_eval:
            row = chain_problem(rng, min_ops, max_ops)
        if wants_eval and row["prompt"] in seen:
            # a space that is nearly used up repeats itself far more often than it yields
            if index > 100 * (count + 10):
                raise ValueError(
                    f"task chain with {min_ops}-{max_ops} operations has only about {len(rows)} distinct "
                    f"evaluation problems, {count} were asked for; raise max_ops or ask for fewer"
                )
            continue
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def reasoning_gym_rows(
    name: str, count: int, *, split: str, seed: int, options: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return ``count`` entries (question, answer, metadata) of one split; evaluation questions are distinct.

    Args:
        name: Task name.
        count: Number of entries, >= 1.
        split: "train", or anything else for evaluation; told apart by the question text.
        seed: Seed of the underlying data set.
        options: Fields of the task's own configuration.

    Raises:
        ValueError: From ``reasoning_gym_dataset``, or when the task runs out of distinct questions.
    """
    wants_eval = split != "train"
    # an eighth of the texts is for evaluation; no more than that takes, since some tasks are slow to size up
    draws = 16 * count + 1000 if wants_eval else 2 * count + 200
    dataset = reasoning_gym_dataset(name, **(options or {}), size=draws, seed=seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for index in range(draws):
        row = dataset[index]
        if in_eval_split(row["question"]) == wants_eval and not (wants_eval and row["question"] in seen):
            seen.add(row["question"])
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(
        f"reasoning_gym task {name!r} gave only {len(rows)} of {count} problems of split {split!r} in "
        f"{draws} draws; ask for fewer, or widen the task's options"
    )
