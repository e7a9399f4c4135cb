"""Rows of data files as people have them: formats, compressions, text encodings, folders and globs of shards."""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PlacedRow = tuple[str, dict[str, Any]]  # where the row stands, in words for an error message, and the row

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# what the hub and the datasets library write beside the rows
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SHARD = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})")
_LONGEST_FIELD = 2**31 - 1  # a demonstration is longer than the 128 KiB that csv takes by itself


def is_local(source: str) -> bool:
    """Whether a source is a file, a folder or a glob, there or not, and no task or hub data set.

    Args:
        source: As in ``data.examples.load_examples``.
    """
    path = Path(source).expanduser()
    named = _suffix(path) in _SUFFIXES or source.startswith((".", "/", "~")) or glob.has_magic(source)
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
    files = _find(source, split)
    rows: list[PlacedRow] = []
    for path in files:
        if limit is not None and len(rows) >= limit:
            break
        rows += _read(path, None if limit is None else limit - len(rows))
    if not rows and len(files) == 1 and _suffix(files[0]) not in (".json", ".parquet", ".arrow"):
        raise ValueError(f"{files[0]}, line 1: no rows, the file is empty")
    return rows


# ---- which files ----


def _suffix(path: Path) -> str:
    """What says the format: the last part of the name, in small letters, a compression's left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if _suffix(path) in _SUFFIXES
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


def _find(source: str, split: str) -> list[Path]:
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
        if _suffix(file) not in _SUFFIXES:
            raise ValueError(f"cannot tell the format of {file}; expected one of {', '.join(_SUFFIXES)}")
        if not file.is_file():
            raise ValueError(f"no such data file: {file}")
    return files


def _of_folder(folder: Path, split: str) -> list[Path]:
    files = _data_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no data file; expected some of {', '.join(_SUFFIXES)}")
    named = sorted({name for file in files for name in _splits(file, folder)})
    if named:
        nameless = [file for file in files if not _splits(file, folder)]
        files = [file for file in files if _is_of_split(file, folder, split)]
        if not files:
            raise ValueError(
                f"{folder} has no files of split {split!r}, only of {', '.join(named)}; set data.split "
                "(data.eval_split for evaluation)"
            )
        if stray := [file for file in nameless if _suffix(file) == _suffix(files[0])]:
            raise ValueError(
                f"{stray[0]} names no split and {files[0].name} beside it does; rename it, or name the files by a glob"
            )
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.name.split(".")[0]))]
    for what, kinds in (
        ("folders", sorted({str(file.parent) for file in files})),
        ("formats", sorted({_suffix(file) for file in files})),
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


# ---- bytes and text ----


def _open(path: Path) -> Any:
    """The file's bytes, decompressed by what they are and not by what the name says; they can be peeked at."""
    file = path.open("rb")
    magic = file.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if magic == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(file)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        file.close()
        raise ValueError(f"{path} is compressed with zstd, which is not read here; decompress it first: zstd -d {path}")
    return file


def _encoding(head: bytes) -> str:
    """UTF-8, or what a byte order mark or the zeros around a first ASCII character give away."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):  # fmt: skip
        if head.startswith(mark):
            return name
    zeros = tuple(byte == 0 for byte in head[:4])
    names: dict[tuple[bool, ...], str] = {
        (False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be",
        (False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
    }  # fmt: skip
    return names.get(zeros, "utf-8")


def _without_marks(line: str) -> str:
    """The line without the byte order marks that tools leave where files were joined or appended to."""
    body = line.rstrip("\r\n")
    return body.strip("\ufeff") + line[len(body) :]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, from 1."""
    with _open(path) as stream:
        encoding = _encoding(stream.peek(4))
        if encoding != "utf-8":
            number = 0
            try:
                with io.TextIOWrapper(stream, encoding=encoding, newline="\n") as text:
                    for number, line in enumerate(text, start=1):
                        yield number, _without_marks(line)
            except UnicodeDecodeError as error:
                place = f"{path}, after line {number}"
                raise ValueError(f"{place}: not valid {encoding.upper()} ({error.reason})") from error
            return
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, _without_marks(raw.decode())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 (byte {raw[error.start]:#04x}: {error.reason}); save the file "
                    "as UTF-8, such as by iconv -f <its encoding> -t UTF-8"
                ) from error


# ---- formats ----


def _read(path: Path, limit: int | None) -> list[PlacedRow]:
    suffix = _suffix(path)
    try:
        if suffix in (".jsonl", ".ndjson"):
            return _read_jsonl(path, limit)
        if suffix == ".json":
            return _read_json(path, limit)
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, limit)
        return [(f"{path}, row {index}", row) for index, row in enumerate(_read_columns(path, limit))]
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: its compression is damaged ({error}); is it truncated?") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object, and only one of them can be meant")
    return row


def _read_jsonl(path: Path, limit: int | None) -> list[PlacedRow]:
    rows: list[PlacedRow] = []
    for number, line in _lines(path):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            cut = "" if line.endswith("\n") else "; the file ends within this line: is it truncated?"
            raise ValueError(f"{place}: not valid JSON ({error}){cut}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from error
        if not isinstance(row, dict):
            remedy = "; a file that is one list is named .json" if isinstance(row, list) else ""
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}{remedy}")
        rows.append((place, row))
    return rows


def _read_json(path: Path, limit: int | None) -> list[PlacedRow]:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # many a .json file has one object a line
            return _read_jsonl(path, limit)
        raise ValueError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); expected a list of objects, or one a line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(rows).__name__}")
    for index, row in enumerate(rows[:limit]):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {index}: expected a JSON object, got {type(row).__name__}")
    return [(f"{path}, row {index}", row) for index, row in enumerate(rows[:limit])]


def _read_csv(path: Path, limit: int | None) -> list[PlacedRow]:
    """Rows under a header; every value is text, and a line of more or fewer fields than the header is an error."""
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    # by the header: a comma, or what a spreadsheet writes where the comma is the decimal point
    delimiter = max(",;\t", key=first.count) if _suffix(path) == ".csv" else "\t"
    longest = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    rows: list[PlacedRow] = []
    start = 1
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"{path}, line 1: the column {twice[0]!r} stands twice in the header")
        start = reader.line_num + 1
        for fields in reader:
            if limit is not None and len(rows) == limit:
                break
            place, start = f"{path}, line {start}", reader.line_num + 1
            if fields and len(fields) != len(header):
                raise ValueError(f"{place}: {len(fields)} fields, and the header has {len(header)}; quote a field that "
                                 f"holds {delimiter!r} or a line end")  # fmt: skip
            if fields:
                rows.append((place, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(longest)
    return rows


def _read_columns(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a parquet file, or of one that the datasets library saved as Arrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{_suffix(path)[1:]} files need the extra srft[train]: pip install 'srft[train]'") from error
    rows: list[dict[str, Any]] = []
    with _open(path) as stream:
        whole = stream if isinstance(stream, io.BufferedReader) else io.BytesIO(stream.read())
        try:
            if _suffix(path) == ".parquet":
                batches = pyarrow.parquet.ParquetFile(whole).iter_batches(batch_size=1024)
            elif whole.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(whole)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                whole.seek(0)
                batches = pyarrow.ipc.open_stream(whole)
            for batch in batches:
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable {_suffix(path)[1:]} file: {error}") from error
    return rows[:limit]
