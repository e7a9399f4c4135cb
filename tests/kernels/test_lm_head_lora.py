"""FusedLMHead made from a LoRA layer of peft: it computes what the layer would, whatever state that is in."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from srft_kernels import FusedLMHead, linear_cross_entropy, linear_grpo_loss, reference
from tests.kernels.cases import make_case

peft = pytest.importorskip("peft")

SHAPE = (37, 101, 53)


class Model(nn.Module):
    """Something with an lm_head."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(53, 101)

    def forward(self, hidden):
        """Logits."""
        return self.lm_head(hidden)


def lora_model(dtype=torch.float64, **options):
    """A peft model whose lm_head has a random adapter, "default"."""
    model = peft.get_peft_model(Model(), lora_config(**options)).to(dtype)
    randomise(model)
    return model


def lora_config(**options):
    """LoRA of rank 4 on lm_head."""
    return peft.LoraConfig(**{"target_modules": ["lm_head"], "r": 4, "lora_alpha": 6, **options})


def randomise(model):
    """peft starts with b = 0, which hides the gradient of a."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)


def make_head(model) -> FusedLMHead:
    """The head of a peft model."""
    return FusedLMHead.from_linear(model.base_model.model.lm_head)


def eager_gradients(model, case):
    """Loss and gradients of hidden states and trained parameters through peft's own forward."""
    model.zero_grad()
    hidden = case.hidden.clone().requires_grad_()
    logits = model(hidden)
    identity = torch.eye(101, dtype=logits.dtype)
    out = reference.linear_grpo_loss(logits, identity, case.labels, case.advantages, case.old_logprobs)
    out.loss.backward()
    return out.loss.detach(), {"hidden": hidden.grad, **trained_gradients(model)}


def fused_gradients(model, head, case):
    """The same through the head."""
    model.zero_grad()
    hidden = case.hidden.clone().requires_grad_()
    op = partial(
        linear_grpo_loss, labels=case.labels, advantages=case.advantages, old_logprobs=case.old_logprobs
    )
    out = head(hidden, op)
    out.loss.backward()
    return out.loss.detach(), {"hidden": hidden.grad, **trained_gradients(model)}


def trained_gradients(model):
    """Clones of the gradients that exist, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like_peft(model, head, case):
    """Loss, and the same gradients on the same parameters."""
    loss, grads = fused_gradients(model, head, case)
    eager_loss, eager = eager_gradients(model, case)
    assert torch.allclose(loss, eager_loss, rtol=1e-10)
    assert grads.keys() == eager.keys()
    for name, x in eager.items():
        assert (grads[name] - x).norm() <= 1e-10 * x.norm(), name
    return grads


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["alpha/r", "rank-stabilised"])
def test_adapters_train_and_the_base_does_not(options):
    """a and b get peft's gradients, the frozen weight and bias none."""
    case = make_case(SHAPE, torch.float64)
    model = lora_model(**options)
    head = make_head(model)
    grads = assert_like_peft(model, head, case)
    assert len(grads) == 3
    assert head.weight.grad is None and head.bias.grad is None
    assert grads["base_model.model.lm_head.lora_A.default.weight"].any()


def test_parameters_and_keys():
    """Adapters are parameters of the head, under peft's names; the base keeps those of nn.Linear."""
    model = lora_model()
    head = make_head(model)
    assert set(head.state_dict()) == {"weight", "bias", "lora_A.default.weight", "lora_B.default.weight"}
    assert [name for name, p in head.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]
    assert {id(p) for p in head.parameters()} == {id(p) for p in model.parameters()}


def test_the_state_of_the_adapters_is_followed():
    """Disabled, another one active, merged, unmerged: each time what peft computes."""
    case = make_case(SHAPE, torch.float64)
    model = lora_model()
    head = make_head(model)
    layer = model.base_model.model.lm_head
    model.add_adapter("other", lora_config(r=2))
    randomise(model)
    model.double()
    losses = []
    for name, around in [
        ("default", nullcontext),
        ("default", model.disable_adapter),
        ("other", nullcontext),
        ("default", nullcontext),
    ]:
        model.set_adapter(name)
        with around():
            loss, _ = fused_gradients(model, head, case)
            assert torch.allclose(loss, eager_gradients(model, case)[0], rtol=1e-10)
            losses.append(loss)
    assert len({x.item() for x in losses[:3]}) == 3 and losses[3] == losses[0]
    layer.merge()
    loss, grads = fused_gradients(model, head, case)
    assert torch.allclose(loss, losses[0], rtol=1e-10) and grads.keys() == {"hidden"}
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match="disabled but merged; unmerge them first"):
        fused_gradients(model, head, case)
    layer.enable_adapters(True)
    layer.unmerge()
    assert_like_peft(model, head, case)


def test_bf16_hidden_states_and_fp32_adapters():
    """peft keeps adapters in fp32 beside a bf16 base; their gradients stay fp32."""
    case = make_case(SHAPE)
    model = lora_model(torch.float32)
    head = make_head(model)
    head.weight.data = head.weight.data.bfloat16()
    head.bias.data = head.bias.data.bfloat16()
    hidden = case.hidden.bfloat16().requires_grad_()
    op = partial(linear_grpo_loss, labels=case.labels, advantages=case.advantages)
    head(hidden, op).loss.backward()
    double = {name: p.detach().double().requires_grad_() for name, p in head.named_parameters()}
    a, b = double["lora_A.default.weight"], double["lora_B.default.weight"]
    weight = double["weight"] + 1.5 * b @ a
    gold = reference.linear_grpo_loss(
        hidden.detach().double(), weight, case.labels, case.advantages.double(), bias=double["bias"]
    )
    gold.loss.backward()
    for name in ("lora_A.default.weight", "lora_B.default.weight"):
        grad = head.get_parameter(name).grad
        assert grad.dtype == torch.float32
        assert (grad - double[name].grad).norm() < 5e-3 * double[name].grad.norm(), name


def test_dropout_is_an_error_in_training_only():
    """Dropping inputs of the adapter alone is not what the ops compute."""
    case = make_case(SHAPE, torch.float64)
    model = lora_model(lora_dropout=0.1)
    head = make_head(model)
    with pytest.raises(ValueError, match="dropout of 0.1.*set lora_dropout=0, or call .eval"):
        head(case.hidden, partial(linear_cross_entropy, labels=case.labels))
    assert_like_peft(model.eval(), head, case)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_variants_are_an_error(options):
    """Neither DoRA nor a bias of the adapter is left out silently."""
    case = make_case(SHAPE, torch.float64)
    head = make_head(lora_model(**options))
    with pytest.raises(ValueError, match="variant .* or has a bias.*configure plain LoRA"):
        head(case.hidden, partial(linear_cross_entropy, labels=case.labels))


def test_two_active_adapters_are_an_error():
    """The ops take one low-rank change."""
    case = make_case(SHAPE, torch.float64)
    model = lora_model()
    head = make_head(model)
    model.add_adapter("other", lora_config(r=2))
    model.base_model.model.lm_head.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active LoRA adapter, got default, other"):
        head(case.hidden, partial(linear_cross_entropy, labels=case.labels))


def test_an_adapter_around_another_layer():
    """LoRA of an embedding is no head."""
    model = nn.Module()
    model.embedding = nn.Embedding(7, 5)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embedding"], r=2))
    with pytest.raises(ValueError, match="module must be an nn.Linear, or a LoRA layer .* around Embedding"):
        FusedLMHead.from_linear(model.base_model.model.embedding)
