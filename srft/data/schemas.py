"""Known layouts of a row, one record each: adding a layout is adding its record, and what it reads, to this file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from srft.data.columns import Row, has_column
from srft.data.messages import is_missing
from srft.rewards.gym import REASONING_GYM


@dataclass(frozen=True)
class Column:
    """Where a row holds its prompt, its answer or its demonstrations, and what is made of it there.

    Args:
        name: Column name, or a dotted path into nested fields.
        read: From (value, row) what the example gets, of demonstrations from each text; None takes it as it stands. It
            is passed over where ``data.columns`` names another column, and raises ValueError with what a row lacks.
    """

    name: str
    read: Callable[[Any, Row], Any] | None = None


@dataclass(frozen=True)
class Schema:
    """A layout.

    Args:
        name: What people call it.
        signs: Columns, or dotted paths, that give it away when a row has all of them.
        prompt: Where the prompt stands.
        answer: Where the ground truth stands.
        demos: Where demonstrations may stand; the first that is there counts.
        reward: The verifier that judges it unless ``reward.kind`` says otherwise; None where none is known to fit.
        forms_differ: Whether data sets of this layout ask for answers in different forms, so that what the prompts
            ask for goes before ``reward``.
        fits: What else gives it away, where other layouts have the same columns.
        identity: What makes two rows the same problem; None: the prompt.
    """

    name: str
    signs: tuple[str, ...]
    prompt: Column
    answer: Column
    demos: tuple[Column, ...]
    reward: str | None
    forms_differ: bool = False
    fits: Callable[[Row], bool] | None = None
    identity: Callable[[Row], Any] | None = None


# what a layout makes of its columns


def _after_hashes(answer: Any, row: Row) -> str | None:
    return str(answer).rpartition("#### ")[2].strip() if "#### " in str(answer) else None


def _without_marks(demo: str, row: Row) -> str:
    """A worked answer of GSM8K without its calculator marks: 48/2 = <<48/2=24>>24."""
    return re.sub(r"<<[^<>]*>>", "", demo)


def _countdown_prompt(nums: Any, row: Row) -> str:
    """Instruction for one row, asking for the form that the countdown verifier reads."""
    if "target" not in row:
        raise ValueError("no column 'target' in this row")
    if not isinstance(nums, list | tuple):
        raise ValueError(f"nums must be a list of numbers, got {type(nums).__name__} {nums!r:.80}")
    return (
        f"Using the numbers [{', '.join(map(str, nums))}], write an expression that equals {row['target']}. "
        "Use + - * / and parentheses, and each number at most once. Work step by step, then give the "
        "expression alone between <answer> and </answer>.\n"
    )


def _countdown_demo(solution: str, row: Row) -> str:
    answer = row.get("answer")
    return solution if is_missing(answer) else f"{solution}\n<answer>{answer}</answer>"


def _countdown_problem(row: Row) -> Any:
    """The order of the numbers makes no other problem."""
    nums = row["nums"]
    # a map of the user's may leave them aside, whatever they are
    return [sorted(map(str, nums)) if isinstance(nums, list | tuple) else nums, row["target"]]


# the layouts, of which the first that fits counts

SCHEMAS = (
    # verl's layout; OpenR1-Math and LUFFY keep worked answers in target, verl's GSM8K in extra_info
    Schema(
        "openr1",
        signs=("prompt", "reward_model.ground_truth"),
        prompt=Column("prompt"),
        answer=Column("reward_model.ground_truth"),
        demos=(Column("target"), Column("extra_info.answer", _without_marks)),
        reward="math",
        forms_differ=True,
    ),
    Schema(
        "countdown",
        signs=("nums", "target"),
        prompt=Column("nums", _countdown_prompt),
        answer=Column("target"),
        demos=(Column("solution", _countdown_demo),),
        reward="countdown",
        identity=_countdown_problem,
    ),
    Schema(
        "gsm8k",
        signs=("question", "answer"),
        fits=lambda row: "#### " in str(row["answer"]),
        prompt=Column("question"),
        answer=Column("answer", _after_hashes),
        demos=(Column("answer", _without_marks),),
        reward="numeric",
    ),
    Schema(
        "math",
        signs=("problem", "answer"),
        prompt=Column("problem"),
        answer=Column("answer"),
        demos=(Column("solution"),),
        reward="math",
    ),
    Schema(
        "prompt_answer",
        signs=("prompt", "answer"),
        prompt=Column("prompt"),
        answer=Column("answer"),
        demos=(Column("demo"), Column("completion")),
        reward="exact",
    ),
    Schema(
        "question_answer",
        signs=("question", "answer"),
        prompt=Column("question"),
        answer=Column("answer"),
        demos=(Column("demo"), Column("completion")),
        reward="exact",
    ),
    Schema(
        "messages",
        signs=("messages", "answer"),
        prompt=Column("messages"),
        answer=Column("answer"),
        demos=(Column("messages"),),
        reward="exact",
    ),
    Schema(
        "conversations",
        signs=("conversations", "answer"),
        prompt=Column("conversations"),
        answer=Column("answer"),
        demos=(Column("conversations"),),
        reward="exact",
    ),
    Schema(
        "other",
        signs=(),
        prompt=Column("prompt"),
        answer=Column("answer"),
        demos=(Column("demo"), Column("completion")),
        reward=None,
    ),
)

# the entries of reasoning-gym's tasks; each task judges its own
_GENERATED = Schema(
    REASONING_GYM,
    signs=(),
    prompt=Column("question"),
    answer=Column("answer"),
    demos=(Column("answer"),),
    reward=None,
)

# the built-in task poses its problem in a few bytes, in place of the layout's instruction
_COUNTDOWN = Schema(
    "countdown",
    signs=(),
    prompt=Column("prompt"),
    answer=Column("target"),
    demos=(Column("demo"),),
    reward="countdown",
    identity=_countdown_problem,
)

# in the form of the layout with these columns, except that an answer may stand in a sentence
_SUMS = replace(next(schema for schema in SCHEMAS if schema.name == "prompt_answer"), name="sums", reward="numeric")


def detect_schema(row: Row) -> Schema:
    """Return the first layout that a row fits; "other" fits every row.

    Args:
        row: Any row of the source, or several merged by :func:`srft.data.columns.merged`.
    """
    return next(
        schema
        for schema in SCHEMAS
        if all(has_column(row, column) for column in schema.signs) and (schema.fits is None or schema.fits(row))
    )


def find_schema(source: str, row: Row) -> Schema:
    """Return the layout of a source's rows.

    Args:
        source: As in ``data.examples.load_examples``; countdown, sums and reasoning-gym tasks have their own.
        row: As in :func:`detect_schema`.
    """
    if source in ("countdown", "sums"):
        return _COUNTDOWN if source == "countdown" else _SUMS
    return replace(_GENERATED, reward=source) if source.startswith(REASONING_GYM) else detect_schema(row)
