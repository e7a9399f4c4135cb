"""LUFFY: its loss by hand, and a whole step against plain float64 in any number of micro-batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.learning import remember_old_logprobs, update
from srft.methods import UpdateInfo, assign_advantages
from srft.methods.luffy import Method
from srft.record.metrics import combined
from srft.responses import Group, Response, count
from tests.numerics import assert_sum
from tests.trainer.plain_step import (
    Expected,
    Scored,
    assert_as_expected,
    divisor,
    expected_step,
    statistics_of,
    step,
)
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import (
    CPU,
    budget_for,
    flat_gradient,
    learner_of,
    members,
    plain_model,
    policy,
    random_groups,
    sequence,
    tiny_config,
)

LUFFY = "method.name=luffy"


def compared(groups: Sequence[Group]) -> list[tuple[Response, float]]:
    """Everybody, with the reward less the mean of rollouts and demonstrations."""
    taught = []
    for group in groups:
        everybody = [*group.rollouts, *group.demos]
        mean = sum(s.reward for s in everybody) / len(everybody)
        taught += [(s, s.reward - mean) for s in everybody]
    return taught


def expected_of(
    config: Config, model: torch.nn.Module, groups: Sequence[Group], old: dict[int, Tensor] | None = None
) -> Expected:
    """-A r on rollouts, -A p / (p + gamma) on demonstrations, over what the aggregation of all tokens divides by."""
    method = config.method
    low = -math.inf if method.clip_low is None else 1 - method.clip_low
    high = math.inf if method.clip_high is None else 1 + method.clip_high

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        p, ratio = one.logp.exp(), one.ratio
        gain = torch.minimum(ratio * one.advantage, ratio.clamp(low, high) * one.advantage)
        if one.response.is_demo:
            gain = one.advantage * p / (p + method.gamma) if method.gamma else one.advantage * p
        bonus = method.entropy_coef * one.entropy / sum(len(each.logp) for each in everyone)
        return torch.cat([-gain / divisor(method.aggregation, one, everyone, config.rollout.max_new_tokens), -bonus])

    plain = copy.deepcopy(model).double()
    return expected_step(plain, config.rollout.temperature, compared(groups), terms, old)


@pytest.mark.parametrize("batches", [1, 2, 7])
@pytest.mark.parametrize(
    "options",
    [[], ["aggregation=token-mean", "gamma=0", "entropy_coef=0"], ["aggregation=sequence-mean", "gamma=0.3"],
     ["aggregation=constant", "entropy_coef=0.01"]],
    ids=["default", "token-mean", "sequence-mean", "constant"],
)  # fmt: skip
def test_step_equals_plain_float64(options: list[str], batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split."""
    model, groups = plain_model(), random_groups(demos=2)
    overrides = [LUFFY, "rollout.temperature=0.8", *(f"method.{option}" for option in options)]
    budget = f"train.tokens_per_microbatch={budget_for(batches, members(groups))}"
    config = tiny_config(*overrides, budget)
    expected = expected_of(config, model, groups)
    assert_as_expected(*step(config, model, groups), expected)


@pytest.mark.parametrize("clip", [[], ["method.clip_low=0.02", "method.clip_high=0.01"]], ids=["open", "clipped"])
def test_second_update_uses_the_sampling_policy(clip: list[str]) -> None:
    """The ratio of rollouts is to the policy before the step; demonstrations have none."""
    model, groups = plain_model(), random_groups(seed=4)
    before = copy.deepcopy(model).double()
    with torch.no_grad():
        old = {id(s): statistics_of(before, s, 1.0)[0] for s in members(groups)}
    trained = policy(model)
    config = tiny_config(LUFFY, "train.lr=0.05", "train.tokens_per_microbatch=60", *clip)
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=1.0))
    parts = groups[:5], groups[5:]
    remember_old_logprobs(learner, assign_advantages(groups, config.method))
    for part in parts:
        now = copy.deepcopy(model).double()
        now.load_state_dict({k: v.double() for k, v in trained.state_dict().items()})
        expected = expected_of(config, now, part, old)
        metrics = combined([update(learner, assign_advantages(part, config.method), 1)])
        assert_as_expected(metrics, flat_gradient(trained), expected)
    assert (metrics["clip/share"] > 0) == bool(clip)


def test_a_token_by_hand() -> None:
    """Four words alike, p = 1/4: one right demonstration of two tokens against one wrong rollout of one."""
    method = Method(name="luffy")
    group = Group(random_groups(1)[0].prompt, [sequence([1], [2])], [sequence([1], [3, 1], is_demo=True, reward=1.0)])
    taught = method.learn_from(group)
    assert [s.advantage for s in taught] == [-0.5, 0.5]
    (batch,) = pack(taught, 10, CPU)
    loss = method.loss(batch, UpdateInfo(count(taught), step=1, max_new_tokens=8))
    out = loss(torch.zeros(3, 5), torch.zeros(4, 5), labels=batch.labels)
    shaped, policy_term, bonus = -0.5 * 2 * 0.25 / 0.35 / 8, 0.5 / 8, -0.001 * math.log(4)
    assert out.terms["shaped"].item() == pytest.approx(shaped, rel=1e-6)
    assert out.terms["policy"].item() == pytest.approx(policy_term, rel=1e-6)
    assert out.loss.item() == pytest.approx(shaped + policy_term + bonus, rel=1e-6)


def test_without_demonstrations_it_is_unclipped_dr_grpo() -> None:
    """Sums of -A r divided by the longest response, with the mean of the rollouts alone."""
    model, groups = plain_model(), random_groups()
    for group in groups:
        group.demos = []
    config = tiny_config(LUFFY, "method.entropy_coef=0")
    metrics, gradient = step(config, model, groups)
    same, other = step(
        tiny_config("method.name=grpo", "method.loss_type=grpo", "method.clip_low=1e9", "method.clip_high=1e9",
                    "method.aggregation=sum", "method.advantage_std=false"), model, groups,
    )  # fmt: skip
    sizes = expected_of(config, model, groups)
    assert_sum("loss", metrics["loss/total"], same["loss/total"], sizes.loss_size)
    assert_sum("gradient", gradient, other, sizes.gradient_size)


def test_a_group_that_agrees_teaches_nothing() -> None:
    """With every reward alike all advantages, and without the bonus every gradient, are exactly 0."""
    groups = random_groups()[-1:]
    _, gradient = step(tiny_config(LUFFY, "method.entropy_coef=0"), plain_model(), groups)
    assert not gradient.any()


def test_a_run(tmp_path: Path) -> None:
    """Two steps record both terms and draw them."""
    run = train(tmp_path, method__name="luffy", train__page=True)
    for row in read_lines(run / "metrics.jsonl")[1:]:
        assert {"loss/policy", "loss/shaped", "loss/entropy_bonus", "clip/share"} <= row.keys()
        assert row["grad_norm"] > 0
    assert (run / "plots" / "loss_components.png").exists()
