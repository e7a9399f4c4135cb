"""How a method is found: built-in or a file of one's own, its options, and what is refused before work starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from srft.methods import BaseMethod, find_method, method_names
from srft.options import changed_keys, help_text, load_config, load_config_text, to_toml
from tests.trainer.runs import ROOT, arguments, read_lines, train, train_process

OWN = '''
from functools import partial

from srft.methods import BaseMethod, Curves, Line
from srft_kernels import linear_grpo_loss


class Method(BaseMethod):
    """Doubled: twice the likelihood of demonstrations."""

    needs_rollouts = False
    curves = (Curves(name="doubled", title="Doubled", caption="Twice.", ylabel="nats",
                     lines=(Line(key="loss/policy", label="", color="amber"),)),)

    factor: float = 2.0
    """By how much."""
    words: list[str] = []
    """Words."""

    def learn_from(self, group):
        for demo in group.demos:
            demo.advantage = self.factor
        return group.demos

    def loss(self, batch, update):
        return partial(linear_grpo_loss, advantages=batch.advantages, num_tokens=update.totals.demo_tokens)
'''


def write(folder: Path, text: str = OWN) -> Path:
    path = folder / "doubled.py"
    path.write_text(text)
    return path


def test_built_in_methods_are_the_files_of_their_folder() -> None:
    """Nothing has to be registered."""
    files = {path.stem for path in (ROOT / "srft" / "methods").glob("*.py")} - {"__init__"}
    assert set(method_names()) == files >= {"srft", "grpo", "sft"}


@pytest.mark.parametrize("name", method_names())
def test_help_of_each_method(name: str) -> None:
    """Its own options with a default, a type and a sentence, and no other method's."""
    text = help_text(method=name)
    assert f'\n  method.name="{name}"  ({" | ".join(method_names())} | path/to/file.py)\n' in text
    lines = text.splitlines()
    listed = [i for i, line in enumerate(lines) if line.startswith("  method.")]
    assert [lines[i].split("=")[0].strip() for i in listed] == [f"method.{o}" for o in find_method(name).model_fields]
    for i in listed:
        assert lines[i].endswith(")") and len(lines[i + 1].strip()) > 10
    config = load_config([f"method.name={name}"])
    assert type(config.method) is find_method(name)
    assert load_config_text(to_toml(config)) == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method.name=srft", "method.clip_low=0.1"], ["method.clip_low: it belongs to method.name=", "grpo",
                                                       "but method.name is srft"]),
        (["method.preset=upt", "method.name=sft"], ["method.preset: it belongs to method.name=srft"]),
        (["method.name=grpo", "method.clip_lo=0.1"], ["did you mean method.clip_low?"]),
        (["method.name=grop"], ["got 'grop'", "did you mean grpo?"]),
        (["method.name=grpo", "method.clip_low=0"], ["method.clip_low: ", "greater than 0", "got 0"]),
        (["method=grpo"], ["method is a section", "method.name"]),
    ],
)  # fmt: skip
def test_options_that_are_not_the_methods(arguments: list[str], said: list[str]) -> None:
    """One line that says whose option it is, or which was meant."""
    with pytest.raises(ValueError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ["there is no file", "doubled.py"]),
        ("x = 1\n", ["doubled.py has no class Method(srft.methods.BaseMethod)"]),
        ("class Method:\n    pass\n", ["doubled.py has no class Method(srft.methods.BaseMethod)"]),
        ("x = 1\ny = x / 0\n", ["doubled.py:2 raised ZeroDivisionError: division by zero"]),
        ("class Method(\n", ["doubled.py", "raised SyntaxError"]),
        (OWN.replace("def loss", "def lose"), ["class Method of", "lacks loss"]),
    ],
    ids=["absent", "no-method", "another-class", "raises", "syntax", "incomplete"],
)
def test_files_that_are_no_methods(tmp_path: Path, text: str | None, said: list[str]) -> None:
    """One line with the path and what to mend, from the command line too."""
    path = tmp_path / "doubled.py" if text is None else write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        load_config([f"method.name={path}"])
    message = str(caught.value)
    assert message.startswith("method.name: ") and "\n" not in message
    for words in said:
        assert words in message


def test_a_bad_file_ends_the_command_in_one_line(tmp_path: Path) -> None:
    """Before a model is built or a folder made."""
    done = train_process([f"method.name={write(tmp_path, 'y = 1 / 0')}", f"runs_dir={tmp_path / 'runs'}"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: method.name: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_options_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are checked, shown and kept like built-in ones, and the file is found again from any folder."""
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_config(["method.name=doubled.py", "method.factor=3", 'method.words=["many"]'])
    assert config.method.model_dump() == {"name": str(tmp_path / "doubled.py"), "factor": 3.0, "words": ["many"]}
    assert config.method.label == "doubled"
    monkeypatch.chdir("/")
    assert load_config_text(to_toml(config)) == config
    assert "method.factor=2.0  (float)\n      By how much.\n" in help_text(method=str(tmp_path / "doubled.py"))
    with pytest.raises(ValueError, match=r"unknown option method.factr; did you mean method.factor\?"):
        load_config([f"method.name={tmp_path}/doubled.py", "method.factr=3"])
    with pytest.raises(ValueError, match=r"method.factor: Input should be a valid number.*, got 'x'"):
        load_config([f"method.name={tmp_path}/doubled.py", "method.factor=x"])
    other = load_config([f"method.name={tmp_path}/doubled.py", "method.words=[]"])
    assert set(changed_keys(config, other)) == {"method.factor", "method.words"}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """As soon as it changes, and not before."""
    path = str(write(tmp_path))
    first = find_method(path)
    assert find_method(path) is first and issubclass(first, BaseMethod)
    write(tmp_path, OWN.replace("factor: float = 2.0", "factor: float = 25.0"))
    assert find_method(path)(name=path).factor == 25.0


def test_the_readmes_own_method(tmp_path: Path) -> None:
    """The file that the README shows trains as it says, learns from both kinds, and goes on from another folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# switch\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "switch.py").write_text(code)
    reward = tmp_path / "odd.py"
    reward.write_text("def odd(completion, answer, row):\n    return float(len(completion) % 2)\n")
    words = {"reward__kind": f"{reward}:odd", "data__bad_demos": "keep", "train__prompts_per_step": 8}
    name = {"method__name": os.path.relpath(tmp_path / "switch.py", ROOT), "method__solved": 0.5}
    done = train_process(arguments(tmp_path, train__steps=1, **words, **name))
    assert done.returncode == 0, done.stderr
    run = train(tmp_path, train__resume=True, **words, method__name=tmp_path / "switch.py", method__solved=0.5)
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["loss/sft"] > 0 and row["entropy/rollout"] > 0 for row in rows[1:])
    assert f'name = "{tmp_path}/switch.py"' in (run / "config.toml").read_text()
    (tmp_path / "moved.py").write_text(code)
    with pytest.raises(ValueError, match=r"other options: method.name was '.*/switch.py', now '.*/moved.py'"):
        train(tmp_path, train__resume=True, **words, method__name=tmp_path / "moved.py", method__solved=0.5)
    (tmp_path / "switch.py").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: method.name: there is no file .*/switch.py"):
        train(tmp_path, train__resume=True, **words, method__name=tmp_path / "moved.py", method__solved=0.5)
