"""Rows in, examples out: a problem with its answer and its demonstrations, whatever source and layout it came in."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srft.data.columns import has_column, merged
from srft.data.fields import map_columns, read_fields
from srft.data.files import is_local
from srft.data.messages import Demo, Message
from srft.data.schemas import find_schema
from srft.data.sources import read_source

logger = logging.getLogger(__name__)

_ROWS_LOOKED_AT = 100  # to tell the columns of a source in which a row may lack one


@dataclass(frozen=True)
class Example:
    """One problem, its ground truth and its demonstrations.

    Args:
        id: "<source>:<row index>", of files their name without the folder; stable over runs.
        prompt: Text, or chat messages with "role" and "content".
        answer: Ground truth, handed to the verifier.
        demos: Demonstrations without an end-of-sequence token.
        row: The source row, for verifiers that need more than the answer.
    """

    id: str
    prompt: str | list[Message]
    answer: Any
    demos: list[Demo]
    row: dict[str, Any]


def load_examples(
    source: str,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    task: dict[str, Any] | None = None,
    use_demo: bool = True,
    require_demo: bool = False,
    welcome_demo: bool = False,
    bad_rows: Literal["error", "skip"] = "error",
    turns: bool = False,
) -> list[Example]:
    """Read a data source into examples.

    Args:
        source: A task of ``tasks.BUILTIN_TASKS``; "reasoning_gym:<task>"; a .jsonl, .json, .csv, .tsv, .parquet or
            .arrow file, compressed or not; a folder or a glob of such files; or a hub data set, "owner/name" or
            "owner/name:config".
        split: Split of a hub data set, or of a folder whose files name theirs. For generated tasks "train" or
            anything else, which then means evaluation; the two never share a problem. A file is one split and
            ignores it.
        columns: Column or dotted path of "prompt", "answer" and "demo"; what is left out follows the
            schema of the rows. A prompt that is a conversation ends before the assistant's last turn, which is the
            demonstration where no other column is; see ``turns``.
        limit: Number of rows taken from the start, >= 1; None takes all, and of a generated task 8192 to
            train and 256 to evaluate.
        seed: Stream of a generated task; not used elsewhere.
        task: Options of a generated task: those of ``tasks.chain_rows`` or ``countdown_rows``, or the fields of the
            reasoning-gym task.
        use_demo: Whether demonstrations are read; without it their column is not looked at.
        require_demo: Whether a row without a demonstration is an error.
        welcome_demo: Whether a demonstration is no more than welcome: nothing is an error without the column that
            ``columns`` has for it.
        bad_rows: "error", or "skip" to drop rows without a prompt, an answer or a required demonstration, and
            log how many.
        turns: Whether such a prompt ends before the assistant's first turn instead, and all turns from that on are the
            demonstration.

    Raises:
        ValueError: On a missing or unreadable source, an invalid line (named by its 1-based number), a
            missing column, a row without answer or required demonstration, or no rows at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1 or None, got {limit}")
    placed = read_source(source, split, limit, seed, task or {})
    if not placed:
        raise ValueError(f"{source} holds no rows")
    whole = merged(row for _, row in placed[:_ROWS_LOOKED_AT])
    schema = find_schema(source, whole)
    given = dict(columns or {})
    if welcome_demo and "demo" in given and not has_column(whole, given["demo"]):
        del given["demo"]
    paths = map_columns(source, whole, schema, given, use_demo=use_demo, require_demo=require_demo)
    # files go by their name alone, so that seeds made from ids do not depend on where they lie
    name = Path(source).expanduser().absolute().name if is_local(source) else source
    examples: list[Example] = []
    bad: list[str] = []
    for index, (place, row) in enumerate(placed):
        try:
            prompt, answer, demos = read_fields(place, row, paths, schema, turns=turns)
            if require_demo and not demos:
                raise ValueError(f"{place}: no demonstration in column {paths['demo']!r}")
        except ValueError:
            if bad_rows == "error":
                raise
            bad.append(place)
        else:
            examples.append(Example(f"{name}:{index}", prompt, answer, demos, row))
    if bad:
        logger.warning("%s: dropped %d of %d rows, the first is %s", source, len(bad), len(placed), bad[0])
    if not examples:
        raise ValueError(f"{source}: none of the {len(placed)} rows is usable")
    return examples
