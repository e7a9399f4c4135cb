"""From any source to token ids: formats, column maps, errors that name the place, templates, sampler."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from srft.data import (
    Example,
    PromptSampler,
    build_prompts,
    drop_shared,
    encode_demo,
    encode_prompt,
    load_examples,
    render_prompt,
    sample_seed,
)
from srft.sources import detect_schema

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n"
    "{% else %}User: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: <think>\n{% endif %}"
)


def char_tokenizer(template: str | None = None, *, frame: str = "$A") -> PreTrainedTokenizerFast:
    """One token a character, <bos> 0 and <eos> 1; ``frame`` says which of them surround a text."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
    )


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The characters behind ids, special tokens included."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows, one object a line, and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def example(prompt: Any = "2+3=", demo: str | None = "#5") -> Example:
    """A small example."""
    return Example("t:0", prompt, "5", demo, {})


# ---- schemas ----

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
    assert detect_schema(row) == schema
    assert (loaded.answer, loaded.demo, loaded.row) == (answer, demo, row)
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
    assert loaded[0].prompt == OPENR1_ROW["prompt"] and loaded[0].demo.startswith("<think>\n")
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
    assert (loaded.prompt, loaded.answer, loaded.demo) == ("2+3=", 5, "#5")


def test_columns_map_wins_over_the_schema(tmp_path: Path) -> None:
    """Mapping one role leaves the others to the schema, whose habit for that role is off."""
    source = write_jsonl(tmp_path / "r.jsonl", [{**GSM8K_ROW, "long": "by <<hand>> 24"}])
    (loaded,) = load_examples(source, columns={"demo": "long"})
    assert (loaded.answer, loaded.demo) == ("24", "by <<hand>> 24")


# ---- what a user can get wrong ----


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
        ('{"prompt": [{"role": "user"}], "answer": "b"}\n', "line 1: the prompt must be text or messages"),
        ('{"prompt": "a", "answer": "b", "demo": 3}\n', "line 1: the demonstration must be text"),
    ],
    ids=[
        "empty", "blank", "truncated", "invalid", "not-object", "row-lacks-column", "null-answer",
        "blank-answer", "blank-prompt", "bad-message", "demo-type",
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
        ("a.csv", "prompt,answer", r"format of .*a\.csv; expected one of \.jsonl, \.json, \.parquet"),
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
    assert load_examples(source)[0].demo is None
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
    assert not any("<<" in (e.demo or "") for e in loaded)


@needs_data
def test_math_train_names_its_two_rows_without_an_answer() -> None:
    """The MATH training file has two empty boxes; they are named, or skipped on request."""
    source = str(DATA / "train/math_train.jsonl")
    with pytest.raises(ValueError, match=r"math_train\.jsonl, line 5342: no answer"):
        load_examples(source)
    assert len(load_examples(source, bad_rows="skip")) == 7498


@needs_data
def test_drop_shared_finds_the_repeats_of_countdown() -> None:
    """The five test rows that repeat a train row in another order of numbers are dropped, and no other."""
    train = load_examples(str(DATA / "train/countdown_train.jsonl"))
    test = load_examples(str(DATA / "eval/countdown_test.jsonl"))
    kept = {e.id for e in drop_shared(test, train)}
    assert sorted(int(e.id.split(":")[1]) for e in test if e.id not in kept) == [257, 263, 370, 494, 922]


def test_drop_shared_compares_prompts() -> None:
    """Equal text or messages are shared, whatever the ids."""
    a, b, c = example("x"), example([{"role": "user", "content": "x"}]), example("y")
    assert drop_shared([a, b, c], [example("x")]) == [b, c]
    assert drop_shared([a, b, c], [b, c]) == [a]


# ---- templates and tokens ----


def test_plain_prompt_is_taken_as_it_is() -> None:
    """Without a template the prompt's own characters are the prompt; a system text goes in front."""
    tokenizer = char_tokenizer()
    assert text_of(tokenizer, encode_prompt(example(), tokenizer)) == "2+3="
    assert render_prompt(example(), tokenizer, system="Add.", chat=False) == "Add.\n\n2+3="


def test_chat_falls_back_to_plain_text_only_without_a_template() -> None:
    """chat=True uses the template where there is one."""
    assert render_prompt(example(), char_tokenizer(), system=None, chat=True) == "2+3="
    rendered = render_prompt(example("2+3?\n"), char_tokenizer(CHATML), system="Add.", chat=True)
    assert rendered == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_always_use_the_template() -> None:
    """Message prompts are templated whatever ``chat`` says, a given system text replaces theirs."""
    turns = [{"role": "system", "content": "Old."}, {"role": "user", "content": "2+3?"}]
    tokenizer = char_tokenizer(CHATML)
    for chat in (True, False):
        assert render_prompt(example(turns), tokenizer, system=None, chat=chat).startswith(
            "<|im_start|>system\nOld.<|im_end|>\n<|im_start|>user\n2+3?"
        )
    rendered = render_prompt(example(turns), tokenizer, system="New.", chat=False)
    assert "New." in rendered and "Old." not in rendered
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(example(turns), char_tokenizer(), system=None, chat=True)


def test_encoded_chat_prompt_is_what_the_tokenizer_itself_makes() -> None:
    """Ids equal apply_chat_template(tokenize=True), with no second start token."""
    tokenizer = char_tokenizer("<bos>" + CHATML, frame="<bos> $A")
    turns = [{"role": "user", "content": "2+3?"}]
    ids = encode_prompt(example(turns), tokenizer)
    assert ids == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("frame", ["$A", "<bos> $A", "<bos> $A <eos>"], ids=["bare", "bos", "bos-eos"])
def test_plain_prompt_stays_open_and_demo_is_closed_once(frame: str) -> None:
    """A start token leads the prompt, an end token never closes it; the demonstration ends in one EOS."""
    tokenizer = char_tokenizer(frame=frame)
    prompt = encode_prompt(example(), tokenizer)
    assert text_of(tokenizer, prompt) == ("<bos>2+3=" if "bos" in frame else "2+3=")
    assert text_of(tokenizer, encode_demo(example(), tokenizer, tokenizer.eos_token_id)) == "#5<eos>"


def test_leading_think_is_dropped_only_when_the_prompt_opens_it() -> None:
    """After a prompt that ends in <think>, the demonstration goes on inside; otherwise it keeps its own."""
    row = example([{"role": "user", "content": "1+1?"}], demo="<think>\nEasy.\n</think>\n2")
    limits: dict[str, Any] = {"max_prompt_tokens": 100, "max_demo_tokens": 100}
    for template, expected in [(THINKING, "Easy.\n</think>\n2<eos>"), (CHATML, f"{row.demo}<eos>")]:
        tokenizer = char_tokenizer(template)
        ((prompt,), _) = build_prompts([row], tokenizer, **limits)
        assert text_of(tokenizer, prompt.demo_ids[0]) == expected
    tokenizer = char_tokenizer(THINKING)
    ((prompt,), _) = build_prompts([row], tokenizer, system="S.", **limits)
    assert text_of(tokenizer, prompt.prompt_ids) == "S.\nUser: 1+1?\nAssistant: <think>\n"


def test_build_prompts_skips_and_counts_overlong_examples() -> None:
    """What is exactly at a limit stays whole; one token more and the example goes, and is counted."""
    rows = [example("1234"), example("12345"), example("1", "12"), example("1", "123"), example("1", None)]
    prompts, counts = build_prompts(
        rows, char_tokenizer(), max_prompt_tokens=4, max_demo_tokens=3, overlong="skip"
    )
    assert [p.example for p in prompts] == [rows[0], rows[2], rows[4]]
    assert counts == {"overlong_prompts": 1, "overlong_demos": 1}
    assert [len(p.prompt_ids) for p in prompts] == [4, 1, 1]
    assert [[len(ids) for ids in p.demo_ids] for p in prompts] == [[3], [3], []]
    assert prompts[1].demo_ids[0] == encode_demo(rows[2], char_tokenizer(), prompts[1].demo_ids[0][-1])


def test_build_prompts_error_names_numbers_and_options() -> None:
    """The default refuses overlong examples with how many, the longest, and what to set."""
    rows = [example("1234567"), example("1", "12345678"), example("1", "1")]
    with pytest.raises(ValueError) as caught:
        build_prompts(rows, char_tokenizer(), max_prompt_tokens=4, max_demo_tokens=5)
    message = str(caught.value)
    for part in (
        "1 of 3 examples have a prompt over 4",
        "longest 7",
        "1 a demonstration over 5",
        "longest 9",
    ):
        assert part in message
    for option in ("data.max_prompt_tokens", "rollout.max_new_tokens", "data.overlong=skip"):
        assert option in message
    with pytest.raises(ValueError, match="2 of 2 examples"):
        build_prompts(
            [rows[0]] * 2, char_tokenizer(), max_prompt_tokens=4, max_demo_tokens=5, overlong="skip"
        )


def test_build_prompts_without_demos() -> None:
    """max_demo_tokens=None leaves demonstrations out, however long."""
    ((prompt,), counts) = build_prompts(
        [example(demo="x" * 999)], char_tokenizer(), max_prompt_tokens=9, max_demo_tokens=None
    )
    assert prompt.demo_ids == [] and not any(counts.values())


def test_build_prompts_needs_an_end_token() -> None:
    """A tokenizer without EOS is refused unless the caller names the token."""
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        build_prompts([example()], tokenizer, max_prompt_tokens=9, max_demo_tokens=9)
    ((prompt,), _) = build_prompts([example()], tokenizer, max_prompt_tokens=9, max_demo_tokens=9, eos_id=2)
    assert prompt.demo_ids[0][-1] == 2


@needs_data
def test_real_chat_template() -> None:
    """A published tokenizer's template gives the ids that it gives by itself."""
    folder = DATA / "tokenizers"
    config = json.loads((folder / "minimind_tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "minimind_tokenizer.json"),
        chat_template=config["chat_template"],
        eos_token="<|im_end|>",
    )
    ids = encode_prompt(example("2+3?"), tokenizer, system="Add.", chat=True)
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"}]
    assert ids == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )


# ---- sampler ----


def test_sampler_visits_every_prompt_once_an_epoch() -> None:
    """Whatever the batch sizes, each epoch is a permutation, and two epochs are ordered differently."""
    sampler = PromptSampler(10, seed=5)
    drawn = [index for size in (3, 4, 5, 8, 10) for index in sampler.next(size)]
    epochs = [drawn[0:10], drawn[10:20], drawn[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert PromptSampler(10, seed=6).next(10) != epochs[0]


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_sampler_resumes_anywhere(stop: int) -> None:
    """A sampler loaded from a state goes on exactly as the one that saved it, also mid-epoch."""
    whole = PromptSampler(7, seed=1)
    batches = [whole.next(4) for _ in range(10)]
    first = PromptSampler(7, seed=1)
    for _ in range(stop):
        first.next(4)
    second = PromptSampler(7, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next(4) for _ in range(10 - stop)] == batches[stop:]


def test_sampler_order_is_fixed() -> None:
    """The order is part of what a seed means; a change of it would silently change every resumed run."""
    assert PromptSampler(8, seed=0).next(8) == [5, 0, 3, 6, 4, 7, 2, 1]


def test_sampler_refusals() -> None:
    """Batches larger than the data, no data, and a state of other data or another seed are errors."""
    sampler = PromptSampler(4, seed=0)
    with pytest.raises(ValueError, match="a batch of 5 prompts from 4"):
        sampler.next(5)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSampler(0, seed=0)
    with pytest.raises(ValueError, match="num_prompts=5, this run 4"):
        sampler.load_state_dict(PromptSampler(5, seed=0).state_dict())
    with pytest.raises(ValueError, match="seed=1, this run 0"):
        sampler.load_state_dict(PromptSampler(4, seed=1).state_dict())


def test_sample_seeds_differ_in_every_part_and_fit_63_bits() -> None:
    """Run seed, step, prompt and sample index each change the seed; the value is the same everywhere."""
    seeds = {
        sample_seed(s, t, uid, k)
        for s in range(3)
        for t in range(11)
        for uid in ("a:1", "a:11")
        for k in range(12)
    }
    assert len(seeds) == 3 * 11 * 2 * 12
    assert all(0 <= value < 2**63 for value in seeds) and max(seeds) > 2**61
    assert sample_seed(0, 1, "chain:7", 2) == 9152259900630540904
