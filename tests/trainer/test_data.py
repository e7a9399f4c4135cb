"""From any source to examples: known layouts, column maps, errors that name the place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from srft.data.examples import load_examples
from srft.data.schemas import detect_schema

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows, one object a line, and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# schemas

GSM8K_ROW = {"question": "What is 48/2?", "answer": "It is 48/2 = <<48/2=24>>24 clips.\n#### 24"}
OPENR1_ROW = {
    "data_source": "openr1",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 1+1?"}],
    "target": [{"role": "assistant", "content": "<think>\nEasy.\n</think>\n\\boxed{2}"}],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 7, "split": "train"},
}


@pytest.mark.parametrize(
    ("row", "schema", "expected"),
    [
        (
            {"prompt": "2+3=", "answer": "5", "demo": "#5"},
            "prompt_answer",
            ("2+3=", "5", "#5"),
        ),
        (GSM8K_ROW, "gsm8k", ("What is 48/2?\n", "24", "It is 48/2 = 24 clips.\n#### 24")),
        (
            {"question": "Which?\n\nA) x", "answer": "A"},
            "question_answer",
            ("Which?\n\nA) x\n", "A", None),
        ),
        (
            {"problem": "Find $x$.", "solution": "So \\boxed{3}.", "answer": "3", "level": "Level 5"},
            "math",
            ("Find $x$.\n", "3", "So \\boxed{3}."),
        ),
        (
            OPENR1_ROW,
            "openr1",
            (OPENR1_ROW["prompt"], "2", "<think>\nEasy.\n</think>\n\\boxed{2}"),
        ),
        (
            {"nums": [3, 4], "target": 7, "solution": "3 + 4 = 7", "answer": "3 + 4"},
            "countdown",
            (
                "Using the numbers [3, 4], write an expression that equals 7. Use + - * / and parentheses, "
                "and each number at most once. Work step by step, then give the expression alone between "
                "<answer> and </answer>.\n",
                7,
                "3 + 4 = 7\n<answer>3 + 4</answer>",
            ),
        ),
        (
            {"nums": [3, 4], "target": 7},
            "countdown",
            (None, 7, None),
        ),
    ],
    ids=["prompt_answer", "gsm8k", "question_answer", "math", "openr1", "countdown", "countdown-bare"],
)
def test_known_schemas_need_no_map(tmp_path: Path, row: dict, schema: str, expected: tuple) -> None:
    """Prompt, answer and demonstration are found by the columns alone."""
    (loaded,) = load_examples(write_jsonl(tmp_path / "rows.jsonl", [row]))
    prompt, answer, demo = expected
    assert detect_schema(row).name == schema
    assert (loaded.answer, (loaded.demos or [None])[0], loaded.row) == (answer, demo, row)
    assert prompt is None or loaded.prompt == prompt
    assert loaded.id == "rows.jsonl:0"


def test_openr1_parquet_round_trip(tmp_path: Path) -> None:
    """The nested columns of the OpenR1 layout survive parquet, and a limit takes the first rows."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "openr1.parquet"
    rows = [{**OPENR1_ROW, "reward_model": {"ground_truth": str(i), "style": "rule"}} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = load_examples(str(path), require_demo=True, limit=2500)
    assert [e.answer for e in loaded] == [str(i) for i in range(2500)]
    assert loaded[0].prompt == OPENR1_ROW["prompt"] and loaded[0].demos[0].startswith("<think>\n")
    assert loaded[0].row == rows[0]


def test_json_list_is_read(tmp_path: Path) -> None:
    """A .json file is a list of rows."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]))
    assert [e.answer for e in load_examples(str(path))] == [1, 2]


def test_columns_map_with_dotted_paths(tmp_path: Path) -> None:
    """A map reaches into nested fields and takes any column names."""
    source = write_jsonl(tmp_path / "r.jsonl", [{"q": {"text": "2+3="}, "gold": {"v": 5}, "how": "#5"}])
    (loaded,) = load_examples(source, columns={"prompt": "q.text", "answer": "gold.v", "demo": "how"})
    assert (loaded.prompt, loaded.answer, (loaded.demos or [None])[0]) == ("2+3=", 5, "#5")


def test_columns_map_wins_over_the_schema(tmp_path: Path) -> None:
    """Mapping one role leaves the others to the schema, whose habit for that role is off."""
    source = write_jsonl(tmp_path / "r.jsonl", [{**GSM8K_ROW, "long": "by <<hand>> 24"}])
    (loaded,) = load_examples(source, columns={"demo": "long"})
    assert (loaded.answer, (loaded.demos or [None])[0]) == ("24", "by <<hand>> 24")


# what a user can get wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no rows"),
        ("\n\n", "line 1: no rows"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "ans', "line 2: not valid JSON.*truncated"),
        ('{"prompt": "a", "answer": "b"}\n\nnonsense\n', r"line 3: not valid JSON \(Expecting value"),
        ("[1, 2]\n", "line 1: expected a JSON object, got list"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2: no column 'answer'"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": null}\n', "line 2: no answer in column"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": " "}\n', "line 2: no answer in column"),
        ('{"prompt": " ", "answer": "b"}\n', "line 1: the prompt must be text or messages"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}\n', "line 1: a message of user has no text"),
        ('{"prompt": [3], "answer": "b"}\n', "line 1: the prompt must be text or messages"),
        ('{"prompt": "a", "answer": "b", "demo": 3}\n', "line 1: the demonstration must be text"),
    ],
    ids=[
        "empty", "blank", "truncated", "invalid", "not-object", "row-lacks-column", "null-answer",
        "blank-answer", "blank-prompt", "bad-message", "prompt-type", "demo-type",
    ],
)  # fmt: skip
def test_bad_jsonl_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    """Each kind of broken row is answered with the file and its 1-based line."""
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"broken\.jsonl, {message}"):
        load_examples(str(path))


def test_undecodable_jsonl_names_the_line(tmp_path: Path) -> None:
    """Bytes that are no text are placed like any other broken line."""
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2"):
        load_examples(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", "line 1: not valid JSON"),
        ("a.json", '{"prompt": 1}', "expected a JSON list of objects"),
        ("a.json", "[]", "holds no rows"),
        ("a.parquet", "text", "not a readable parquet file"),
        ("a.xml", "prompt,answer", r"format of .*a\.xml; expected one of \.jsonl, \.ndjson, \.json, \.csv"),
    ],
    ids=["json-broken", "json-object", "json-empty", "parquet-broken", "unknown-format"],
)
def test_other_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    """Broken json and parquet, and formats nobody reads, fail with the file's name."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / name))


def test_missing_file_is_not_taken_for_a_hub_name() -> None:
    """A path that is not there is reported as a path."""
    with pytest.raises(ValueError, match="no such data file: nowhere/rows.jsonl"):
        load_examples("nowhere/rows.jsonl")


def test_missing_column_names_the_present_the_nearest_and_the_option(tmp_path: Path) -> None:
    """The error can be acted on without opening the file."""
    source = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "anwser": "b", "meta": {"n": 1}}])
    with pytest.raises(ValueError) as caught:
        load_examples(source)
    for part in (
        "'answer'",
        "nearest: 'anwser'",
        "prompt, anwser, meta, meta.n",
        "data.columns.answer=anwser",
    ):
        assert part in str(caught.value)


def test_missing_demo_column_only_matters_when_required(tmp_path: Path) -> None:
    """Without require_demo a source without demonstrations is fine; with it the option is named."""
    source = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "b", "demos": "c"}])
    assert load_examples(source)[0].demos == []
    with pytest.raises(ValueError, match="data.columns.demo=demos"):
        load_examples(source, require_demo=True)


def test_mapped_column_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """A column that the user names must exist, required or not; so must its role."""
    source = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="no column 'worked' for the demo"):
        load_examples(source, columns={"demo": "worked"})
    with pytest.raises(ValueError, match=r"not \['demonstration'\]"):
        load_examples(source, columns={"demonstration": "answer"})


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With bad_rows=skip the good rows keep their ids; the log says how many went and where the first was."""
    rows = [{"prompt": "a", "answer": "b", "demo": d} for d in ("x", None, "y", "")]
    source = write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(ValueError, match="line 2: no demonstration in column 'demo'"):
        load_examples(source, require_demo=True)
    with caplog.at_level(logging.WARNING):
        kept = load_examples(source, require_demo=True, bad_rows="skip")
    assert [e.id for e in kept] == ["r.jsonl:0", "r.jsonl:2"]
    assert "dropped 2 of 4 rows, the first is" in caplog.text and "line 2" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 rows is usable"):
        load_examples(write_jsonl(tmp_path / "n.jsonl", [{"prompt": "a", "answer": ""}]), bad_rows="skip")


def test_misspelt_task_is_not_looked_up_on_the_hub() -> None:
    """A near miss of a built-in task gets its name."""
    with pytest.raises(ValueError, match="did you mean the built-in task 'chain'"):
        load_examples("chian")


def test_task_options_belong_to_tasks(tmp_path: Path) -> None:
    """Options of a generated task on a file would be ignored, so they are refused."""
    with pytest.raises(ValueError, match="are for generated tasks"):
        load_examples(
            write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "b"}]), task={"max_ops": 2}
        )


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """owner/name:config and the split reach datasets, and rows come back as examples."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([GSM8K_ROW, GSM8K_ROW, GSM8K_ROW])

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = load_examples("openai/gsm8k:main", split="test", limit=2)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [e.id for e in loaded] == ["openai/gsm8k:main:0", "openai/gsm8k:main:1"] and loaded[
        0
    ].answer == "24"


def test_hub_without_network_is_one_clear_line() -> None:
    """Offline, the error is a single line that names the source and the way out."""
    pytest.importorskip("datasets")
    with pytest.raises(ValueError) as caught:
        load_examples("nobody/nothing-of-the-kind")
    message = str(caught.value)
    assert "'nobody/nothing-of-the-kind' (train)" in message and "local .jsonl" in message
    assert "\n" not in message


@needs_data
@pytest.mark.parametrize(
    ("file", "rows", "demos"),
    [
        ("train/gsm8k_train.jsonl", 7473, True),
        ("train/countdown_train.jsonl", 10240, True),
        ("eval/math500.jsonl", 500, True),
        ("eval/aime25.jsonl", 30, False),
        ("eval/amc83.jsonl", 83, False),
        ("eval/arc_challenge_test.jsonl", 1172, False),
    ],
)
def test_real_files_load_without_a_map(file: str, rows: int, demos: bool) -> None:
    """Public data sets in their own layouts load as they are."""
    loaded = load_examples(str(DATA / file), require_demo=demos)
    assert len(loaded) == rows == len({e.id for e in loaded})
    assert not any("<<" in e.demos[0] if e.demos else "" for e in loaded)


@needs_data
def test_math_train_names_its_two_rows_without_an_answer() -> None:
    """The MATH training file has two empty boxes; they are named, or skipped on request."""
    source = str(DATA / "train/math_train.jsonl")
    with pytest.raises(ValueError, match=r"math_train\.jsonl, line 5342: no answer"):
        load_examples(source)
    assert len(load_examples(source, bad_rows="skip")) == 7498
