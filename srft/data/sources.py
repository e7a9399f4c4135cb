"""Rows of a data source, whatever it is: a built-in task, a reasoning-gym task, files, or the hub."""

from __future__ import annotations

import difflib
from typing import Any

from srft.data.files import is_local, read_files
from srft.data.formats import PlacedRow
from srft.data.tasks import BUILTIN_TASKS, reasoning_gym_rows, task_rows
from srft.rewards.gym import REASONING_GYM

GENERATED_ROWS = {"train": 8192, "eval": 256}  # how many a generated task gives when no limit is set


def _read_hub(source: str, split: str, limit: int | None) -> list[PlacedRow]:
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ValueError("hub data sets need the extra srft[train]: pip install 'srft[train]'") from error
    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cannot load {source!r} ({split}) from the Hugging Face hub: {type(error).__name__}: "
            f"{reason}; check the name (owner/name or owner/name:config), the split and the network, or give "
            "a local .jsonl or .parquet file"
        ) from error
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return [(f"{source}, row {index}", dict(row)) for index, row in enumerate(dataset)]


def read_source(
    source: str, split: str, limit: int | None, seed: int, task: dict[str, Any]
) -> list[PlacedRow]:
    """Return the rows of any source; the arguments are those of ``data.examples.load_examples``.

    Args:
        source: Task, file or hub data set.
        split: Split to read.
        limit: Number of rows, or None.
        seed: Of a generated task.
        task: Options of a generated task.

    Raises:
        ValueError: On a missing or unreadable source, or options that it does not have.
    """
    count = GENERATED_ROWS["train" if split == "train" else "eval"] if limit is None else limit
    if source in BUILTIN_TASKS:
        generated = task_rows(source, count, split=split, seed=seed, options=task)
    elif source.startswith(REASONING_GYM):
        name = source.removeprefix(REASONING_GYM)
        generated = reasoning_gym_rows(name, count, split=split, seed=seed, options=task)
    else:
        if task:
            raise ValueError(f"task options {sorted(task)} are for generated tasks, not for {source!r}")
        if is_local(source):
            return read_files(source, split, limit)
        if "/" not in source and (near := difflib.get_close_matches(source, BUILTIN_TASKS, n=1)):
            raise ValueError(f"unknown data source {source!r}; did you mean the built-in task {near[0]!r}?")
        return _read_hub(source, split, limit)
    return [(f"{source}, row {index}", row) for index, row in enumerate(generated)]
