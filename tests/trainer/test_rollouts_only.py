"""Runs that make, judge and record rollouts by one policy and learn nothing, and runs that learn from these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from srft import prepare
from srft import train as loop
from srft.data.sampler import StepSampler
from srft.policy.parallel import ALONE
from srft.record.recorded import Recorded, steps_recorded
from srft.record.rollouts import read_rows, step_file
from tests.trainer.runs import arguments, comparable_rows, during_call, kill_runs, read_lines, train
from tests.trainer.test_replay import options, rows_of
from tests.trainer.test_stop import terminated
from tests.trainer.tiny import tiny_config

ONLY = {"train__rollouts_only": True, "method__name": "dapo"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of three steps, in which prompts gave way to others."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return train(folder, **options(folder, **ONLY))


def sampled(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What does not come of learning."""
    return [{k: v for k, v in row.items() if k not in ("logprobs", "entropies")} for row in rows]


def test_one_policy_makes_them_all(made: Path, tmp_path: Path) -> None:
    """The first step's are those of a run that learns, and all later ones are by the weights of the start too."""
    learns = train(tmp_path / "run", **options(tmp_path / "run", train__record_rollouts=True, **ONLY) | {
        "train__rollouts_only": False, "train__steps": 1,
    })  # fmt: skip
    first, *later = rows_of(made)
    assert sampled(first) == sampled(read_rows(step_file(learns, 1)))
    assert {row["version"] for rows in (first, *later) for row in rows} == {0}
    assert any(row["gave_way"] for rows in (first, *later) for row in rows)
    assert any(row["advantage"] for row in first)
    assert [row["step"] for row in comparable_rows(made)] == [0, 1, 2, 3]
    assert not {path.name for path in made.iterdir()} & {"checkpoints", "model"}


def test_nothing_is_held_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient, no moment, no proof on packed sequences and no largest micro-batch."""
    learners = []

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was asked for")

    class Seen(prepare.Rollouts):
        def __init__(self, learner: Any, *others: Any) -> None:
            learners.append(learner)
            super().__init__(learner, *others)

    monkeypatch.setattr("torch.Tensor.backward", never)
    monkeypatch.setattr("torch.autograd.grad", never)
    monkeypatch.setattr(prepare, "Rollouts", Seen)
    train(tmp_path / "run", **options(tmp_path / "run", **ONLY, train__steps=1))
    (learner,) = learners
    assert not learner.optimizer.state and all(p.grad is None for p in learner.model.parameters())


MOMENTS = {"in-the-file": ("srft.record.rollouts.replace_file", 3), "after-it": ("srft.train.group_metrics", 3)}


def test_killed_run_goes_on(made: Path, tmp_path: Path) -> None:
    """SIGKILL while a step's file is written, and before its row is: the same files as without."""
    run = options(made.parents[1], **ONLY)
    kill_runs([(*where, arguments(tmp_path / moment, **run)) for moment, where in MOMENTS.items()])
    for moment in MOMENTS:
        left = tmp_path / moment / "runs" / "run"
        assert steps_recorded(left) == 2 and step_file(left, 3).exists() == (moment == "after-it")
        again = train(tmp_path / moment, **run, train__resume=True)
        for step in (1, 2, 3):
            assert step_file(again, step).read_bytes() == step_file(made, step).read_bytes()
        assert comparable_rows(again) == comparable_rows(made)
        assert read_lines(again / "problems.jsonl") == read_lines(made / "problems.jsonl")


def test_signal_says_what_is_complete(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the second step; the first is there, and training does not go on from it."""
    run = options(made.parents[1], **ONLY)
    during_call(monkeypatch, "srft.rollouts.judge", 3, terminated)
    with pytest.raises(loop.Stopped) as stopped:
        train(tmp_path, **run)
    done = steps_recorded(tmp_path / "runs" / "run")
    assert done < 3
    assert stopped.value.__notes__ == [
        f"the rollouts of {done} steps are complete, and name=run train.resume=true goes on after them"
    ]
    with pytest.raises(ValueError, match="train.rollouts_only was True, now False"):
        train(tmp_path, **run | {"train__rollouts_only": False}, train__resume=True)


def test_replay_weights_them_by_their_age(made: Path, tmp_path: Path) -> None:
    """Without a lag they are refused from the second step on; with it they count by how likely they still are."""
    run = options(made.parents[1], train__replay=made, method__name="grpo")
    with pytest.raises(ValueError, match="step_000003.arrow has rollouts of the policy after 0 steps, 2 behind.* to 2"):
        train(tmp_path / "refused", **run)
    with pytest.raises(ValueError, match="does not weight rollouts of an older policy"):
        tiny_config("rollout.max_lag=2", f"train.replay={made}", "method.name=sft_then_rl", "method.patience=1")
    weighted = train(tmp_path / "weighted", **run, rollout__max_lag=2)
    rows = comparable_rows(weighted)[1:]
    assert [row["lag/max"] for row in rows] == [0, 1, 2]
    assert rows[0]["lag/is_off"] == 0 and rows[2]["lag/is_ess"] < 1
    assert "counts by how likely it still is" in (weighted / "run.json").read_text()


def test_resume_on_other_rows_is_refused(made: Path) -> None:
    """The file of a step knows the rows that it was drawn from, and where it left the sampler."""
    data = {"rows": 64, "train": "other", "demos": None, "held_out": []}
    recorded = Recorded(made, StepSampler(64, 0, 0), data, ALONE)
    with pytest.raises(ValueError, match="step_000003.arrow has rollouts of other rows than data.train"):
        recorded.restore(None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.replay=runs/first"], "takes those of another run; unset one of them"),
        (["rollout.max_lag=1"], "has one policy for all steps, got rollout.max_lag=1"),
        (["method.name=sft"], 'method.name="sft" asks for no rollouts'),
    ],
    ids=["replay", "lag", "sft"],
)
def test_what_does_not_fit_is_refused(words: list[str], said: str) -> None:
    """Before anything is read."""
    with pytest.raises(ValueError, match=said):
        tiny_config("train.rollouts_only=true", *words)
