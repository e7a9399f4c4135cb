"""Completions that go on over steps on two ranks: the rows of one process, and what is saved of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srft.record.rollouts import read_rows, step_file
from tests.trainer.runs import ROOT, comparable_rows, environment
from tests.trainer.test_max_lag_ranks import ODD, assert_close, start
from tests.trainer.test_partial import STOP

# three prompts are uneven, and so are the groups that have ended, of which an update may have none
OPTIONS: dict[str, Any] = {
    "method__name": "grpo", "rollout__partial_tokens": 6, "rollout__max_lag": 3, "rollout__stop": STOP,
    "data__bad_demos": "keep", "train__prompts_per_step": 3, "train__updates_per_step": 3,
    "train__rollouts_per_prompt": 2, "train__steps": 4, "train__save_every": 1, "train__eval_every": 4,
    "train__lr": 1e-3, "data__eval_limit": 3, "rollout__max_new_tokens": 16, "train__record_rollouts": True,
}  # fmt: skip


def main(folder: Path) -> None:
    """All runs, in children of one process that has imported everything."""
    (folder / "odd.py").write_text(ODD)
    statuses = start(folder / "alone", 1, options=OPTIONS)
    # two ranks, one that goes on from what they have open, and two that go on from that
    for ranks, steps in ((2, 2), (1, 3), (2, 4)):
        until = {"train__steps": steps, "train__eval_every": steps}
        statuses += start(folder / "ranks", ranks, options=OPTIONS | until)
    (folder / "statuses.json").write_text(json.dumps(statuses))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they lie."""
    folder = tmp_path_factory.mktemp("ranks")
    command = f"import sys, pathlib; from {__name__} import main; main(pathlib.Path(sys.argv[1]))"
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", command, str(folder)], cwd=ROOT, env=env, timeout=280)
    assert done.returncode == 0 and set(json.loads((folder / "statuses.json").read_text())) == {0}
    return folder


def test_rows_are_those_of_one_process(runs: Path) -> None:
    """With other ranks in the middle: the same groups end in the same steps, with tokens of the same weights."""
    run, alone = (runs / name / "runs" / "run" for name in ("ranks", "alone"))
    opened = [row["groups/open"] for row in comparable_rows(alone)[1:]]
    assert opened == [row["groups/open"] for row in comparable_rows(run)[1:]] and max(opened) > 3
    for step in range(1, 5):
        one, other = (read_rows(step_file(path, step)) for path in (run, alone))
        for name in ("id", "group", "place", "response_ids", "versions", "reward"):
            assert [row[name] for row in one] == [row[name] for row in other], (step, name)
    assert any(len(set(row["versions"])) > 1 for row in other)


def test_figures_are_those_of_one_process(runs: Path) -> None:
    """Up to the rounding of sums in another order; the three updates of a step have the same groups."""
    run, alone = (runs / name / "runs" / "run" for name in ("ranks", "alone"))
    rows = [{k: v for k, v in row.items() if "eval" not in k} for row in comparable_rows(run)]
    text = "\n".join(json.dumps(row) for row in rows)
    (run / "metrics.jsonl").write_text(text)
    those = [{k: v for k, v in row.items() if "eval" not in k} for row in comparable_rows(alone)]
    (alone / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in those))
    assert_close(run, alone)
