"""Folders that appear whole or not at all, with a manifest by which anybody sees whether one still is as written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srft.disk import sync_to_disk, writing

_MANIFEST = "manifest.json"
# of the files of a folder; more would not read faster from most disks
_READERS = 4


@contextmanager
def appearing_at_once(folder: Path) -> Iterator[Path]:
    """Let the body fill a folder beside ``folder``, which takes its place when it is whole and on the disk.

    Whatever breaks the body removes the new folder and leaves the old one.

    Args:
        folder: Created or replaced.

    Raises:
        WriteError: When the disk refuses.
    """
    with writing(folder):
        partial = start_folder(folder)
        try:
            yield partial
            finish_folder(folder, digests(partial, names_in(partial)))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def start_folder(folder: Path) -> Path:
    """Make the empty folder to be filled, which ``finish_folder`` puts in the place of ``folder``.

    Args:
        folder: As it will be called.
    """
    partial = partial_of(folder)
    for left_over in (partial, _old(folder)):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def partial_of(folder: Path) -> Path:
    """Return where a folder is while it is being filled.

    Args:
        folder: As it will be called.
    """
    return folder.with_name(f".{folder.name}.partial")


def finish_folder(folder: Path, files: dict[str, Any]) -> None:
    """Write the manifest of a folder that has been filled, wait for the disk, and let it appear.

    Args:
        folder: As it will be called.
        files: From ``digests``, of all its files.
    """
    partial = partial_of(folder)
    manifest = {"files": dict(sorted(files.items()))}
    manifest["sha256"] = _digest_of_list(manifest["files"])  # type: ignore[assignment]
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*partial.rglob("*"), partial]:
        sync_to_disk(path)
    if folder.exists():
        os.rename(folder, _old(folder))
    os.rename(partial, folder)
    shutil.rmtree(_old(folder), ignore_errors=True)
    sync_to_disk(folder.parent)


def names_in(folder: Path) -> list[str]:
    """Return the files of a folder and those under it, by their paths from it.

    Args:
        folder: Any.
    """
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digests(folder: Path, names: list[str]) -> dict[str, Any]:
    """Return size and SHA-256 of files, by name.

    Args:
        folder: Holds them.
        names: From ``names_in``, or some of them.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda name: _digest(folder / name), names)
        return {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256}
            for name, sha256 in zip(names, found, strict=True)
        }


def damage(folder: Path) -> str | None:
    """Say what differs from the folder that was written, by its manifest; None when nothing does.

    Args:
        folder: A checkpoint or an exported model.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _digest_of_list(files):
            return f"{_MANIFEST} was changed"
    except FileNotFoundError:
        return f"it has no {_MANIFEST}; an earlier version wrote it, or a copy of it was cut short"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != expected["size"]:
            return f"{name} has {size:,} bytes, and had {expected['size']:,} when it was written"
    found = digests(folder, list(files))
    for name, expected in files.items():
        if found[name]["sha256"] != expected["sha256"]:
            return f"{name} has other contents than were written"
    return None


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_list(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
