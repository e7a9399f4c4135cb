"""Bad input ends with exit code 2 and one clear line, before a model is loaded or a run begins."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from srft import prepare, train
from tests.trainer.runs import arguments, read_lines, train_process
from tests.trainer.runs import train as run_small

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "demo": str(a + b)} for a in range(8) for b in range(8)]


def write(path: Path, rows: list[dict[str, object]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def bad_row(index: int, **fields: object) -> Callable[[Path], Path]:
    """A file with one row that is wrong, or lacks the fields given as None."""
    row = {key: value for key, value in {**ROWS[index], **fields}.items() if value is not None}
    return lambda path: write(path, [*ROWS[:index], row, *ROWS[index + 1 :]])


def without(column: str) -> Callable[[Path], Path]:
    return lambda path: write(path, [{k: v for k, v in row.items() if k != column} for row in ROWS])


def good(path: Path) -> Path:
    return write(path, ROWS)


# what the data file holds, further words of the command line, and what the line must say
CASES: dict[str, tuple[Callable[[Path], Path], list[str], list[str]]] = {
    "unknown-key": (good, ["train.prompt_per_step=4"], ["unknown option train.prompt_per_step;",
                                                        "did you mean train.prompts_per_step?"]),
    "key-of-another-section": (good, ["steps=4"], ["unknown option steps", "did you mean train.steps?"]),
    "wrong-type": (good, ["train.lr=fast"], ["train.lr", "'fast'"]),
    "out-of-range": (good, ["rollout.temperature=-1"], ["rollout.temperature", "greater than 0", "-1"]),
    "section-as-value": (good, ["train=4"], ["train is a section", "train.steps"]),
    "unknown-method": (good, ["method.name=ppo"], ["method.name", " srft, ", "or path/to/file.py, got 'ppo'"]),
    "no-such-toml": (good, ["absent.toml"], ["no such configuration file: absent.toml"]),
    "not-an-option": (good, ["fast"], ["expected a .toml file or section.key=value, got 'fast'"]),
    "no-columns": (without("prompt"), [], ["has no column 'prompt' for the prompt", "columns present: answer, demo"]),
    "no-answers": (without("answer"), [], ["has no column 'answer' for the answer", "data.columns.answer="]),
    "no-demos": (without("demo"), [], ["has no column 'demo' for the demo", "data.columns.demo="]),
    "wrong-column": (good, ["data.columns.demo=demos"], ["has no column 'demos'", "nearest: 'demo'"]),
    "empty": (lambda path: write(path, []), [], ["line 1: no rows, the file is empty"]),
    "truncated": (lambda path: write(path, ROWS[:40], '{"prompt": "1+'), [], ["line 41", "is it truncated?"]),
    "line-not-json": (lambda path: write(path, ROWS[:40], "oops\n{}\n"), [], ["line 41: not valid JSON"]),
    "row-without-demo": (bad_row(5, demo=None), [], ["line 6", "no demonstration in column 'demo'"]),
    "row-without-answer": (bad_row(5, answer=""), [], ["line 6", "no answer in column 'answer'"]),
    "demo-without-answer": (bad_row(5, demo="no idea"), [], ["1 of 58 demonstrations", "rows.jsonl:5",
                                                             "data.bad_demos=skip"]),
    "prompt-too-long": (bad_row(5, prompt="9" * 33), [], ["1 of 58 examples have a prompt over 32 tokens (longest 33)",
                                                          "data.overlong=skip"]),
    "demo-too-long": (bad_row(5, demo="5" * 32, answer="5" * 32), [], ["demonstration over 32 (longest 33)"]),
    "all-held-out-in-training": (good, ["data.eval={data}"], ["every held-out problem is also in", "set data.eval"]),
    "indivisible-batch": (good, ["train.updates_per_step=3"], ["train.prompts_per_step=4", "3 equal updates"]),
    "batch-over-data": (good, ["train.prompts_per_step=60"], ["gives only 58 usable prompts"]),
    "budget-under-a-sequence": (good, ["train.tokens_per_microbatch=63"], ["cannot hold one sequence", "64 tokens"]),
    "grpo-alone": (good, ["method.name=grpo", "train.rollouts_per_prompt=1"], ["must be at least 2"]),
    "no-reward-file": (good, ["reward.kind=absent.py:score"], ["absent.py"]),
    "no-reward-function": (good, ["reward.kind={folder}/reward.py:absent"], ["absent", "reward.py"]),
    "reward-that-fails": (good, ["reward.kind={folder}/broken.py:score"], ["cannot be loaded", "NameError"]),
    "unknown-reward": (good, ["reward.kind=exat"], ["'exat'", "exact"]),
    "no-data-file": (good, ["data.train={folder}/absent.jsonl"], ["no such data file", "absent.jsonl"]),
    "unknown-format": (good, ["data.train={folder}/reward.py"], ["cannot tell the format of"]),
    "no-eval-file": (good, ["data.eval={folder}/absent.jsonl"], ["no such data file", "absent.jsonl"]),
    "unknown-task": (good, ["data.train=chian"], ["unknown data source 'chian'", "'chain'"]),
    "no-tokenizer": (good, ["model.tokenizer={folder}/absent"], ["cannot load a tokenizer from"]),
}  # fmt: skip


def words_for(case: str, folder: Path) -> list[str]:
    make, more, _ = CASES[case]
    (folder / "reward.py").write_text("def score(completion, answer, row):\n    return 1.0\n")
    (folder / "broken.py").write_text("undefined\n")
    data = make(folder / "rows.jsonl")
    words = [word.format(data=data, folder=folder) for word in more]
    return [*arguments(folder, data__train=data, data__limit=len(ROWS)), *words]


def check_line(stderr: str, expected: list[str]) -> None:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for part in expected:
        assert part in lines[0]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line that names what is wrong, no model and no run folder."""

    def no_model(*_args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(prepare, "load_policy", no_model)
    monkeypatch.setattr(sys, "argv", ["srft.train", *words_for(case, tmp_path)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2
    check_line(capfd.readouterr().err, CASES[case][2])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", ["demo-without-answer", "reward-that-fails"])
def test_bad_input_ends_the_process(case: str, tmp_path: Path) -> None:
    """The same through the command line: nothing but that line reaches stderr, libraries included."""
    done = train_process(words_for(case, tmp_path))
    assert done.returncode == 2
    check_line(done.stderr, CASES[case][2])
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_unknown_reasoning_gym_task(tmp_path: Path) -> None:
    """A task that reasoning-gym does not have names the nearest that it has."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="no task 'chain_sun'; nearest: chain_sum"):
        run_small(tmp_path, data__train="reasoning_gym:chain_sun")


def test_every_wrong_option_is_named(tmp_path: Path) -> None:
    """Two wrong options are two lines, so that one attempt shows both."""
    with pytest.raises(ValueError) as caught:
        run_small(tmp_path, train__lr=-1, train__steps=0)
    assert sorted(line.partition(":")[0] for line in str(caught.value).splitlines()) == ["train.lr", "train.steps"]


@pytest.mark.parametrize(
    ("case", "option"),
    [("prompt-too-long", "data.overlong=skip"), ("demo-too-long", "data.overlong=skip"),
     ("demo-without-answer", "data.bad_demos=skip")],
    ids=["prompt", "demo", "answer"],
)  # fmt: skip
def test_skipped_rows_are_counted(case: str, option: str, tmp_path: Path) -> None:
    """Rows that the user allows to be skipped are left out and said so in the run's record."""
    train.fit(train.load_config([*words_for(case, tmp_path), option, "train.prompts_per_step=57"]))
    run = tmp_path / "runs" / "run"
    said = " ".join(json.loads((run / "run.json").read_text())["said"])
    assert "57 prompts" in said
    assert ("1 training rows skipped as too long" in said) != ("1 rows skipped whose demonstration" in said)
    assert "rows.jsonl:5" not in {sample["id"] for sample in read_lines(run / "samples.jsonl")}


def test_demonstrations_may_be_kept_unchecked(tmp_path: Path) -> None:
    """data.bad_demos=keep trains on them; the verifier still gives them their reward."""
    words = [*words_for("demo-without-answer", tmp_path), "data.bad_demos=keep", "train.prompts_per_step=58"]
    train.fit(train.load_config(words))
    row = read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")[1]
    assert row["reward/demo"] == pytest.approx(57 / 58)

