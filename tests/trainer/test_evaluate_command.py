"""python -m srft.evaluate on a run: end to end, killed and resumed, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from srft import evaluate as command
from srft.evaluation import record
from srft.evaluation.subject import find_subject
from srft.policy.model import build_tiny, byte_tokenizer
from tests.trainer.fake_server import serving
from tests.trainer.runs import read_lines, small_config, train

ASKED = ["chain", "--samples", "4", "--k", "2", "--limit", "10", "--batch", "16", "--max-new-tokens", "6"]
FILES = ("chain.jsonl", "table.md")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    return train(tmp_path_factory.mktemp("run"), train__steps=1, train__page=False)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The order of sums depends on it, and a fork survives no other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own, and return how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(line: int, words: list[str]) -> None:
    """Evaluate, and be killed in the middle of the so-manieth line that is written."""
    write, count = record.write_json_line, 0

    def torn(file: FileIO, row: dict[str, Any], *, sync: bool) -> None:
        nonlocal count
        count += 1
        if count == line:
            file.write(record.json_line(row)[:40].encode())
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, row, sync=sync)

    record.write_json_line = torn
    command.main(words)


def test_killed_twice_and_resumed_is_uninterrupted(run: Path, tmp_path: Path) -> None:
    """The same answers, byte for byte, and the same table, though each kill tears a line and halves a batch."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert in_a_child(lambda: command.main([str(run), *ASKED, "--out", str(whole)])) == 0
    words = [str(run), *ASKED, "--out", str(broken)]
    assert in_a_child(lambda: killed_at(2, words)) == -signal.SIGKILL
    assert in_a_child(lambda: killed_at(5, words)) == -signal.SIGKILL
    assert (broken / "chain.jsonl").read_bytes().count(b"\n") == 5
    assert in_a_child(lambda: command.main(words)) == 0
    for name in FILES:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    rows = read_lines(whole / "chain.jsonl")
    assert [row["id"] for row in rows] == [f"chain:{index}" for index in range(10)]
    texts = {answer["text"] for row in rows for answer in row["answers"]}
    assert len(texts) > 30
    assert "| chain | 10 of 10 | avg@4 |" in (whole / "table.md").read_text()


def test_what_is_there_is_not_made_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call makes table and page from it; another set joins them, and a larger limit goes on."""
    monkeypatch.chdir(tmp_path)
    words = [str(run), "chain", "--greedy", "--max-new-tokens", "4", "--out", "out"]
    command.main([*words, "--limit", "3"])
    coming = "chain: 3 answers to draw, of at most 4 tokens each, up to 512 together"
    assert capsys.readouterr().err.startswith(coming)
    first = (tmp_path / "out" / "chain.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_prepared", None)
        command.main([*words, "--limit", "3"])
    assert "to draw" not in capsys.readouterr().err
    Path("math500.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    command.main([str(run), "math500=math500.jsonl", *words[2:], "--instruction", ""])
    command.main([*words, "--limit", "5"])
    grown = (tmp_path / "out" / "chain.jsonl").read_bytes()
    assert grown.startswith(first) and grown.count(b"\n") == 5
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| chain | 5 of 5 | pass@1 |" in table and "| MATH500 | 1 of 1 | pass@1 |" in table
    assert "MATH500 is not as in the paper: 0.0 for 0.6 of temperature; 4 for 8192 of max_new_tokens." in table


def test_greedy_is_what_the_run_measured(run: Path, tmp_path: Path) -> None:
    """The accuracy of the last row of the run, on its own held-out problems and tokens."""
    command.main([str(run), "chain", "--greedy", "--max-new-tokens", "32", "--limit", "8", "--out", str(tmp_path)])
    rows = read_lines(tmp_path / "chain.jsonl")
    right = sum(row["tally"]["right"] for row in rows) / len(rows)
    cut = sum(row["tally"]["cut"] for row in rows) / len(rows)
    last = read_lines(run / "metrics.jsonl")[-1]
    assert (right, cut) == (last["eval/accuracy"], last["eval/truncated"])


def test_servers_answer_alike(run: Path, tmp_path: Path) -> None:
    """One that was started with other weights is given those of the run."""
    config = small_config(tmp_path)
    other = build_tiny(config.model, byte_tokenizer(), config.longest_sequence, 5)
    words = [str(run), "chain", "--greedy", "--max-new-tokens", "8", "--limit", "3"]
    command.main([*words, "--out", str(tmp_path / "here")])
    with serving(other, max_model_len=512) as (server,):
        urls = ["engine.kind=http", f"engine.urls={server.url}", f"engine.weights_dir={tmp_path / 'weights'}"]
        command.main([*words, *urls, "--out", str(tmp_path / "there")])
        assert len(server.asked) == 3 and server.loads == 1
    assert read_lines(tmp_path / "there" / "chain.jsonl") == read_lines(tmp_path / "here" / "chain.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chain", "--samples", "2"], "chain.samples was 1, now 2"),
        (["chain", "--seed", "1"], "seed was 0, now 1"),
        (["chain", "math"], "no set is called 'math'; did you mean 'math500'"),
        (["rollout.stop=x"], "give a set to evaluate on"),
        (["chain", "--greedy", "--samples", "2"], "--greedy is temperature 0 and one answer"),
        (["chain", "--temperature", "0"], "for 0 give --greedy"),
        (["chain", "--max-new-tokens", "9999"], "lower --max-new-tokens"),
        (["chain", "--samples", "2", "--k", "2,3"], "--k 3 is more than the answers to a problem, 2; raise --samples"),
        (["chain", "chain"], "two of the sets have one name"),
        (["chain", "engine.kin=hf"], "unknown option engine.kin"),
    ],
)
def test_what_a_user_can_get_wrong(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """One line, exit status 2, and nothing that was there is touched."""
    out = tmp_path / "out"
    out.mkdir()
    record.keep_settings(out, {"seed": 0}, {"chain": {"asked": {"samples": 1}}}, {})
    (out / "chain.jsonl").touch()
    before = (out / record.SETTINGS).read_bytes()
    with pytest.raises(SystemExit) as left:
        command.main([str(run), *words, "--out", str(out)])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert (out / record.SETTINGS).read_bytes() == before


def test_runs_checkpoints_and_models_are_found(run: Path, tmp_path: Path) -> None:
    """With the options of their run; other weights under the same name are other ones."""
    of_run = find_subject(str(run), ["rollout.stop=;"])
    assert (of_run.label, of_run.out, of_run.config.rollout.stop) == ("run", run / "evaluation", [";"])
    assert of_run.config.data.task == {"max_ops": 3} and of_run.positions == 64
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = find_subject(str(checkpoint), [])
    assert (step.label, step.out) == (f"run, {checkpoint.name}", run / f"evaluation-{checkpoint.name}")
    assert step.config.data.task == {"max_ops": 3}
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    alone = find_subject(str(model), [])
    assert alone.weights == of_run.weights and alone.config.data.task == {}
    assert alone.out == Path("runs/evaluation/model")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert find_subject(str(model), []).weights != of_run.weights
    with pytest.raises(ValueError, match="holds no model"):
        find_subject(str(run / "checkpoints"), [])
    with pytest.raises(ValueError, match="no such folder"):
        find_subject(str(tmp_path / "none"), [])
