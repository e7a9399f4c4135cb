"""UFT and Prefix-RFT: rollouts that begin with a part of a demonstration, by hand and against plain float64."""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.data.examples import Example
from srft.data.prompts import Prompt
from srft.engine.base import Completion, Sampling
from srft.learning import update
from srft.methods import StepInfo, UpdateInfo, assign_advantages, token_weights
from srft.methods.prefix_rft import Method as PrefixRft
from srft.methods.uft import Method as Uft
from srft.policy.exchange import _decoded, _encoded
from srft.record.metrics import combined, group_metrics
from srft.responses import Group, Response, Totals, count
from srft.rollout import Actor, roll_out
from tests.numerics import assert_sum
from tests.trainer.chat import char_tokenizer
from tests.trainer.plain_step import Expected, Scored, assert_as_expected, divisor, expected_step, step
from tests.trainer.runs import read_lines, small_config, train
from tests.trainer.tiny import (
    CPU,
    FakeEngine,
    FakePool,
    budget_for,
    learner_of,
    members,
    plain_model,
    policy,
    random_groups,
    sequence,
    tiny_config,
)

UFT, PREFIX = "method.name=uft", "method.name=prefix_rft"


def begun(rollout: Response, tokens: int) -> Response:
    """A rollout whose first tokens are of a demonstration."""
    logprobs = [0.0] * tokens + rollout.rollout_logprobs[tokens:]
    return replace(rollout, prefix_tokens=tokens, rollout_logprobs=logprobs)


def groups_with_prefixes(which: slice) -> list[Group]:
    """Groups of four rollouts, of which these begin with up to four tokens of a demonstration where they have more."""
    groups = random_groups(rollouts=4, demos=0, seed=5)
    for number, group in enumerate(groups):
        changed = [begun(r, min(number % 5, len(r.response_ids) - 1)) for r in group.rollouts[which]]
        group.rollouts[which] = changed
    return groups


def shown(one: Scored) -> Tensor:
    """[n] bool: the tokens of its prefix."""
    return torch.arange(len(one.logp)) < one.response.prefix_tokens


def test_what_a_prefix_counts_as() -> None:
    """Three tokens of a demonstration, two of a rollout: one sequence of each kind, with an advantage of its own."""
    hybrid = replace(begun(sequence([1, 2], [3, 4, 5, 6, 7]), 3), advantage=-1.0, prefix_advantage=2.0)
    plain, demo = replace(sequence([1], [8]), advantage=0.5), sequence([1], [9, 1], is_demo=True)
    totals = count([hybrid, plain, demo])
    assert totals == Totals(rollout_tokens=3, demo_tokens=5, rollout_sequences=2, demo_sequences=2)
    (batch,) = pack([hybrid, plain, demo], 30, CPU)
    assert batch.is_demo.tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False]
    assert batch.advantages.tolist() == [2.0] * 3 + [-1.0] * 2 + [0.0] * 2 + [0.5]
    assert batch.rollout_logprobs[:3].tolist() == [0.0] * 3 and batch.rollout_logprobs[3] < 0
    weights = token_weights(batch, UpdateInfo(totals, 1, 10), "sequence-mean")
    assert weights.tolist() == pytest.approx([5 / 2 / 3] * 3 + [3 / 2 / 2] * 2 + [5 / 2 / 2] * 2 + [3 / 2])


def test_a_prefix_crosses_ranks() -> None:
    """What another rank learns from has its prefix, its advantage and its policy; a conversation has its turns."""
    hybrid = replace(begun(sequence([1, 2], [3, 4, 5]), 2), advantage=-0.5, prefix_advantage=0.25)
    hybrid.versions = [(3, 1), (5, 2)]
    plain = sequence([1], [8, 9])
    talk = replace(sequence([1], [8, 9, 5]), spans=[1, 1, 1], rollout_logprobs=[-1.0, -2.0], teacher_prompt_ids=[7])
    found = _decoded([float(x) for s in (hybrid, talk, plain) for x in _encoded(s)])
    assert found == [replace(hybrid, text=""), replace(talk, text=""), replace(plain, text="")]


def test_metrics_of_prefixes() -> None:
    """Tokens of a demonstration were not sampled; rewards are those of all, and those that nothing was shown."""
    group = Group(random_groups(1)[0].prompt, [sequence([1], [2, 3]), begun(sequence([1], [2, 3, 4], reward=1.0), 2)])
    found = group_metrics([group])
    assert found["tokens/sampled"] == 3 and found["length/prefix"] == 1.0 and found["length/mean"] == 2.5
    assert found["reward/mean"] == 0.5 and found["reward/unaided"] == 0.0
    assert not {"length/prefix", "reward/unaided"} & group_metrics([Group(group.prompt, group.rollouts[:1])]).keys()


class Own(Uft):
    """Prefixes by hand."""

    def prefixes(self, demo_ids: Sequence[int], rollouts: int, now: StepInfo, rng: random.Random) -> list[int]:
        return [0, 2, 0, 3]


def rolled_out(folder: Path, method: Any, engine: FakeEngine, prompt: Prompt, limit: int) -> Group:
    """The group of a prompt of four rollouts."""
    config = small_config(folder, train__rollouts_per_prompt=4)
    config = config.model_copy(update={"method": method})
    actor = Actor(engine, Sampling(1.0, limit, (1,)), char_tokenizer(), FakePool())
    (group,) = roll_out(config, actor, [prompt], StepInfo(1, 10, limit, {}))
    return group


def test_rollouts_go_on_from_their_prefix(tmp_path: Path) -> None:
    """The engine gets prompt and prefix, and its seeds; the limit is of both together; the text is of both."""
    tokenizer = char_tokenizer()
    said = tokenizer.encode("so #5", add_special_tokens=False)
    prompt = Prompt(Example("f:0", "2+3=", "5", ["so #5"], {}), [50, 51], [[*said, 1]])
    rest = tokenizer.encode("#5", add_special_tokens=False)
    answers = {
        (50, 51): Completion([60, 1], [-0.5, -0.25], "stop", 0),
        (50, 51, *said[:2]): Completion([60, 61, 1], [-0.5, -0.25, -0.1], "stop", 0),
        (50, 51, *said[:3]): Completion([*rest, 1], [-0.5, -0.25, -0.1], "stop", 0),
    }
    engine = FakeEngine(answers)
    group = rolled_out(tmp_path, Own(name="uft"), engine, prompt, limit=5)
    plain, two, three = group.rollouts[0], group.rollouts[2], group.rollouts[3]
    assert [r.prefix_tokens for r in group.rollouts] == [0, 0, 2, 3] and not group.demos
    assert plain.response_ids == [60, 1] and plain.rollout_logprobs == [-0.5, -0.25] and not plain.truncated
    assert two.response_ids == [*said[:2], 60, 61, 1] and two.rollout_logprobs == [0, 0, -0.5, -0.25, -0.1]
    assert not two.truncated and three.truncated
    assert three.response_ids == [*said[:3], *rest] and three.text == "so #5" and three.prompt_ids == [50, 51]
    ((_, seeds),) = engine.asked
    assert [len(each) for each in seeds] == [2, 1, 1] and len({s for each in seeds for s in each}) == 4
    with pytest.raises(ValueError, match=r"must return 4 numbers of tokens from 0 to 1, all but the last"):
        rolled_out(tmp_path, Own(name="uft"), engine, replace(prompt, demo_ids=[[7, 1]]), limit=5)


@pytest.mark.parametrize(
    ("options", "chances"),
    [
        # 30 steps of 50 with hints: 0.05 + 0.45 (1 + cos(pi t / 30))
        ({}, {10: 0.05 + 0.45 * 1.5, 15: 0.5, 20: 0.05 + 0.45 * 0.5, 30: 0.05, 31: 0.0}),
        ({"q_high": 1.0, "q_low": 0.0, "hint_share": 1.0}, {25: 0.5, 50: 0.0}),
        ({"hint_share": 0.0}, {1: 0.0}),
    ],
    ids=["default", "all", "none"],
)
def test_hints_grow_shorter(options: dict[str, float], chances: dict[int, float]) -> None:
    """The chance of a segment at single steps, by hand; hints are the same for all rollouts, and never all."""
    method, rng = Uft(name="uft", **options), random.Random(0)
    for number, chance in chances.items():
        now = StepInfo(number, 50, 8, {})
        assert method.chance(now) == pytest.approx(chance, abs=1e-12)
        hints = [method.prefixes(range(11), 3, now, rng) for _ in range(400)]
        assert {n for hint in hints for n in hint} <= {0, 2, 4, 6, 8, 10} and all(len(set(h)) == 1 for h in hints)
        # of 400 sums of five draws, within six standard errors
        assert statistics.fmean(h[0] for h in hints) == pytest.approx(10 * chance, abs=0.6)
        assert method.prefixes([1], 3, now, rng) == [0] * 3
        assert set(method.prefixes([5, 1], 2, now, rng)) <= {0, 1}


def test_prefixes_of_one_rollout() -> None:
    """The last of a prompt; at first nearly all of a demonstration, later any share, never none or all of it."""
    method, rng = PrefixRft(name="prefix_rft"), random.Random(0)
    lows = [method.low(StepInfo(number, 10, 8, {})) for number in (1, 6, 10)]
    assert lows[:2] == pytest.approx([0.95, 0.5]) and 0.05 < lows[2] < 0.1
    drawn = {n: [method.prefixes(range(20), 4, StepInfo(n, 10, 8, {}), rng) for _ in range(300)] for n in (1, 10)}
    assert all(each[:3] == [0, 0, 0] for each in drawn[1] + drawn[10])
    assert {each[3] for each in drawn[1]} == {19} and {each[3] for each in drawn[10]} == set(range(1, 19))
    assert method.prefixes([1], 4, StepInfo(1, 10, 8, {}), rng) == [0] * 4
    assert method.prefixes([5, 1], 4, StepInfo(1, 10, 8, {}), rng) == [0, 0, 0, 1]


def test_uft_by_hand() -> None:
    """Four words alike, p = 1/4, of the reference 1/2: a right and a wrong rollout after one token of a hint each."""
    method = Uft(name="uft", advantage_std=False, hint_coef=0.3, entropy_coef=0.1, kl_coef=0.2)
    rollouts = [begun(sequence([1], [2, 3], reward=1.0), 1), begun(sequence([1], [2, 3]), 1)]
    taught = method.learn_from(Group(random_groups(1)[0].prompt, rollouts))
    assert [s.advantage for s in taught] == [0.5, -0.5] and method.needs_ref
    for s in taught:
        s.ref_logprobs = torch.tensor([-99.0, -math.log(2)])
    (batch,) = pack(taught, 10, CPU)
    loss = method.loss(batch, UpdateInfo(count(taught), step=1, max_new_tokens=8))
    out = loss(torch.zeros(4, 5), torch.zeros(4, 5), labels=batch.labels)
    assert out.terms["policy"].item() == pytest.approx(0, abs=1e-7)
    assert out.terms["sft"].item() == pytest.approx(0.3 * math.log(4), rel=1e-6)
    # k3 of a ratio of 2
    assert out.terms["kl"].item() == pytest.approx(0.2 * (2 - math.log(2) - 1), rel=1e-6)
    assert out.terms["entropy_bonus"].item() == pytest.approx(-0.1 * math.log(4), rel=1e-6)


@pytest.mark.parametrize(("continuation", "advantage"), [("reward", 1.0), ("zero", 0.0)])
def test_prefix_rft_by_hand(continuation: str, advantage: float) -> None:
    """Four words alike: two rollouts, one right, and a right one of which two tokens of five were shown."""
    method = PrefixRft(name="prefix_rft", continuation=continuation, prefix_top=0.5, entropy_coef=0.0)
    rollouts = [sequence([1], [2], reward=1.0), sequence([1], [2]), begun(sequence([1], [2] * 5, reward=1.0), 2)]
    for r in rollouts:
        r.old_logprobs = torch.full((len(r.response_ids),), -math.log(4))
        r.old_entropy = torch.tensor([0.1, 0.9, 0.0, 0.0, 0.0][: len(r.response_ids)])
    taught = method.learn_from(Group(random_groups(1)[0].prompt, rollouts))
    assert [(s.advantage, s.prefix_advantage) for s in taught] == [(0.5, 0.0), (-0.5, 0.0), (advantage, 0.5)]
    (batch,) = pack(taught, 20, CPU)
    loss = method.loss(batch, UpdateInfo(count(taught), step=1, max_new_tokens=8))
    hidden_states = torch.zeros(7, 5).requires_grad_()
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    out = loss(hidden_states, weight, labels=batch.labels)
    # the second token of the prefix, the three after it, and the two others
    assert out.loss.item() == pytest.approx(-(0.5 + 3 * advantage + 0.5 - 0.5) / 7, rel=1e-6)
    out.loss.backward()
    moved = [bool(row.any()) for row in hidden_states.grad]
    assert moved == [False, True, *[bool(advantage)] * 3, True, True]


def expected_uft(config: Config, model: torch.nn.Module, groups: Sequence[Group]) -> Expected:
    """-A r and the bonus over the continuations' tokens, the cross-entropy over the hints'."""
    method, taught = config.method, []
    for group in groups:
        rewards = [s.reward for s in group.rollouts]
        spread = statistics.stdev(rewards) + 1e-6
        taught += [(s, (s.reward - statistics.fmean(rewards)) / spread) for s in group.rollouts]

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        hint, hints = shown(one), sum(int(shown(each).sum()) for each in everyone)
        others = sum(len(each.logp) for each in everyone) - hints
        rl = -one.ratio * one.advantage - method.entropy_coef * one.entropy
        return torch.where(hint, -method.hint_coef * one.logp / max(1, hints), rl / others)

    return expected_step(copy.deepcopy(model).double(), config.rollout.temperature, taught, terms)


def expected_prefix(config: Config, model: torch.nn.Module, groups: Sequence[Group]) -> Expected:
    """-A r over all tokens, of a prefix with its own advantage on the tokens of the highest entropy."""
    method, taught = config.method, []
    for group in groups:
        own = [s for s in group.rollouts if not s.prefix_tokens]
        mean = statistics.fmean(s.reward for s in own)
        taught += [(s, s.reward - (0 if s.prefix_tokens else mean)) for s in group.rollouts]
        for s in group.rollouts:
            s.prefix_advantage = s.reward - mean if s.prefix_tokens else 0.0

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        n = one.response.prefix_tokens
        advantages = torch.full_like(one.logp.detach(), one.advantage)
        kept = sorted(range(n), key=lambda t: -one.entropy[t].item())[: math.ceil(method.prefix_top * n)]
        advantages[:n] = 0
        advantages[kept] = one.response.prefix_advantage
        # with aggregation "sequence-mean" a prefix is a sequence of its own
        parts = torch.where(shown(one), n, len(one.logp) - n)
        sequences = sum(1 + bool(each.response.prefix_tokens) for each in everyone)
        by = parts * sequences if method.aggregation == "sequence-mean" else divisor("token-mean", one, everyone, 1)
        tokens = sum(len(each.logp) for each in everyone)
        return torch.cat([-one.ratio * advantages / by, -method.entropy_coef * one.entropy / tokens])

    return expected_step(copy.deepcopy(model).double(), config.rollout.temperature, taught, terms)


@pytest.mark.parametrize("batches", [1, 5])
@pytest.mark.parametrize(
    ("options", "which", "expected_of"),
    [
        ([UFT], slice(None), expected_uft),
        ([UFT, "method.hint_coef=0.5", "method.entropy_coef=0"], slice(None), expected_uft),
        ([PREFIX], slice(3, 4), expected_prefix),
        ([PREFIX, "method.aggregation=sequence-mean", "method.prefix_top=0.7"], slice(3, 4), expected_prefix),
    ],
    ids=["uft", "uft-coefs", "prefix", "prefix-mean"],
)
def test_step_equals_plain_float64(options: list[str], which: slice, expected_of: Any, batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split."""
    model, groups = plain_model(), groups_with_prefixes(which)
    budget = f"train.tokens_per_microbatch={budget_for(batches, members(groups))}"
    config = tiny_config(*options, "rollout.temperature=0.8", "train.rollouts_per_prompt=4", budget)
    expected = expected_of(config, model, groups)
    metrics, gradient = step(config, model, groups)
    assert_as_expected(metrics, gradient, expected)
    # a prefix has no log-probability of the engine that could differ
    assert metrics["mismatch/max"] < 20


@pytest.mark.parametrize("options", [[UFT], [PREFIX, "method.advantage_std=true"]], ids=["uft", "prefix"])
def test_without_demonstrations_it_is_grpo(options: list[str]) -> None:
    """No prefix leaves a step of GRPO on the same rollouts."""
    model, groups = plain_model(), random_groups(rollouts=4, demos=0)
    metrics, gradient = step(tiny_config(*options, "train.rollouts_per_prompt=4"), model, groups)
    same, other = step(tiny_config("method.name=grpo", "method.entropy_coef=0.001"), model, groups)
    assert metrics["loss/total"] == pytest.approx(same["loss/total"], rel=1e-5)
    assert_sum("gradient", gradient, other, float(other.norm()) * 10)


def test_hints_alone_are_sft() -> None:
    """Where all rollouts are alike the hints' cross-entropy is what sft makes of them as demonstrations."""
    model, groups = plain_model(), groups_with_prefixes(slice(None))
    hints = copy.deepcopy(groups)
    for group, other in zip(groups, hints, strict=True):
        for rollout in group.rollouts:
            rollout.reward = 0.0
        kept = [r for r in other.rollouts if r.prefix_tokens]
        other.demos = [sequence(r.prompt_ids, r.response_ids[: r.prefix_tokens], is_demo=True) for r in kept]
        other.rollouts = []
    config = tiny_config(UFT, "method.hint_coef=1", "method.entropy_coef=0", "train.rollouts_per_prompt=4")
    metrics, gradient = step(config, model, groups)
    same, other_gradient = step(tiny_config("method.name=sft"), model, hints)
    assert metrics["loss/sft"] == pytest.approx(same["loss/total"], rel=1e-6)
    assert_sum("gradient", gradient, other_gradient, float(other_gradient.norm()) * 10)


def test_prefixes_alone_are_sft() -> None:
    """Advantage 1, all tokens of a prefix, nothing for its continuation: the gradient of their likelihood."""
    model, groups = plain_model(), groups_with_prefixes(slice(3, 4))
    groups = [g for g in groups if g.rollouts[3].prefix_tokens]
    demos = []
    for group in groups:
        for rollout in group.rollouts:
            rollout.reward = float(rollout.prefix_tokens > 0)
        last = group.rollouts[3]
        demo = sequence(last.prompt_ids, last.response_ids[: last.prefix_tokens], is_demo=True)
        demos.append(Group(group.prompt, [], [demo]))
    options = ["method.continuation=zero", "method.prefix_top=1", "method.entropy_coef=0"]
    config = tiny_config(PREFIX, "train.rollouts_per_prompt=4", *options)
    _, gradient = step(config, model, groups)
    _, other = step(tiny_config("method.name=sft"), model, demos)
    share = count(members(demos)).demo_tokens / count(members(groups)).tokens
    assert_sum("gradient", gradient, share * other, float(other.norm()) * 10)


def test_terms_of_prefix_rft_are_left_out_apart() -> None:
    """Without its prefixes it is what it is on the rest; the two add up."""
    model, groups = plain_model(), groups_with_prefixes(slice(3, 4))
    own = [PREFIX, "train.rollouts_per_prompt=4", "method.entropy_coef=0"]
    gradients = [
        step(tiny_config(*own, *left), model, groups)[1]
        for left in ([], ["train.term_scales.prefix=0"], ["train.term_scales.policy=0"])
    ]
    assert_sum("gradient", gradients[0], gradients[1] + gradients[2], float(gradients[0].norm()) * 10)
    assert all(g.norm() > 0 for g in gradients)


def test_the_entropies_before_the_step_decide() -> None:
    """A second update of a step takes the same tokens of a prefix, whatever the first has made of them."""
    model, groups = plain_model(), groups_with_prefixes(slice(3, 4))
    trained = policy(model)
    config = tiny_config(PREFIX, "train.rollouts_per_prompt=4", "train.lr=0.5")
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=1.0))
    taught = assign_advantages(groups, config.method)
    (batch,) = pack(taught, 10_000, CPU)
    combined([update(learner, taught, 1)])
    chosen = config.method._learned(pack(taught, 10_000, CPU)[0])
    kept = {id(s): s.old_entropy for s in taught}
    combined([update(learner, taught, 1)])
    assert all(s.old_entropy is kept[id(s)] for s in taught)
    assert torch.equal(chosen, config.method._learned(pack(taught, 10_000, CPU)[0]))
    assert 0 < int((~chosen).sum()) < len(batch.labels)


@pytest.mark.parametrize("name", ["uft", "prefix_rft"])
def test_a_run(name: str, tmp_path: Path) -> None:
    """Two steps from beginnings of demonstrations, recorded."""
    options = {"method__hint_share": 1.0, "method__q_low": 0.95} if name == "uft" else {}
    run = train(tmp_path, method__name=name, **options)
    for row in read_lines(run / "metrics.jsonl")[1:]:
        assert row["length/prefix"] > 0 and row["entropy/demo"] > 0 and row["grad_norm"] > 0
        assert row["mismatch/max"] < 1e-4
        assert ("reward/unaided" in row) == (name == "prefix_rft")
