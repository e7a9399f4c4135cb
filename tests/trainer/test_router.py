"""The auxiliary loss of mixtures of experts: the model's own, over a whole update however it is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.config import Config
from srft.learning import update
from srft.methods import assign_advantages
from srft.policy.router import Router, router_logits, router_of
from srft.record.metrics import combined
from tests.trainer.architectures import build
from tests.trainer.test_model import packed_batch
from tests.trainer.tiny import (
    budget_for,
    flat_gradient,
    learner_of,
    members,
    policy,
    random_groups,
    relative_error,
    tiny_config,
)

MIXTURES = (
    "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "phimoe", "granitemoe", "jetmoe", "dbrx", "ernie4.5-moe", "flex-olmo",
)  # fmt: skip
COEF = "model.router_aux_coef=0.5"  # as strong as the other terms, so that its gradient shows


def step(model: PreTrainedModel, config: Config) -> tuple[dict[str, float], Tensor]:
    """The trainer's own update on a fresh copy of ``model``: metrics and gradient."""
    trained = policy(model, f"model.gradient_checkpointing={str(config.model.gradient_checkpointing).lower()}")
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
    sequences = assign_advantages(random_groups(), config.method)
    return combined([update(learner_of(config, trained, optimizer), sequences, 1)]), flat_gradient(trained)


def own_auxiliary_loss(model: PreTrainedModel) -> tuple[float, Tensor]:
    """What transformers returns for the same sequences, padded and masked, and its gradient."""
    rows = [s.prompt_ids + s.response_ids for s in members(random_groups())]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    loss.backward()
    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return loss.item(), flat_gradient(model)


@pytest.mark.parametrize("name", MIXTURES)
def test_value_and_gradient_are_those_of_the_model(name: str) -> None:
    """Per family, against the model's own on a padded batch; the method's part is what remains without it."""
    model = build(name)
    expected, expected_gradient = own_auxiliary_loss(model)
    metrics, gradient = step(model, tiny_config(COEF))
    without, plain_gradient = step(model, tiny_config("model.router_aux_coef=0"))
    assert metrics["loss/router_aux"] == pytest.approx(0.5 * expected, rel=1e-5)
    assert metrics["loss/total"] - without["loss/total"] == pytest.approx(0.5 * expected, abs=1e-5)
    assert "loss/router_aux" not in without
    error = (gradient - plain_gradient - 0.5 * expected_gradient).norm()
    assert error <= 1e-5 * (gradient.norm() + plain_gradient.norm())
    assert 0.5 * expected_gradient.norm() > 1e-3 * plain_gradient.norm(), "or its gradient would not show"


@pytest.mark.parametrize("changes", ["", "model.gradient_checkpointing=true", "method.entropy_scope=batch"])
def test_no_split_changes_it(changes: str) -> None:
    """One micro-batch and four give one gradient, though the loss is a product of two means over all tokens."""
    model, words = build("mixtral"), [COEF, *changes.split()]
    metrics, gradient = step(model, tiny_config(*words))
    sequences = assign_advantages(random_groups(), tiny_config().method)
    budget = budget_for(4, sequences)
    split, split_gradient = step(model, tiny_config(*words, f"train.tokens_per_microbatch={budget}"))
    assert split == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert relative_error(split_gradient, gradient) <= 1e-5


def test_the_coefficient_is_the_models_own() -> None:
    """Its own where none is given, none at 0, and none for a model that has routers and no such loss, or no routers."""
    mixtral = build("mixtral")
    assert mixtral.config.output_router_logits is False
    assert router_of(tiny_config(), mixtral) == Router(mixtral.config.router_aux_loss_coef, 2)
    assert router_of(tiny_config(COEF), mixtral) == Router(0.5, 2)
    assert router_of(tiny_config("model.router_aux_coef=0"), mixtral) is None
    for name in ("deepseek-v3", "llama4", "qwen2"):
        assert router_of(tiny_config(COEF), build(name)) is None


def test_evenly_used_experts_give_the_smallest_loss() -> None:
    """E sum f P is top_k for an even load, and E where all tokens want one expert."""
    router, batch = Router(1.0, 1), packed_batch()
    even = torch.eye(4).repeat(3, 1) * 50
    one = torch.eye(4)[:1].repeat(12, 1) * 50
    for logits, expected in ((even, 1.0), (one, 4.0)):
        load = router.load([logits, logits], batch)
        assert router.loss([logits, logits], load, batch).item() == pytest.approx(expected)


def test_router_logits_cover_every_token() -> None:
    """Prompt tokens too: no row of a packed batch is padding."""
    batch = packed_batch()
    gates = router_logits(policy(build("qwen2-moe")), batch, torch.float32)
    assert [tuple(g.shape) for g in gates] == [(len(batch.input_ids), 4)] * 2
