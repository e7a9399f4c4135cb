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


def state_and_parent(pid: int) -> tuple[str, int] | None:
    """Of a process that is alive; a zombie is not."""
    try:
        # the name may hold spaces; after it: state, parent
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else (state, int(parent))


def descendants(root: int) -> set[int]:
    """Live processes that a process started, and those that these did."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {pid: found[1] for pid in pids if (found := state_and_parent(pid))}
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {root}


def marked_processes(mark: str) -> set[int]:
    """Live processes with the mark in their environment, however they were started."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes() and state_and_parent(int(process.name)):
                found.add(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


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
    mark = f"SRFT_TEST_RUN={tmp_path}"
    with subprocess.Popen(
        command(words), cwd=ROOT, env=environment() | dict([mark.split("=")]), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as trainer:  # fmt: skip
        try:
            metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
            while trainer.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
                time.sleep(0.02)
            assert trainer.poll() is None, trainer.stderr.read()
            family = descendants(trainer.pid) | marked_processes(mark) - {trainer.pid}
            # two reward workers, the engine and at least its guard
            assert len(family) >= 4
        finally:
            os.kill(trainer.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (left := {p for p in family | marked_processes(mark) if state_and_parent(p)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
