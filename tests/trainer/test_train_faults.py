"""Whole runs on two ranks in which something ends, hangs or fails: what is said, what is lost, that nothing is left."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from srft.policy.checkpoint import whole_checkpoint
from tests.trainer.processes import descendants, marked_processes, state_and_parent
from tests.trainer.runs import ROOT, arguments, assert_same_run, command, environment, read_lines, train_forked

RUN = {"train__ranks": 2, "train__save_every": 3, "train__eval_every": 4}
# of rank 1 alone: what it does once it is told to
REWARD = """
import os, pathlib, time

def reward(completion, answer, row):
    told = (pathlib.Path(__file__).parent / "now").exists() and os.environ["RANK"] == "1"
    if told and {hangs}:
        time.sleep(600)
    return float("wrong") if told else 1.0
"""


class Running:
    """A run on two ranks, as a user starts it."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        self.metrics = folder / "runs" / "run" / "metrics.jsonl"

    def rows(self) -> int:
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def wait_for_rows(self, count: int) -> None:
        while self.process.poll() is None and self.rows() < count:
            time.sleep(0.02)
        assert self.process.poll() is None, self.ended()[1]

    def rank(self, number: int) -> int:
        """Process id of a rank: the launcher's only children."""
        (found,) = [
            pid for pid in descendants(self.process.pid)
            if (state_and_parent(pid) or (0, 0))[1] == self.process.pid
            and f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ]  # fmt: skip
        return found

    def ended(self, within: float = 120) -> tuple[int, str]:
        """Its status and what it wrote to stderr; nothing of it is left by then."""
        _, said = self.process.communicate(timeout=within)
        assert not marked_processes(f"SRFT_TEST_RUN={self.folder}")
        return self.process.returncode, said


@contextmanager
def running(folder: Path, **changes: object) -> Iterator[Running]:
    words = arguments(folder, **RUN | changes)
    env = environment() | {"SRFT_TEST_RUN": str(folder)}
    with subprocess.Popen(
        command(words), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Running(folder, process)
        finally:
            process.kill()


def test_ranks_that_are_stopped_and_killed_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGTERM to the launcher, then SIGKILL to a rank: saved by both, ended with it, and the same bits in the end."""
    with running(tmp_path, train__steps=10000) as run:
        run.wait_for_rows(2)
        run.process.terminate()
        status, said = run.ended()
        done = run.rows() - 1
    newest, notes = whole_checkpoint(tmp_path / "runs" / "run")
    assert status == 143
    assert newest is not None and newest.name == f"step_{done:06d}" and not notes
    assert said.splitlines() == [
        "SIGTERM: stopping where the run can go on from; a second signal ends it at once",
        f"stopped by SIGTERM; {newest} is complete, and name=run train.resume=true goes on from it",
    ]
    with running(tmp_path, train__steps=10000, train__resume=True) as run:
        run.wait_for_rows(done + 3)
        os.kill(run.rank(0), signal.SIGKILL)
        status, said = run.ended(within=30)
        assert status == 137
        (line,) = said.splitlines()  # the other rank misses it in many
        assert line.startswith("rank 0 of 2 ended by SIGKILL (")
    steps = run.rows() + 1
    for folder, resume in ((tmp_path, True), (tmp_path / "undisturbed", False)):
        finished = train_forked(arguments(folder, **RUN, train__steps=steps, train__resume=resume), ranks=2)
        assert finished.returncode == 0, finished.stderr
    run_dir, undisturbed = (folder / "runs" / "run" for folder in (tmp_path, tmp_path / "undisturbed"))
    assert [row["step"] for row in read_lines(run_dir / "metrics.jsonl")] == list(range(steps + 1))
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "fails"])
def test_rank_that_others_wait_for_is_named(hangs: bool, tmp_path: Path) -> None:
    """One hangs in a reward until the deadline of collectives, or ends with an error, which does not take as long.

    A checkpoint is being written all the while.
    """
    (tmp_path / "reward.py").write_text(REWARD.format(hangs=hangs))
    deadline = {"reward__deadline_s": 600, "train__collective_deadline_s": 20 if hangs else 1800}
    reward = {"reward__kind": f"{tmp_path}/reward.py:reward", "train__steps": 10000, "train__save_every": 1}
    with running(tmp_path, **reward, **deadline) as run:
        run.wait_for_rows(2)
        (tmp_path / "now").touch()
        status, said = run.ended()
    assert status == 2
    if hangs:
        assert "did not come within train.collective_deadline_s=20 s: rank 1, last at 'step " in said
        assert ", reward'" in said
    else:
        assert "[rank 1] error: reward " in said and "failed on all of the first" in said
    assert "Traceback" not in said


def test_disk_that_is_full_and_kill_in_mid_checkpoint_cost_that_checkpoint(tmp_path: Path) -> None:
    """One error for both ranks; then SIGKILL to all while one is half written, and the run goes on without a gap."""
    run_dir = tmp_path / "runs" / "run"
    checkpoints = run_dir / "checkpoints"
    steps = {"train__steps": 10000, "train__save_every": 1}
    with running(tmp_path, **steps) as run:
        run.wait_for_rows(3)
        resource.prlimit(run.rank(1), resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        status, said = run.ended()
    newest, notes = whole_checkpoint(run_dir)
    assert status == 2 and newest is not None and not notes
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert line.startswith(f"error: cannot write {checkpoints}/step_") and "File too large; " in line
    assert line.endswith(f"{newest} is complete, and name=run train.resume=true goes on from it")
    assert not list(checkpoints.glob(".step_*"))
    with running(tmp_path, **steps, train__resume=True) as run:
        run.wait_for_rows(int(newest.name[5:]) + 2)
        everybody = [run.process.pid, *descendants(run.process.pid)]
        while run.process.poll() is None and not list(checkpoints.glob(".step_*.partial/optimizer.safetensors")):
            pass
        for pid in everybody:
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
    assert list(checkpoints.glob(".step_*.partial"))
    newest, notes = whole_checkpoint(run_dir)
    assert newest is not None and not notes
    # the step whose checkpoint it was, and the one that was made meanwhile
    done = run.rows() - 1
    assert done - int(newest.name[5:]) <= 2
    rest = RUN | steps | {"train__steps": done + 1}
    finished = train_forked(arguments(tmp_path, **rest, train__resume=True), ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert [row["step"] for row in read_lines(run_dir / "metrics.jsonl")] == list(range(done + 2))
    assert not list(checkpoints.glob(".step_*"))
