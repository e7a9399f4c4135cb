"""A run that is told to end stops where its state is whole, saves it, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from srft.policy.checkpoint import whole_checkpoint
from srft.policy.manifest import damage
from srft.rewards.pool import RewardPool, RewardResult
from srft.stop import Stopped, StopSignals
from tests.trainer.processes import catches, marked_processes, state_and_parent
from tests.trainer.runs import (
    ROOT,
    arguments,
    assert_same_run,
    command,
    during_call,
    environment,
    read_lines,
    train,
)

# two updates a step, so that a signal can come when the weights have moved and the step is not over
RUN = {
    "train__steps": 4, "train__save_every": 3, "train__eval_every": 2, "train__keep_checkpoints": 2,
    "train__updates_per_step": 2, "train__lr_warmup_steps": 3, "model__warm_start__max_steps": 2,
    "model__warm_start__batch_size": 8,
}  # fmt: skip
# sessions of one run: at the how-manieth call of what the signal comes, and the step that is saved then
SESSIONS = [
    ("srft.prepare.make_prompts", 1, 0),
    ("srft.warm_start.update", 2, 0),
    ("srft.prepare.start_engine", 1, 0),
    ("srft.sync.WeightSync.push", 1, 0),
    ("srft.train.evaluate", 1, 0),
    ("srft.record.log.RunLog.metrics", 1, 0),
    ("srft.rollouts.roll_out", 1, 0),
    ("srft.rollouts.judge", 1, 0),
    # the gradient of the first update is there, and abandoned; at that of the second the weights have moved
    ("torch.nn.utils.clip_grad_norm_", 1, 0),
    ("torch.nn.utils.clip_grad_norm_", 2, 1),
    # before the evaluation of step 2, then in it
    ("srft.sync.WeightSync.push", 2, 2),
    ("srft.train.evaluate", 1, 2),
    ("srft.policy.checkpoint.Checkpoints.save", 1, 3),
    ("srft.train.evaluate", 1, 4),
    ("srft.train.export_policy", 1, 4),
    ("srft.record.log.RunLog.finish", 1, 4),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one piece."""
    return train(tmp_path_factory.mktemp("uninterrupted"), **RUN)


@contextmanager
def terminated() -> Iterator[None]:
    """Begin with SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)
    yield


def signal_at(patch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """Let the ``call``-th call of a function begin with SIGTERM to this process."""
    during_call(patch, where, call, terminated)


def test_run_stopped_at_every_kind_of_moment_ends_in_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    """Start-up, rollout, reward, gradient, between two updates, sync, evaluation, export: each time it goes on."""
    run = tmp_path / "runs" / "run"
    for where, call, step in SESSIONS:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, where, call)
            with pytest.raises(Stopped, match="stopped by SIGTERM"):
                train(tmp_path, **RUN, train__resume=True)
        newest, notes = whole_checkpoint(run)
        assert not notes
        assert (0 if newest is None else int(newest.name.removeprefix("step_"))) == step, where
    train(tmp_path, **RUN, train__resume=True)
    assert_same_run(run, uninterrupted)
    assert not list(run.glob(".*.partial")) and not list((run / "checkpoints").glob(".*"))


# a run in small: what it prints says how far it came
MINIATURE = """
import sys, time
from srft.rewards.pool import RewardPool, RewardResult
from srft.stop import Stopped, StopSignals, leave_at_once

leave_at_once()
with StopSignals() as stop:
    try:
        if "held" in sys.argv:
            stop.hold()
        print("running", flush=True)
        time.sleep(float(sys.argv[1]))
        stop.release()
    except Stopped as stopped:
        print("saving", flush=True)
        time.sleep(20)
"""


def miniature(*words: object, ignored: int | None = None) -> subprocess.Popen[str]:
    def set_signals() -> None:
        # what is ignored is handed on: SIGHUP by nohup, SIGINT by a script to what it starts in the background
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    started = subprocess.Popen(
        [sys.executable, "-c", MINIATURE, *map(str, words)],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=set_signals,
    )  # fmt: skip
    assert started.stdout is not None and started.stdout.readline() == "running\n"
    return started


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("held", [True, False])
def test_second_signal_ends_at_once(first: int, second: int, held: bool) -> None:
    """The first is announced, and obeyed unless it has to wait; the second is obeyed in any case."""
    with miniature(20, *["held"] * held) as process:
        process.send_signal(first)
        assert process.stderr is not None and "a second signal ends it at once" in process.stderr.readline()
        if not held:
            assert process.stdout is not None and process.stdout.readline() == "saving\n"
        time.sleep(0.15)
        process.send_signal(second)
        assert process.wait(timeout=5) == 128 + second


def test_signal_that_waits_is_obeyed_at_release() -> None:
    """Held for a moment, the run stops when it is whole again."""
    with miniature(0.3, "held") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_sent_twice_by_one_sender_is_one(number: int) -> None:
    """`timeout` signals a process and then its group, a closing terminal too: the run still saves itself."""
    with miniature(20) as process:
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.02)
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
        time.sleep(0.2)
        assert process.poll() is None
        process.kill()


def test_signal_that_was_ignored_stays_ignored() -> None:
    """Under nohup a closed terminal does not stop the run."""
    with miniature(0.3, ignored=signal.SIGHUP) as process:
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=5) == ("", "")
        assert process.returncode == 0


def test_handlers_are_put_back_and_threads_get_none() -> None:
    """After the block, and in another thread than the main one, signals are what they were."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    found: list[Any] = []

    def enter() -> None:
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == before[:1]


def test_signal_during_the_imports_ends_without_a_traceback() -> None:
    """A command line that is ended before it has read its options says so in one line."""
    with subprocess.Popen(
        command(["absent.toml"]), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not catches(process.pid, signal.SIGTERM):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None and process.stderr.read() == "ended by SIGTERM\n"
    assert process.returncode == 143


# hangs once it is told to
SLOW_REWARD = """
import pathlib, time

def slow(completion, answer, row):
    here = pathlib.Path(__file__).parent
    if (here / "hang").exists():
        (here / "hangs").touch()
        time.sleep(60)
    return 1.0
"""


def test_job_that_is_told_to_end(tmp_path: Path) -> None:
    """SIGTERM to every process of a run, in the middle of a reward: exit code 143, saved, nothing left; it goes on."""
    (tmp_path / "reward.py").write_text(SLOW_REWARD)
    changes = {"reward__kind": f"{tmp_path}/reward.py:slow", "reward__deadline_s": 60, "train__save_every": 100}
    words = arguments(tmp_path, **changes, train__steps=10000)
    mark = f"SRFT_TEST_RUN={tmp_path}"
    run = tmp_path / "runs" / "run"
    with subprocess.Popen(
        command(words), cwd=ROOT, env=environment() | dict([mark.split("=")]), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as trainer:  # fmt: skip
        metrics = run / "metrics.jsonl"
        while trainer.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
            time.sleep(0.02)
        (tmp_path / "hang").touch()
        while trainer.poll() is None and not (tmp_path / "hangs").exists():
            time.sleep(0.02)
        family = marked_processes(mark)
        assert len(family) >= 2  # the trainer and a reward worker
        for pid in family - {trainer.pid}:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        trainer.send_signal(signal.SIGTERM)
        assert trainer.stderr is not None
        announced, ended = trainer.stderr.read().splitlines()
        assert trainer.wait(timeout=20) == 143
    assert announced.startswith("SIGTERM: stopping")
    done = len(read_lines(metrics)) - 1
    newest = run / "checkpoints" / f"step_{done:06d}"
    assert ended == f"stopped by SIGTERM; {newest} is complete, and name=run train.resume=true goes on from it"
    assert damage(newest) is None
    assert not {pid for pid in family | marked_processes(mark) if state_and_parent(pid)}
    (tmp_path / "hang").unlink()
    train(tmp_path, **changes, train__steps=done + 1, train__resume=True)
    assert [row["step"] for row in read_lines(metrics)] == list(range(done + 2))


# both kinds of children, each told to end
TERMINATING_REWARD = """
import multiprocessing, subprocess, time

def hang(started):
    started.set()
    time.sleep(60)

def terminate(completion, answer, row):
    program = subprocess.Popen(["sleep", "60"])
    context = multiprocessing.get_context("fork")
    started = context.Event()
    fork = context.Process(target=hang, args=(started,))
    fork.start()
    started.wait()
    program.terminate()
    fork.terminate()
    fork.join(5)
    return float(program.wait(5) == -15 and fork.exitcode == -15)
"""


def test_a_verifier_may_end_what_it_started(tmp_path: Path) -> None:
    """The reward worker passes over signals, the programs and forks of its verifier do not."""
    (tmp_path / "reward.py").write_text(TERMINATING_REWARD)
    with RewardPool(f"{tmp_path}/reward.py:terminate", 1, 30.0) as pool:
        assert pool.score([("", "", {})]) == [RewardResult(1.0, "ok")]
