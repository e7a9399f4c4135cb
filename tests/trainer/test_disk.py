"""A disk that refuses to write ends a run with one line, and takes nothing of what was safe before."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from srft import train as train_module
from srft.disk import WriteError, writing
from srft.policy.checkpoint import newest_checkpoint
from srft.policy.manifest import damage
from srft.policy.model import byte_tokenizer
from tests.trainer.runs import arguments, assert_same_run, during_call, train

RUN = {
    "train__steps": 3, "train__save_every": 1, "train__eval_every": 3, "train__keep_checkpoints": 1,
    "train__page": True,
    "model__warm_start__max_steps": 2, "model__warm_start__batch_size": 8,
}  # fmt: skip


@contextmanager
def full_disk(limit: int = 64) -> Iterator[None]:
    """No file grows beyond ``limit`` bytes: what a full disk does to a write, with another errno (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusing_in(patch: pytest.MonkeyPatch, where: str, call: int, limit: int = 64) -> None:
    """Let the disk be full during the ``call``-th call of a function."""
    during_call(patch, where, call, lambda: full_disk(limit))


# sessions of one run: in the how-manieth call of what the disk is full, the path that is named, the step that is safe
SESSIONS = [
    ("srft.warm_start.export_model", 1, "{folder}/cache/tiny-", 0),
    ("srft.record.log.RunLog.__enter__", 1, "{run}/config.toml", 0),
    ("srft.record.log.RunLog.say", 1, "{run}/run.json", 0),
    ("srft.record.log.RunLog.metrics", 1, "{run}/metrics.jsonl", 0),
    ("srft.record.log.RunLog.samples", 1, "{run}/samples.jsonl", 0),
    ("srft.record.log.RunLog.metrics", 1, "{run}/metrics.jsonl", 0),
    ("srft.policy.checkpoint.write_config", 1, "{run}/checkpoints/step_000001", 0),
    ("srft.policy.tensor_files.TensorFiles.create", 4, "{run}/checkpoints/step_000002", 1),
    ("transformers.PreTrainedTokenizerBase.save_pretrained", 1, "{run}/checkpoints/step_000002", 1),
    ("pathlib.Path.write_text", 1, "{run}/checkpoints/step_000002", 1),
    ("pathlib.Path.write_text", 2, "{run}/checkpoints/step_000002", 1),
    ("srft.train.export_policy", 1, "{run}/model", 3),
    ("srft.report.plots.draw_plots", 1, "{run}/plots", 3),
    ("srft.report.build.write_atomically", 1, "{run}/report.html", 3),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a disk with room."""
    return train(tmp_path_factory.mktemp("uninterrupted"), **RUN)


def attempt(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """The command line in this process, with one thread as ``train`` has it; it must end with exit code 2."""
    patch.setattr(sys, "argv", ["srft.train", *words])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(SystemExit) as caught:
            train_module.main()
    finally:
        torch.set_num_threads(threads)
    assert caught.value.code == 2


def test_run_that_met_a_full_disk_at_every_kind_of_write(
    uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line with the path and what is safe, the last checkpoint whole, nothing half written, and it goes on."""
    run = tmp_path / "runs" / "run"
    for where, call, path, step in SESSIONS:
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            refusing_in(patch, where, call)
            attempt(arguments(tmp_path, **RUN, train__resume=True), patch)
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        (line,) = [line for line in stderr.splitlines() if "error" in line]
        assert line.startswith(f"error: cannot write {path.format(folder=tmp_path, run=run)}"), (where, line)
        newest = newest_checkpoint(run)
        if step == 0:
            assert newest is None and line.endswith("; no checkpoint was written yet")
        else:
            assert newest is not None and newest.name == f"step_{step:06d}", where
            assert damage(newest) is None
            assert line.endswith(f"; {newest} is complete, and name=run train.resume=true goes on from it")
        left = [p for p in tmp_path.rglob("*") if p.name.endswith((".part", ".partial", ".old", ".writing"))]
        assert not left, where
    train(tmp_path, **RUN, train__resume=True)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 5000),
        lambda path: save_file({"x": torch.zeros(2000)}, path),
        lambda path: byte_tokenizer().save_pretrained(path),
    ],
    ids=["python", "safetensors", "tokenizers"],
)
def test_every_writer_of_ours_is_understood(write: Callable[[Path], None], tmp_path: Path) -> None:
    """The libraries raise what they like; it becomes one error that names the path and the reason."""
    path = tmp_path / "x"
    with pytest.raises(WriteError, match=rf"^cannot write {path}: File too large$"), full_disk(), writing(path):
        write(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_reason_is_the_systems(code: int, tmp_path: Path) -> None:
    """Disk full, over quota, read only, broken."""
    with pytest.raises(WriteError, match=f": {os.strerror(code)}$"), writing(tmp_path):
        raise OSError(code, os.strerror(code))


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    """A mistake in the code is not taken for a disk that refuses."""
    with pytest.raises(TypeError, match="not serializable"), writing(tmp_path):
        raise TypeError("not serializable")
