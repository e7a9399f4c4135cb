"""RL with an SFT loss, HPT and SuperRL: who teaches, their losses by hand, and whole steps against plain float64."""

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
from srft.methods import UpdateInfo, find_method
from srft.methods.hpt import Method as Hpt
from srft.methods.superrl import Method as SuperRl
from srft.responses import Group, Response, count
from tests.numerics import assert_sum
from tests.trainer.plain_step import Expected, Scored, assert_as_expected, divisor, expected_step, of_its_kind, step
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import CPU, budget_for, plain_model, random_groups, sequence, tiny_config

NAMES = ("rl_with_sft", "hpt", "superrl")
SIZES = ("train.rollouts_per_prompt=3", "train.demos_per_prompt=2")


def config_of(name: str, *options: str) -> Config:
    return tiny_config(f"method.name={name}", *SIZES, *options)


def taught_by(config: Config, groups: Sequence[Group]) -> list[tuple[Response, float]]:
    """Rollouts with their advantages and demonstrations: all, or of a prompt the one or the other."""
    method, taught = config.method, []
    for group in groups:
        rewards = [s.reward for s in group.rollouts]
        spread = statistics.stdev(rewards) + 1e-6 if method.advantage_std else 1.0
        rollouts = [(s, (s.reward - statistics.fmean(rewards)) / spread) for s in group.rollouts]
        demos = [(s, 0.0) for s in group.demos]
        if method.name == "rl_with_sft":
            taught += rollouts + demos
        else:
            fails = sum(rewards) / 3 <= method.gate if method.name == "hpt" else not any(rewards)
            if method.name == "superrl" and method.gate == "advantage":
                fails = len(set(rewards)) == 1
            taught += demos if fails else rollouts
    return taught


def expected_of(config: Config, plain: torch.nn.Module, groups: Sequence[Group]) -> Expected:
    """The mean over all prompts of what each teaches, or the sum of two token means."""
    method = config.method

    def per(one: Scored, everyone: Sequence[Scored]) -> float:
        """What a term of this token is divided by."""
        if method.name == "rl_with_sft":
            how = method.sft_aggregation if one.response.is_demo else method.rl_aggregation
            return divisor(how, one, of_its_kind(one, everyone), 12)
        if one.response.is_demo:
            return len(groups) * 2 * len(one.logp)
        return len(groups) * 12 if method.name == "hpt" else len(groups) * 3 * len(one.logp)

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        low, high = (0.0, math.inf) if method.name == "hpt" else (0.8, 1.2)
        rl = -torch.minimum(one.ratio * one.advantage, one.ratio.clamp(low, high) * one.advantage)
        coef = 1.0 if method.name == "superrl" else method.sft_coef
        loss = (coef * -one.logp if one.response.is_demo else rl) / per(one, everyone)
        bonus = method.entropy_coef * one.entropy / sum(len(each.logp) for each in everyone)
        return torch.cat([loss, -bonus])

    return expected_step(plain, config.rollout.temperature, taught_by(config, groups), terms)


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rl_with_sft", []),
        ("rl_with_sft", ["sft_coef=0.3", "rl_aggregation=sum", "sft_aggregation=constant", "advantage_std=false"]),
        ("hpt", []),
        ("hpt", ["gate=0.34", "sft_coef=0.3", "advantage_std=true"]),
        ("superrl", []),
        ("superrl", ["gate=advantage", "entropy_coef=0.01"]),
    ],
    ids=["sum", "sum-other", "hpt", "hpt-other", "superrl", "superrl-other"],
)
def test_step_equals_plain_float64(name: str, options: list[str], batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split."""
    model, groups = plain_model(), random_groups(demos=2)
    settings = [*(f"method.{option}" for option in options), "rollout.temperature=0.8"]
    taught = [s for s, _ in taught_by(config_of(name, *settings), groups)]
    assert {s.is_demo for s in taught} == {True, False}
    config = config_of(name, *settings, f"train.tokens_per_microbatch={budget_for(batches, taught)}")
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    metrics, gradient = step(config, model, groups)
    assert_as_expected(metrics, gradient, expected)
    if name != "rl_with_sft":
        share = sum(s.is_demo for s in taught) / 2 / len(groups)
        assert metrics["weight/demo_share"] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("rewards", "gate", "by_demos"),
    [([0, 0, 0, 0], 0.0, True), ([1, 0, 0, 0], 0.0, False), ([1, 0, 0, 0], 0.25, True), ([1, 1, 0, 0], 0.25, False)],
)
def test_gate_of_hpt(rewards: list[float], gate: float, by_demos: bool) -> None:
    """The demonstrations teach where the share of right rollouts is at most the gate."""
    group = Group(
        random_groups(1)[0].prompt, [sequence([1], [2], reward=r) for r in rewards], [sequence([1], [3], is_demo=True)]
    )
    assert Hpt(name="hpt", gate=gate).learn_from(group) == (group.demos if by_demos else group.rollouts)


@pytest.mark.parametrize(
    ("rewards", "by_reward", "by_advantage"), [([0, 0], True, True), ([0, 1], False, False), ([1, 1], False, True)]
)
def test_gates_of_superrl(rewards: list[float], by_reward: bool, by_advantage: bool) -> None:
    """The demonstrations teach where no rollout has earned anything, or none more than another."""
    group = Group(
        random_groups(1)[0].prompt, [sequence([1], [2], reward=r) for r in rewards], [sequence([1], [3], is_demo=True)]
    )
    for gate, by_demos in (("reward", by_reward), ("advantage", by_advantage)):
        assert SuperRl(name="superrl", gate=gate).learn_from(group) == (group.demos if by_demos else group.rollouts)


@pytest.mark.parametrize(
    ("name", "sft", "rl"),
    [
        # token means of 2 tokens of a demonstration and of 4 of rollouts, A = +-1/sqrt(2) on one and on three; the
        # prompt without a right answer adds two tokens with A = 0
        ("rl_with_sft", math.log(4), (-1 + 3) / 2**0.5 / 6),
        # one prompt of two; A = +-1/2, a sum divided by 8
        ("hpt", math.log(4) / 2, (-1 + 3) / 2 / 8 / 2),
        # the token means of a right and of a wrong rollout cancel
        ("superrl", math.log(4) / 2, 0.0),
    ],
)
def test_two_prompts_by_hand(name: str, sft: float, rl: float) -> None:
    """Four words alike: one prompt with a right rollout of one token and a wrong one of three, and one that fails."""
    method = find_method(name)(name=name)
    prompt = random_groups(1)[0].prompt
    right = Group(prompt, [sequence([1], [2], reward=1.0), sequence([1], [2, 3, 1])])
    fails = Group(prompt, [sequence([1], [2]), sequence([1], [3])], [sequence([1], [3, 1], is_demo=True)])
    taught = method.learn_from(right) + method.learn_from(fails)
    (batch,) = pack(taught, 30, CPU)
    info = UpdateInfo(count(taught), step=1, max_new_tokens=8, rollouts_per_prompt=2, demos_per_prompt=1)
    size = len(batch.labels)
    out = method.loss(batch, info)(torch.zeros(size, 5), torch.zeros(4, 5), labels=batch.labels)
    assert out.terms["sft"].item() == pytest.approx(sft, rel=1e-5)
    assert out.terms["policy"].item() == pytest.approx(rl, rel=1e-5, abs=1e-7)


def test_rl_with_sft_is_grpo_plus_sft() -> None:
    """Loss and gradient are those of the two methods, added."""
    model, groups = plain_model(), random_groups(demos=2)
    (loss, gradient), (rl, of_rl), (sft, of_sft) = (
        step(config_of(name), model, groups) for name in ("rl_with_sft", "grpo", "sft")
    )
    sizes = expected_of(config_of("rl_with_sft"), copy.deepcopy(model).double(), groups)
    assert_sum("loss", loss["loss/total"], rl["loss/total"] + sft["loss/total"], sizes.loss_size)
    assert_sum("gradient", gradient, of_rl + of_sft, sizes.gradient_size)


@pytest.mark.parametrize(
    ("name", "alike", "factor"),
    [
        ("hpt", ["name=dr_grpo", "clip_low=1e9", "clip_high=1e9"], 3),
        ("superrl", ["name=grpo", "aggregation=sequence-mean"], 1),
    ],
)
def test_where_every_prompt_succeeds_it_is_its_rl_part(name: str, alike: list[str], factor: float) -> None:
    """Of HPT Dr. GRPO without a clip, with the rollouts of a prompt added up; of SuperRL GRPO by sequence."""
    model, groups = plain_model(), random_groups(demos=2)[1:]
    config = config_of(name, "method.entropy_coef=0")
    metrics, gradient = step(config, model, groups)
    same, other = step(tiny_config(*(f"method.{option}" for option in alike)), model, groups)
    sizes = expected_of(config, copy.deepcopy(model).double(), groups)
    assert_sum("loss", metrics["loss/total"], factor * same["loss/total"], sizes.loss_size)
    assert_sum("gradient", gradient, factor * other, sizes.gradient_size)
    assert metrics["weight/demo_share"] == 0


@pytest.mark.parametrize("name", ["hpt", "superrl"])
def test_where_every_prompt_fails_it_is_sft(name: str) -> None:
    """The mean over demonstrations of token means, refused ones too."""
    model, groups = plain_model(), random_groups(demos=2)
    for group in groups:
        for s in group.rollouts:
            s.reward = 0.0
    groups[1].demos[0].reward = 0.0
    metrics, gradient = step(config_of(name, "method.entropy_coef=0"), model, groups)
    same, other = step(tiny_config("method.name=sft", "method.aggregation=sequence-mean"), model, groups)
    assert metrics["loss/total"] == pytest.approx(same["loss/total"], rel=1e-6)
    assert_sum("gradient", gradient, other, other.norm().item(), noise=1e-6)
    assert metrics["weight/demo_share"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_terms_have_scales_of_their_own(name: str) -> None:
    """Without one term the other is left as it is."""
    model, groups = plain_model(), random_groups(demos=2)
    both, _ = step(config_of(name), model, groups)
    assert both["loss/policy"] and both["loss/sft"]
    for off, left in (("policy", "sft"), ("sft", "policy")):
        metrics, _ = step(config_of(name, f"train.term_scales.{off}=0"), model, groups)
        assert metrics[f"loss/{off}"] == 0 and metrics[f"loss/{left}"] == both[f"loss/{left}"]


def test_a_run(tmp_path: Path) -> None:
    """Two steps record their terms and the share, and draw them."""
    run = train(tmp_path, method__name="hpt", train__page=True)
    for row in read_lines(run / "metrics.jsonl")[1:]:
        assert {"clip/share", "weight/demo_share"} <= row.keys() and row["grad_norm"] > 0
        # an update in which every prompt fails has no term of rollouts
        assert {"loss/policy", "loss/sft"} & row.keys()
    assert all((run / "plots" / f"{name}.png").exists() for name in ("loss_components", "demo_share"))
