"""Two phases in one run: which a step belongs to, what each of them learns, and what begins the second."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srft.learning import learn
from srft.methods import StepInfo
from srft.methods.sft_then_rl import Method
from srft.options import load_config
from srft.policy.learner import Learner
from srft.responses import Group
from tests.trainer.plain_step import step
from tests.trainer.runs import comparable_rows, read_lines, train
from tests.trainer.tiny import plain_model, random_groups, tiny_config

TWO = "method.name=sft_then_rl"
RL, SFT = (True, False), (False, True)


def phases(method: Method, steps: int, memory: dict[str, Any] | None = None) -> list[tuple[bool, bool]]:
    """What each step of a run asks for."""
    return [method.asks(StepInfo(number, steps, 8, memory or {})) for number in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [SFT, SFT, RL, RL, RL]),
        ({"order": "rl-sft"}, [RL, RL, SFT, SFT, SFT]),
        ({"switch_share": 0.2}, [SFT, RL, RL, RL, RL]),
        ({"switch_step": 3, "switch_share": 0.2}, [SFT, SFT, SFT, RL, RL]),
        ({"switch_step": 0}, [RL] * 5),
        ({"switch_step": 9}, [SFT] * 5),
    ],
    ids=["half", "reversed", "share", "step", "rl", "sft"],
)
def test_the_phase_of_each_step(options: dict[str, Any], expected: list[tuple[bool, bool]]) -> None:
    """Of a run of five steps."""
    assert phases(Method(name="sft_then_rl", **options), 5) == expected


def test_the_plateau_of_held_out_loss_ends_the_first_phase() -> None:
    """Two evaluations not 0.1 lower than the best, by hand; steps without one, and later ones, do not count."""
    method, memory = Method(name="sft_then_rl", switch_step=8, patience=2, min_delta=0.1), {}
    losses = {1: 2.0, 2: None, 3: 1.95, 4: 1.8, 5: 1.75, 6: 1.71, 7: 9.0, 8: 0.1}
    for number, loss in losses.items():
        row = {"loss/total": 0.0} | ({} if loss is None else {"eval/demo_loss": loss})
        method.note(row, StepInfo(number, 10, 8, memory))
    assert memory == {"best": 1.8, "stale": 2, "plateau": 6} == json.loads(json.dumps(memory))
    assert phases(method, 10, memory) == [SFT] * 6 + [RL] * 4


def test_without_a_plateau_it_switches_at_the_step() -> None:
    """A loss that falls to the end, or is not finite, or is no matter, changes nothing but the note."""
    falling, memory = Method(name="sft_then_rl", patience=1), {}
    for number in range(1, 5):
        falling.note({"eval/demo_loss": 1 / number}, StepInfo(number, 10, 8, memory))
    assert phases(falling, 10, memory) == [SFT] * 5 + [RL] * 5
    falling.note({"eval/demo_loss": math.nan}, StepInfo(5, 10, 8, memory))
    assert memory["plateau"] == 5
    Method(name="sft_then_rl").note({"eval/demo_loss": 1.0}, StepInfo(1, 10, 8, other := {}))
    assert other == {}


@pytest.mark.parametrize(("reset", "at"), [(True, [4]), (False, [])], ids=["new", "kept"])
def test_the_optimizer_begins_anew_once(reset: bool, at: list[int]) -> None:
    """Before the first step of the second phase; a run of one phase has no such step."""
    method = Method(name="sft_then_rl", switch_step=3, reset_optimizer=reset)
    assert [n for n in range(1, 7) if method.resets_optimizer(StepInfo(n, 6, 8, {}))] == at
    alone = Method(name="sft_then_rl", switch_step=0)
    assert not any(alone.resets_optimizer(StepInfo(n, 6, 8, {})) for n in range(1, 7))


@pytest.mark.parametrize(
    ("kept", "options", "same"),
    [
        ("rollouts", ["clip_high=0.28", "aggregation=sum", "advantage_std=false", "entropy_coef=0.01"], "grpo"),
        ("rollouts", ["loss_type=gspo"], "grpo"),
        ("demos", [], "sft"),
        ("demos", ["sft_aggregation=sequence-mean"], "sft"),
    ],
    ids=["grpo", "gspo", "sft", "sft-mean"],
)
def test_each_phase_is_the_method_of_its_name(kept: str, options: list[str], same: str) -> None:
    """A step on rollouts alone equals one of grpo, on demonstrations alone one of sft, loss and gradient."""
    model, groups = plain_model(), random_groups(demos=2)
    for group in groups:
        setattr(group, "demos" if kept == "rollouts" else "rollouts", [])
    budget = "train.tokens_per_microbatch=60"
    metrics, gradient = step(tiny_config(TWO, budget, *(f"method.{o}" for o in options)), model, groups)
    others = [f"method.{option.removeprefix('sft_')}" for option in options]
    expected, other = step(tiny_config(f"method.name={same}", budget, *others), model, groups)
    assert metrics["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-6, abs=1e-7)
    torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-8)
    assert ("loss/sft" in metrics, "clip/share" in metrics) == ((False, True) if same == "grpo" else (True, False))


def test_each_phase_has_its_rate() -> None:
    """The scale of its kind alone."""
    model = plain_model()
    rates = []
    for kept in ("rollouts", "demos"):
        groups = random_groups()
        for group in groups:
            setattr(group, "demos" if kept == "rollouts" else "rollouts", [])
        config = tiny_config(TWO, "train.lr=0.5", "train.rl_lr_scale=0.02", "train.sft_lr_scale=4")
        rates.append(step(config, model, groups)[0]["lr"])
    assert rates == pytest.approx([0.01, 2.0], rel=1e-12)


def test_patience_is_of_sft_first() -> None:
    """In RL there is no loss of demonstrations to wait for."""
    with pytest.raises(ValueError, match=r"method\.patience waits for a plateau of SFT; unset it"):
        load_config([TWO, "method.order=rl-sft", "method.patience=2"])


def test_a_run_of_two_phases(tmp_path: Path) -> None:
    """The first samples nothing, the second shows nothing; AdamW forgets the first, unless it is told not to."""
    options = {"method__name": "sft_then_rl", "train__steps": 4, "train__save_every": 4}
    rows = read_lines(train(tmp_path, **options) / "metrics.jsonl")[1:]
    assert [row["tokens/sampled"] > 0 for row in rows] == [False, False, True, True]
    assert ["loss/sft" in row for row in rows] == ["reward/demo" in row for row in rows] == [True, True, False, False]
    assert ["loss/policy" in row for row in rows] == [False, False, True, True]
    assert all(row["grad_norm"] > 0 for row in rows[:2])
    losses = [row["eval/demo_loss"] for row in rows]
    assert losses[0] > losses[1] and all(map(math.isfinite, losses))
    kept = train(tmp_path, **options, method__reset_optimizer=False, name="kept")
    assert comparable_rows(kept)[:3] == comparable_rows(tmp_path / "runs" / "run")[:3]
    # without an advantage a new AdamW does not move, one with moments goes on
    assert (kept / "model" / "model.safetensors").read_bytes() != (
        tmp_path / "runs" / "run" / "model" / "model.safetensors"
    ).read_bytes()


def stopping_at(number: int) -> Callable[[Learner, list[Group], int], dict[str, float]]:
    """``learn`` until that step, which is interrupted."""

    def learn_or_stop(learner: Learner, groups: list[Group], step: int) -> dict[str, float]:
        if step == number:
            raise KeyboardInterrupt
        return learn(learner, groups, step)

    return learn_or_stop


def test_a_run_goes_on_in_its_phase(tmp_path: Path) -> None:
    """A plateau that was noted before a checkpoint is known after it."""
    options = {
        "method__name": "sft_then_rl", "method__patience": 1, "method__min_delta": 100.0, "method__switch_share": 1.0,
        "train__steps": 4,
    }  # fmt: skip
    whole = train(tmp_path, **options, name="whole")
    # the first evaluation is the best so far, the second ends the phase
    assert [row["tokens/sampled"] > 0 for row in read_lines(whole / "metrics.jsonl")[1:]] == [False, False, True, True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srft.train.learn", stopping_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **options, name="cut")
    assert comparable_rows(train(tmp_path, **options, name="cut", train__resume=True)) == comparable_rows(whole)
