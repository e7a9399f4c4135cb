"""Writing to the disk: what fails is one error that names the path, whichever library wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """A file or folder could not be written; the message names it and the reason."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` in whatever the body raises because the disk refused.

    Args:
        path: What the body writes, as a user knows it.

    Raises:
        WriteError: When the disk is full, a quota or a limit is reached, or it cannot be written for another reason.
    """
    try:
        yield
    except WriteError:
        raise
    # the writers below have no error in common: safetensors has its own, tokenizers raises a bare Exception
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise WriteError(f"cannot write {path}: {reason}") from error


def sync_to_disk(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names.

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refusal(error: Exception) -> str | None:
    """Why the operating system refused to write; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # as libraries written in Rust report it
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
