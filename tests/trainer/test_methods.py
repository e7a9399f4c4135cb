"""What each method learns: advantages by hand, and a whole step's loss and gradient against plain float64."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.learning import remember_old_logprobs, update
from srft.methods import Aggregation, UpdateInfo, assign_advantages, group_advantages, token_weights
from srft.record.metrics import combined
from srft.responses import Group, Response, Totals
from tests.numerics import assert_sum
from tests.trainer.plain_step import (
    Expected,
    Scored,
    assert_as_expected,
    divisor,
    expected_step,
    of_its_kind,
    statistics_of,
    step,
)
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

METHODS = {
    "paper": ["method.preset=paper"],
    "official": ["method.preset=official"],
    "upt": ["method.preset=upt"],
    "grpo": ["method.name=grpo"],
    "sft": ["method.name=sft"],
}
PRESETS = ("paper", "official", "upt")
TERMS = ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative")


def expected_members(config: Config, groups: list[Group]) -> list[tuple[Response, float]]:
    """The sequences a method learns from, with their advantages, from the definition."""
    method = config.method
    divide = method.name == "grpo" or (method.name == "srft" and method.preset == "paper")
    chosen = []
    for group in groups:
        kept = {"srft": group.rollouts + group.demos, "grpo": group.rollouts, "sft": group.demos}[method.name]
        rewards = [s.reward for s in kept]
        mean = statistics.fmean(rewards)
        spread = statistics.stdev(rewards) + 1e-6 if divide else 1.0
        chosen += [(s, (s.reward - mean) / spread) for s in kept]
    return chosen


def token_losses(config: Config, one: Scored, h: Tensor) -> dict[str, Tensor]:
    """The terms of one response before their denominators, by aggregation; ``h`` is the entropy in the weights."""
    method, s, advantage, logp, ratio = config.method, one.response, one.advantage, one.logp, one.ratio
    if method.name == "sft":
        return {method.aggregation: -logp}
    if method.name == "grpo":
        if method.loss_type == "gspo":
            ratio = ratio.log().mean().exp().expand(len(logp))
        clipped = ratio.clamp(1 - method.clip_low, 1 + method.clip_high)
        if method.loss_type == "cispo":
            return {method.aggregation: -clipped.detach() * advantage * logp}
        return {method.aggregation: -torch.minimum(ratio * advantage, clipped * advantage)}
    official = method.preset == "official"
    rl = method.rl_aggregation or ("sequence-mean" if method.preset == "paper" else "sum")
    if s.is_demo:
        weight = 0.5 * torch.exp(h if official else -h)
        p = logp.exp()
        shaped = -advantage * (p if method.preset == "paper" else p / (p + 0.1))
        sft = method.sft_aggregation or "token-mean"
        return {sft: -weight * logp + shaped} if sft == rl else {sft: -weight * logp, rl: shaped}
    weight = 0.1 * torch.exp(h)
    if official:
        return {rl: -advantage * ratio * (weight if advantage > 0 else 1)}
    return {rl: -weight * logp if s.reward == 1 else logp}


def expected_of(
    config: Config, plain: transformers.PreTrainedModel, groups: list[Group], old: dict[int, Tensor] | None = None
) -> Expected:
    """What an update of this configuration must come to."""
    method = config.method
    bonus = 0.001 if method.name == "srft" and method.preset != "paper" else 0.0

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        everything = torch.cat([each.entropy for each in everyone])
        if method.needs_entropy:
            h = everything.mean()
        elif method.name == "srft" and method.preset == "official":
            h = one.entropy
        else:
            h = one.entropy.mean()
        kin = of_its_kind(one, everyone)
        parts = [
            losses / divisor(how, one, kin, config.rollout.max_new_tokens)
            for how, losses in token_losses(config, one, h.detach()).items()
        ]
        return torch.cat([*parts, -bonus * one.entropy / len(everything)])

    return expected_step(plain, config.rollout.temperature, expected_members(config, groups), terms, old)


@pytest.mark.parametrize(
    ("divide", "right", "wrong"), [(True, 2.4749, -0.3536), (False, 0.875, -0.125)], ids=["std", "mean"]
)
def test_advantages_of_a_group_rescued_by_its_demo(divide: bool, right: float, wrong: float) -> None:
    """Seven wrong rollouts and a right demonstration, by hand."""
    found = group_advantages([0.0] * 7 + [1.0], divide)
    assert found == pytest.approx([wrong] * 7 + [right], abs=5e-5)


@pytest.mark.parametrize("divide", [True, False], ids=["std", "mean"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_no_spread_means_exactly_no_advantage(reward: float, divide: bool) -> None:
    """Equal rewards teach nothing, also where their floating-point spread is not 0."""
    assert group_advantages([reward] * 7, divide) == [0.0] * 7


@pytest.mark.parametrize("name", METHODS)
def test_who_is_compared_and_who_teaches(name: str) -> None:
    """SRFT compares rollouts with demonstrations, GRPO sees no demonstration, SFT no rollout."""
    config, groups = tiny_config(*METHODS[name]), random_groups()
    expected = expected_members(config, groups)
    chosen = assign_advantages(groups, config.method)
    assert [id(s) for s in chosen] == [id(s) for s, _ in expected]
    kinds = {"grpo": {False}, "sft": {True}}.get(name, {False, True})
    assert {s.is_demo for s in chosen} == kinds
    if name != "sft":
        assert [s.advantage for s in chosen] == pytest.approx([a for _, a in expected], rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_not_judged_teaches_nothing(name: str) -> None:
    """Advantages and the chosen sequences are those of groups that never held the unjudged ones."""
    config, groups, without = tiny_config(*METHODS[name]), random_groups(), random_groups()
    for group, other in zip(groups, without, strict=True):
        group.rollouts[1].status = "unjudged"
        del other.rollouts[1]
    for unjudged in (*groups[2].rollouts, *groups[2].demos):
        unjudged.status = "unjudged"
    without[2].rollouts, without[2].demos = [], []
    chosen, expected = assign_advantages(groups, config.method), assign_advantages(without, config.method)
    assert [(s.response_ids, s.advantage) for s in chosen] == [(s.response_ids, s.advantage) for s in expected]


@pytest.mark.parametrize("divide", [True, False], ids=["std", "mean"])
@pytest.mark.parametrize("name", ["paper", "official", "upt", "grpo"])
def test_advantage_std_overrides_the_preset(name: str, divide: bool) -> None:
    """One right of two rollouts and a right demonstration."""
    config = tiny_config(*METHODS[name], f"method.advantage_std={str(divide).lower()}")
    (group,) = random_groups(1, rollouts=2)
    group.rollouts[0].reward, group.rollouts[1].reward = 0.0, 1.0
    assign_advantages([group], config.method)
    spread = statistics.stdev([0, 1] if name == "grpo" else [0, 1, 1]) + 1e-6 if divide else 1.0
    centre = 1 / 2 if name == "grpo" else 2 / 3
    assert group.rollouts[0].advantage == pytest.approx(-centre / spread, rel=1e-12)
    assert group.rollouts[1].advantage == pytest.approx((1 - centre) / spread, rel=1e-12)


@pytest.mark.parametrize(
    ("how", "rollout", "demo"),
    [
        ("token-mean", 1.0, 1.0),
        # divided by 40 and 10 tokens, these give 1 / (4 sequences x 5 tokens) and 1 / (2 x 8)
        ("sequence-mean", 40 / 4 / 5, 10 / 2 / 8),
        ("constant", 40 / 4 / 12, 10 / 2 / 12),
        ("sum", 40 / 12, 10 / 12),
    ],
)
def test_token_weights(how: Aggregation, rollout: float, demo: float) -> None:
    """Weights of a rollout of 5 tokens and a demonstration of 8, at rollout.max_new_tokens=12."""
    totals = Totals(rollout_tokens=40, demo_tokens=10, rollout_sequences=4, demo_sequences=2)
    (batch,) = pack([sequence([1], [2] * 5), sequence([1, 2], [2] * 8, is_demo=True)], 20, CPU)
    weights = token_weights(batch, UpdateInfo(totals, step=1, max_new_tokens=12), how)
    # the longer one is packed first
    assert weights.tolist() == pytest.approx([demo] * 8 + [rollout] * 5, rel=1e-6)


@pytest.mark.parametrize(
    ("how", "rollout", "demo"),
    [
        ("token-mean", 1.0, 1.0),
        ("sequence-mean", 50 / 6 / 5, 50 / 6 / 8),
        ("constant", 50 / 6 / 12, 50 / 6 / 12),
        ("sum", 50 / 12, 50 / 12),
    ],
)
def test_token_weights_of_both_kinds_together(how: Aggregation, rollout: float, demo: float) -> None:
    """The same where rollouts and demonstrations are one kind of 50 tokens in 6 sequences."""
    totals = Totals(rollout_tokens=40, demo_tokens=10, rollout_sequences=4, demo_sequences=2)
    (batch,) = pack([sequence([1], [2] * 5), sequence([1, 2], [2] * 8, is_demo=True)], 20, CPU)
    weights = token_weights(batch, UpdateInfo(totals, step=1, max_new_tokens=12), how, together=True)
    assert weights.tolist() == pytest.approx([demo] * 8 + [rollout] * 5, rel=1e-6)


@pytest.mark.parametrize("batches", [1, 2, 7])
@pytest.mark.parametrize("name", METHODS)
def test_step_equals_plain_float64(name: str, batches: int) -> None:
    """Loss, gradient and entropies of a step, packed into any number of micro-batches, at temperature 0.8."""
    model, groups = plain_model(), random_groups(demos=2)
    overrides = [*METHODS[name], "rollout.temperature=0.8"]
    taught = [s for s, _ in expected_members(tiny_config(*overrides), groups)]
    config = tiny_config(*overrides, f"train.tokens_per_microbatch={budget_for(batches, taught)}")
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    metrics, found = step(config, model, groups)
    assert_as_expected(metrics, found, expected)
    assert_sum("norm", metrics["grad_norm"], expected.gradient.norm(), expected.gradient_size)
    for key, value in expected.entropies.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5)
    assert {k for k in metrics if k.startswith("entropy/")} == expected.entropies.keys()


@pytest.mark.parametrize(
    ("name", "scope"),
    [*((name, "preset") for name in METHODS), *((name, "batch") for name in list(METHODS)[:3])],
)
def test_micro_batches_do_not_change_a_step(name: str, scope: str) -> None:
    """One, two or seven micro-batches give the same metrics and gradient up to summation order."""
    extra = [] if scope == "preset" else ["method.entropy_scope=batch"]
    model, groups = plain_model(), random_groups(demos=2, seed=1)
    taught = [s for s, _ in expected_members(tiny_config(*METHODS[name]), groups)]
    results = []
    for batches in (1, 2, 7):
        budget = f"train.tokens_per_microbatch={budget_for(batches, taught)}"
        results.append(step(tiny_config(*METHODS[name], *extra, budget), model, groups))
    (metrics, gradient), *others = results
    config = tiny_config(*METHODS[name], *extra)
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    signed = {key: value for key, value in metrics.items() if key.startswith("loss/")}
    for other_metrics, other_gradient in others:
        assert_sum("gradient", other_gradient, gradient, expected.gradient_size, noise=1e-6)
        assert other_metrics.keys() == metrics.keys()
        for key, value in signed.items():
            # a term without its weight is larger than the loss it enters
            size = max(expected.loss_size, abs(value))
            assert_sum(key, other_metrics[key], value, size)
        assert {k: v for k, v in other_metrics.items() if k not in signed} == pytest.approx(
            {k: v for k, v in metrics.items() if k not in signed}, rel=1e-6
        )


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", ["paper", "official", "upt"])
def test_batch_entropy_is_that_of_the_whole_update(name: str, batches: int) -> None:
    """With the "batch" scope the weights use the mean over all micro-batches."""
    model, groups = plain_model(), random_groups(seed=2)
    budget = f"train.tokens_per_microbatch={budget_for(batches, members(groups))}"
    config = tiny_config(*METHODS[name], "method.entropy_scope=batch", budget)
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    assert_as_expected(*step(config, model, groups), expected)


@pytest.mark.parametrize("options", [
    ("token-mean", "token-mean"), ("sequence-mean", "constant"), ("constant", "sum"), ("sum", "sequence-mean"),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("name", METHODS)
def test_aggregated_step_equals_plain_float64(name: str, options: tuple[str, str]) -> None:
    """Aggregations other than the method's own, over three micro-batches; SRFT takes one for each kind of term."""
    model, groups = plain_model(tied=True), random_groups(seed=3)
    kinds = ("sft_aggregation", "rl_aggregation") if name in PRESETS else ("aggregation",)
    overrides = [*METHODS[name], *(f"method.{kind}={how}" for kind, how in zip(kinds, options, strict=False))]
    taught = [s for s, _ in expected_members(tiny_config(*overrides), groups)]
    config = tiny_config(*overrides, f"train.tokens_per_microbatch={budget_for(3, taught)}")
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    assert_as_expected(*step(config, model, groups), expected)


@pytest.mark.parametrize("name", ["paper", "official", "upt"])
def test_the_terms_add_up_to_the_loss(name: str) -> None:
    """The four logged components and the entropy bonus are the whole loss."""
    config = tiny_config(*METHODS[name], "train.tokens_per_microbatch=60")
    metrics, _ = step(config, plain_model(), random_groups())
    terms = [metrics[f"loss/{term}"] for term in TERMS]
    assert all(terms)
    parts = [*terms, metrics["loss/entropy_bonus"]]
    assert_sum("loss", metrics["loss/total"], sum(parts), sum(map(abs, parts)))
    assert {f"loss/{term}_unweighted" for term in TERMS} <= metrics.keys()
    # the bonus is coefficient times the mean over all tokens
    totals = {kind: sum(len(s.response_ids) for s in members(random_groups()) if s.is_demo is kind)
              for kind in (False, True)}  # fmt: skip
    mean = (metrics["entropy/rollout"] * totals[False] + metrics["entropy/demo"] * totals[True]) / sum(
        totals.values()
    )
    bonus = 0.0 if name == "paper" else -0.001 * mean
    assert metrics["loss/entropy_bonus"] == pytest.approx(bonus, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "cispo", "official"])
def test_second_update_uses_the_sampling_policy(loss_type: str) -> None:
    """Of two updates from one step's rollouts, the second compares with the policy before the first."""
    overrides = METHODS["official"] if loss_type == "official" else [
        "method.name=grpo", f"method.loss_type={loss_type}", "method.clip_low=0.02", "method.clip_high=0.01"
    ]  # fmt: skip
    model, groups = plain_model(), random_groups(seed=4)
    before = copy.deepcopy(model).double()
    with torch.no_grad():
        old = {id(s): statistics_of(before, s, 1.0)[0] for s in members(groups)}
    trained = policy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    config = tiny_config(*overrides, "train.lr=0.05", "train.tokens_per_microbatch=60")
    parts = [assign_advantages(part, config.method) for part in (groups[:5], groups[5:])]
    remember_old_logprobs(learner_of(config, trained, optimizer), parts[0] + parts[1])
    for part in (groups[:5], groups[5:]):
        now = copy.deepcopy(model).double()
        now.load_state_dict({k: v.double() for k, v in trained.state_dict().items()})
        expected = expected_of(config, now, part, old)
        metrics = combined([update(learner_of(config, trained, optimizer), assign_advantages(part, config.method), 1)])
        assert_as_expected(metrics, flat_gradient(trained), expected)
    if loss_type != "official":
        # the steps are large enough that the clip matters
        assert metrics["clip/share"] > 0


def test_a_step_moves_the_weights_and_warms_the_rate_up() -> None:
    """Plain gradient descent at half the rate in the first of two warm-up steps, with the gradient clipped."""
    config = tiny_config("train.lr=0.1", "train.lr_warmup_steps=2", "train.grad_clip=0.5")
    trained = policy(plain_model())
    before = torch.cat([p.detach().flatten().clone() for p in trained.parameters()])
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    sequences = assign_advantages(random_groups(), config.method)
    metrics = combined([update(learner_of(config, trained, optimizer), sequences, 1)])
    after = torch.cat([p.detach().flatten() for p in trained.parameters()])
    assert metrics["lr"] == 0.05
    assert metrics["grad_norm"] > 0.5
    assert (after - before).norm().item() == pytest.approx(0.05 * 0.5, rel=1e-3)


def test_equal_rewards_give_grpo_no_gradient() -> None:
    """A batch whose groups all agree leaves every gradient exactly 0."""
    groups = [g for g in random_groups() if len({s.reward for s in g.rollouts}) == 1]
    assert len(groups) >= 2
    _, gradient = step(tiny_config("method.name=grpo"), plain_model(), groups)
    assert not gradient.any()


def test_sequence_entropy_is_noted() -> None:
    """Each sequence learns its mean entropy for the sample table."""
    model, groups = plain_model(), random_groups()
    step(tiny_config(), model, groups)
    plain = copy.deepcopy(model).double()
    for s in members(groups):
        assert s.entropy == pytest.approx(statistics_of(plain, s, 1.0)[1].mean().item(), rel=1e-5)


def test_refused_demo_gets_a_negative_advantage() -> None:
    """A demonstration that its verifier refuses counts as wrong beside a right rollout."""
    group = Group(
        random_groups(1)[0].prompt, [sequence([1], [2], reward=1.0)], [sequence([1], [3], is_demo=True)]
    )
    assign_advantages([group], tiny_config().method)
    assert group.demos[0].advantage < 0 < group.rollouts[0].advantage
