"""Runs as their folders tell them: one, or several that follow each other on one axis of steps."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.record.files import read_json_lines
from srft.record.history import RunRecord, load_record

Counts = Mapping[str, Sequence[int]]
"""Of each problem, by id, what ``srft.record.problems`` counts."""


@dataclass(frozen=True)
class Story:
    """A run, or several of which each goes on from the model of the one before.

    Args:
        label: A few words for figures.
        records: In order.
        rows: Metric rows in order of step; steps of a later run go on from those of the one before.
        begins: Steps after which a later run begins.
        held_out: Counts of held-out problems by step, in order; empty where the runs did not record them.
        training: The same of the problems that were trained on.
        warnings: Sentences on what is wrong with the record.
    """

    label: str
    records: list[RunRecord]
    rows: list[dict[str, Any]]
    begins: list[int]
    held_out: dict[int, Counts]
    training: dict[int, Counts]
    warnings: list[str]

    @property
    def last(self) -> RunRecord:
        """The run that the story ends with."""
        return self.records[-1]


def read_stories(words: Sequence[str]) -> list[Story]:
    """Read runs.

    Args:
        words: Run folders; "a+b" is b after a, and "label=a" has a label of its own.

    Raises:
        ValueError: When there is no such folder, or no step in it.
    """
    own, paths = zip(*(split_label(word) for word in words), strict=True)
    groups = [[Path(path)] if Path(path).is_dir() else [Path(part) for part in path.split("+")] for path in paths]
    names = short_names([str(path) for group in groups for path in group])
    labels = [label or " + ".join(names[str(path)] for path in group) for label, group in zip(own, groups, strict=True)]
    return [read_story(group, label) for group, label in zip(groups, labels, strict=True)]


def split_label(word: str) -> tuple[str, str]:
    """Return the label, empty where there is none, and the rest of "label=rest".

    Args:
        word: Of the command line; one that names a file or folder as it stands has no label.
    """
    label, is_labelled, path = word.partition("=")
    return (label, path) if is_labelled and not Path(word).exists() else ("", word)


def short_names(words: Sequence[str]) -> dict[str, str]:
    """Return as much of the end of each path as tells it from the others.

    Args:
        words: Paths or hub ids; the folder model/ of a run goes by the run's name.
    """
    parts = {}
    for word in words:
        path = Path(word).resolve() if Path(word).exists() else Path(word)
        parts[word] = path.parts[:-1] if path.name == "model" and len(path.parts) > 1 else path.parts
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {word: "/".join(of_path[-depth:]) for word, of_path in parts.items()}
        if len(set(names.values())) == len(set(parts.values())):
            return names
    return {word: word for word in words}


def read_story(folders: Sequence[Path], label: str) -> Story:
    """Read runs that follow each other as one.

    Args:
        folders: Of the runs, in order, at least one.
        label: A few words for figures.

    Raises:
        ValueError: When there is no such folder, or no step in it.
    """
    records = [load_record(folder) for folder in folders]
    rows: list[dict[str, Any]] = []
    begins: list[int] = []
    held_out: dict[int, Counts] = {}
    training: dict[int, Counts] = {}
    warnings = [sentence for record in records for sentence in record.warnings]
    for record in records:
        if not record.rows:
            raise ValueError(
                f"{record.run_dir} has no step in metrics.jsonl; give the folder of a run, such as runs/demo"
            )
        done = rows[-1]["step"] if rows else 0
        if rows:
            begins.append(done)
            warnings += _not_after(record, records[len(begins) - 1])
        # where a later run starts is where the one before has ended
        rows += [row | {"step": row["step"] + done} for row in record.rows if row["step"] > 0 or not rows]
        lines, broken = read_json_lines(record.run_dir / "problems.jsonl")
        if broken:
            warnings.append(f"Lines of {record.run_dir / 'problems.jsonl'} that are no JSON: {len(broken)}.")
        for line in sorted(lines, key=lambda line: line["step"]):
            into = held_out if line.get("of") == "held-out" else training
            if line["step"] > 0 or record is records[0]:
                into[line["step"] + done] = line["problems"]
    return Story(label, records, rows, begins, held_out, training, warnings)


def _not_after(record: RunRecord, before: RunRecord) -> list[str]:
    """A warning where a run began from another model than the one before it came to."""
    began = str(tomllib.loads(record.config_text).get("model", {}).get("name", "")) if record.config_text else ""
    if before.run_dir.resolve() in Path(began).resolve().parents:
        return []
    return [
        f"{record.run_dir} did not go on from {before.run_dir}: it began from model.name={began or 'unknown'}. Its "
        "curves stand after the other's all the same."
    ]
