"""DFT, PSFT and on-policy SFT: their losses by hand, and whole steps against plain float64."""

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
from srft.methods import UpdateInfo, assign_advantages, find_method
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

NAMES = ("dft", "psft", "on_policy_sft")


def taught_by(name: str, groups: Sequence[Group]) -> list[Response]:
    """Demonstrations, or the rollouts that are right and whole."""
    if name != "on_policy_sft":
        return [s for group in groups for s in group.demos]
    return [s for group in groups for s in group.rollouts if s.reward == 1 and not s.truncated]


def expected_of(
    config: Config, plain: torch.nn.Module, groups: Sequence[Group], old: dict[int, Tensor] | None = None
) -> Expected:
    """The published loss of each token, over what the aggregation divides by, less the entropy bonus."""
    method = config.method

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        loss = {
            "dft": -one.logp.exp().detach() * one.logp,
            "psft": -torch.minimum(one.ratio, one.ratio.clamp(0.8, 1.28)),
            "on_policy_sft": -one.logp,
        }[method.name]
        bonus = method.entropy_coef * one.entropy / sum(len(each.logp) for each in everyone)
        return torch.cat([loss / divisor(method.aggregation, one, everyone, config.rollout.max_new_tokens), -bonus])

    taught = [(s, 0.0) for s in taught_by(method.name, groups)]
    return expected_step(plain, config.rollout.temperature, taught, terms, old)


def groups_of() -> list[Group]:
    """Two demonstrations a prompt, one of which the verifier refuses, and a right rollout that was cut."""
    groups = random_groups(demos=2)
    groups[1].demos[0].reward = 0.0
    groups[-1].rollouts[0].truncated = True
    return groups


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("options", [[], ["aggregation=sequence-mean", "entropy_coef=0.01"]], ids=["default", "other"])
@pytest.mark.parametrize("name", NAMES)
def test_step_equals_plain_float64(name: str, options: list[str], batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split."""
    model, groups = plain_model(), groups_of()
    budget = f"train.tokens_per_microbatch={budget_for(batches, taught_by(name, groups))}"
    overrides = [f"method.name={name}", *(f"method.{option}" for option in options)]
    config = tiny_config(*overrides, "rollout.temperature=0.8", budget)
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    assert_as_expected(*step(config, model, groups), expected)


@pytest.mark.parametrize(("name", "loss"), [("dft", math.log(4) / 4), ("psft", -1.0), ("on_policy_sft", math.log(4))])
def test_tokens_by_hand(name: str, loss: float) -> None:
    """Four words alike, p = 1/4: of a group one demonstration is judged, and one of three rollouts right and whole."""
    rollouts = [sequence([1], [2, 1], reward=1.0), sequence([1], [3]), sequence([1], [2], reward=1.0)]
    rollouts[2].truncated = True
    demos = [sequence([1], [3, 1], is_demo=True) for _ in range(2)]
    demos[1].status = "unjudged"
    method = find_method(name)(name=name)
    taught = method.learn_from(Group(random_groups(1)[0].prompt, rollouts, demos))
    assert taught == ([rollouts[0]] if name == "on_policy_sft" else [demos[0]])
    (batch,) = pack(taught, 10, CPU)
    op = method.loss(batch, UpdateInfo(count(taught), step=1, max_new_tokens=8))
    out = op(torch.zeros(2, 5), torch.zeros(4, 5), labels=batch.labels)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)


def test_in_a_step_of_one_update_psft_has_the_gradient_of_sft() -> None:
    """The ratio is 1, and its derivative that of log p."""
    model, groups = plain_model(), groups_of()
    metrics, gradient = step(tiny_config("method.name=psft"), model, groups)
    _, same = step(tiny_config("method.name=sft"), model, groups)
    assert metrics["loss/total"] == pytest.approx(-1, rel=1e-6)
    assert_sum("gradient", gradient, same, same.norm().item(), noise=1e-6)


def test_psft_lets_go_of_tokens_that_became_likely() -> None:
    """In the second update of a step on the same demonstrations, against the policy before the first."""
    model, groups = plain_model(), groups_of()
    before = copy.deepcopy(model).double()
    with torch.no_grad():
        old = {id(s): statistics_of(before, s, 1.0)[0] for s in members(groups)}
    trained = policy(model)
    config = tiny_config("method.name=psft", "train.lr=0.1", "train.tokens_per_microbatch=60")
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=1.0))
    taught = assign_advantages(groups, config.method)
    remember_old_logprobs(learner, taught)
    for clipped in (False, True):
        now = copy.deepcopy(model).double()
        now.load_state_dict({k: v.double() for k, v in trained.state_dict().items()})
        expected = expected_of(config, now, groups, old)
        metrics = combined([update(learner, taught, 1)])
        assert_as_expected(metrics, flat_gradient(trained), expected)
        assert 0 <= metrics["clip/share"] < 1 and (metrics["clip/share"] > 0) is clipped


def test_with_right_rollouts_for_demonstrations_on_policy_sft_is_sft() -> None:
    """The cross-entropy of the same sequences."""
    model, groups = plain_model(), groups_of()
    metrics, gradient = step(tiny_config("method.name=on_policy_sft"), model, groups)
    for group in groups:
        right = taught_by("on_policy_sft", [group])
        group.demos = [sequence(s.prompt_ids, s.response_ids, is_demo=True) for s in right]
    same, other = step(tiny_config("method.name=sft"), model, groups)
    assert metrics["loss/total"] == pytest.approx(same["loss/total"], rel=1e-6)
    assert_sum("gradient", gradient, other, other.norm().item(), noise=1e-6)


def test_a_run_of_psft(tmp_path: Path) -> None:
    """Of two updates a step the second has moved from the policy before it, and at a high rate too far."""
    run = train(tmp_path, method__name="psft", train__updates_per_step=2, train__lr=0.05)
    rows = read_lines(run / "metrics.jsonl")[1:]
    assert all(row["updates/made"] == 2 and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["clip/share"] > 0


def test_a_run_without_a_right_answer(tmp_path: Path) -> None:
    """On-policy SFT has nothing to learn from, and the run goes on."""
    run = train(tmp_path, method__name="on_policy_sft", train__steps=1)
    (row,) = read_lines(run / "metrics.jsonl")[1:]
    assert row["reward/mean"] == 0 and "loss/total" not in row
