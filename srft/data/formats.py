"""Files of rows as people have them: JSON lines, JSON, CSV, parquet and Arrow; compressions and text encodings."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PlacedRow = tuple[str, dict[str, Any]]  # where the row stands, in words for an error message, and the row

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_LONGEST_FIELD = 2**31 - 1  # a demonstration is longer than the 128 KiB that csv takes by itself


def suffix_of(path: Path) -> str:
    """Return what says the format of a file: the last part of its name, in small letters, a compression's left out.

    Args:
        path: Any, there or not.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: Path, limit: int | None) -> list[PlacedRow]:
    """Return the rows of one file.

    Args:
        path: A file with one of ``SUFFIXES``.
        limit: Most rows taken, or None.

    Raises:
        ValueError: Naming the file, and the line or row, of what cannot be read.
    """
    suffix = suffix_of(path)
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
    delimiter = max(",;\t", key=first.count) if suffix_of(path) == ".csv" else "\t"
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
        kind = suffix_of(path)[1:]
        raise ValueError(f"{kind} files need the extra srft[train]: pip install 'srft[train]'") from error
    rows: list[dict[str, Any]] = []
    with _open(path) as stream:
        whole = stream if isinstance(stream, io.BufferedReader) else io.BytesIO(stream.read())
        try:
            if suffix_of(path) == ".parquet":
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
            raise ValueError(f"{path} is not a readable {suffix_of(path)[1:]} file: {error}") from error
    return rows[:limit]
