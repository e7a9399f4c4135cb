"""The files of a source: one, a folder of shards, or a glob, and which of them belong to a split."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from srft.data.formats import SUFFIXES, PlacedRow, read_file, suffix_of

# what the hub and the datasets library write beside the rows
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SHARD = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})")


def is_local(source: str) -> bool:
    """Whether a source is a file, a folder or a glob, there or not, and no task or hub data set.

    Args:
        source: As in ``data.examples.load_examples``.
    """
    path = Path(source).expanduser()
    named = suffix_of(path) in SUFFIXES or source.startswith((".", "/", "~")) or glob.has_magic(source)
    return named or path.exists()


def has_split(source: str, split: str) -> bool:
    """Whether a source is a folder some of whose files belong to a split by name.

    Args:
        source: A local source.
        split: Name of the split.
    """
    folder = Path(source).expanduser()
    return folder.is_dir() and any(_is_of_split(file, folder, split) for file in _data_files(folder))


def read_files(source: str, split: str, limit: int | None) -> list[PlacedRow]:
    """Return the rows of a file, of the files of a folder, or of those that a glob names, in the order of their names.

    Args:
        source: Path or glob.
        split: Which files of a folder to take, where their names or folders say to which split they belong.
        limit: Most rows taken, or None.

    Raises:
        ValueError: Naming the file, and the line or row, of what is missing or cannot be read.
    """
    files = find_files(source, split)
    rows: list[PlacedRow] = []
    for path in files:
        if limit is not None and len(rows) >= limit:
            break
        rows += read_file(path, None if limit is None else limit - len(rows))
    if not rows and len(files) == 1 and suffix_of(files[0]) not in (".json", ".parquet", ".arrow"):
        raise ValueError(f"{files[0]}, line 1: no rows, the file is empty")
    return rows


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if suffix_of(path) in SUFFIXES
        and path.name not in _METADATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _splits(file: Path, folder: Path) -> set[str]:
    """The splits that a file names: the whole name of a shard, and every word for a split in it or its folders."""
    inner = file.relative_to(folder)
    words = re.split(r"[^a-z]+", str(inner.with_name(file.name.split(".")[0])).lower())
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    shard = _SHARD.fullmatch(file.name.split(".")[0])
    return found | {shard["name"]} if shard and found else found


def _is_of_split(file: Path, folder: Path, split: str) -> bool:
    return _SPLIT_WORDS.get(split, split) in _splits(file, folder)


def find_files(source: str, split: str) -> list[Path]:
    """Return a file, the files of a folder, or those that a glob names, in the order of their names.

    Args:
        source: Path or glob.
        split: Which files of a folder to take, where their names or folders say to which split they belong.

    Raises:
        ValueError: Naming what is missing, or is no data file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, split)
    if glob.has_magic(source) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [name for name in found if name.is_file()]
        if not files:
            raise ValueError(f"no file matches {source}")
    else:
        files = [path]
    for file in files:
        if suffix_of(file) not in SUFFIXES:
            raise ValueError(f"cannot tell the format of {file}; expected one of {', '.join(SUFFIXES)}")
        if not file.is_file():
            raise ValueError(f"no such data file: {file}")
    return files


def _of_folder(folder: Path, split: str) -> list[Path]:
    files = _data_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no data file; expected some of {', '.join(SUFFIXES)}")
    named = sorted({name for file in files for name in _splits(file, folder)})
    if named:
        nameless = [file for file in files if not _splits(file, folder)]
        files = [file for file in files if _is_of_split(file, folder, split)]
        if not files:
            raise ValueError(
                f"{folder} has no files of split {split!r}, only of {', '.join(named)}; set data.split "
                "(data.eval_split for evaluation)"
            )
        if stray := [file for file in nameless if suffix_of(file) == suffix_of(files[0])]:
            raise ValueError(
                f"{stray[0]} names no split and {files[0].name} beside it does; rename it, or name the files by a glob"
            )
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.name.split(".")[0]))]
    for what, kinds in (
        ("folders", sorted({str(file.parent) for file in files})),
        ("formats", sorted({suffix_of(file) for file in files})),
        ("splits", sorted({shard["name"] for shard in shards} if named else [])),
    ):
        if len(kinds) > 1:
            raise ValueError(
                f"the files of split {split!r} in {folder} are of several {what}: {', '.join(kinds)}; they may hold "
                "the same rows: give one of them, or a glob of all"
            )
    for name, total in {(shard["name"], shard["total"]) for shard in shards}:
        there = {shard["index"] for shard in shards if (shard["name"], shard["total"]) == (name, total)}
        if missing := [index for index in map("{:05}".format, range(int(total))) if index not in there]:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {int(total)} shards, the first is {name}-{missing[0]}-of-{total}; "
                "get them, or name what is there by a glob"
            )
    return files
