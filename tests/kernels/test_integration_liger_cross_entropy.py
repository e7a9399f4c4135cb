"""The cross-entropies named after Liger's equal Liger's and torch's, and refuse what they do not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from srft_kernels.integrations.liger import (
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
)
from tests.kernels.liger_peer import assert_same, needs_liger

H, V = 12, 37


def make_tokens(dtype=torch.float64, n=23):
    """hidden [n, H], weight [V, H], bias [V], targets [n], some of them ignored, and two upstream gradients [n]."""
    g = torch.Generator().manual_seed(5)
    hidden, weight, bias, dnll, dentropy = (
        torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in ((n, H), (V, H), (V,), (n,), (n,))
    )
    target = torch.randint(V, (n,), generator=g)
    target[::5] = -100
    return hidden, weight, bias, target, dnll, dentropy


@needs_liger
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scaled_cross_entropy_equals_liger(temperature, return_entropy, selected):
    """nll, entropy, selected log-probabilities and gradients equal Liger's in fp32."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

    hidden, weight, _, target, dnll, dentropy = make_tokens(torch.float32)
    ids = torch.tensor([0, V - 1, 3, 0]) if selected else None
    results = []
    for function in (Liger, LigerFusedLinearScaledCrossEntropyFunction):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        outputs = function.apply(*leaves, target, temperature, -100, 2, return_entropy, ids)
        assert isinstance(outputs, tuple) == (return_entropy or selected)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [dnll, dentropy][: 1 + return_entropy] + [torch.linspace(-1, 1, 23 * 4).view(23, 4)] * selected
        torch.autograd.backward(outputs, upstream)
        results.append(dict(enumerate([*(x.detach() for x in outputs), *(x.grad for x in leaves)])))
    assert_same(results[1], results[0], 1e-5)


def test_selected_logprobs_are_exact():
    """In float64, selected log-probabilities and their gradients are those of the materialised logits."""
    hidden, weight, _, target, _, _ = make_tokens()
    ids, valid = torch.tensor([2, 2, V - 1]), target != -100
    temperature = torch.rand(23, dtype=torch.float64) + 0.5
    upstream = torch.linspace(-1, 1, 23 * 3, dtype=torch.float64).view(23, 3)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    _, actual = LigerFusedLinearScaledCrossEntropyFunction.apply(
        *leaves, target, temperature, selected_token_ids=ids
    )
    logits = hidden @ weight.T / temperature[:, None]
    expected = logits.log_softmax(-1)[:, ids] * valid[:, None]
    torch.testing.assert_close(actual, expected)
    for x, y in zip(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0], r"int64 tensor of shape \[K\] .* got list"),
        (torch.tensor([[0]]), r"int64 tensor of shape \[K\] .* got torch.int64 \[1, 1\]"),
        (torch.tensor([0.0]), r"int64 tensor of shape \[K\] .* got torch.float32"),
        (torch.tensor([0], device="meta"), "same device as weight, cpu, got .* on meta"),
        (torch.tensor([-1]), r"in \[0, 37\), got \[-1\]"),
        (torch.tensor([0, V]), r"in \[0, 37\), got \[0, 37\]"),
    ],
)
def test_selection_must_fit(ids, message):
    """A selection that is not [K] int64 beside the weight, or names no token, is refused."""
    hidden, weight, _, target, _, _ = make_tokens()
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, selected_token_ids=ids)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "scale"), [(0.0, 0.0), (0.1, 1e-2)], ids=["plain", "smoothed"])
def test_cross_entropy_equals_torch(smoothing, scale, reduction, with_bias, softcap, ignore_index):
    """Loss and gradients equal F.cross_entropy on materialised float64 logits; "none" takes a gradient per token."""
    hidden, weight, bias, target, upstream, _ = make_tokens()
    target = torch.where(target == -100, ignore_index, target)
    leaves = [x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    logits = F.linear(hidden, weight, bias if with_bias else None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = target != ignore_index
    each = F.cross_entropy(
        logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=smoothing
    ) + scale * torch.where(valid, logits.logsumexp(-1).square(), 0.0)
    expected = {"mean": each.sum() / valid.sum(), "sum": each.sum(), "none": each}[reduction]
    loss_fn = LigerFusedLinearCrossEntropyLoss(
        reduction=reduction, softcap=softcap, ignore_index=ignore_index,
        label_smoothing=smoothing, lse_square_scale=scale,
    )  # fmt: skip
    actual = loss_fn(weight, hidden, target, bias if with_bias else None)
    torch.testing.assert_close(actual, expected)
    upstream = upstream if reduction == "none" else upstream[0]
    for x, y in zip(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "setting",
    [
        {"ce_weight": torch.ones(V)},
        {"return_z_loss": True},
        {"use_token_scaling": True},
        {"return_token_accuracy": True},
        {"return_predicted_tokens": True},
        {"reduction": "batchmean"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_cross_entropy_refuses_what_it_does_not_have(setting):
    """A setting that would be ignored raises instead."""
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        LigerFusedLinearCrossEntropyLoss(**setting)


def test_tensor_parallel_head_needs_a_group():
    """Without torch.distributed the head that is spread over ranks says what is missing."""
    hidden, weight, _, target, _, _ = make_tokens()
    with pytest.raises(ValueError, match="torch.distributed must be initialised"):
        LigerFusedLinearScaledCrossEntropyTPFunction.apply(hidden, weight, target, None)
