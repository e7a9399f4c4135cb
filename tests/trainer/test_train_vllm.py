"""Whole runs with rollouts by vLLM: every step's samples come from that step's weights, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from srft import evaluate
from srft.policy.checkpoint import whole_checkpoint
from tests.trainer.processes import descendants, marked_processes, state_and_parent
from tests.trainer.runs import (
    ROOT,
    arguments,
    command,
    comparable_rows,
    during_call,
    environment,
    read_lines,
    train,
    weights,
)

pytestmark = pytest.mark.vllm

# vLLM's attention on CPU takes heads of 32 and more
RUN = {
    "engine__kind": "vllm", "train__steps": 4, "train__save_every": 4, "train__eval_every": 4, "train__lr": 0.01,
    "model__tiny__hidden_size": 64, "model__tiny__num_layers": 2, "train__rollouts_per_prompt": 2,
}  # fmt: skip
UNTIED = RUN | {"model__tiny__tie_embeddings": False, "rollout__max_lag": 1}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    return train(tmp_path_factory.mktemp("untied"), **UNTIED)


def test_every_step_samples_from_the_weights_it_should(untied: Path) -> None:
    """Four steps at a learning rate that moves the weights: engine and trainer agree to 1e-4 nats after each.

    The rollouts of the first step are of the weights that it trains, those of each later one a step old.
    """
    rows = check(untied)
    assert [row["lag/max"] for row in rows[1:]] == [0, 1, 1, 1]
    assert rows[1]["lag/is_max"] == pytest.approx(1, abs=1e-3)
    assert all(row["lag/is_max"] > 1.01 for row in rows[2:])


def test_a_model_is_evaluated_by_vllm(untied: Path, tmp_path: Path) -> None:
    """Its most likely answers are those of the engine in this process, but for one that a last bit may have turned."""
    said = {}
    for kind in ("vllm", "hf"):
        words = ["chain", "--greedy", "--limit", "8", "--max-new-tokens", "32", "--out", str(tmp_path / kind)]
        evaluate.main([str(untied), *words, f"engine.kind={kind}"])
        rows = read_lines(tmp_path / kind / "chain.jsonl")
        said[kind] = [(row["answers"][0]["text"], row["answers"][0]["finish"]) for row in rows]
    assert sum(one == other for one, other in zip(said["vllm"], said["hf"], strict=True)) >= 7
    assert len(set(said["vllm"])) > 2
    assert json.loads((tmp_path / "vllm" / "evaluation.json").read_text())["asked"]["engine"] == "vllm"
    assert not descendants(os.getpid())


def test_texts_stop_and_a_tied_model_samples_from_its_own_weights(tmp_path: Path) -> None:
    """Where texts end completions, each does so at its first such text."""
    run = train(tmp_path, **RUN, rollout__stop='["0", "1", "2", ";", "é"]', model__tiny__tie_embeddings=True)
    assert all(row["mismatch/max"] <= 1e-3 for row in check(run)[1:])
    said = [s["completion"] for s in read_lines(run / "samples.jsonl") if not s["demo"]]
    ends = [index for text in said for index, sign in enumerate(reversed(text)) if sign in "012;é"]
    assert ends and not any(ends)


def check(run: Path) -> list[dict[str, Any]]:
    """What every such run must show; its rows."""
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["canary/max_abs_diff"] <= 1e-4 for row in rows)
    assert rows[4]["loss/total"] != rows[1]["loss/total"]
    assert (run / "engine" / "vllm.log").is_file()
    assert rows[-1]["eval/accuracy"] >= 0
    return rows


@contextmanager
def killed_in_it() -> Iterator[None]:
    """The engine does not come to an end of what it is asked now, and is killed."""
    (engine,) = [
        pid for pid in descendants(os.getpid())
        if b"vllm_worker" in Path(f"/proc/{pid}/cmdline").read_bytes() and os.getsid(pid) == pid
    ]  # fmt: skip
    os.kill(engine, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (engine, signal.SIGKILL))
    killer.start()
    yield
    killer.join()


def test_a_run_that_loses_its_engines_learns_the_same(
    untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the batch of step 3 beside training, and in an update, it is replaced, given the weights, asked again.

    Those of the batch are older than the policy, which step 2 moves meanwhile.
    """
    with pytest.MonkeyPatch.context() as patch:
        # the first rollout is step 0's evaluation; the third update gives the second engine what the first had
        during_call(patch, "srft.engine.vllm.VllmEngine.generate", 4, killed_in_it)
        during_call(patch, "srft.engine.vllm.VllmEngine.update_weights", 5, killed_in_it)
        run = train(tmp_path, **UNTIED)
    rows, expected = comparable_rows(run), comparable_rows(untied)
    assert [row.pop("engine/restarts", None) for row in rows] == [None, 0, 1, 2, 2]
    assert [row.pop("engine/restarts", None) for row in expected] == [None, 0, 0, 0, 0]
    assert rows == expected
    assert weights(run) == weights(untied)
    said = capsys.readouterr().err
    assert "vLLM failed in generate: its process died (SIGKILL); it is started again (1 of 3)" in said
    assert "vLLM failed in update: its process died (SIGKILL); it is started again (2 of 3)" in said


def test_ended_trainer_leaves_no_process(tmp_path: Path) -> None:
    """SIGTERM in mid-run, to every process as a scheduler sends it: what was trained is saved, nobody is left.

    That none outlives a trainer that is killed is shown of engines and of reward workers by themselves.
    """
    words = arguments(tmp_path, **RUN | {"train__steps": 10000, "train__save_every": 10000}, reward__workers=2)
    mark = f"SRFT_TEST_RUN={tmp_path}"
    run = tmp_path / "runs" / "run"
    metrics = run / "metrics.jsonl"
    with subprocess.Popen(
        command(words), cwd=ROOT, env=environment() | dict([mark.split("=")]), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as trainer:  # fmt: skip
        try:
            while trainer.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
                time.sleep(0.02)
            assert trainer.poll() is None, trainer.stderr.read()
            family = descendants(trainer.pid) | marked_processes(mark) - {trainer.pid}
            # two reward workers, the engine and at least its guard
            assert len(family) >= 4
            for pid in family:
                os.kill(pid, signal.SIGTERM)
        finally:
            os.kill(trainer.pid, signal.SIGTERM)
        assert trainer.wait(timeout=60) == 143
    deadline = time.monotonic() + 10
    while (left := {p for p in family | marked_processes(mark) if state_and_parent(p)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    newest, notes = whole_checkpoint(run)
    assert newest is not None and not notes
    assert newest.name == f"step_{read_lines(metrics)[-1]['step']:06d}"
