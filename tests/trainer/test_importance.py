"""What tokens of an older policy count: the weights and their figures by hand, the loss against plain float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from srft.batch import Batch, pack
from srft.importance import lag_figures, weigh
from srft.learning import learn
from srft.methods import UpdateInfo, assign_advantages, find_method, method_names
from srft.responses import Response, count
from tests.trainer.plain_step import Scored, assert_as_expected, divisor, expected_step, of_its_kind, statistics_of
from tests.trainer.tiny import (
    CPU,
    flat_gradient,
    learner_of,
    members,
    plain_model,
    policy,
    random_groups,
    sequence,
    tiny_config,
)

TAKE_LAG = [name for name in method_names() if find_method(name).takes_lag]


def two_rollouts_and_a_demo() -> list[Response]:
    """One rollout begins with a token of a demonstration."""
    first, second = sequence([1], [5, 6, 7]), sequence([1], [5, 6])
    first.rollout_logprobs, second.rollout_logprobs = [-1.0, -2.0, -1.0], [0.0, -3.0]
    # of two policies, and of the one before the step
    first.versions, second.versions, second.prefix_tokens = [(3, 2), (5, 1)], [(6, 1)], 1
    demo = sequence([1], [8, 9], is_demo=True)
    first.old_logprobs = torch.tensor([-1.0, -2.0 + math.log(4), -1.0 + math.log(0.5)])
    second.old_logprobs, demo.old_logprobs = torch.tensor([-7.0, -3.0 + math.log(1.05)]), torch.tensor([-1.0, -1.0])
    return [first, demo, second]


def test_weights_and_figures_by_hand() -> None:
    """Ratios 1, 4, 0.5 and 1.05, of which one is above the cap; prefixes and demonstrations count once."""
    for mode, above in (("truncate", 2.0), ("mask", 0.0)):
        held = two_rollouts_and_a_demo()
        weigh(held, 2.0, mode)  # type: ignore[arg-type]
        figures = lag_figures(held, 7, 2.0)
        weights = [s.importance.tolist() for s in held if s.importance is not None]
        assert weights == [pytest.approx([1, above, 0.5]), [1, 1], pytest.approx([1, 1.05])]
        total, squares = 6.55, 1 + 16 + 0.25 + 1.05**2
        assert figures == pytest.approx({
            "lag/mean": 7 / 4, "lag/max": 3, "lag/older": 3 / 4, "lag/is_mean": total / 4, "lag/is_p95": 4,
            "lag/is_max": 4, "lag/is_off": 0.5, "lag/is_ess": total**2 / 4 / squares, "lag/is_capped": 0.25,
        })  # fmt: skip


def test_without_rollouts_there_is_no_lag() -> None:
    """A step of demonstrations alone has no figures."""
    demo = two_rollouts_and_a_demo()[1]
    assert lag_figures([demo], 2, 2.0) == {}


def behind(seed: int = 0) -> tuple[torch.nn.Module, list, dict[int, Tensor]]:
    """A model, groups whose engine's log-probabilities are those of others, and the ratios to these in float64."""
    model, groups = plain_model(), random_groups(seed=seed)
    plain, ratios = copy.deepcopy(model).double(), {}
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for s in members(groups):
            if not s.is_demo:
                logp = statistics_of(plain, s, 1.0)[0]
                ratios[id(s)] = (0.6 * torch.randn(len(logp), generator=draw)).double().exp()
                s.rollout_logprobs = (logp - ratios[id(s)].log()).tolist()
    return model, groups, ratios


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("name", ["grpo", "srft", "on_policy_sft", "rl_with_sft"])
def test_a_step_equals_plain_float64(name: str, mode: str) -> None:
    """Ratio and likelihood forms: each rollout token's term times its weight, denominators as without."""
    model, groups, ratios = behind()
    plain = copy.deepcopy(model).double()
    config = tiny_config(
        f"method.name={name}", "rollout.max_lag=1", "rollout.is_cap=1.5", f"rollout.is_mode={mode}",
        "train.tokens_per_microbatch=60", "train.grad_terms_every=0",
    )  # fmt: skip

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        s, kin = one.response, of_its_kind(one, everyone)
        if s.is_demo:
            losses = -one.logp / divisor("token-mean", one, kin, 12)
            if name == "rl_with_sft":
                return losses
            # a mask takes tokens of rollouts alone out of the mean entropy of their sequence
            h = one.entropy.mean().detach()
            shaped = -one.advantage * one.logp.exp() / divisor("sequence-mean", one, kin, 12)
            return 0.5 * torch.exp(-h) * losses + shaped
        ratio = ratios[id(s)]
        weight = ratio.clamp(max=1.5) if mode == "truncate" else torch.where(ratio > 1.5, 0.0, ratio)
        if name == "srft":
            h = one.entropy[weight > 0].mean().detach()
            losses = -0.1 * torch.exp(h) * one.logp if s.reward == 1 else one.logp
            return (weight * losses / divisor("sequence-mean", one, kin, 12))[weight > 0]
        if name == "on_policy_sft":
            return -weight * one.logp / divisor("token-mean", one, kin, 12)
        return -weight * one.ratio * one.advantage / divisor("token-mean", one, kin, 12)

    taught = [(s, s.advantage) for s in assign_advantages(groups, config.method)]
    expected = expected_step(plain, 1.0, taught, terms)
    trained = policy(model)
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=0.0))
    metrics = learn(learner, groups, 1)
    assert_as_expected(metrics, flat_gradient(trained), expected)
    assert metrics["lag/is_capped"] > 0.1


@pytest.mark.parametrize(("updates", "passes"), [(1, 1), (2, 3)])
def test_one_update_scores_in_the_forward_pass_that_it_learns_by(updates: int, passes: int) -> None:
    """Several score all tokens before the first; either way responses have the policy's word on them."""
    model, groups, ratios = behind()
    trained = policy(model)
    config = tiny_config(
        "method.name=grpo", "rollout.max_lag=1", f"train.updates_per_step={updates}", "train.grad_terms_every=0"
    )
    seen: list[int] = []
    trained.model.register_forward_pre_hook(lambda *_: seen.append(1))
    metrics = learn(learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=0.0)), groups, 1)
    assert len(seen) == passes
    every = torch.cat([ratios[id(s)] for s in members(groups) if id(s) in ratios and s.importance is not None])
    assert metrics["lag/is_mean"] == pytest.approx(every.mean().item(), rel=1e-4)


def test_without_lag_no_token_is_weighted() -> None:
    """The same groups at max_lag=0 have the gradient of a policy that sampled them."""
    model, groups, _ = behind()
    trained = policy(model)
    learner = learner_of(tiny_config("method.name=grpo"), trained, torch.optim.SGD(trained.parameters(), lr=0.0))
    metrics = learn(learner, groups, 1)
    assert not [name for name in metrics if name.startswith(("lag", "ratio"))]
    assert all(s.importance is None and s.old_logprobs is None for s in members(groups))


@pytest.mark.parametrize("name", [name for name in TAKE_LAG if name != "gspo"])
def test_each_method_weights_its_rollouts(name: str) -> None:
    """The gradient of a rollout's row is its weight times what it would be, that of a demonstration's row stays.

    Of GSPO, whose ratio is of a sequence, a row has the weights of all of it.
    """
    options = [f"method.name={name}", "train.demos_per_prompt=1"]
    if "entropy_coef" in find_method(name).model_fields:
        options.append("method.entropy_coef=0")
    if name in ("opd", "self_distill"):
        options += ["method.rl_coef=1", "method.sft_coef=1"]
    config = tiny_config(*options)
    groups = random_groups(count=6, seed=3)
    if name in ("prefix_rft", "uft"):
        for s in members(groups):
            s.prefix_tokens = 0 if s.is_demo or len(s.response_ids) < 3 else 1
    held, draw = assign_advantages(groups, config.method), torch.Generator().manual_seed(0)
    for s in held:
        n = len(s.response_ids)
        s.old_logprobs, s.teacher_logprobs = (-3 * torch.rand(n, generator=draw) for _ in range(2))
        s.old_entropy = torch.rand(n, generator=draw)
    (once,) = pack(held, 10_000, CPU)
    choice = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, once.labels.shape, generator=draw)]
    weights = torch.where(once.is_demo, 1.0, choice)
    for s, place in once.responses():
        s.importance = weights[place]
    (weighted,) = pack(held, 10_000, CPU)
    hidden, head = torch.randn(len(weights), 8, generator=draw), torch.randn(37, 8, generator=draw)
    update = UpdateInfo(count(held), 2, 12, entropies={"rollout": 1.0, "demo": 1.0})

    def row_gradients(batch: Batch) -> Tensor:
        rows = hidden.clone().requires_grad_()
        loss = partial(config.method.loss(batch, update), labels=batch.labels, temperature=1.0)
        loss(rows, head).loss.backward()
        assert rows.grad is not None
        return rows.grad

    plain = row_gradients(once)
    assert (plain[~once.is_demo].abs().sum(-1) > 0).any()
    torch.testing.assert_close(row_gradients(weighted), weights[:, None] * plain, rtol=1e-5, atol=1e-9)
