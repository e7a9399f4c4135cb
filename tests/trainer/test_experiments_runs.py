"""Whole suites of tiny runs: the numbers of the trainer itself, and the same table however often they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from srft.experiments.command import main
from srft.experiments.results import Result, read_results
from tests.trainer.processes import marked_processes
from tests.trainer.runs import ROOT, SMALL, assert_same_run, environment, read_lines, train_process

SUITE = """
title = "Tiny"
question = "Does it go on?"
reference = "aware"
equal = ["prompts"]
base = [{base}]
[arms]
aware = []
[arms.average]
from_run = {{ arm = "aware", options = {{ "method.sft_coef" = "mean:weight/sft" }} }}
[arms.large]
options = ["train.prompts_per_step=9999"]
[arms.lost]
from_run = {{ arm = "aware", options = {{ "train.lr" = "mean:no/such" }} }}
[arms.orphan]
from_run = {{ arm = "large", options = {{ "model.name" = "model" }} }}
"""
BASE = SMALL | {"train.steps": 3, "data.task.max_ops": 3}


def words(folder: Path) -> list[str]:
    """The command line of the suite under ``folder``: two arms of two seeds, and three that cannot be made."""
    path = folder / "suite.toml"
    path.write_text(SUITE.format(base=", ".join(f'"{key}={value}"' for key, value in BASE.items())))
    return [str(path), "--seeds", "2", "--out", str(folder / "out"), f"cache_dir={folder / 'cache'}"]


def start(folder: Path) -> subprocess.Popen[str]:
    env = environment() | {"SRFT_TEST_SUITE": str(folder)}
    command = [sys.executable, "-m", "srft.experiments", *words(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite in one piece."""
    process = start(folder := tmp_path_factory.mktemp("undisturbed"))
    said, _ = process.communicate()
    assert process.returncode == 1, said
    return folder / "out"


def results(out: Path) -> dict[tuple[str, int], Result]:
    """The complete runs."""
    return {(result.arm, result.seed): result for result in read_results(out) if not result.error}


def table(out: Path) -> str:
    """Its accuracies, differences and entropies."""
    return (out / "table.md").read_text().partition("## Accuracy")[2].partition("## Budgets")[0]


def test_runs_are_those_of_the_trainer(undisturbed: Path, tmp_path: Path) -> None:
    """`python -m srft.train` with the options of a run's config.toml ends in the same bytes, rows and samples."""
    found = next((undisturbed / "runs" / "average").glob("seed-1-*/config.toml")).parent
    threads = results(undisturbed)["average", 1].threads
    places = [str(found / "config.toml"), "name=run", f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    os.environ["OMP_NUM_THREADS"], before = str(threads), os.environ.get("OMP_NUM_THREADS", "1")
    try:
        done = train_process(places, timeout=280)
    finally:
        os.environ["OMP_NUM_THREADS"] = before
    assert done.returncode == 0, done.stderr
    assert not (found / "report.html").exists()
    (found / "report.html").touch()
    assert_same_run(found, tmp_path / "run")
    (session,) = json.loads((found / "run.json").read_text())["sessions"]
    assert "-m srft.train" in session["command"] and "train.seed=1" in session["command"]


def test_an_arm_gets_the_mean_of_another(undisturbed: Path) -> None:
    """Of the run with the same seed, over its steps, and no other run."""
    for seed in (0, 1):
        (source,) = (undisturbed / "runs" / "aware").glob(f"seed-{seed}-*/metrics.jsonl")
        weights = [row["weight/sft"] for row in read_lines(source) if row["step"] > 0]
        (config,) = (undisturbed / "runs" / "average").glob(f"seed-{seed}-*/config.toml")
        (line,) = [line for line in config.read_text().splitlines() if line.startswith("sft_coef")]
        assert float(line.partition(" = ")[2]) == pytest.approx(sum(weights) / 3, rel=1e-12)


def test_runs_that_fail_cost_no_other(undisturbed: Path) -> None:
    """Each says why; the rest is made."""
    assert results(undisturbed).keys() == {(arm, seed) for arm in ("aware", "average") for seed in (0, 1)}
    errors = {result.arm: result.error for result in read_results(undisturbed) if result.error}
    assert "train.prompts_per_step=9999, but chain gives only 64 usable prompts" in errors["large"]
    assert "train.lr of arm lost is the mean of no/such, which arm aware does not log" in errors["lost"]
    assert errors["orphan"] == "arm large gave it nothing to start from"
    warning = "**Warning:** large, seed 0, ended early: train.prompts_per_step=9999"
    assert warning in (undisturbed / "table.md").read_text()


def test_what_has_ended_is_not_made_again(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What failed is tried again; other options are other runs."""
    main([*words(undisturbed.parent), "--dry-run"])
    said = capsys.readouterr().out
    assert "average: 2 of 2 runs made" in said and "lost: 0 of 2 runs made" in said
    assert "6 of 10 runs to make" in said
    main([*words(undisturbed.parent), "--dry-run", "train.lr=0.5"])
    assert "10 of 10 runs to make" in capsys.readouterr().out


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_killed_at_any_time_it_says_the_same(undisturbed: Path, tmp_path: Path) -> None:
    """Told to stop in a run, killed in a later one with its results torn, and then let go on."""
    out, mark = tmp_path / "out", f"SRFT_TEST_SUITE={tmp_path}"

    def in_a_run() -> bool:
        # a run has made a step and is not done
        return any(b'"step": 1' in path.read_bytes() for path in out.glob("runs/*/*/metrics.jsonl"))

    process = start(tmp_path)
    wait_for(in_a_run, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 143, said
    assert "stopped by SIGTERM; the same command goes on from here" in said
    assert not marked_processes(mark)

    ended = len(results(out))
    process = start(tmp_path)
    wait_for(lambda: len(results(out)) > ended and len(list(out.glob("runs/average/*/metrics.jsonl"))), process)
    process.kill()
    process.communicate()
    while marked_processes(mark):  # until the test's own limit
        time.sleep(0.05)
    assert 0 < len(results(out)) < 4
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"arm": "aver')

    before = (out / "results.jsonl").read_bytes()
    process = start(tmp_path)
    said, _ = process.communicate()
    assert process.returncode == 1, said
    assert (out / "results.jsonl").read_bytes().startswith(before)
    lines = [line.partition('"seed"')[0] for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines.count('{"arm": "aware", ') == lines.count('{"arm": "average", ') == 2
    assert table(out) == table(undisturbed)
    for key, result in results(undisturbed).items():
        mine = results(out)[key]
        assert (mine.evaluations, mine.means, mine.curves) == (result.evaluations, result.means, result.curves), key
        assert mine.budget is not None and result.budget is not None
        assert mine.budget.model_copy(update={"seconds": 0.0}) == result.budget.model_copy(update={"seconds": 0.0})
