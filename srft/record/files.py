"""The files of a record: JSON lines that are whole at any moment, and texts that are replaced at once."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

from srft.disk import WriteError, writing

LOCK = ".lock"
"""File by which a process has a folder to itself."""


def strict(value: object) -> Any:
    """Return ``value`` as strict JSON allows it: non-finite floats become None, unknown types their text.

    Args:
        value: Anything; mappings, lists and tuples are walked.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value)


def json_line(record: Mapping[str, object]) -> str:
    """Return a record as one line of a JSON-lines file, with its end; ASCII with escapes, so any string is safe.

    Args:
        record: Made strict by ``strict``.
    """
    return json.dumps(strict(record), allow_nan=False, separators=(", ", ": ")) + "\n"


def open_json_lines(path: Path) -> FileIO:
    """Open a JSON-lines file for ``write_json_line``: appending and unbuffered.

    Args:
        path: The file; created when missing.

    Raises:
        WriteError: When the disk refuses.
    """
    with writing(path):
        return open(path, "ab", buffering=0)


def write_json_line(file: FileIO, record: Mapping[str, object], *, sync: bool = False) -> None:
    """Append one record as one line in one system call: a killed process tears at most its last line.

    Args:
        file: From ``open_json_lines``.
        record: As of ``json_line``.
        sync: Also wait until the disk has it. Needed only against a crash of the machine.

    Raises:
        WriteError: When the disk refuses, or took only a part of the line.
    """
    line = json_line(record).encode()
    with writing(Path(file.name)):
        written = file.write(line)
        if written != len(line):
            raise WriteError(f"cannot write {file.name}: wrote {written} of {len(line)} bytes; is the disk full?")
        if sync:
            os.fsync(file.fileno())


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read a file of objects that each carry an integer ``step``.

    Args:
        path: The file; a missing one reads as empty.

    Returns:
        (records, unreadable): the objects in file order, and the lines that are none, such as the half line
        of a machine that lost power.
    """
    records: list[dict[str, Any]] = []
    unreadable: list[str] = []
    if not path.exists():
        return records, unreadable
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # also raised for bytes that are not UTF-8
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            unreadable.append(line.decode(errors="replace"))
    return records, unreadable


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by ``text`` in UTF-8; a reader sees the old file or the new one, never a part.

    Args:
        path: The file.
        text: Its contents; what UTF-8 cannot hold (lone surrogates) is written as ``?``.

    Raises:
        WriteError: When the disk refuses; the old file is as it was.
    """
    replace_file(path, text.encode(errors="replace"))


def replace_file(path: Path, contents: bytes) -> None:
    """Replace a file by other bytes; a reader sees the old file or the new one, never a part.

    Args:
        path: The file.
        contents: All of it.

    Raises:
        WriteError: When the disk refuses; the old file is as it was.
    """
    beside = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def set_aside_after(path: Path, step: int) -> int:
    """Move the records after ``step``, and unreadable lines, to ``<name>.discarded.jsonl``.

    They are in the second file before they leave the first, so being killed in between loses nothing.

    Args:
        path: A JSON-lines file; may be missing.
        step: The last step to keep.

    Returns:
        How many lines were moved.
    """
    records, unreadable = read_json_lines(path)
    later = [record for record in records if record["step"] > step]
    moved = later + [{"unreadable": line} for line in unreadable]
    if not moved:
        return 0
    with open_json_lines(path.with_suffix(".discarded.jsonl")) as file:
        for record in moved[:-1]:
            write_json_line(file, record)
        write_json_line(file, moved[-1], sync=True)
    kept = [record for record in records if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return len(moved)


def lock_folder(folder: Path) -> TextIO | None:
    """Take a folder for this process, until the file that is returned is closed or the process ends, however it does.

    Args:
        folder: Made where there is none.

    Returns:
        The lock; None when another process has it.

    Raises:
        WriteError: When the disk refuses.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def locked(folder: Path, otherwise: str) -> Iterator[None]:
    """Keep other processes out of a folder while the body runs.

    Args:
        folder: Made where there is none.
        otherwise: What the error says.

    Raises:
        ValueError: When another process has it.
        WriteError: When the disk refuses.
    """
    file = lock_folder(folder)
    if file is None:
        raise ValueError(otherwise)
    with file:
        yield
