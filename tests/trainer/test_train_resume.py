"""A run that was stopped, politely or by SIGKILL at any moment, goes on to the very bytes it would have ended with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from srft.policy.checkpoint import whole_checkpoint
from tests.trainer.runs import (
    ROOT,
    arguments,
    assert_same_run,
    command,
    environment,
    kill_runs,
    read_lines,
    small_config,
    train,
    train_forked,
    weights,
)

STEPS = 4
# warm start so that it can be killed, a checkpoint every second step so that a kill can lose one
RUN = {
    "train__steps": STEPS, "train__save_every": 2, "train__eval_every": 2, "train__keep_checkpoints": 1,
    "train__lr_warmup_steps": 3, "model__warm_start__max_steps": 3, "model__warm_start__batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one piece."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = train_forked(arguments(folder, **RUN))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "run"


def test_two_halves_are_the_whole(uninterrupted: Path, tmp_path: Path) -> None:
    """Two steps, then a resume to four, end in the same bytes and metrics as four steps at once."""
    run = train(tmp_path, **RUN | {"train__steps": 2})
    assert weights(run) != weights(uninterrupted)
    assert train(tmp_path, **RUN, train__resume=True, train__page=True) == run
    assert_same_run(run, uninterrupted)
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"method__name": "grpo", "train__updates_per_step": 2},
        {"method__name": "dapo"},
        {"method__preset": "upt", "method__entropy_scope": "batch", "model__tiny__tie_embeddings": "false"},
    ],
    ids=["grpo-2updates", "dapo", "srft-upt-batch-untied"],
)
def test_two_halves_of_other_methods(changes: dict[str, object], tmp_path: Path) -> None:
    """The same holds with several updates a step, with prompts that give way to others, with a batch-wide entropy, and
    with an untied head.
    """
    reward = tmp_path / "odd.py"
    reward.write_text("def odd(completion, answer, row):\n    return float(len(completion) % 2)\n")
    run = RUN | {"reward__kind": f"{reward}:odd", "data__bad_demos": "keep", "model__warm_start__max_steps": 0}
    whole = train(tmp_path / "whole", **run, **changes)
    train(tmp_path / "halves", **run | {"train__steps": 2}, **changes)
    assert_same_run(train(tmp_path / "halves", **run, **changes, train__resume=True), whole)


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    """A resume of a complete run trains no step and exports the same model."""
    run = train(tmp_path, **RUN)
    train(tmp_path, **RUN, train__resume=True)
    assert_same_run(run, uninterrupted)


def test_resume_without_a_checkpoint_starts_at_step_0(uninterrupted: Path, tmp_path: Path) -> None:
    """train.resume=true on a name that has no run yet is a run from the start."""
    assert_same_run(train(tmp_path, **RUN, train__resume=True), uninterrupted)


MOMENTS = {
    "in-warm-start": ("srft.warm_start.update", 2),
    "warm-start-half-written": ("srft.policy.manifest._digest_of_list", 1),
    "before-first-checkpoint": ("srft.rollouts.judge", 2),
    "between-samples-and-metrics": ("srft.record.log.write_json_line", 7),
    # three of the warm start, then one a step: the gradient of step 3 is there and the weights are not moved yet
    "in-mid-step": ("torch.nn.utils.clip_grad_norm_", 6),
    "checkpoint-without-moments": ("os.pwrite", 20),
    "checkpoint-before-rename": ("os.rename", 5),
    "old-checkpoint-emptied": ("os.rmdir", 1),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were killed at each of the moments."""
    folders = {moment: tmp_path_factory.mktemp(moment) for moment in MOMENTS}
    runs = [(*MOMENTS[moment], arguments(folder, **RUN)) for moment, folder in folders.items()]
    kill_runs(runs)
    return folders


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_to_the_same_bytes(moment: str, uninterrupted: Path, killed: dict[str, Path]) -> None:
    """SIGKILL at a chosen moment, resume: the model, the metrics and the samples are those of the run in one piece."""
    assert_same_run(train(killed[moment], **RUN, train__resume=True), uninterrupted)


def test_run_killed_at_random_moments_resumes_to_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL from outside, a random while after the first row and again after resuming, changes nothing either."""
    draw = random.Random(0)
    run = tmp_path / "runs" / "run"
    for resume in (False, True):
        with subprocess.Popen(
            command(arguments(tmp_path, **RUN, train__resume=resume)),
            cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as trainer:  # fmt: skip
            while trainer.poll() is None and not (run / "run.json").exists():
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.3))
            os.kill(trainer.pid, signal.SIGKILL)
    assert_same_run(train(tmp_path, **RUN, train__resume=True), uninterrupted)


def test_damaged_checkpoint_is_passed_over(
    uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the one before, says so, and ends in the same bytes."""
    run = train(tmp_path, **RUN | {"train__save_every": 1, "train__keep_checkpoints": 2, "train__steps": 3})
    broken = run / "checkpoints" / "step_000003" / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-7])
    capfd.readouterr()
    train(tmp_path, **RUN, train__resume=True)
    assert f"Checkpoint {broken.parent} is damaged: optimizer.safetensors has" in capfd.readouterr().err
    assert_same_run(run, uninterrupted)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["damaged-step_000003", f"step_{STEPS:06d}"]


def test_changed_options_are_named(tmp_path: Path) -> None:
    """Resuming with options that make it another run is refused, with each of them and both values."""
    run = train(tmp_path, **RUN | {"train__steps": 2})
    before = weights(run), (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="other options") as caught:
        train(tmp_path, **RUN, train__resume=True, train__lr=0.5, method__preset="upt")
    assert "train.lr was 0.001, now 0.5" in str(caught.value)
    assert "method.preset was 'paper', now 'upt'" in str(caught.value)
    assert "train.steps" not in str(caught.value)
    assert (weights(run), (run / "metrics.jsonl").read_bytes()) == before


def write_sums(path: Path, add: int = 1, count: int = 40) -> Path:
    """A file of sums with their demonstrations."""
    rows = [{"prompt": f"{a}+{add}=", "answer": str(a + add), "demo": f"#{a + add}"} for a in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_changed_data_is_refused(tmp_path: Path) -> None:
    """Other rows under the same name, more rows, another file, or other held-out rows: each names the option.

    The same rows in another place are the same data.
    """
    short = {**RUN, "train__save_every": 1, "train__steps": 1, "model__warm_start__max_steps": 0, "data__limit": 100}
    data, held_out = write_sums(tmp_path / "sums.jsonl"), write_sums(tmp_path / "test.jsonl", add=5, count=9)
    files = {"data__train": data, "data__eval": held_out}
    run = train(tmp_path, **short, **files)
    before = weights(run), (run / "metrics.jsonl").read_bytes()
    again = short | {"train__steps": 2, "train__resume": True}
    write_sums(data, add=2)
    with pytest.raises(ValueError, match=r"data\.train=.*sums\.jsonl does not hold the rows that .*step_000001"):
        train(tmp_path, **again, **files)
    write_sums(data, count=41)
    with pytest.raises(ValueError, match=r"data\.train=.*\(40 problems then, 41 now\)"):
        train(tmp_path, **again, **files)
    with pytest.raises(ValueError, match=r"data\.train=.*other\.jsonl does not hold the rows"):
        train(tmp_path, **again, data__train=write_sums(tmp_path / "other.jsonl"), data__eval=held_out)
    write_sums(data)
    write_sums(held_out, add=6, count=9)
    with pytest.raises(ValueError, match=r"data\.eval=.*test\.jsonl does not hold the held-out rows"):
        train(tmp_path, **again, **files)
    assert (weights(run), (run / "metrics.jsonl").read_bytes()) == before
    moved = write_sums(tmp_path / "moved" / "sums.jsonl")
    elsewhere = write_sums(tmp_path / "moved" / "test.jsonl", add=5, count=9)
    train(tmp_path, **again, data__train=moved, data__eval=elsewhere, data__eval_limit=3)
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1, 2]


def test_fewer_steps_than_done_are_refused(tmp_path: Path) -> None:
    """Resuming to a step that is past already says so."""
    train(tmp_path, **RUN | {"train__steps": 2})
    with pytest.raises(ValueError, match="is at step 2, past train.steps=1"):
        train(tmp_path, **RUN | {"train__steps": 1}, train__resume=True)


def test_memory_options_may_change_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that only say how fast or where, such as the micro-batch size, are free when a run goes on."""
    run = train(tmp_path, **RUN | {"train__steps": 2})
    free = {"train__tokens_per_microbatch": "auto", "engine__max_batch": 8, "model__attention": "sdpa"}
    train(tmp_path, **RUN | free, train__resume=True)
    assert "at most 16384 tokens per forward pass" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == list(range(STEPS + 1))
    newest, _ = whole_checkpoint(small_config(tmp_path).run_dir)
    assert newest is not None and newest.name == f"step_{STEPS:06d}"
