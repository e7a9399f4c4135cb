"""Models beside the policy: a reference KL by hand and in a whole step, what the reference is, and what is refused."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from srft.batch import empty_batch, pack
from srft.config import Config
from srft.learning import learn, update
from srft.methods import UpdateInfo, assign_advantages
from srft.policy.adapter import put_adapters
from srft.policy.frozen import Frozen, load_frozen
from srft.policy.learner import Learner
from srft.policy.lora import adapters
from srft.policy.model import byte_tokenizer
from srft.policy.parallel import ALONE
from srft.prepare import frozen_models
from srft.record.metrics import combined
from srft.responses import Group, count
from tests.trainer.plain_step import (
    Expected,
    Scored,
    assert_as_expected,
    divisor,
    expected_step,
    of_its_kind,
    statistics_of,
)
from tests.trainer.runs import assert_same_run, comparable_rows, train
from tests.trainer.test_method_chord import compared
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

KL = ["method.name=grpo", "method.kl_coef=0.3"]


def learner_beside(config: Config, model: transformers.PreTrainedModel, frozen: Frozen) -> Learner:
    """A policy that stays where it is, with models beside it."""
    trained = policy(model)
    return replace(learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=0.0)), frozen=frozen)


def step(learner: Learner, groups: Sequence[Group]) -> tuple[dict[str, float], Tensor]:
    """Figures and gradient of one update from these groups."""
    taught = assign_advantages(groups, learner.config.method)
    return combined([update(learner, taught, 1)]), flat_gradient(learner.model)


def expected_of(
    config: Config, model: torch.nn.Module, reference: torch.nn.Module, groups: Sequence[Group]
) -> Expected:
    """GRPO's policy term, or the likelihood of demonstrations, and kl_coef times k3 of the same tokens."""
    plain, other = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    is_sft = config.method.name == "sft"

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        loss = -one.logp if is_sft else -one.ratio * one.advantage
        ref = statistics_of(other, one.response, config.rollout.temperature)[0].detach()
        k3 = (ref - one.logp).exp() - (ref - one.logp) - 1
        how = config.method.aggregation
        return torch.cat([loss, config.method.kl_coef * k3]) / divisor(
            how, one, of_its_kind(one, everyone), config.rollout.max_new_tokens
        )

    taught = [(s, a) for s, a in compared(groups, True) if s.is_demo is is_sft]
    return expected_step(plain, config.rollout.temperature, taught, terms)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(
    "options",
    [KL, [*KL, "method.aggregation=sequence-mean"], ["method.name=sft", "method.kl_coef=0.2"]],
    ids=["grpo", "grpo-sequence-mean", "sft"],
)
def test_a_step_with_a_reference_equals_plain_float64(options: list[str], batches: int) -> None:
    """Loss and gradient at temperature 0.8, however the update is split; the reference gets no gradient."""
    model, other, groups = plain_model(), plain_model(seed=1), random_groups(6)
    taught = [s for s in members(groups) if s.is_demo is ("method.name=sft" in options)]
    budget = f"train.tokens_per_microbatch={budget_for(batches, taught)}"
    config = tiny_config(*options, "rollout.temperature=0.8", budget)
    reference = policy(other)
    metrics, gradient = step(learner_beside(config, model, Frozen(reference)), groups)
    assert_as_expected(metrics, gradient, expected_of(config, model, other, groups))
    assert metrics["loss/kl"] > 0.01
    assert all(p.grad is None for p in reference.parameters())


def test_a_token_by_hand() -> None:
    """Four words alike, p = 1/4, and 1/2 in the reference: k3 = 2 - log 2 - 1, of advantage 0."""
    method = tiny_config("method.name=grpo", "method.kl_coef=0.5").method
    rollout = sequence([1], [2])
    rollout.ref_logprobs = torch.tensor([math.log(0.5)])
    (batch,) = pack([rollout], 10, CPU)
    loss = method.loss(batch, UpdateInfo(count([rollout]), step=1, max_new_tokens=8))
    out = loss(torch.zeros(1, 5).requires_grad_(), torch.zeros(4, 5), labels=batch.labels)
    assert out.loss.item() == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-6)


def test_against_itself_there_is_no_kl() -> None:
    """The policy as it starts is its own reference, also where it has none in memory; figures say 0."""
    model, groups = plain_model(), random_groups(4)
    plain, gradient = step(learner_beside(tiny_config("method.name=grpo"), model, Frozen()), groups)
    for frozen in (Frozen(policy(model)), Frozen()):
        metrics, same = step(learner_beside(tiny_config(*KL), model, frozen), groups)
        assert metrics["loss/kl"] == metrics["kl/reference"] == 0
        assert metrics["loss/total"] == plain["loss/total"] and torch.equal(same, gradient)


def test_every_update_of_a_step_has_the_same_reference() -> None:
    """Scores are those of the first pass, and the logged distance is the mean of log p - log ref of rollouts."""
    model, other, groups = plain_model(), plain_model(seed=1), random_groups(4)
    config = tiny_config(*KL, "train.updates_per_step=2")
    figures = learn(learner_beside(config, model, Frozen(policy(other))), groups, 1)
    rollouts = [s for g in groups for s in g.rollouts]
    gaps = []
    for s in rollouts:
        now, ref = (statistics_of(copy.deepcopy(m).double(), s, 1.0)[0] for m in (model, other))
        gaps.append(now - ref)
        assert torch.allclose(s.ref_logprobs.double(), ref, atol=1e-5)
    assert figures["kl/reference"] == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-4)


def test_an_excluded_token_stays_a_number() -> None:
    """A reference that has probability 0 for a token that was sampled: the loss is finite."""
    model, other, groups = plain_model(), plain_model(seed=1), random_groups(4)
    reference, row = policy(other), groups[0].rollouts[0].response_ids[0]
    with torch.no_grad():
        reference.lm_head.weight[row] *= 1e30
    metrics, gradient = step(learner_beside(tiny_config(*KL), model, Frozen(reference)), groups)
    assert math.isfinite(metrics["loss/total"]) and bool(gradient.isfinite().all())


def test_a_batch_without_sequences_has_the_scores_of_the_others() -> None:
    """A rank that has nothing keeps step with those that have reference and teacher."""
    batch = empty_batch(is_demo=False, scores=["ref_logprobs", "teacher_logprobs"], device=CPU)
    assert batch.ref_logprobs is not None and batch.teacher_logprobs is not None and batch.old_logprobs is None


def test_new_adapters_need_no_copy() -> None:
    """Their base is the reference, and with B moved away from zero the distance is theirs."""
    pytest.importorskip("peft", reason="needs peft: pip install 'srft[lora]'")
    config = tiny_config(*KL, "model.lora.rank=2", "model.name=somewhere")
    assert frozen_models(config, byte_tokenizer(), None, ALONE) == Frozen()
    model, groups = plain_model(), random_groups(4)
    adapted = copy.deepcopy(model)
    put_adapters(adapted, "somewhere", config)
    with torch.no_grad():
        for _, p in adapters(adapted):
            p.add_(0.1)
    learner = learner_beside(config, adapted, Frozen())
    metrics, _ = step(learner, groups)
    assert metrics["loss/kl"] > 1e-3
    (first, *_), plain = groups[0].rollouts, copy.deepcopy(model).double()
    assert torch.allclose(first.ref_logprobs.double(), statistics_of(plain, first, 1.0)[0], atol=1e-5)


def saved(folder: Path, **changes: object) -> str:
    """A folder of a model of bytes with its tokenizer."""
    plain_model(vocab=258, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_resumed_run_keeps_its_reference(tmp_path: Path) -> None:
    """The start of a model built from scratch, not the checkpoint, also after an option that is free to change."""
    options = {"method__name": "sft", "method__kl_coef": 0.5, "model__warm_start__max_steps": 1}
    whole = train(tmp_path, name="whole", train__steps=3, **options)
    part = train(tmp_path, name="part", train__steps=2, **options)
    resumed = train(tmp_path, name="part", train__steps=3, train__resume=True, **options)
    assert resumed == part
    assert_same_run(part, whole)
    rows = comparable_rows(whole)
    assert rows[1]["loss/kl"] < 1e-9 < rows[2]["loss/kl"] < rows[3]["loss/kl"]
    free = {"train__tokens_per_microbatch": 128, "train__resume": True}
    train(tmp_path, name="part", train__steps=4, **free, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="the model that the run started from, .*, is not there"):
        train(tmp_path, name="part", train__steps=5, **free, **options)


def test_a_reference_of_ones_own(tmp_path: Path) -> None:
    """A folder: the first step has a KL to it."""
    folder = saved(tmp_path / "other", seed=3)
    run = train(tmp_path, method__name="sft", method__kl_coef=0.5, model__reference=folder, train__steps=1)
    assert comparable_rows(run)[1]["loss/kl"] > 0.1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter; merge it"),
        (lambda folder: shutil.rmtree(folder), "cannot load a tokenizer"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot load a causal LM"),
        (lambda folder: plain_model().save_pretrained(folder), "has embeddings for 37 tokens"),
    ],
    ids=["adapter", "absent", "damaged", "small"],
)
def test_folders_that_are_refused(tmp_path: Path, spoil: object, said: str) -> None:
    """One line that names the option."""
    folder = saved(tmp_path / "other")
    spoil(Path(folder))  # type: ignore[operator]
    with pytest.raises(ValueError, match=said):
        load_frozen("model.reference", folder, tiny_config(), byte_tokenizer(), ALONE)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Tokens of other numbers would be scored for what they are not."""
    folder, other = saved(tmp_path / "other"), byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="model.reference=.* has another tokenizer: 1 tokens differ, such as '<more>'"):
        load_frozen("model.reference", folder, tiny_config(), other, ALONE)


def test_a_reference_that_nothing_uses_is_refused() -> None:
    """A setting that would not be followed says so."""
    with pytest.raises(ValueError, match='model.reference=x, but method.name="grpo".* has no use'):
        tiny_config("method.name=grpo", "model.reference=x")

