"""Files as people have them: formats, compressions, encodings, folders, globs; what cannot be read names its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srft.data.examples import load_examples
from srft.data.files import has_split, is_local, read_files

ROWS: list[dict[str, Any]] = [{"prompt": f"{a}+1=", "answer": str(a + 1), "demo": f"#{a + 1} é√"} for a in range(6)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
COMMAS = "prompt,answer,demo\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
MARK = "\ufeff"


def table(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write a parquet or Arrow file."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(whole, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole)
    return path


def rows_of(source: Path | str, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    return [row for _, row in read_files(str(source), split, limit)]


# read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("no-last-newline.jsonl", LINES.rstrip("\n").encode()),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("blank-lines.jsonl", ("\n" + LINES.replace("\n", "\n\n \n")).encode()),
        ("bom.jsonl", (MARK + LINES).encode()),
        ("joined-boms.jsonl", LINES.replace('{"', f'{MARK}{{"').encode()),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("utf16-le.jsonl", LINES.encode("utf-16-le")),
        ("utf16-be.jsonl", LINES.encode("utf-16-be")),
        ("utf16-be-bom.jsonl", (MARK + LINES).encode("utf-16-be")),
        ("utf16-late-bom.jsonl", (LINES[:-1] + MARK + "\r\n").encode("utf-16")),
        ("utf32.jsonl", LINES.encode("utf-32")),
        ("utf32-be.jsonl", LINES.encode("utf-32-be")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("utf16.jsonl.gz", gzip.compress(LINES.encode("utf-16"), mtime=0)),
        ("gzipped-by-content.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("gzipped-by-name.jsonl.gz", LINES.encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("bom.json", (MARK + json.dumps(ROWS)).encode()),
        ("utf16.json", json.dumps(ROWS).encode("utf-16")),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("lines.json", LINES.encode()),
        ("a.csv", COMMAS.encode()),
        ("crlf.csv", COMMAS.replace("\n", "\r\n").encode()),
        ("bom.csv", (MARK + COMMAS).encode()),
        ("utf16.csv", COMMAS.encode("utf-16")),
        ("blank-lines.csv", COMMAS.replace("\n", "\n\n").encode()),
        ("spreadsheet.csv", COMMAS.replace(",", ";").encode()),
        ("tabs.csv", COMMAS.replace(",", "\t").encode()),
        ("a.tsv", COMMAS.replace(",", "\t").encode()),
        ("a.csv.gz", gzip.compress(COMMAS.encode(), mtime=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_same_rows_whatever_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    """Formats, compressions and encodings of the same rows give the same rows, accents and all; a limit the first."""
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == ROWS
    assert rows_of(tmp_path / name, limit=2) == ROWS[:2]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_tables_give_the_same_rows(tmp_path: Path, name: str) -> None:
    """Parquet, and Arrow as the datasets library saves it, compressed or not."""
    path = table(tmp_path / name)
    assert rows_of(path) == ROWS and rows_of(path, limit=2) == ROWS[:2]
    packed = path.with_name(f"{name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    assert rows_of(packed) == ROWS


def test_csv_fields_may_be_long_and_hold_anything(tmp_path: Path) -> None:
    """Quotes, delimiters, line ends, 200,000 characters; every value is the text in the file."""
    rows = [{"prompt": 'say "a, b;\n\tc"', "answer": "007", "demo": "x" * 200_000}, dict.fromkeys(ROWS[0], "1e5")]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert rows_of(tmp_path / "a.csv") == rows
    assert csv.field_size_limit() == 131072
    with pytest.raises(ValueError, match="line 5: no answer"):
        (tmp_path / "b.csv").write_text('prompt,answer\n"a\n\nb",1\nc,\n')
        load_examples(str(tmp_path / "b.csv"))


# folders and globs


def test_shards_of_a_folder_and_of_a_glob(tmp_path: Path) -> None:
    """All files of a folder, in the order of their names; a glob names some; ids go on over the files."""
    for index in range(3):
        table(tmp_path / "shards" / f"train-{index:05}-of-00003.parquet", ROWS[2 * index : 2 * index + 2])
    (tmp_path / "shards" / "README.md").write_text("no data")
    assert rows_of(tmp_path / "shards") == ROWS and rows_of(tmp_path / "shards", limit=3) == ROWS[:3]
    examples = load_examples(str(tmp_path / "shards"))
    assert [e.id for e in examples] == [f"shards:{index}" for index in range(6)]
    assert rows_of(f"{tmp_path}/sha*/*-0000[12]-*.parquet") == ROWS[2:]
    assert rows_of(f"{tmp_path}/**/*.parquet") == ROWS
    (tmp_path / "a[0].jsonl").write_text(LINES, encoding="utf-8")
    assert rows_of(tmp_path / "a[0].jsonl") == ROWS


def test_an_empty_shard_is_no_error(tmp_path: Path) -> None:
    """One of several files may be empty, all of them not."""
    for name, content in (("a.jsonl", LINES), ("b.jsonl", "")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert rows_of(tmp_path) == ROWS
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        load_examples(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.parquet", "test.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("my_train_set.parquet", "my-eval.parquet"),
        ("train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"),
    ],
    ids=["hub", "files", "folders", "words", "saved"],
)
def test_folder_in_the_layout_of_the_hub(tmp_path: Path, train: str, test: str) -> None:
    """Files or folders named after splits are those splits; what libraries write beside them is no data."""
    table(tmp_path / train, ROWS[:4])
    table(tmp_path / test, ROWS[4:])
    for name in ("dataset_infos.json", "dataset_dict.json", "train/state.json", ".cache/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert (rows_of(tmp_path), rows_of(tmp_path, "test")) == (ROWS[:4], ROWS[4:])
    assert has_split(str(tmp_path), "test") and not has_split(str(tmp_path), "validation")
    with pytest.raises(ValueError, match=r"has no files of split 'validation', only of .*test.*data\.split"):
        rows_of(tmp_path, "validation")


def test_split_named_in_full(tmp_path: Path) -> None:
    """Splits such as train_sft and train_prefs of one repository are told apart."""
    table(tmp_path / "data/train_sft-00000-of-00001.parquet", ROWS[:2])
    table(tmp_path / "data/test_sft-00000-of-00001.parquet", ROWS[2:4])
    assert rows_of(tmp_path, "train_sft") == ROWS[:2] == rows_of(tmp_path)
    table(tmp_path / "data/train_prefs-00000-of-00001.parquet", ROWS[4:])
    assert rows_of(tmp_path, "train_sft") == ROWS[:2]
    with pytest.raises(ValueError, match="of several splits: train_prefs, train_sft"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no data file"),
        (["main/train.parquet", "socratic/train.parquet"], "of several folders: .*main, .*socratic"),
        (["train.parquet", "train.arrow"], "of several formats: .arrow, .parquet"),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"],
         "lacks 1 of 3 shards, the first is train-00001-of-00003"),
        (["train.parquet", "more.parquet"], r"more\.parquet names no split and train\.parquet beside it does"),
    ],
    ids=["empty", "configurations", "formats", "missing-shard", "stray"],
)  # fmt: skip
def test_folder_that_may_be_read_wrongly_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    """Two configurations, the same rows in two formats, or a download that is not whole."""
    for name in files:
        table(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path)


def test_what_is_taken_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suffix, a path's first sign, a glob or something that is there; the rest are tasks and hub names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert all(map(is_local, ["a.jsonl", "a.csv.gz", "./x", "~/x", "/x", "x/*", "owner/name"]))
    assert not any(map(is_local, ["chain", "openai/gsm8k", "owner/name:config", "reasoning_gym:x"]))
    with pytest.raises(ValueError, match=r"no file matches nothing/\*\.jsonl"):
        load_examples("nothing/*.jsonl")


# what cannot be read


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES.encode("latin-1", "replace"), r"line 1: not UTF-8 \(byte 0xe9.*iconv -f"),
        ("a.csv", COMMAS.encode("latin-1", "replace"), r"line 2: not UTF-8 \(byte 0xe9.*iconv -f"),
        ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("latin-1", "replace"), "line 1: not UTF-8"),
        ("a.jsonl", LINES.encode("utf-16")[:-1], "after line .*: not valid UTF-16"),
        ("a.jsonl.gz", cut(gzip.compress(LINES.encode(), mtime=0)), r"a\.jsonl\.gz: its compression is damaged"),
        ("a.jsonl.xz", cut(lzma.compress(LINES.encode())), r"a\.jsonl\.xz: its compression is damaged"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd0000", r"compressed with zstd, .*zstd -d .*a\.jsonl\.zst"),
        ("a.jsonl", b'{"prompt": "a"}\n{"answer": "1", "answer": "2"}\n', "line 2: the key 'answer' stands twice"),
        ("a.json", b'[{"answer": "1", "answer": "2"}]', "a.json: the key 'answer' stands twice"),
        ("a.json", b'{"rows": []}', "expected a JSON list of objects, got dict"),
        ("a.json", b'[{"prompt": 1}, null]', "row 1: expected a JSON object, got NoneType"),
        ("a.jsonl", b'{"prompt": 1}\nnull\n', "line 2: expected a JSON object, got NoneType"),
        ("a.jsonl", b"[" * 100_000, "line 1: "),
        ("a.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}\n", "line 1: Exceeds the limit"),
        ("a.csv", b"", "line 1: no rows"),
        ("a.csv", b"prompt,answer\n", "line 1: no rows"),
        ("a.csv", b"prompt,answer,prompt\na,b,c\n", "line 1: the column 'prompt' stands twice"),
        ("a.csv", b"prompt,answer\n1,2\n\n1,2,3\n", "line 4: 3 fields, and the header has 2; quote"),
        ("a.csv", b"prompt,answer\n1,2\n1\n", "line 3: 1 fields, and the header has 2"),
        ("a.csv", b'prompt,answer\n1,2\n"1,2\n', "line 3: not valid CSV"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.arrow", b"none", "not a readable arrow file"),
        ("a.txt", b"x", r"cannot tell the format of .*a\.txt"),
        ("a.jsonl.zip", b"x", r"cannot tell the format of .*a\.jsonl\.zip"),
    ],
)
def test_unreadable_files_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Every kind of damage is one line with the file, its line where there is one, and a remedy where one is known."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(str(path))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda rows: rows[2].update(prompt="\ud83d"), r"line 3: the prompt holds half of .* pair \('\\ud83d'"),
        (lambda rows: rows[2].update(answer="\udc00"), "line 3: the answer holds half of a surrogate pair"),
        (lambda rows: rows[2].update(demo="#\ud83d"), "line 3: the demonstration holds half of a surrogate pair"),
        (lambda rows: rows[2].update(prompt=[{"role": "user", "content": "\ud83d"}]), "line 3: the prompt holds half"),
        (lambda rows: rows[2].update(answer=float("nan")), "line 3: no answer in column 'answer'"),
        (lambda rows: rows[2].update(answer=None), "line 3: no answer in column 'answer'"),
        (lambda rows: rows[2].update(demo=float("nan")), "line 3: no demonstration in column 'demo'"),
        (lambda rows: rows[2].clear(), "line 3: no column 'prompt' in this row"),
        (lambda rows: rows[2].update(prompt=5), "line 3: the prompt must be text or messages"),
        (lambda rows: rows[2].update(demo={"a": 1}), "line 3: the demonstration must be text or messages"),
    ],
    ids=["surrogate-prompt", "surrogate-answer", "surrogate-demo", "surrogate-message", "nan-answer", "null-answer",
         "nan-demo", "empty-row", "number-prompt", "object-demo"],
)  # fmt: skip
def test_rows_that_are_no_use_name_the_line(tmp_path: Path, rows: Callable[[Any], None], message: str) -> None:
    """A row without a usable field is named, and dropped on request."""
    broken = json.loads(json.dumps(ROWS))
    rows(broken)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in broken))
    with pytest.raises(ValueError, match=message):
        load_examples(str(path), require_demo=True)
    kept = load_examples(str(path), require_demo=True, bad_rows="skip")
    assert [e.id for e in kept] == [f"a.jsonl:{i}" for i in (0, 1, 3, 4, 5)]


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    """Half a surrogate pair in another column, or a broken demonstration that is not used, is no error."""
    path = tmp_path / "a.jsonl"
    demos = [3, {}, "\ud83d", [1], None, "x"]
    rows = [row | {"demo": demo, "note": "\ud83d"} for row, demo in zip(ROWS, demos, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [e.demos for e in load_examples(str(path), use_demo=False)] == [[]] * 6
    with pytest.raises(ValueError, match="line 1: the demonstration must be text"):
        load_examples(str(path))


def test_columns_are_looked_for_in_many_rows(tmp_path: Path) -> None:
    """A first row that lacks a column, or has null in it, does not hide the layout."""
    path = tmp_path / "a.jsonl"
    empty = {"prompt": "1", "answer": None, "meta": None}
    rows: list[dict[str, Any]] = [{}, empty, {"prompt": "2", "answer": "3", "meta": {"g": 1}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (only,) = load_examples(str(path), bad_rows="skip")
    assert (only.id, only.answer) == ("a.jsonl:2", "3")
    (only,) = load_examples(str(path), bad_rows="skip", columns={"answer": "meta.g"})
    assert only.answer == 1
