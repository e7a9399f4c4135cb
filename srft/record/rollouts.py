"""What a step learned from, token by token: an Arrow file a step, from which another run may learn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa  # comes with datasets
import torch

from srft.config import Config
from srft.disk import sync_to_disk, writing
from srft.policy.parallel import World
from srft.record.files import replace_file
from srft.responses import SAMPLED, Group, Response
from srft.sampled import Sampled

_ABOUT = b"srft"
SHAPES = (
    "rollout.temperature", "rollout.max_new_tokens", "train.prompts_per_step", "train.rollouts_per_prompt",
    "train.demos_per_prompt", "method.name",
)  # fmt: skip
"""Options that a file tells of the run that made it."""
_IDS, _NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())
_SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("group", pa.int32()), ("place", pa.int32()), ("gave_way", pa.bool_()),
        ("is_demo", pa.bool_()), ("truncated", pa.bool_()), ("reward", pa.float64()), ("status", pa.string()),
        ("message", pa.string()), ("advantage", pa.float64()), ("text", pa.string()), ("version", pa.int32()),
        ("versions", _IDS), ("prefix_tokens", pa.int32()), ("prompt_ids", _IDS), ("response_ids", _IDS),
        ("teacher_prompt_ids", _IDS), ("rollout_logprobs", pa.list_(pa.float64())), ("logprobs", _NUMBERS),
        ("entropies", _NUMBERS), ("spans", _IDS), ("transcript", pa.string()),
    ]
)  # fmt: skip


def step_file(run_dir: Path, step: int) -> Path:
    """Return where a step's rollouts are recorded.

    Args:
        run_dir: Folder of the run.
        step: Its number, from 1.
    """
    return run_dir / "rollouts" / f"step_{step:06d}.arrow"


def write_step(
    run_dir: Path, batch: Sampled, config: Config, world: World, facts: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Record a step once it was learned from, if it is, on the first rank; an older file of it is replaced at once.

    A row is a response, in order: the groups with rollouts, those of demonstrations alone, those that gave way.
    ``versions`` has the weights that sampled each token of a rollout, as the steps that they were trained for, null of
    a demonstration's with which it begins; ``version`` the oldest. ``logprobs`` and ``entropies`` are of each token by
    the policy before the step, as far as the step has them: null for what the method left out, and on several ranks,
    where others than those that sampled a response may learn from it; of a conversation they are of its own tokens, see
    ``Response.spans``. ``message``, ``text`` and ``transcript`` have ``?`` for halves of surrogate pairs.

    Args:
        run_dir: Folder of the run.
        batch: This rank's groups.
        config: The whole configuration.
        world: The ranks.
        facts: What the file tells beside the options, by name: JSON.

    Raises:
        WriteError: On the first rank, when the disk refuses.
        Elsewhere: On the other ranks then.
    """
    alone = world.size == 1
    kinds = [
        [(group.drawn, _rows(group, alone)) for group in batch.groups if group.rollouts],
        [(group.drawn, _rows(group, alone)) for group in batch.groups if not group.rollouts],
        [((0, 0), _rows(group, alone)) for group in batch.gave_way],
    ]
    every = world.gather(kinds)
    about = options_of(config) | {"ended": batch.ended} | dict(facts)
    world.on_first(lambda: _write(step_file(run_dir, batch.step), every, about))


def _write(
    path: Path, every: list[list[list[tuple[tuple[int, int], list[dict[str, Any]]]]]], about: dict[str, Any]
) -> None:
    rows: list[dict[str, Any]] = []
    number = 0
    for kind, of_ranks in enumerate(zip(*every, strict=True)):
        # where nobody has noted when they were drawn, each rank has one of every so many groups
        placed = [(drawn, i, rank) for rank, own in enumerate(of_ranks) for i, (drawn, _) in enumerate(own)]
        for group in (of_ranks[rank][i][1] for _, i, rank in sorted(placed)):
            rows += [{"group": number, "place": i, "gave_way": kind == 2} | row for i, row in enumerate(group)]
            number += 1
    about = about | {"has_prefixes": any(row["prefix_tokens"] for row in rows)}
    table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_ABOUT: json.dumps(about)}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, sink.getvalue().to_pybytes())
        sync_to_disk(path.parent)


def options_of(config: Config) -> dict[str, Any]:
    """Return the options that a file tells of its run.

    Args:
        config: The whole configuration.
    """
    sections = (name.partition(".") for name in SHAPES)
    return {f"{section}.{name}": getattr(getattr(config, section), name) for section, _, name in sections}


def _rows(group: Group, alone: bool) -> list[dict[str, Any]]:
    return [_row(group, response, alone) for response in (*group.rollouts, *group.demos)]


def _row(group: Group, s: Response, alone: bool) -> dict[str, Any]:
    row = {name: getattr(s, name) for name in SAMPLED}
    row |= {name: getattr(s, name).encode(errors="replace").decode() for name in ("text", "message", "transcript")}
    row |= {"id": group.prompt.example.id, "prompt_ids": s.prompt_ids, "advantage": s.advantage, "version": s.version}
    begun = [] if s.is_demo else [None] * s.prefix_tokens
    row["versions"] = begun + [version for version, tokens in s.versions for _ in range(tokens)]
    before = (s.logprobs, s.entropies) if s.old_logprobs is None else (s.old_logprobs, s.old_entropy)
    known = [values.tolist() if isinstance(values, torch.Tensor) and alone else None for values in before]
    return row | dict(zip(("logprobs", "entropies"), known, strict=True))


def read_about(path: Path) -> dict[str, Any]:
    """Return the options of the run that made a file, by ``SHAPES``, "has_prefixes", and the facts it was given.

    Args:
        path: From ``step_file``.

    Raises:
        ValueError: When there is none, or it is no such file.
    """
    with _opened(path) as file:
        return json.loads(file.schema.metadata[_ABOUT])


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    """Return the rows of a file.

    Args:
        path: From ``step_file``.
        columns: Those that are read; None: all.

    Raises:
        ValueError: When there is none, or it is no such file.
    """
    with _opened(path) as file:
        try:
            table = file.read_all()
            # offsets that lead out of a damaged file end the process
            table.validate(full=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}; record it again") from None
        return (table if columns is None else table.select(list(columns))).to_pylist()


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no {path}; record it with train.record_rollouts=true")
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; record it again") from None
    if _ABOUT not in (file.schema.metadata or {}):
        raise ValueError(f"{path} is not of train.record_rollouts; name the folder of a run that has recorded")
    return file


def by_group(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Give the rows of each group, in order.

    Args:
        rows: From ``read_rows``.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    yield from groups.values()
