"""What was said to the policy is read and never learned from: every number of a step against plain float64."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from srft.batch import pack
from srft.importance import weigh
from srft.learning import learn, remember_old_logprobs
from srft.methods import UpdateInfo, token_weights
from srft.policy.optimizer import make_optimizer
from srft.responses import Group, Response, Totals, count
from tests.trainer.plain_step import assert_as_expected, statistics_of, step
from tests.trainer.test_method_grpo_kin import KIN, expected_of, options_of
from tests.trainer.test_method_srft import expected_of as expected_of_srft
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
)  # fmt: skip


def talk(s: Response, rng: random.Random) -> Response:
    """The same tokens as a conversation of up to three turns of its own."""
    cuts = sorted(rng.choices(range(1, len(s.response_ids) + 1), k=2 * rng.randrange(3)))
    spans = [after - before for before, after in zip([0, *cuts], [*cuts, len(s.response_ids)], strict=True)]
    made = replace(s, spans=spans if len(spans) > 1 else [])
    return replace(made, rollout_logprobs=[] if s.is_demo else [-0.1 * (i + 1) for i in range(made.num_own)])


def talking(count: int = 10, demos: int = 1) -> list[Group]:
    """Groups of which most responses are conversations; each begins with a token of its own."""
    rng, groups = random.Random(3), random_groups(count, demos=demos)
    for group in groups:
        group.max_new_tokens = 10
        group.rollouts = [talk(s, rng) for s in group.rollouts]
        group.demos = [talk(s, rng) for s in group.demos]
    assert sum(len(s.spans) > 1 for s in members(groups)) > 0.4 * len(members(groups))
    return groups


def test_spans_by_hand() -> None:
    """Prompt 9, then 3 4 of the policy, 5 6 said to it, 7 of it: three rows, that of 7 predicted by the 6."""
    one = replace(sequence([9], [3, 4, 5, 6, 7]), spans=[2, 2, 1], rollout_logprobs=[-1.0, -2.0, -3.0], advantage=2.0)
    empty = replace(sequence([9], [3, 4]), spans=[1, 0, 1], rollout_logprobs=[-4.0, -5.0])
    assert (list(one.own_places), one.own_ids, one.num_own, len(one)) == ([0, 1, 4], [3, 4, 7], 3, 6)
    assert count([one, empty]) == Totals(5, 0, 2, 0)
    (batch,) = pack([one, empty], 99, CPU)
    assert batch.input_ids.tolist() == [9, 3, 4, 5, 6, 7, 9, 3, 4]
    assert batch.loss_rows.tolist() == [0, 1, 4, 6, 7]
    assert batch.labels.tolist() == [3, 4, 7, 3, 4]
    assert batch.rollout_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert batch.advantages.tolist() == [2.0] * 3 + [0.0] * 2
    weights = token_weights(batch, UpdateInfo(count([one, empty]), 1, 10), "sequence-mean")
    assert weights.tolist() == pytest.approx([5 / 2 / 3] * 3 + [5 / 2 / 2] * 2)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", KIN)
def test_step_of_conversations_equals_plain_float64(name: str, batches: int) -> None:
    """Token means, sequence means, GSPO's mean over a sequence and DAPO's lengths, all without what was said."""
    model, groups = plain_model(), talking()
    budget = budget_for(batches, [s for group in groups for s in group.rollouts])
    config = tiny_config(*options_of(name), "rollout.temperature=0.8", f"train.tokens_per_microbatch={budget}")
    expected = expected_of(config, copy.deepcopy(model).double(), groups)
    assert_as_expected(*step(config, model, groups), expected)


def test_step_of_srft_equals_plain_float64() -> None:
    """Rollouts and demonstrations that are conversations."""
    groups = talking(4, demos=2)
    config = tiny_config("method.name=srft", "method.weights=fixed", "method.sft_coef=1", "method.rl_coef=1")
    metrics, gradient = step(config, plain_model(), groups)
    expected = expected_of_srft(config, groups, torch.tensor(1.0), torch.tensor(1.0), 0.0)
    assert_as_expected(metrics, gradient, expected)
    own = torch.cat([statistics_of(plain_model().double(), s, 1.0)[1] for g in groups for s in g.rollouts])
    assert metrics["entropy/rollout"] == pytest.approx(own.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["chord", "luffy", "opd", "psft", "srft"])
def test_a_spoken_token_that_nothing_reads_changes_no_gradient(name: str) -> None:
    """Two tokens said at the end, after which the policy has no turn: with or without them a method learns the same."""
    learned = []
    for said in ([], [7, 8]):
        groups = random_groups(4)
        for s in members(groups):
            s.spans = [len(s.response_ids), len(said), 0] if said else []
            s.response_ids = s.response_ids + said
        for group in groups:
            group.max_new_tokens = 12
            for rollout in group.rollouts:
                rollout.teacher_prompt_ids = rollout.prompt_ids
        options = {"opd": ["method.teacher=policy"], "srft": []}.get(name, [])
        config = tiny_config(f"method.name={name}", "train.lr=0.1", *options)
        model = policy(plain_model())
        learner = learner_of(config, model, make_optimizer(model, config))
        learn(learner, groups, 1)
        learned.append(flat_gradient(model))
    assert (learned[0] - learned[1]).norm() <= 1e-5 * learned[0].norm() + 1e-9


def test_old_logprobs_and_importance_are_of_own_tokens() -> None:
    """Each as long as what the policy said, and the log-probabilities of exactly these tokens."""
    groups = talking(4)
    taught = members(groups)
    config, model = tiny_config("method.name=grpo"), plain_model()
    learner = learner_of(config, policy(model), torch.optim.SGD(model.parameters(), lr=0.0))
    remember_old_logprobs(learner, taught)
    weigh(taught, 2.0, "truncate")
    for s in taught:
        assert s.old_logprobs is not None and s.old_entropy is not None and s.importance is not None
        logp, entropy = statistics_of(copy.deepcopy(model).double(), s, 1.0)
        torch.testing.assert_close(s.old_logprobs.double(), logp.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(s.old_entropy.double(), entropy.detach(), rtol=1e-4, atol=1e-5)
        assert len(s.importance) == s.num_own
