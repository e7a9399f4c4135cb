"""CHORD: its schedule and its loss by hand, and a whole step against plain float64 in any number of micro-batches."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.methods import UpdateInfo
from srft.methods.chord import Method
from srft.responses import Group, Response, count
from tests.numerics import assert_sum
from tests.trainer.plain_step import (
    Expected,
    Scored,
    assert_as_expected,
    divisor,
    expected_step,
    of_its_kind,
    step,
)
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import CPU, budget_for, members, plain_model, random_groups, sequence, tiny_config

CHORD = "method.name=chord"


def compared(groups: Sequence[Group], divide: bool) -> list[tuple[Response, float]]:
    """Rollouts against each other; demonstrations have no advantage."""
    taught = []
    for group in groups:
        rewards = [s.reward for s in group.rollouts]
        spread = statistics.stdev(rewards) + 1e-6 if divide else 1.0
        taught += [(s, (s.reward - statistics.fmean(rewards)) / spread) for s in group.rollouts]
        taught += [(s, 0.0) for s in group.demos]
    return taught


def expected_of(config: Config, model: torch.nn.Module, groups: Sequence[Group], mu: float) -> Expected:
    """(1 - mu) times the rollouts' clipped objective, mu times the demonstrations' cross-entropy, by token in phi."""
    method = config.method

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        demo = one.response.is_demo
        how = method.sft_aggregation if demo else method.rl_aggregation
        p = one.logp.exp().detach()
        sft = -one.logp * (p * (1 - p) if method.phi else 1)
        ratio = one.ratio
        rl = -torch.minimum(ratio * one.advantage, ratio.clamp(0.8, 1.2) * one.advantage)
        loss = (mu * sft if demo else (1 - mu) * rl) / divisor(
            how, one, of_its_kind(one, everyone), config.rollout.max_new_tokens
        )
        bonus = method.entropy_coef * one.entropy / sum(len(each.logp) for each in everyone)
        return torch.cat([loss, -bonus])

    plain = copy.deepcopy(model).double()
    return expected_step(plain, config.rollout.temperature, compared(groups, method.advantage_std), terms)


@pytest.mark.parametrize("batches", [1, 2, 7])
@pytest.mark.parametrize(
    ("options", "number", "mu"),
    [
        ([], 101, 0.475),
        (["phi=true"], 500, 0.1),
        (["phi=true", "mu_peak=0.5", "mu_decay_steps=10", "advantage_std=false", "entropy_coef=0.01"], 6, 0.3),
        (["mu_warmup_steps=4", "sft_aggregation=sequence-mean", "rl_aggregation=sum"], 3, 0.45),
    ],
    ids=["mu", "phi", "both", "warm-up"],
)
def test_step_equals_plain_float64(options: list[str], number: int, mu: float, batches: int) -> None:
    """Loss and gradient of a step somewhere in the schedule, at temperature 0.8, however the update is split."""
    model, groups = plain_model(), random_groups(demos=2)
    budget = f"train.tokens_per_microbatch={budget_for(batches, members(groups))}"
    config = tiny_config(CHORD, "rollout.temperature=0.8", budget, *(f"method.{option}" for option in options))
    metrics, gradient = step(config, model, groups, number)
    assert_as_expected(metrics, gradient, expected_of(config, model, groups, mu))
    assert metrics["weight/mu"] == pytest.approx(mu, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        # a quarter of the cosine: 0.05 + 0.85 * (1 + sqrt(1/2)) / 2
        ({}, {1: 0.9, 51: 0.05 + 0.425 * (1 + 0.5**0.5), 101: 0.475, 200: 0.05, 201: 0.05, 10**6: 0.05}),
        ({"mu_warmup_steps": 10}, {1: 0.0, 6: 0.45, 11: 0.9, 111: 0.475, 211: 0.05}),
        ({"mu_decay_steps": 0}, {1: 0.05}),
        ({"mu_peak": 0.3, "mu_valley": 0.3}, {1: 0.3, 100: 0.3}),
        ({"phi": True}, {1: 0.1, 77: 0.1, 500: 0.1}),
    ],
    ids=["default", "warm-up", "no-decay", "constant", "phi"],
)
def test_schedule(options: dict[str, float], shares: dict[int, float]) -> None:
    """The share of SFT at single steps, by hand."""
    method = Method(name="chord", **options)
    for number, share in shares.items():
        assert method.share(number) == pytest.approx(share, abs=1e-4 if number == 200 else 1e-12)


@pytest.mark.parametrize(("phi", "factor"), [(False, 1.0), (True, 0.25 * 0.75)])
def test_a_token_by_hand(phi: bool, factor: float) -> None:
    """Four words alike, p = 1/4: a right and a wrong rollout of one token, a demonstration of two, mu = 0.6."""
    method = Method(name="chord", phi=phi, mu_peak=0.6, mu_valley=0.6, advantage_std=False)
    group = Group(
        random_groups(1)[0].prompt,
        [sequence([1], [2], reward=1.0), sequence([1], [2])],
        [sequence([1], [3, 1], is_demo=True)],
    )
    taught = method.learn_from(group)
    assert [s.advantage for s in taught] == [0.5, -0.5, 0.0]
    (batch,) = pack(taught, 10, CPU)
    loss = method.loss(batch, UpdateInfo(count(taught), step=1, max_new_tokens=8))
    hidden_states = torch.zeros(4, 5).requires_grad_()
    out = loss(hidden_states, torch.zeros(4, 5), labels=batch.labels)
    assert out.terms["policy"].item() == pytest.approx(0, abs=1e-7)
    assert out.loss.item() == pytest.approx(0.6 * math.log(4) * factor, rel=1e-6)


def test_without_demonstrations_it_is_grpo() -> None:
    """Its RL part: (1 - mu) times what GRPO makes of the same rollouts."""
    model, groups = plain_model(), random_groups()
    for group in groups:
        group.demos = []
    config = tiny_config(CHORD, "method.mu_peak=0.25")
    metrics, gradient = step(config, model, groups)
    same, other = step(tiny_config("method.name=grpo"), model, groups)
    sizes = expected_of(config, model, groups, 0.25)
    assert_sum("loss", metrics["loss/total"], 0.75 * same["loss/total"], sizes.loss_size)
    assert_sum("gradient", gradient, 0.75 * other, sizes.gradient_size)


def test_with_all_of_the_share_it_is_sft() -> None:
    """mu = 1 leaves the cross-entropy of the demonstrations, refused ones too, and nothing of the rollouts."""
    model, groups = plain_model(), random_groups()
    groups[1].demos[0].reward = 0.0
    config = tiny_config(CHORD, "method.mu_peak=1")
    metrics, gradient = step(config, model, groups)
    same, other = step(tiny_config("method.name=sft"), model, groups)
    sizes = expected_of(config, model, groups, 1.0)
    assert_sum("loss", metrics["loss/total"], same["loss/total"], sizes.loss_size)
    assert_sum("gradient", gradient, other, sizes.gradient_size)
    assert metrics["loss/policy"] == 0


def test_a_run(tmp_path: Path) -> None:
    """Two steps record both terms and mu, which follows the steps of the run, and draw them."""
    run = train(tmp_path, method__name="chord", method__mu_decay_steps=2, train__page=True)
    rows = read_lines(run / "metrics.jsonl")[1:]
    for row in rows:
        assert {"loss/policy", "loss/sft", "clip/share"} <= row.keys()
        assert row["grad_norm"] > 0
    assert [row["weight/mu"] for row in rows] == pytest.approx([0.9, 0.475])
    assert (run / "plots" / "mu.png").exists()
