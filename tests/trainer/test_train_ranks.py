"""A run on two ranks learns what one process learns, through the command a user types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.runs import OF_A_LAYOUT, arguments, comparable_rows, read_lines, train, train_process

# seven prompts on two ranks: one has more of them; two updates a step: log-probabilities of the sampling policy
OPTIONS: dict[str, Any] = {
    "train__prompts_per_step": 14, "train__updates_per_step": 2, "train__steps": 3, "train__eval_every": 2,
    "train__save_every": 3, "train__lr": 1e-4, "data__eval_limit": 9, "method__entropy_scope": "batch",
    "model__warm_start__max_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folders of one process and of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = train(folder / "alone", **OPTIONS)
    done = train_process(arguments(folder / "together", train__ranks=2, **OPTIONS), timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Complete: 3 steps.") == 1, "the first rank alone shows the record"
    return alone, folder / "together" / "runs" / "run"


def test_every_row_is_that_of_one_process(runs: tuple[Path, Path]) -> None:
    """Samples are drawn by the same seeds, and losses and means are over all ranks."""
    alone, together = map(comparable_rows, runs)
    assert [row["step"] for row in together] == [0, 1, 2, 3]
    for expected, actual in zip(alone, together, strict=True):
        assert set(actual) == set(expected)
        for name, value in expected.items():
            if not name.startswith(OF_A_LAYOUT):
                # AdamW makes much of rounding where a gradient is small
                assert actual[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


def test_weights_and_folder_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    """The exported model has the same names and nearly the same values; every file is there."""
    alone, together = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert set(together) == set(alone)
    for name, expected in alone.items():
        assert torch.allclose(together[name], expected, rtol=0, atol=1e-4), name
    names = [sorted(p.name for p in run.iterdir() if p.name != "engine") for run in runs]
    assert names[0] == names[1]


def test_the_first_rank_shows_what_it_drew(runs: tuple[Path, Path]) -> None:
    """Of step 1 two of its four groups are among those that one process shows, with the same completions."""
    alone, together = (
        [row for row in read_lines(run / "samples.jsonl") if row["step"] == 1 and not row["demo"]] for run in runs
    )
    shown = [{row["id"]: row["completion"] for row in rows} for rows in (alone, together)]
    both = set(shown[0]) & set(shown[1])
    assert (len(shown[0]), len(shown[1]), len(both)) == (4, 4, 2)
    assert all(shown[0][name] == shown[1][name] for name in both)
    assert all(row["entropy"] is not None for row in together), "found on the rank that learned from it"
