"""Whole runs with rollouts by vLLM: every step's samples come from that step's weights, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.trainer.runs import ROOT, arguments, command, environment, read_lines, train

pytestmark = pytest.mark.vllm

# vLLM's attention on CPU takes heads of 32 and more
RUN = {
    "engine__kind": "vllm", "train__steps": 4, "train__save_every": 4, "train__eval_every": 4, "train__lr": 0.01,
    "model__tiny__hidden_size": 64, "model__tiny__num_layers": 2, "train__rollouts_per_prompt": 2,
}  # fmt: skip


def processes_in(folder: Path) -> list[int]:
    """Processes, zombies aside, whose command line, environment or open files name the folder of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            words = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if str(folder).encode() in words and int(process.name) != os.getpid():
            found.append(int(process.name))
    return sorted(found)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_step_samples_from_its_own_weights(tied: bool, tmp_path: Path) -> None:
    """Four steps at a learning rate that moves the weights: engine and trainer agree to 1e-4 nats after each."""
    run = train(tmp_path, **RUN, model__tiny__tie_embeddings=tied)
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["canary/max_abs_diff"] <= 1e-4 for row in rows)
    assert all(row["mismatch/max"] <= 1e-3 for row in rows[1:])
    assert rows[4]["loss/total"] != rows[1]["loss/total"]
    assert (run / "engine" / "vllm.log").is_file()
    assert rows[-1]["eval/accuracy"] >= 0


def test_killed_trainer_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL in mid-run ends the engine, whatever it started, and the reward workers within 10 seconds."""
    words = arguments(tmp_path, **RUN | {"train__steps": 10000}, reward__workers=2)
    # every process of the run inherits the mark, the engine's own children included
    marked = environment() | {"SRFT_TEST_RUN": str(tmp_path)}
    with subprocess.Popen(
        command(words), cwd=ROOT, env=marked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as trainer:
        try:
            metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
            while trainer.poll() is None and not (metrics.exists() and len(read_lines(metrics)) >= 3):
                time.sleep(0.02)
            assert trainer.poll() is None, trainer.stderr.read()
            # the trainer, two workers, the engine and at least its guard
            assert len(processes_in(tmp_path)) >= 5
        finally:
            os.kill(trainer.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := processes_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
