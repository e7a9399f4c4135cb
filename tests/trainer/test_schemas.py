"""Conversations, completions and lists of generations: what is prompt, what demonstration, and how each is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srft.data import schemas
from srft.data.examples import Example, load_examples
from srft.data.judging import asked_reward, fitting_reward
from srft.data.problems import drop_shared
from srft.data.schemas import Column, Schema, detect_schema
from srft.rewards.kinds import check_kind
from tests.trainer.runs import small_config

USER = {"role": "user", "content": "0+1="}
SAID = {"role": "assistant", "content": "#1"}
HUMAN, GPT = {"from": "human", "value": "0+1="}, {"from": "gpt", "value": "#1"}
ASKED = [{"role": "user", "content": "0+1="}]


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Example]:
    """Examples of rows written as jsonl; each row has the answer "1" unless it brings its own."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"answer": "1", **row}) + "\n" for row in rows))
    return load_examples(str(path), **options)


# the last turn of the assistant


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, SAID]},
        {"conversations": [HUMAN, GPT]},
        {"conversations": [USER, SAID]},
        {"messages": [HUMAN, SAID]},
        {"messages": [{"role": "human", "value": "0+1="}, {"from": "assistant", "content": "#1"}]},
        {"messages": [{**USER, "from": None, "value": None}, {"role": None, "content": None, **GPT}]},
        {"messages": [{"role": "User", "content": "0+1="}, {"role": "model", "content": "#1"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "0+"}, {"text": "1="}]}, SAID]},
        {"messages": {"role": ["user", "assistant"], "content": ["0+1=", "#1"]}},
        {"messages": json.dumps([USER, SAID])},
        {"messages": str([USER, SAID])},
        {"conversations": json.dumps([HUMAN, GPT])},
        {"prompt": [USER, SAID]},
        {"prompt": [USER], "completion": [SAID]},
        {"prompt": [USER], "completion": "#1"},
        {"prompt": [USER], "completion": [{"content": "#1"}]},
        {"prompt": [USER, SAID], "demo": "#1"},
        {"prompt": json.dumps([USER]), "completion": json.dumps([SAID])},
        {"prompt": json.dumps(USER), "demo": "#1"},
        {"prompt": [USER], "reward_model": {"ground_truth": "1"}, "target": [SAID]},
        {"prompt": [USER], "reward_model": {"ground_truth": "1"}, "target": [{"content": "#1"}]},
        {"prompt": [USER, SAID], "reward_model": {"ground_truth": "1"}},
    ],
)
def test_answer_is_the_demonstration_and_never_in_the_prompt(tmp_path: Path, row: dict[str, Any]) -> None:
    """Whatever the layout, the prompt is the user's turn and the demonstration the assistant's."""
    (example,) = load(tmp_path, row, require_demo=True)
    assert (example.prompt, example.demos, example.answer) == (ASKED, ["#1"], "1")


def test_prompt_and_completion_as_text(tmp_path: Path) -> None:
    """Both stay as they are."""
    (example,) = load(tmp_path, {"prompt": "0+1=", "completion": " #1"}, require_demo=True)
    assert (example.prompt, example.demos) == ("0+1=", [" #1"])


def test_earlier_turns_stay_in_the_prompt(tmp_path: Path) -> None:
    """Of a longer conversation only the last turn is left out; one that ends with the user has no demonstration."""
    system = {"role": "system", "content": "Add."}
    (example,) = load(tmp_path, {"messages": [system, USER, SAID, USER, {**SAID, "content": "#one"}]})
    assert (example.prompt, example.demos) == ([system, USER, SAID, USER], ["#one"])
    (example,) = load(tmp_path, {"conversations": [HUMAN, GPT], "system": "Add."})
    assert (example.prompt, example.demos) == ([system, USER], ["#1"])
    (example,) = load(tmp_path, {"messages": [USER, SAID, USER]})
    assert (example.prompt, example.demos) == ([USER, SAID, USER], [])


def test_mapped_columns_of_a_conversation(tmp_path: Path) -> None:
    """OpenR1-Math's messages as prompt and demonstration, as demonstration alone, or as prompt beside a solution."""
    row = {"problem": "What?", "solution": "It is 1.", "messages": [USER, SAID]}
    for columns, expected in (
        ({"prompt": "messages", "demo": "messages"}, (ASKED, ["#1"])),
        ({"demo": "messages"}, ("What?\n", ["#1"])),
        ({"prompt": "messages"}, (ASKED, ["It is 1."])),
        ({}, ("What?\n", ["It is 1."])),
    ):
        (example,) = load(tmp_path, row, columns=columns, require_demo=True)
        assert (example.prompt, example.demos) == expected


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thought_in_a_field_of_its_own(tmp_path: Path, key: str) -> None:
    """A demonstration gets the thought that its turn keeps apart, once."""
    (example,) = load(tmp_path, {"messages": [USER, {**SAID, key: "easy\n"}]})
    assert example.demos == ["<think>\neasy\n</think>\n\n#1"]
    (example,) = load(tmp_path, {"messages": [USER, {"role": "assistant", "content": "<think>x</think>#1", key: "x"}]})
    assert example.demos == ["<think>x</think>#1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "assistant has no text"),
        ({"messages": [{"role": "judge", "content": "x"}, SAID]}, "a message has the role 'judge'; expected one of"),
        ({"messages": [{"content": "x"}, SAID]}, "a message has the role None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]}, "has a part that is not text"),
        ({"messages": [SAID]}, "have no user turn before the assistant's"),
        ({"messages": [{**USER, "content": " "}, SAID]}, "have no user turn before the assistant's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "have no user turn$"),
        ({"messages": [USER, SAID, SAID]}, "two turns in a row"),
        ({"messages": []}, "the prompt must be text or messages"),
        ({"messages": '[{"role": "user", "content": "x"}\n {"role": "gpt", "content": "#1"}]'}, "neither JSON nor"),
        ({"messages": [USER, "x"]}, "the prompt must be text or messages"),
        ({"prompt": "x", "demo": [["#1"]]}, "the demonstration must be text or messages, got list"),
        ({"prompt": "x", "demo": [SAID, USER, SAID]}, "has several turns of the assistant, .* map data.columns.prompt"),
    ],
    ids=["null", "role", "no-role", "image", "no-user", "blank-user", "system", "two-in-a-row", "empty", "numpy",
         "mixed", "nested-list", "turns-between"],
)  # fmt: skip
def test_conversations_that_cannot_be_read_name_the_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    """What is no conversation is refused with its line, and never trained on as text."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}"):
        load(tmp_path, {"messages": [USER, SAID], "prompt": "p", "demo": "d"}, row, columns={"prompt": next(iter(row))})


@pytest.mark.parametrize(
    "prompt", ["[1, 2] has which sum?", '["role"]', '{"a": 1}', "[x]", '[{"from": "SFO", "to": "LAX"}]', "[" * 50]
)
def test_text_that_only_looks_like_json_stays_text(tmp_path: Path, prompt: str) -> None:
    """Brackets do not make a prompt messages."""
    (example,) = load(tmp_path, {"prompt": prompt})
    assert example.prompt == prompt


# several demonstrations


def test_generations_are_several_demonstrations(tmp_path: Path) -> None:
    """Each text of a list is one; empty ones and repeats are none, and those marked wrong are left out."""
    row = {"problem": "What?", "generations": ["#1", "", "so #1", None, "#1", "#2"]}
    columns = {"demo": "generations"}
    assert load(tmp_path, row, columns=columns)[0].demos == ["#1", "so #1", "#2"]
    flags = {"correctness_math_verify": [True, True, None, True, True, False]}
    assert load(tmp_path, {**row, **flags}, columns=columns)[0].demos == ["#1", "so #1"]
    other = {"correctness_math_verify": [False]}
    assert load(tmp_path, {**row, **other}, columns=columns)[0].demos == ["#1", "so #1", "#2"]
    with pytest.raises(ValueError, match="line 1: no demonstration in column 'generations'"):
        load(tmp_path, {**row, "correctness_math_verify": [False] * 6}, columns=columns, require_demo=True)
    row = {"problem": "What?", "generations": [[USER, SAID], [{"role": "assistant", "content": "so #1"}]]}
    assert load(tmp_path, row, columns=columns)[0].demos == ["#1", "so #1"]


# what judges


def verl_row(instruction: str, gold: Any = "18") -> dict[str, Any]:
    """A row as verl's preprocessing writes it."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"How many? {instruction}"}],
        "ability": "math",
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": 0, "split": "train", "answer": "9*2=<<9*2=18>>18\n#### 18", "question": "How many?"},
    }


@pytest.mark.parametrize(
    ("instruction", "gold", "kind"),
    [
        ('Let\'s think step by step and output the final answer after "####".', "18", "numeric"),
        ('Output the final answer after "####".', "$1,234.50", "numeric"),
        ('Output the final answer after "####".', "Paris", "exact"),
        (r"Let's think step by step and output the final answer within \boxed{}.", "18", "math"),
        (r"The last line should be of the form Answer: $Answer.", "34", "numeric"),
        (r"The last line should be of the form Answer: $Answer.", r"\frac{1}{2}", "math"),
        ("", "18", "math"),
    ],
)
def test_verls_layout_is_judged_by_what_its_prompts_ask_for(
    tmp_path: Path, instruction: str, gold: str, kind: str
) -> None:
    """The verifier reads the form that the prompt names; the worked answer in extra_info is the demonstration."""
    from srft.dataset import read_problems

    path = tmp_path / "rows.jsonl"
    rows = [verl_row(instruction, gold) for _ in range(3)]
    for index, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": f"{index} {row['prompt'][0]['content']}"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_problems(small_config(tmp_path, data__train=path))
    assert problems.reward == kind
    assert problems.train[0].demos == ["9*2=18\n#### 18"]


ROWS = {
    "openr1": {"prompt": "What?", "reward_model": {"ground_truth": "1"}},
    "countdown": {"nums": [1, 2], "target": 3},
    "gsm8k": {"question": "What?", "answer": "It is.\n#### 1"},
    "math": {"problem": "What?", "answer": "1"},
    "prompt_answer": {"prompt": "What?", "answer": "1"},
    "question_answer": {"question": "What?", "answer": "1"},
    "messages": {"messages": [USER], "answer": "1"},
    "conversations": {"conversations": [HUMAN], "answer": "1"},
    "other": {"instruction": "What?", "output": "1"},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("openr1", "math"), ("countdown", "countdown"), ("gsm8k", "numeric"), ("math", "math"),
        ("prompt_answer", "exact"), ("question_answer", "exact"), ("messages", "exact"), ("conversations", "exact"),
    ],
)  # fmt: skip
def test_layout_names_the_verifier_that_fits(name: str, kind: str) -> None:
    """Each layout is known by its columns and judged by its own verifier, which is there."""
    example = Example("f:0", "What?", "1", [], ROWS[name])
    assert detect_schema(ROWS[name]).name == name
    assert fitting_reward("f.jsonl", None, [example]) == kind
    check_kind(kind)


def test_every_layout_has_a_row_here() -> None:
    """A record without one in ``ROWS`` is not tested."""
    assert [schema.name for schema in schemas.SCHEMAS] == list(ROWS)


@pytest.mark.parametrize(("source", "kind"), [("chain", "exact"), ("reasoning_gym:gcd", "reasoning_gym:gcd")])
def test_generated_tasks_are_judged_by_their_own(source: str, kind: str) -> None:
    """Chains by exact match, reasoning-gym's entries by the task itself, whatever their columns look like."""
    if source != "chain":
        pytest.importorskip("reasoning_gym")
    examples = load_examples(source, limit=2)
    assert fitting_reward(source, None, examples) == kind


def test_columns_of_no_known_layout_need_a_verifier(tmp_path: Path) -> None:
    """A map makes such rows readable, but what judges them is the user's to say."""
    from srft.prepare import read_problems

    columns = {"data__columns.prompt": "instruction", "data__columns.answer": "output"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{i}", "output": "1"}) + "\n" for i in range(12)))
    grpo = {"method__name": "grpo", "data__train": path} | columns
    with pytest.raises(ValueError, match=r"no known verifier fits the columns of .*rows\.jsonl; set reward\.kind"):
        read_problems(small_config(tmp_path, **grpo))
    assert read_problems(small_config(tmp_path, reward__kind="exact", **grpo)).reward == "exact"


def test_another_layout_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns, reading, identity and verifier of a new record are followed; a map of the user's goes first."""

    def blank(value: str, row: dict[str, Any]) -> str:
        if "after" not in row:
            raise ValueError("nothing after the blank")
        return f"{value}_{row['after']}"

    record = Schema(
        "cloze",
        signs=("before", "after", "word"),
        fits=lambda row: row["word"] != "?",
        prompt=Column("before", blank),
        answer=Column("word", lambda value, row: value.upper()),
        demos=(Column("why.text", lambda text, row: f"{text}:{row['word']}"),),
        reward="countdown",
        identity=lambda row: row["word"],
    )
    monkeypatch.setattr(schemas, "SCHEMAS", (record, *schemas.SCHEMAS))
    row = {"before": "a", "after": "c", "word": "b", "why": {"text": "abc"}}
    (example,) = load(tmp_path, row, require_demo=True)
    assert (example.prompt, example.answer, example.demos) == ("a_c", "B", ["abc:b"])
    assert fitting_reward("rows.jsonl", None, [example]) == "countdown"
    other = load(tmp_path, {**row, "before": "x"}, {**row, "word": "d"})
    assert [e.id for e in drop_shared(other, [example])] == ["rows.jsonl:1"]
    (mapped,) = load(tmp_path, row, columns={"prompt": "after", "answer": "before", "demo": "word"})
    assert (mapped.prompt, mapped.answer, mapped.demos) == ("c", "a", ["b"])
    with pytest.raises(ValueError, match="line 2: nothing after the blank"):
        load(tmp_path, row, {"before": "a", "word": "b"})
    assert detect_schema({**row, "word": "?"}).name == "other"


@pytest.mark.parametrize("nums", [7, True, "[3, 4]", None, {"a": 1}], ids=str)
def test_numbers_of_countdown_that_are_no_list_name_the_row(tmp_path: Path, nums: Any) -> None:
    """Such as the text that they are in a CSV file."""
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: nums must be a list of numbers, got \w+"):
        load(tmp_path, {"nums": [3, 4], "target": 7}, {"nums": nums, "target": 7})


def test_worked_answer_as_bytes(tmp_path: Path) -> None:
    """What parquet holds as binary is read as the text that it is, before the answer is cut out of it."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"question": b"What?", "answer": b"<<1=1>>\n#### 1"}]), path)
    (example,) = load_examples(str(path), require_demo=True)
    assert (example.prompt, example.answer, example.demos) == ("What?\n", "1", ["\n#### 1"])


def test_system_prompt_counts_as_asking() -> None:
    """What data.system asks for is asked; rows that ask for different forms are refused with one of each."""
    rows = [("a:0", "What?", "1"), ("a:1", [USER], "2")]
    assert asked_reward(None, rows) is None
    assert asked_reward("Answer after ####.", rows) == "numeric"
    assert asked_reward(r"Use \boxed{}.", rows) == "math"
    mixed = [("a:0", r"In \boxed{}.", "1"), ("a:1", "After ####.", "2")]
    with pytest.raises(ValueError, match=r"a:0 asks for the answer in a box and a:1 after a mark.*reward\.kind"):
        asked_reward(None, mixed)
