"""The configuration: what is refused and how it is said, order of layers, TOML there and back, help."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from srft.config import Config
from srft.options import changed_keys, help_text, load_config, load_config_text, to_toml

SERVERS = ["engine.kind=http", "engine.urls=http://a:1", "engine.weights_dir=/w"]


def all_options(section: type[BaseModel], path: str = "") -> list[str]:
    """Dotted names of every option."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += all_options(kind, f"{path}{name}.")
        else:
            names.append(path + name)
    return names


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("train.learning_rate=1", "train.l"),
        ("train.lrr=1", "did you mean train.lr?"),
        ("method.entropy_cof=1", "did you mean method.entropy_coef?"),
        ("model.tiny.hidden=8", "did you mean model.tiny.hidden_size?"),
        ("temperature=1", "did you mean rollout.temperature?"),
        ("trian.steps=1", "did you mean train.steps?"),
        ("zzzzqqq=1", "--help"),
    ],
)
def test_unknown_option_names_the_nearest(argument: str, hint: str) -> None:
    """An option that does not exist is an error that says which one was probably meant."""
    with pytest.raises(ValueError, match="unknown option") as caught:
        load_config([argument])
    assert argument.split("=")[0] in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.lr=-1", "train.lr"),
        ("train.lr=0", "train.lr"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("method.name=dpo", "method.name"),
        ("method.sft_entropy_sign=2", "method.sft_entropy_sign"),
        ("engine.gpu_memory_utilization=1.5", "engine.gpu_memory_utilization"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.seed=-1", "train.seed"),
        ("name=../elsewhere", "name"),
        ("model.gradient_checkpointing=perhaps", "model.gradient_checkpointing"),
        ("data.columns=5", "data.columns"),
        ("rollout.stop=[[1]]", "rollout.stop"),
        ("rollout.stop=['']", "rollout.stop"),
        ("engine.urls=gpu1:8000", "engine.urls"),
        ("engine.urls=https://gpu1:8000", "engine.urls"),
    ],
)
def test_wrong_value_names_the_option_and_what_it_got(argument: str, option: str) -> None:
    """Wrong types and values out of range are one line with the option first."""
    with pytest.raises(ValueError) as caught:
        load_config([argument])
    message = str(caught.value)
    assert message.startswith(option)
    assert "got" in message
    assert "\n" not in message or option == "train.betas"


def test_every_wrong_value_is_reported_at_once() -> None:
    """Two mistakes are two lines."""
    with pytest.raises(ValueError) as caught:
        load_config(["train.steps=0", "train.lr=-1"])
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == {"train.steps", "train.lr"}


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["train.prompts_per_step=32", "train.updates_per_step=5"], "take 30 prompts"),
        (["train.prompts_per_step=2", "train.updates_per_step=4"], "take 4 prompts"),
        (["train.tokens_per_microbatch=100"], "= 576 tokens"),
        (["rollout.min_new_tokens=65"], "rollout.min_new_tokens=65 is more than rollout.max_new_tokens=64"),
        (["train.demos_per_prompt=0"], "demos_per_prompt=0; set it to 1"),
        (["method.name=sft", "train.demos_per_prompt=0"], "demos_per_prompt=0; set it to 1"),
        (["method.name=grpo", "data.corrupt_demos=0.3"], "but data.corrupt_demos=0.3 is set; unset it"),
        (["method.name=grpo", "data.demos=chain"], "but data.demos=chain is set; unset it"),
        (["method.name=luffy", "data.demos=chain"], "those of data.demos=chain are not"),
        (["method.name=grpo", "train.rollouts_per_prompt=1"], "must be at least 2"),
        (["engine.kind=http"], "engine.kind=http wants engine.urls, too"),
        (["engine.urls=http://a:1"], "engine.urls=['http://a:1'] is for engine.kind=http, got engine.kind=auto"),
        (["engine.weights_dir=/w", "engine.kind=hf"], "engine.weights_dir=/w is for engine.kind=http, got engine.kin"),
        ([*SERVERS, "engine.urls=['http://a:1','http://a:1']"], "names a server twice; name each once"),
        ([*SERVERS, "engine.urls=http://a:99999"], "http://a:99999 has no port: Port out of range"),
        ([*SERVERS, "engine.urls=http://a:b/v1"], "http://a:b/v1 has no port: Port could not be cast"),
        ([*SERVERS, "engine.ranks_per_engine=2"], "with engine.kind=http all ranks share the servers; leave it unset"),
        ([*SERVERS, "rollout.temperature=2.5"], "vLLM samples at temperatures between 0.01 and 2"),
        (["model.tiny.num_heads=3"], "model.tiny.num_heads=3 must divide model.tiny.hidden_size=128"),
    ],
)
def test_options_that_do_not_fit_together(arguments: list[str], remedy: str) -> None:
    """A clash names both options and what to set."""
    with pytest.raises(ValueError) as caught:
        load_config(arguments)
    assert remedy in str(caught.value)


def test_no_argument_gives_the_demo() -> None:
    """Defaults validate and are the documented ones."""
    config = load_config([])
    assert config == Config()
    assert (config.data.train, config.model.name, config.method.name) == ("chain", "tiny", "srft")
    assert config.compute_dtype is torch.float32
    assert config.run_dir == config.runs_dir / "demo"
    assert config.longest_sequence == 512 + 64


def test_later_layers_win_in_the_order_given(tmp_path: Path) -> None:
    """Files and overrides are applied left to right, and a layer keeps what it does not mention."""
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('name = "a"\n[train]\nsteps = 1\nlr = 0.5\n')
    second.write_text("[train]\nsteps = 2\n")
    assert load_config([str(first), str(second)]).train.steps == 2
    assert load_config([str(second), str(first)]).train.steps == 1
    both = load_config([str(first), "train.steps=7", str(second)])
    assert (both.train.steps, both.train.lr, both.name) == (2, 0.5, "a")
    assert load_config([str(first), str(second), "--train.steps=9", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("train.lr=1e-6", "train.lr", 1e-6),
        ("train.lr=3", "train.lr", 3.0),
        ("data.train=reasoning_gym:chain_sum", "data.train", "reasoning_gym:chain_sum"),
        ("data.train='a b=c.jsonl'", "data.train", "a b=c.jsonl"),
        ("data.task.max_ops=5", "data.task", {"max_ops": 5}),
        ("data.columns.answer=meta.gold", "data.columns", {"answer": "meta.gold"}),
        ("train.betas=[0.8, 0.95]", "train.betas", (0.8, 0.95)),
        ("train.resume=true", "train.resume", True),
        ("method.advantage_std=false", "method.advantage_std", False),
        ("method.demo_gamma=0.25", "method.demo_gamma", 0.25),
        ("method.demo_gamma=0", "method.demo_gamma", 0.0),
        ("data.columns={prompt='q'}", "data.columns", {"prompt": "q"}),
        ("data.task.since=2026-11-25", "data.task", {"since": "2026-11-25"}),
        ("data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs", {"enable_thinking": False}),
        ("rollout.stop=</answer>", "rollout.stop", ["</answer>"]),
        ("rollout.stop=42", "rollout.stop", ["42"]),
        ('rollout.stop=["\\n\\n", "###"]', "rollout.stop", ["\n\n", "###"]),
    ],
)
def test_override_values(argument: str, path: str, value: object) -> None:
    """Overrides read numbers, booleans, lists and tables as TOML and all else as text."""
    found: object = load_config([argument])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


LOOK_ALIKES = [
    "17", "007", "1e5", "1_000", "0x10", "1.10", "true", "2026-11-25", "07.30", "inf", "nan", "-0", "[a]", "{}",
    "2026-11-25T10:00:00Z", "07:32:00", "2026-11-25 10:00:00", "a\nb = 2", "1\nb = 2", "'a' # b", "a#b", "'", "=", "",
]  # fmt: skip


@pytest.mark.parametrize("option", ["data.system", "data.train", "data.columns.prompt", "model.tokenizer"])
@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_text_stays_as_it_was_typed(option: str, text: str) -> None:
    """An option that holds text takes what TOML would read as a number, a date or a table letter by letter."""
    config = load_config([f"{option}={text}"])
    found: object = config
    for part in option.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == text
    assert load_config_text(to_toml(config)) == config


@pytest.mark.parametrize("name", ["17", "007", "1e5", "1_000", "0x10", "1.10", "true", "2026-11-25", "07.30", "nan"])
def test_run_is_named_as_typed(name: str) -> None:
    """A run may be named after a date or a number, and its folder has that very name."""
    config = load_config([f"name={name}", "runs_dir=2026"])
    assert (config.name, config.run_dir) == (name, Path("2026") / name)


def test_text_without_quotes_in_a_file(tmp_path: Path) -> None:
    """A date or a word in a TOML file is the text it spells; a number whose spelling is lost asks for quotes."""
    path = tmp_path / "run.toml"
    path.write_text("name = 2026-11-25\n[data]\ntrain = true\nsystem = 07:32:00\ncolumns = {prompt = 5}\n")
    config = load_config([str(path)])
    assert (config.name, config.data.train, config.data.system) == ("2026-11-25", "true", "07:32:00")
    assert config.data.columns == {"prompt": "5"}
    path.write_text("[data]\ntrain = 1e5\n")
    with pytest.raises(ValueError, match=r"data\.train holds text, got the number 100000\.0; put it in quotes"):
        load_config([str(path)])


def test_argument_that_is_no_text_is_one_line() -> None:
    """A path in another encoding cannot go into the run's record, and is refused before anything is written."""
    with pytest.raises(ValueError, match=r"data\.train=\\udcff\.jsonl' is not text in UTF-8"):
        load_config(["data.train=\udcff.jsonl"])


def test_toml_round_trip(tmp_path: Path) -> None:
    """What is written reads back to the same values, awkward text and open tables included."""
    config = load_config(
        [
            'data.system="say \\"hi\\"\\n\\tC:\\\\dir — ü \\u001b[0m \\u007f"',
            'rollout.stop=["\\n", "###"]',
            "data.chat_template_kwargs.enable_thinking=false",
            "data.columns.prompt=a.b",
            "data.task.max_ops=3",
            "train.betas=[0.5,0.25]",
            "train.lr=1e-06",
            "method.demo_gamma=0.3",
            "method.advantage_std=true",
            "model.tiny.tie_embeddings=false",
        ]
    )
    text = to_toml(config)
    assert load_config_text(text) == config
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    assert load_config([str(path)]) == config
    assert load_config_text(to_toml(Config())) == Config()
    assert "max_ops" in tomllib.loads(text)["data"]["task"]


def test_changed_keys() -> None:
    """Only what differs is listed, under dotted names, with the old and the new value."""
    old, new = load_config(["data.task.max_ops=3"]), load_config(["train.lr=1", "data.task.max_ops=4"])
    assert changed_keys(old, new) == {"train.lr": (1e-3, 1.0), "data.task.max_ops": (3, 4)}
    assert changed_keys(old, old) == {}


def test_help_lists_every_option() -> None:
    """Each option stands in the help with a default, a type and a sentence."""
    lines = help_text().splitlines()
    for option in all_options(Config):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  {option}="))
        assert lines[at].endswith(")")
        assert len(lines[at + 1].strip()) > 10
        assert "None" not in lines[at + 1]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere.toml", "no such configuration file: nowhere.toml"),
        ("train.steps", "expected a .toml file or section.key=value"),
        ("train=5", "train is a section"),
    ],
)
def test_arguments_that_are_not_options(argument: str, message: str) -> None:
    """A word that is neither a file nor an override says what was expected."""
    with pytest.raises(ValueError) as caught:
        load_config([argument])
    assert message in str(caught.value)


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    """A syntax error says where."""
    path = tmp_path / "broken.toml"
    path.write_text("[train\nsteps = 1")
    with pytest.raises(ValueError, match="broken.toml is not valid TOML.*line 1"):
        load_config([str(path)])


@pytest.mark.parametrize(
    ("arguments", "scope"),
    [
        ([], "sequence"),
        (["method.preset=upt"], "sequence"),
        (["method.preset=official"], "token"),
        (["method.preset=official", "method.entropy_scope=batch"], "batch"),
    ],
)
def test_scope_is_the_presets_unless_set(arguments: list[str], scope: str) -> None:
    """The entropy scope in force."""
    assert load_config(arguments).method.scope == scope
