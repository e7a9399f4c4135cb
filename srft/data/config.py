"""The options of a run's data, with their types, ranges, defaults and meanings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from srft.data.corruption import CorruptKind
from srft.section import Section, one_or_more


class DataConfig(Section):
    """Where prompts, demonstrations and answers come from."""

    train: str = "chain"
    """Built-in task, "calculator", "chain", "countdown" or "sums"; "reasoning_gym:<task>"; a file (.jsonl, .json, .csv,
    .tsv, .parquet or .arrow, compressed or not), a folder or a glob of such files; or a Hugging Face hub id."""
    eval: str | None = None
    """Held-out source of the same kinds; unset: the held-out part of a built-in task, `eval_split` of a hub data set
    or of a folder whose files name it, else the last tenth of the problems (at most eval_limit, kept out of training
    with all their rows)."""
    split: str = "train"
    """Split read from a hub data set, or from a folder whose files name their splits; of data.demos, too."""
    eval_split: str = "test"
    """Split read for evaluation from a hub data set or such a folder."""
    eval_sets: Annotated[list[str], BeforeValidator(one_or_more)] = []
    """Further sets evaluated each time, by name from the hub, such as math500, as name=file, or any other source: what
    `python -m srft.evaluate` takes. Of each the first eval_limit problems; eval/<set>/accuracy and so on."""
    columns: dict[str, str] = {}
    """Column map: columns.prompt, columns.answer, columns.demo; dots reach into nested fields."""
    limit: int | None = Field(None, gt=0)
    """Use only the first rows of the training source."""
    eval_limit: int = Field(512, gt=0)
    """Rows evaluated each time."""
    task: dict[str, bool | int | float | str | list[int] | list[str]] = {}
    """Options of a built-in or reasoning-gym task, such as task.max_ops=5. "chain" has min_ops, max_ops and notations,
    the signs that may end a step of a demonstration; "countdown" min_numbers and max_numbers, the largest number,
    max_target, and demos, distinct demonstrations of a problem; "sums" and "calculator" terms and largest number."""
    system: str | None = None
    """System prompt put before the user's turn."""
    chat: bool = True
    """Render prompts with the tokenizer's chat template where it has one."""
    chat_template_kwargs: dict[str, bool | int | float | str | list[str]] = {}
    """What the chat template takes beside the messages, such as chat_template_kwargs.enable_thinking=false."""
    max_prompt_tokens: int = Field(512, gt=0)
    """Longest prompt taken, in tokens."""
    overlong: Literal["error", "skip"] = "error"
    """What to do with a row whose prompt or demonstration is too long; skipped rows are counted."""
    demos: str | None = None
    """Demonstrations of a source of their own, of the kinds of data.train; unset: those in the rows of data.train. They
    are drawn in an order of their own, train.demos_per_prompt for each prompt of a step. Each is a group by itself: a
    method that compares the responses to a prompt finds none to compare it with, and gives it the advantage 0."""
    turns: Literal["auto", "last", "all"] = "auto"
    """Which turns of the assistant are learned from in a demonstration that is a conversation: the "last" one, after a
    prompt of all before; "all", each in its place, after a prompt that ends before the first; "auto" is all with
    env.name, else last. Without env.name rollouts and evaluations answer such a prompt by one turn."""
    demo_columns: dict[str, str] = {}
    """Column map of data.demos."""
    demo_task: dict[str, bool | int | float | str | list[int] | list[str]] = {}
    """Options of the task that data.demos names."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row that lacks its prompt, answer or demonstration; skipped rows are reported."""
    bad_demos: Literal["error", "skip", "keep", "only"] = "error"
    """What to do with a demonstration that its own verifier does not accept; "only" takes no others."""
    corrupt_demos: float = Field(0.0, ge=0, le=1)
    """Share of demonstrations that are made imperfect on purpose: always the same ones of a seed, and those of a
    smaller share among them. The warm start and data.bad_demos take them as they were; they are judged as they are."""
    corrupt_kind: CorruptKind = "wrong-step"
    """How: "wrong-step", one step has another result, which later steps and the answer carry on; "wrong-answer", the
    answer alone is another; "other", the demonstration of another problem."""
