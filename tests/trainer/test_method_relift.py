"""ReLIFT: what its buffer takes and gives, its two kinds of updates, and a run that is interrupted."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.learning import learn, update
from srft.methods import StepInfo, UpdateInfo, assign_advantages
from srft.methods.relift import Method
from srft.responses import Group, Response, count
from tests.numerics import assert_sum
from tests.trainer.plain_step import Scored, assert_as_expected, divisor, expected_step, step
from tests.trainer.runs import comparable_rows, read_lines, train
from tests.trainer.test_method_sft_then_rl import stopping_at
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

RELIFT = "method.name=relift"


def unsolved(*demos: int, solved: int = 0) -> list[Group]:
    """Groups without a right rollout, each with a demonstration of one token, and some with one."""
    made = [
        Group(random_groups(1)[0].prompt, [sequence([1], [5]), sequence([1], [6])],
              [sequence([1], [token], is_demo=True, reward=1.0)])
        for token in demos
    ]  # fmt: skip
    for _ in range(solved):
        (group,) = unsolved(99)
        group.rollouts[0].reward = 1.0
        made.append(group)
    return made


def alone(own: Any) -> list[Any]:
    """What one rank hears from all."""
    return [own]


def test_the_newest_of_the_buffer_are_learned() -> None:
    """Three at a time, by hand; the rest waits; solved prompts, and unjudged rollouts or demonstrations, do not."""
    method, memory = Method(name="relift", buffer_size=3), {}

    def learned(groups: list[Group]) -> list[int]:
        return [s.response_ids[0] for s in method.further(groups, StepInfo(1, 9, 8, memory), alone)]

    assert learned(unsolved(11, 12, solved=2)) == []
    unjudged = unsolved(20, 21)
    unjudged[0].demos[0].status = "unjudged"
    for rollout in unjudged[1].rollouts:
        rollout.status = "unjudged"
    assert learned(unjudged) == []
    assert memory == {"buffer": [[[1], [11]], [[1], [12]]]} == json.loads(json.dumps(memory))
    assert learned(unsolved(14, 13)) == [12, 13, 14]
    assert memory == {"buffer": [[[1], [11]]]}
    # more than one update takes: as many again stay
    assert learned(unsolved(*range(30, 38))) == [35, 36, 37]
    assert [demo for _, (demo,) in memory["buffer"]] == [32, 33, 34]


def test_the_buffer_keeps_turns() -> None:
    """Of a demonstration that is a conversation, through the checkpoint's JSON."""
    method, memory = Method(name="relift", buffer_size=2), {}
    groups = unsolved(11)
    groups[0].demos[0].response_ids, groups[0].demos[0].spans = [11, 5, 6], [1, 1, 1]
    assert method.further(groups, StepInfo(1, 9, 8, memory), alone) == []
    memory = json.loads(json.dumps(memory))
    found = method.further(unsolved(12), StepInfo(1, 9, 8, memory), alone)
    assert [(s.response_ids, s.spans) for s in found] == [([11, 5, 6], [1, 1, 1]), ([12], [])]


def test_the_buffer_holds_a_step_where_no_size_is_set() -> None:
    """Of all ranks, each of which takes the same from it."""
    parts = unsolved(11, solved=1), unsolved(12)

    def heard(own: Any) -> list[Any]:
        sizes = [(2, [[[1], [11]]]), (1, [[[1], [12]]])]
        assert own in [(n, list(map(list, pairs))) for n, pairs in sizes]
        return sizes

    memories: list[dict[str, Any]] = [{}, {}]
    for part, memory in zip(parts, memories, strict=True):
        method = Method(name="relift")
        assert method.further(part, StepInfo(1, 9, 8, memory), heard) == []
        (first, *others) = method.further(part, StepInfo(2, 9, 8, memory), heard)
        assert len(others) == 2 and first.is_demo and first.response_ids == [12]
    assert memories[0] == memories[1] == {"buffer": [[[1], [11]]]}


def test_a_token_by_hand() -> None:
    """Four words alike, p = 1/4: a right and a wrong rollout, and a demonstration of two tokens by itself."""
    method = Method(name="relift")
    taught = method.learn_from(
        Group(random_groups(1)[0].prompt, [sequence([1], [2, 3], reward=1.0), sequence([1], [2])])
    )
    assert [s.advantage for s in taught] == [0.5, -0.5]
    demo = [sequence([1], [3, 1], is_demo=True)]
    for sequences, expected in ((taught, (-0.5 * 2 + 0.5) / 8), (demo, math.log(4))):
        (batch,) = pack(sequences, 10, CPU)
        loss = method.loss(batch, UpdateInfo(count(sequences), step=1, max_new_tokens=8))
        out = loss(torch.zeros(len(batch.labels), 5), torch.zeros(4, 5), labels=batch.labels)
        assert out.loss.item() == pytest.approx(expected - 0.001 * math.log(4), rel=1e-6)


@pytest.mark.parametrize("batches", [1, 5])
def test_step_equals_plain_float64(batches: int) -> None:
    """Loss and gradient of the update on rollouts, however it is split."""
    model, groups = plain_model(), random_groups(demos=0)
    config = tiny_config(RELIFT, f"train.tokens_per_microbatch={budget_for(batches, members(groups))}")
    taught = [
        (s, s.reward - sum(r.reward for r in g.rollouts) / len(g.rollouts)) for g in groups for s in g.rollouts
    ]

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        tokens = sum(len(each.logp) for each in everyone)
        loss = -one.ratio * one.advantage / divisor("sum", one, everyone, config.rollout.max_new_tokens)
        return torch.cat([loss, -0.001 * one.entropy / tokens])

    expected = expected_step(copy.deepcopy(model).double(), 1.0, taught, terms)
    assert_as_expected(*step(config, model, groups), expected)


def gradient_of(config: Config, model: transformers.PreTrainedModel, taught: list[Response]) -> Tensor:
    """Of one update from these responses."""
    trained = policy(model)
    update(learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=0.0)), taught, 1)
    return flat_gradient(trained)


def test_without_demonstrations_it_is_unclipped_dr_grpo() -> None:
    """Its RL part; and what it learns from the buffer is a step of sft."""
    model, groups = plain_model(), random_groups()
    shown = copy.deepcopy(groups)
    for group, other in zip(groups, shown, strict=True):
        group.demos, other.rollouts = [], []
    dr_grpo = ["loss_type=grpo", "clip_low=1e9", "clip_high=1e9", "aggregation=sum", "advantage_std=false"]
    same = [["method.name=grpo", *(f"method.{option}" for option in dr_grpo)], ["method.name=sft"]]
    for part, options in zip((groups, shown), same, strict=True):
        taught = assign_advantages(part, tiny_config(*options).method)
        found = gradient_of(tiny_config(RELIFT, "method.entropy_coef=0"), model, taught)
        expected = gradient_of(tiny_config(*options), model, taught)
        assert_sum("gradient", found, expected, float(expected.norm()) * 10)


def test_a_step_makes_the_update_more() -> None:
    """At the rate of its kind, counted, and gone from the buffer; SGD moves by both gradients."""
    model, groups = plain_model(), random_groups()
    trained = policy(model)
    config = tiny_config(RELIFT, "method.buffer_size=1", "train.lr=0.1", "train.sft_lr_scale=0.5")
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=1.0))
    figures = learn(learner, groups, 1)
    # the first group of ``random_groups`` is all wrong
    assert figures["updates/made"] == 2 and learner.memory["buffer"] == [] and figures["lr"] == pytest.approx(0.05)
    assert {"loss/policy", "loss/sft", "entropy/rollout", "entropy/demo"} <= figures.keys()
    # each of the one update that has it
    assert figures["loss/policy"] == pytest.approx(step(config, model, groups)[0]["loss/policy"], rel=1e-5)
    assert figures["tokens/trained"] == sum(len(s) for g in groups for s in g.rollouts) + len(groups[0].demos[0])
    for group in groups:
        group.rollouts[0].reward = 1.0
    assert learn(learner, groups, 2)["updates/made"] == 1


def test_a_run_goes_on_with_its_buffer(tmp_path: Path) -> None:
    """What waited before a checkpoint waits after it."""
    options = {"method__name": "relift", "method__buffer_size": 6, "train__steps": 4}
    whole = train(tmp_path, **options, name="whole")
    rows = read_lines(whole / "metrics.jsonl")[1:]
    # nobody is right yet: four prompts a step
    assert [row["updates/made"] for row in rows] == [1, 2, 2, 1]
    assert [row["buffer/demos"] for row in rows][0] == 0 and rows[2]["loss/sft"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srft.train.learn", stopping_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **options, name="cut")
    assert comparable_rows(train(tmp_path, **options, name="cut", train__resume=True)) == comparable_rows(whole)
