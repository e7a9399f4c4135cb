"""Dr. GRPO, DAPO, GSPO and CISPO: advantages and lengths by hand, and whole steps against plain float64."""

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
from srft.learning import remember_old_logprobs, update
from srft.methods import UpdateInfo, assign_advantages, find_method
from srft.methods.dapo import Method as Dapo
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

KIN = ("dr_grpo", "dapo", "gspo", "cispo")
MOST = 10
"""Longest completion of the groups, of which the last 4 tokens cost DAPO reward."""


def groups_of(seed: int = 0) -> list[Group]:
    """Rollouts of up to 11 tokens with a limit of ``MOST``."""
    groups = random_groups(seed=seed)
    for group in groups:
        group.max_new_tokens = MOST
    return groups


def compared(name: str, groups: Sequence[Group]) -> list[tuple[Response, float]]:
    """Rollouts against each other, from the definitions."""
    taught = []
    for group in groups:
        rewards = [s.reward for s in group.rollouts]
        if name == "dapo":
            rewards = [s.reward - max(0, len(s.response_ids) - 6) / 4 * 0.5 for s in group.rollouts]
        spread = 1.0 if name == "dr_grpo" else statistics.stdev(rewards) + 1e-6
        taught += [(s, (r - statistics.fmean(rewards)) / spread) for s, r in zip(group.rollouts, rewards, strict=True)]
    return taught


def options_of(name: str) -> list[str]:
    extra = {"dapo": ["method.overlong_buffer=4", "method.overlong_penalty=0.5"]}
    return [f"method.name={name}", *extra.get(name, [])]


def expected_of(
    config: Config, plain: torch.nn.Module, groups: Sequence[Group], old: dict[int, Tensor] | None = None
) -> Expected:
    """The published loss of each token, over what its aggregation divides by."""
    name = config.method.name
    how = {"dr_grpo": "constant", "gspo": "sequence-mean"}.get(name, "token-mean")
    low, high = {"dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 0.28)}[name]

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        ratio, a = one.ratio, one.advantage
        if name == "gspo":
            ratio = ratio.log().mean().exp().expand(len(one.logp))
        clipped = ratio.clamp(1 - low, 1 + high)
        loss = -clipped.detach() * a * one.logp if name == "cispo" else -torch.minimum(ratio * a, clipped * a)
        return loss / divisor(how, one, everyone, config.rollout.max_new_tokens)

    return expected_step(plain, config.rollout.temperature, compared(name, groups), terms, old)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", KIN)
def test_step_equals_plain_float64(name: str, batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split; no demonstration is learned from."""
    model, groups = plain_model(), groups_of()
    taught = [s for group in groups for s in group.rollouts]
    budget = f"train.tokens_per_microbatch={budget_for(batches, taught)}"
    config = tiny_config(*options_of(name), "rollout.temperature=0.8", budget)
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    assert_as_expected(*step(config, model, groups), expected)


@pytest.mark.parametrize("name", KIN)
def test_second_update_is_clipped_at_its_own_bounds(name: str) -> None:
    """The ratio is to the policy before the step, which the first update has left far enough behind."""
    model, groups = plain_model(), groups_of(seed=4)
    before = copy.deepcopy(model).double()
    with torch.no_grad():
        old = {id(s): statistics_of(before, s, 1.0)[0] for s in members(groups)}
    trained = policy(model)
    config = tiny_config(*options_of(name), "train.lr=0.2", "train.tokens_per_microbatch=60")
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=1.0))
    remember_old_logprobs(learner, assign_advantages(groups, config.method))
    for part in (groups[:5], groups[5:]):
        now = copy.deepcopy(model).double()
        now.load_state_dict({k: v.double() for k, v in trained.state_dict().items()})
        expected = expected_of(config, now, part, old)
        metrics = combined([update(learner, assign_advantages(part, config.method), 1)])
        assert_as_expected(metrics, flat_gradient(trained), expected)
    assert metrics["clip/share"] > 0


@pytest.mark.parametrize("known", [False, True], ids=["engine", "before the step"])
def test_likely_tokens_are_out_of_the_policy_term(known: bool) -> None:
    """By the engine's probabilities, or those before the step; entropies and denominators are those of all tokens."""
    model, groups = plain_model(), groups_of()
    plain, taught = copy.deepcopy(model).double(), compared("grpo", groups)
    with torch.no_grad():
        old = {id(s): statistics_of(plain, s, 1.0)[0] for s, _ in taught}
    sampled_at = old if known else {id(s): torch.tensor(s.rollout_logprobs) for s, _ in taught}
    # half of the tokens
    limit = round(torch.cat(list(sampled_at.values())).median().exp().item(), 4)
    config = tiny_config("method.name=grpo", f"method.prob_clip={limit}")
    if known:
        for s, _ in taught:
            s.old_logprobs = old[id(s)].float()

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        kept = sampled_at[id(one.response)] <= math.log(limit)
        return -one.ratio * one.advantage * kept / divisor("token-mean", one, everyone, 12)

    expected = expected_step(plain, 1.0, taught, terms, old)
    metrics, gradient = step(config, model, groups)
    assert_as_expected(metrics, gradient, expected)
    assert metrics["entropy/rollout"] == pytest.approx(expected.entropies["entropy/rollout"], rel=1e-5)
    unlimited, _ = step(tiny_config("method.name=grpo", "method.prob_clip=0.9999999"), model, groups)
    assert unlimited["loss/total"] == step(tiny_config("method.name=grpo"), model, groups)[0]["loss/total"]


@pytest.mark.parametrize(
    ("name", "policy_loss"),
    [
        # A = 1/2 and -1/2 of a right rollout of one token and a wrong one of three, divided by 2 sequences of 8
        ("dr_grpo", -(0.5 * 1 - 0.5 * 3) / 16),
        # A = +-1/sqrt(2) by the standard deviation of (1, 0); over 4 tokens
        ("dapo", -(1 - 3) / 2**0.5 / 4),
        # the token means of the two cancel
        ("gspo", 0.0),
        # -A log p with p = 1/4
        ("cispo", -(1 - 3) / 2**0.5 / 4 * -1.3862944),
    ],
)
def test_a_group_by_hand(name: str, policy_loss: float) -> None:
    """Four words alike, of which a right answer takes one and a wrong one three."""
    method = find_method(name)(name=name)
    rollouts = [sequence([1], [2], reward=1.0), sequence([1], [2, 3, 1])]
    group = Group(random_groups(1)[0].prompt, rollouts, [sequence([1], [3], is_demo=True, reward=1.0)], 8)
    taught = method.learn_from(group)
    assert [id(s) for s in taught] == [id(s) for s in rollouts]
    (batch,) = pack(taught, 20, CPU)
    loss = method.loss(batch, UpdateInfo(count(taught), step=1, max_new_tokens=8))
    out = loss(torch.zeros(4, 5), torch.zeros(4, 5), labels=batch.labels)
    assert out.loss.item() == pytest.approx(policy_loss, rel=1e-5, abs=1e-6)


def test_dapo_takes_reward_from_what_is_too_long() -> None:
    """Nothing up to the buffer, in proportion within it, all at the limit; the reward itself stays."""
    method = Dapo(name="dapo", overlong_buffer=4, overlong_penalty=0.5)
    assert [method.lost_to_length(n, 10) for n in (1, 6, 7, 8, 10)] == [0, 0, 0.125, 0.25, 0.5]
    # unset: a fifth of 20,480
    assert [Dapo(name="dapo").lost_to_length(n, 20480) for n in (16384, 18432, 20480)] == [0, 0.5, 1]
    assert Dapo(name="dapo", overlong_buffer=0).lost_to_length(10, 10) == 0
    long, short = sequence([1], [2] * 10, reward=1.0), sequence([1], [2] * 3, reward=1.0)
    group = Group(random_groups(1)[0].prompt, [long, short], [], 10)
    method.learn_from(group)
    assert long.advantage < 0 < short.advantage and long.reward == short.reward == 1


@pytest.mark.parametrize(
    ("rewards", "wanted"), [([0, 0], True), ([1, 1], True), ([1, 0], False), ([0.5, 0.25], False), ([], True)]
)
def test_dapo_wants_another_where_there_is_no_contrast(rewards: list[float], wanted: bool) -> None:
    """As long as there is a round left; what was not judged is no contrast."""
    method = Dapo(name="dapo", max_resamples=2)
    group = Group(random_groups(1)[0].prompt, [sequence([1], [2], reward=r) for r in rewards])
    unjudged = sequence([1], [2], reward=0.75)
    unjudged.status = "unjudged"
    group.rollouts.append(unjudged)
    assert [method.wants_another(group, tried) for tried in range(4)] == [wanted, wanted, False, False]


def test_where_nothing_is_too_long_dapo_is_grpo_with_a_higher_clip() -> None:
    """Of the same groups; resampling is the trainer's."""
    model, groups = plain_model(), random_groups()
    config = tiny_config("method.name=dapo", "method.overlong_buffer=0")
    found, same = step(config, model, groups), step(tiny_config("method.name=grpo"), model, groups)
    assert found[0]["loss/total"] == same[0]["loss/total"]
    assert_sum("gradient", found[1], same[1], same[1].norm().item())


def test_a_run_of_dapo(tmp_path: Path) -> None:
    """Groups without a contrast give way, what was sampled for them is counted, and the rewards are the judge's."""
    reward = tmp_path / "odd.py"
    reward.write_text("def odd(completion, answer, row):\n    return float(len(completion) % 2)\n")
    run = {"reward__kind": f"{reward}:odd", "data__bad_demos": "keep", "method__name": "dapo"}
    rows = read_lines(train(tmp_path, **run) / "metrics.jsonl")[1:]
    assert sum(row["groups/resampled"] for row in rows) > 0
    for row in rows:
        asked = 4 + row["groups/resampled"]
        assert row["tokens/sampled"] == pytest.approx(row["length/mean"] * 3 * asked)
        assert row["groups/alike"] == pytest.approx(row["groups/resampled"] / asked), "in the end all have a contrast"
        right = row["reward/mean"] * 3 * asked
        assert right == pytest.approx(round(right), abs=1e-9), "of rewards of 0 and 1, whatever the length"
        # a reward that is lost to length may leave one of a group at its mean
        assert (row["tokens/trained"] == row["tokens/step"]) == (row["tokens/skipped"] == 0)
