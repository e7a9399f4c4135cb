"""Rollouts beside training on two ranks: the rows of one process, what is saved of them, and a rank that is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from srft import train as loop
from tests.trainer.runs import OF_A_LAYOUT, ROOT, arguments, assert_same_run, comparable_rows, during_call, environment

ODD = "def odd(completion, answer, row):\n    return float(len(completion) % 2)\n"
# groups of equal rewards give way, so that the ranks meet while they make a batch, and three prompts are uneven
OPTIONS: dict[str, Any] = {
    "method__name": "dapo", "rollout__max_lag": 1, "data__bad_demos": "keep", "train__prompts_per_step": 3,
    "train__rollouts_per_prompt": 2, "train__steps": 4, "train__save_every": 1, "train__eval_every": 4,
    "train__lr": 1e-3, "data__eval_limit": 3, "rollout__max_new_tokens": 16,
}  # fmt: skip


def start(folder: Path, ranks: int, killed: bool = False, options: dict[str, Any] = OPTIONS) -> list[int]:
    """Start a run, or go on with it; the exit status of each rank, without a launcher that would end the others."""
    words = arguments(folder, **options, reward__kind=f"{folder.parent / 'odd.py'}:odd", train__resume=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    met = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        if ranks > 1:
            os.environ.update(met, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
        with (folder.parent / f"{folder.name}-{rank}.log").open("a") as log, pytest.MonkeyPatch.context() as patch:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            if killed and rank == 1:
                # the batch of step 4 is made beside step 3, when the checkpoint of step 1 is whole
                during_call(patch, "srft.rollouts.judge", 4, lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type,return-value]
            sys.argv[1:] = words
            with suppress(SystemExit):
                loop.main()
                os._exit(0)
            os._exit(2)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path) -> None:
    """All runs, in children of one process that has imported everything."""
    (folder / "odd.py").write_text(ODD)
    statuses = {"alone": start(folder / "alone", 1), "whole": start(folder / "whole", 2)}
    statuses["killed"] = start(folder / "killed", 2, killed=True)
    shutil.copytree(folder / "killed", folder / "fewer")
    statuses |= {"resumed": start(folder / "killed", 2), "fewer": start(folder / "fewer", 1)}
    (folder / "statuses.json").write_text(json.dumps(statuses))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Where they lie, and how they ended."""
    folder = tmp_path_factory.mktemp("ranks")
    command = f"import sys, pathlib; from {__name__} import main; main(pathlib.Path(sys.argv[1]))"
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", command, str(folder)], cwd=ROOT, env=env, timeout=280)
    assert done.returncode == 0
    return folder, json.loads((folder / "statuses.json").read_text())


def run_of(runs: tuple[Path, dict[str, list[int]]], name: str) -> Path:
    return runs[0] / name / "runs" / "run"


def assert_close(run: Path, expected: Path) -> None:
    """The same rows, up to the rounding of sums in another order."""
    rows, those = comparable_rows(run), comparable_rows(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in those]
    for row, other in zip(rows, those, strict=True):
        assert set(row) == set(other)
        for name, value in other.items():
            if not name.startswith(OF_A_LAYOUT):
                # AdamW makes much of rounding where a gradient is small
                assert row[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_rows_are_those_of_one_process(runs: tuple[Path, dict[str, list[int]]]) -> None:
    """Drawn, judged and weighted alike, a step behind, with groups that gave way on both ranks."""
    assert runs[1]["alone"] == [0] and runs[1]["whole"] == [0, 0]
    assert_close(run_of(runs, "whole"), run_of(runs, "alone"))
    rows = comparable_rows(run_of(runs, "whole"))[1:]
    assert [row["lag/mean"] for row in rows] == [0, 1, 1, 1]
    assert max(row["lag/is_max"] for row in rows) > 1.01


def test_a_killed_rank_ends_the_other(runs: tuple[Path, dict[str, list[int]]]) -> None:
    """Which names it, while its own batch was being made; nobody waits for ``train.collective_deadline_s``."""
    assert runs[1]["killed"] == [2, -signal.SIGKILL]
    said = (runs[0] / "killed-0.log").read_text()
    where = r"error: rank 0 waited at 'step [23], .* is gone or has failed: rank 1, last at '"
    assert re.search(where + r"step 3, \w+; beside it step 4, reward'", said)


def test_it_goes_on_to_the_same_bits(runs: tuple[Path, dict[str, list[int]]]) -> None:
    """Each rank takes up the batches that waited on it."""
    for name, files in (("whole", ["rollouts-1.jsonl", "rollouts.jsonl"]), ("fewer", ["rollouts.jsonl"])):
        newest = max((run_of(runs, name) / "checkpoints").iterdir())
        assert sorted(path.name for path in newest.glob("rollouts*")) == files
    assert runs[1]["resumed"] == [0, 0]
    assert_same_run(run_of(runs, "killed"), run_of(runs, "whole"))


def test_one_process_goes_on_from_two(runs: tuple[Path, dict[str, list[int]]]) -> None:
    """And learns from what waited on both."""
    assert runs[1]["fewer"] == [0]
    assert_close(run_of(runs, "fewer"), run_of(runs, "whole"))
