"""How a method is found: built-in or a file of one's own, its options, and what is refused before work starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from srft.curves import TAKEN
from srft.methods import BaseMethod, find_method, method_names
from srft.options import changed_keys, help_text, load_config, load_config_text, to_toml
from srft.record.folder import run_folder
from srft.report.plots import panels
from srft.train import main
from tests.trainer.runs import ROOT, arguments, read_lines, small_config, train, train_forked, train_process

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

FIGURES = """def figures(self, terms, update):
        return {'own/x': VALUES

    def learn_from"""


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
        ("import sys\nsys.exit()\n", ["doubled.py:2 raised SystemExit"]),
        ("raise RuntimeError('one\\ntwo')\n", ["doubled.py:1 raised RuntimeError: one two;"]),
        (OWN.replace("factor", "loss"), ["has an option loss, which every method has already"]),
        (OWN.replace("needs_rollouts", "needs_rollouts: bool"), ["has an option needs_rollouts", "leave out its type"]),
        (OWN.replace("factor:", "name: int = 3\n    factor:"), ["has an option name"]),
        (OWN.replace("),)),)", "),)))"), ["curves of", "must be a tuple of Curves"]),
        (OWN.replace('name="doubled"', 'name="loss"'), ["has a figure loss, a name that another figure"]),
        (OWN + "    curves = (curves[0], curves[0])\n", ["has a figure doubled, a name that another figure"]),
    ],
    ids=["absent", "no-method", "another-class", "raises", "syntax", "incomplete", "exits", "two-lines", "shadows",
         "annotated", "name", "curves", "figure", "twice"],
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


def test_names_of_figures_that_are_taken() -> None:
    """They are those that a run of any method draws."""
    assert {panel.name for panel in panels()} | {"overview"} == TAKEN
    for name in method_names():
        figures = [figure.name for figure in find_method(name).curves]
        assert not TAKEN & set(figures) and len(set(figures)) == len(figures)


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OWN.replace("factor: float = 2.0", "factor: float = Field(-1.0, ge=0)"), "method.factor: .*, got -1.0"),
        (OWN.replace("factor: float = 2.0", "factor: int = 'many'"), "method.factor: .* valid integer.*, got 'many'"),
        (OWN.replace("factor: float = 2.0", "factor: float"), "^method.factor has no default; set method.factor=…$"),
        (OWN.replace("needs_rollouts = False", "needs_rollouts = needs_demos = False"), "it would learn nothing"),
    ],
    ids=["out-of-range", "another-type", "absent", "needs-nothing"],
)
def test_options_of_a_file_without_a_right_value(tmp_path: Path, text: str, said: str) -> None:
    """A default of the file's is checked as a value from the command line is."""
    path = write(tmp_path, text.replace("from srft.methods", "from pydantic import Field\nfrom srft.methods", 1))
    with pytest.raises(ValueError, match=said):
        load_config([f"method.name={path}"])


@pytest.mark.parametrize(
    ("encoding", "first"), [("utf-8-sig", ""), ("latin-1", "# coding: latin-1")], ids=["bom", "latin-1"]
)
def test_encodings_of_a_file(tmp_path: Path, encoding: str, first: str) -> None:
    """As Python reads a file, and without what the reader's own module imports from the future."""
    text = OWN.replace("By how much.", "How über.") + "\n\ndef f(x: int): ...\nassert f.__annotations__['x'] is int\n"
    path = tmp_path / "doubled.py"
    path.write_text(f"{first}\n{text}", encoding=encoding)
    method = find_method(str(path))
    assert method.model_fields["factor"].description == "How über."


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return group.demos", "pass", "learn_from of method.name=.* must return a list .*, got None"),
        ("return group.demos", "return [0.5]", r"learn_from of .* got \[0.5\]"),
        ("return partial(", "partial(", "loss of method.name=.* must return an op .* got None"),
        ("return partial(linear_grpo_loss, ", "return lambda h, w, **k: (h @ w.T).sum()\n        dict(",
         "loss of .* this one gave Tensor"),
        ("def learn_from", FIGURES.replace("VALUES", "1.0}"), r"figures of .* got 1.0 for own/x; return Figure\(1.0\)"),
        ("def learn_from", FIGURES.replace("VALUES", "Figure(1), 'loss/total': Figure(1)}"),
         "figures of .* has loss/total, a name of what every"),
        ("def learn_from", FIGURES.replace("VALUES", "Figure(1), 'step': Figure(1)}"),
         "figures of .* has step, a name of what every run logs"),
    ],
    ids=["no-list", "no-responses", "no-op", "no-policy-loss", "no-figure", "taken-name", "step"],
)  # fmt: skip
def test_what_a_method_must_return(tmp_path: Path, old: str, new: str, said: str) -> None:
    """One line that names the method of the class, what was expected and what it gave."""
    path = write(tmp_path, OWN.replace(old, new).replace("BaseMethod, Curves", "BaseMethod, Curves, Figure"))
    with pytest.raises(ValueError, match=said) as caught:
        train(tmp_path, method__name=path, train__steps=1)
    assert "\n" not in str(caught.value)


def test_an_error_in_a_method_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ``ValueError`` of its own code, which has no words of ours, comes with file and line."""
    path = write(tmp_path, OWN.replace("        for demo in", "        int('x')\n        for demo in"))
    monkeypatch.setattr("sys.argv", ["train", *arguments(tmp_path, method__name=path)])
    with pytest.raises(SystemExit):
        main()
    line = path.read_text().splitlines().index("        int('x')") + 1
    assert f"error: invalid literal for int() with base 10: 'x'; raised at {path}:{line}" in capsys.readouterr().err


def test_resuming_with_another_text_of_a_method(tmp_path: Path) -> None:
    """Refused, as another run; the text the run was started with lies in its folder, and goes on."""
    path, kept = write(tmp_path), tmp_path / "runs" / "run" / "method.py"
    train(tmp_path, method__name=path, train__steps=1)
    assert kept.read_text() == OWN
    write(tmp_path, OWN.replace("factor: float", "times: float").replace("self.factor", "self.times"))
    with pytest.raises(ValueError, match=f"differs from the file that .* kept as {kept}, or set another name"):
        train(tmp_path, method__name=path, train__resume=True)
    path.write_bytes(kept.read_bytes())
    run = train(tmp_path, method__name=path, train__resume=True)
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1, 2]


def test_resuming_under_another_method(tmp_path: Path) -> None:
    """The refusal names the methods, and none of the options that one has and the other has not."""
    luffy = small_config(tmp_path, method__name="luffy", method__gamma=0.2)
    luffy.run_dir.mkdir(parents=True)
    (luffy.run_dir / "config.toml").write_text(to_toml(luffy))
    chord = small_config(tmp_path, method__name="chord", train__resume=True, train__lr=0.5)
    with pytest.raises(ValueError) as caught, run_folder(chord):
        pass
    said = str(caught.value)
    assert "method.name was 'luffy', now 'chord'" in said and "train.lr was" in said and said.count("method.") == 1


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """As soon as it changes, and not before."""
    path = str(write(tmp_path))
    first = find_method(path)
    assert find_method(path) is first and issubclass(first, BaseMethod)
    write(tmp_path, OWN.replace("factor: float = 2.0", "factor: float = 25.0"))
    assert find_method(path)(name=path).factor == 25.0


def test_the_documented_method(tmp_path: Path) -> None:
    """The file of docs/methods.md trains as it says, learns from both kinds, and goes on from another folder."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# switch\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "switch.py").write_text(code)
    reward = tmp_path / "odd.py"
    reward.write_text("def odd(completion, answer, row):\n    return float(len(completion) % 2)\n")
    words = {"reward__kind": f"{reward}:odd", "data__bad_demos": "keep", "train__prompts_per_step": 8}
    name = {"method__name": os.path.relpath(tmp_path / "switch.py", ROOT), "method__solved": 0.5}
    done = train_forked(arguments(tmp_path, train__steps=1, **words, **name))
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
    with pytest.raises(ValueError, match=r"read: method.name: there is no file .*/switch.py.*; set another name"):
        train(tmp_path, train__resume=True, **words, method__name=tmp_path / "moved.py", method__solved=0.5)
