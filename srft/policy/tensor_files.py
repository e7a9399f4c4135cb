"""Files of safetensors that several ranks write together, each its own rows, and read as little of as they like.

The rows of a tensor lie one after another in its file, so that ranks which hold them need not meet: the file that they
write is, byte for byte, the one that a single process writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# of a file; several are hashed and loaded side by side
FILE_BYTES = 4 * 2**30
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class _File:
    """One file: the shapes of its tensors, and where each begins once the header is made."""

    shapes: dict[str, tuple[torch.dtype, torch.Size]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    header: bytes = b""
    size: int = 0


class TensorFiles:
    """The files of some tensors: ``<stem>.safetensors``, or numbered ones of about 4 GB and their index.

    Args:
        stem: Such as "model", which transformers and engines look for.
        tensors: By name; all of each, wherever its rows lie. Only shapes and dtypes are read.
        file_bytes: Where a new file is begun, > 0.
    """

    def __init__(self, stem: str, tensors: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> None:
        files, size = [_File()], 0
        for name, tensor in tensors:
            more = prod(tensor.shape) * tensor.dtype.itemsize
            if size and size + more > file_bytes:
                files.append(_File())
                size = 0
            files[-1].shapes[name] = (tensor.dtype, tensor.shape)
            size += more
        for file in files:
            _lay_out(file)
        count = len(files)
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [f"{stem}.safetensors"]
        self._files = dict(zip(names, files, strict=True))
        self._index = f"{stem}.safetensors.index.json"
        self._file_of = {name: file for file, layout in self._files.items() for name in layout.shapes}

    def create(self, folder: Path) -> None:
        """Write the files without their tensors; one rank does.

        Args:
            folder: Exists.
        """
        for name, file in self._files.items():
            with (folder / name).open("wb") as target:
                target.write(file.header)
                target.truncate(file.size)
        if len(self._files) > 1:
            total = sum(file.size - len(file.header) for file in self._files.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            (folder / self._index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, folder: Path, parts: Iterable[tuple[str, int, Tensor]]) -> None:
        """Write rows of tensors to their places, and wait until the disk has them.

        Args:
            folder: In which ``create`` was called.
            parts: (name, first, rows): the tensor, the number of the first of these rows, and the rows themselves, on
                the CPU; a tensor without dimensions is a row.
        """
        opened: dict[str, int] = {}
        try:
            for name, first, rows in parts:
                file = self._file_of[name]
                if file not in opened:
                    opened[file] = os.open(folder / file, os.O_WRONLY)
                dtype, shape = self._files[file].shapes[name]
                assert rows.dtype == dtype and rows.shape[1:] == shape[1:], (name, rows.dtype, rows.shape)
                place = self._files[file].starts[name] + first * prod(shape[1:]) * dtype.itemsize
                _write_all(opened[file], rows, place)
            for handle in opened.values():
                os.fsync(handle)
        finally:
            for handle in opened.values():
                os.close(handle)


def open_slices(files: Iterable[str | Path], stack: ExitStack) -> dict[str, Any]:
    """Open files of safetensors and return a slice of each tensor, of which nothing is read yet.

    Args:
        files: Their paths.
        stack: Closes them.

    Returns:
        By name, what ``[first:beyond]`` reads rows of, and ``[...]`` all.
    """
    slices: dict[str, Any] = {}
    for file in files:
        opened = stack.enter_context(safe_open(file, framework="pt"))
        slices.update({name: opened.get_slice(name) for name in opened.keys()})
    return slices


def files_of(folder: Path, stem: str) -> list[Path]:
    """Return the files that ``TensorFiles`` made in a folder.

    Args:
        folder: Any.
        stem: As it was made with.
    """
    single = folder / f"{stem}.safetensors"
    return [single] if single.is_file() else sorted(folder.glob(f"{stem}-?????-of-?????.safetensors"))


def _lay_out(file: _File) -> None:
    """Make the header of a file and find the places of its tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    # larger elements first, so that each tensor begins at a multiple of its own
    for name, (dtype, shape) in sorted(file.shapes.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begins[name], offset = offset, offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begins[name], offset]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.header = len(text).to_bytes(8, "little") + text
    file.starts = {name: len(file.header) + begin for name, begin in begins.items()}
    file.size = len(file.header) + offset


def _write_all(handle: int, rows: Tensor, place: int) -> None:
    # a tensor of 16 bits has no twin in numpy
    array: Any = rows.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    left = memoryview(array)
    while left:
        written = os.pwrite(handle, left[: 2**30], place)
        left, place = left[written:], place + written
