"""The largest micro-batches before the first step: what they are, and that they leave nothing behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import srft.worst_case
from srft.batch import pack
from srft.learning import update
from srft.methods import assign_advantages
from srft.worst_case import longest_sequences, worst_case
from tests.trainer.tiny import CPU, learner_of, plain_model, policy, random_groups, tiny_config


def _learner(*overrides: str):
    config = tiny_config("model.compute_dtype=float32", *overrides)
    model = policy(plain_model())
    return learner_of(config, model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("method", ["srft", "grpo", "sft", "luffy", "chord"])
def test_they_fill_two_micro_batches_with_the_longest_sequences(method: str) -> None:
    """Of prompts and responses at their limits, of the kinds that the method takes."""
    learner = _learner(f"method.name={method}", "train.tokens_per_microbatch=100")
    sequences = longest_sequences(learner)
    assert {(len(s.prompt_ids), len(s.response_ids)) for s in sequences} == {(8, 12)}
    assert [len(batch.input_ids) for batch in pack(sequences, 100, CPU)] == [100, 100]
    kinds = {"srft": {True, False}, "luffy": {True, False}, "chord": {True, False}, "grpo": {False}, "sft": {True}}
    assert {s.is_demo for s in sequences} == kinds[method]
    assert "of 100 tokens, took " in worst_case(learner)


def test_they_are_no_more_than_a_step_has() -> None:
    """A budget of thousands is not filled where a step has 10 prompts of one demonstration each."""
    learner = _learner("method.name=sft", "train.tokens_per_microbatch=100000")
    assert len(longest_sequences(learner)) == 2 * 10
    learner = _learner("method.name=sft", "train.tokens_per_microbatch=100000", "train.updates_per_step=5")
    assert len(longest_sequences(learner)) == 2 * 2


def test_a_cpu_is_given_what_it_computes_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real model a sequence or two; one each where even that takes longer."""
    learner = _learner("train.tokens_per_microbatch=100")
    weights = sum(p.numel() for p in learner.model.parameters())
    monkeypatch.setattr(srft.worst_case, "_CPU_FLOPS", 2 * 6 * weights * 20 * 3)
    assert len(longest_sequences(learner)) == 2 * 3
    assert worst_case(learner).startswith("Micro-batches of the longest sequences, of 60 tokens, took ")
    monkeypatch.setattr(srft.worst_case, "_CPU_FLOPS", 1.0)
    assert len(longest_sequences(learner)) == 2


def test_they_leave_no_trace() -> None:
    """Weights, moments, gradients and random numbers are as before, and so is what the next update makes of them."""
    learner = _learner("train.tokens_per_microbatch=60")
    groups = random_groups()
    twin = copy.deepcopy((learner.model.state_dict(), groups))
    state = torch.get_rng_state()
    worst_case(learner)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in learner.model.parameters()) and not learner.optimizer.state
    assert all(torch.equal(x, twin[0][name]) for name, x in learner.model.state_dict().items())
    sequences = [s for group in groups for s in assign_advantages([group], learner.config.method)]
    update(learner, sequences, 1)
    other = _learner("train.tokens_per_microbatch=60")
    update(other, [s for group in twin[1] for s in assign_advantages([group], other.config.method)], 1)
    pairs = zip(learner.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_room_is_said_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-memory error names the options that help, and gradients are dropped."""
    learner = _learner("train.tokens_per_microbatch=60")

    def refuse(*_: object, **__: object) -> None:
        learner.model.lm_head.weight.grad = torch.zeros_like(learner.model.lm_head.weight)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(srft.worst_case, "accumulate", refuse)
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    with pytest.raises(ValueError, match="a micro-batch of 60 tokens.*80 GiB.*tokens_per_microbatch lower.*srft.plan"):
        worst_case(learner)
    assert learner.model.lm_head.weight.grad is None
