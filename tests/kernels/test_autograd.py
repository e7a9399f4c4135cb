"""What autograd may ask of an op: frozen parts, second passes, checkpoints, autocast, results that are written to."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import srft_kernels
from srft_kernels import reference
from tests.kernels.cases import (
    LOSSES,
    assert_close,
    each_op,
    grads_of,
    grpo,
    logprobs,
    make_case,
    run,
)
from tests.numerics import assert_accurate


@each_op
def test_frozen_parts_get_no_gradient(op):
    """A frozen weight costs no gradient and gets None; so do hidden states and bias."""
    case = make_case()
    full = run(op, srft_kernels, case)
    for alone in ("hidden", "weight", "bias"):
        leaf = getattr(case, alone).clone().requires_grad_()
        result = op(srft_kernels, replace(case, **{alone: leaf}))
        loss = result if isinstance(result, torch.Tensor) else result.loss
        (loss * -1.7).backward()
        assert torch.equal(leaf.grad, full["d" + alone])
        assert all(getattr(case, name).grad is None for name in ("hidden", "weight", "bias"))


@each_op
def test_no_grad_gives_the_same_values(op):
    """Under no_grad, or with nothing to train, the loss is the same and carries no gradient."""
    case = make_case()
    gold, baseline = (run(op, reference, case.to(dtype))["loss"] for dtype in (torch.float64, torch.float32))
    case.weight.requires_grad_()
    with torch.no_grad():
        result = op(srft_kernels, case)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    assert not loss.requires_grad
    assert_accurate("loss", loss, gold, baseline)


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.__name__)
def test_second_backward_raises(op):
    """The gradients of a one-pass loss are given away once, also with retain_graph."""
    case = make_case()
    case.weight.requires_grad_()
    result = op(srft_kernels, case)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    loss.backward(retain_graph=True)
    before = case.weight.grad.clone()
    with pytest.raises(RuntimeError, match="already differentiated"):
        loss.backward()
    assert torch.equal(case.weight.grad, before)


@each_op
@pytest.mark.parametrize("leaves", [("hidden", "weight", "bias"), ("hidden",), ("weight",)], ids="-".join)
def test_second_derivative_raises(op, leaves):
    """A gradient has its value under create_graph, and differentiated again it is refused, not cut."""
    expected = run(op, srft_kernels, make_case())
    for factor in (lambda loss: -1.7 * loss, lambda loss: loss, lambda loss: loss * loss):
        case = make_case()
        given = [getattr(case, name).requires_grad_() for name in leaves]
        options = {"entropy_grad": False} if op is logprobs else {}
        result = op(srft_kernels, case, **options)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        grads = torch.autograd.grad(factor(loss), given, create_graph=True)
        for grad in grads:
            assert grad.requires_grad
            with pytest.raises(RuntimeError, match="cannot be differentiated again.*srft_kernels.reference"):
                torch.autograd.grad(grad.square().sum(), given, retain_graph=True, allow_unused=True)
    case = make_case()
    leaf = case.weight.requires_grad_()
    result = op(srft_kernels, case)
    ((result if isinstance(result, torch.Tensor) else result.loss) * -1.7).backward(create_graph=True)
    assert torch.equal(leaf.grad, expected["dweight"])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        leaf.grad.square().sum().backward()


def test_entropy_carries_a_gradient_only_where_asked():
    """``entropy_grad`` decides, and the rest of a policy loss is detached."""
    case = make_case()
    case.weight.requires_grad_()
    for wanted in (False, True):
        for module in (srft_kernels, reference):
            logp, entropy = module.linear_logprobs(case.hidden, case.weight, case.labels, entropy_grad=wanted)
            assert logp.requires_grad and entropy.requires_grad == wanted
    result = grpo(srft_kernels, case)
    tensors = [result.logprobs, result.entropy, result.ratio, result.clipped, *result.terms.values()]
    assert result.loss.requires_grad and not any(x.requires_grad for x in tensors)


@pytest.mark.parametrize("reentrant", [False, True])
@each_op
def test_inside_activation_checkpointing(op, reentrant):
    """A checkpointed op runs twice and gives the gradient of one run."""
    case = make_case()
    expected = run(op, srft_kernels, case)
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))

    def region(hidden, weight):
        result = op(srft_kernels, replace(case, hidden=hidden, weight=weight))
        # saves a tensor after the op, so that all of the region is computed again
        return (result if isinstance(result, torch.Tensor) else result.loss) * torch.tensor(-1.7)

    checkpoint(region, hidden, weight, use_reentrant=reentrant).backward()
    assert_close(hidden.grad, expected["dhidden"])
    assert_close(weight.grad, expected["dweight"])


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_results_may_be_written_to(ignored):
    """Masking log-probabilities and entropies in place leaves the gradients alone, ignored tokens or not."""
    case = make_case(ignored=ignored)
    expected = run(logprobs, srft_kernels, case)
    leaf = case.hidden.clone().requires_grad_()
    case.weight.requires_grad_()
    logp, entropy = srft_kernels.linear_logprobs(leaf, case.weight, case.labels, bias=case.bias, entropy_grad=True)
    loss = (logp * case.advantages).sum() + (entropy * case.ref_logprobs).sum()
    logp.detach().zero_()
    entropy.detach().zero_()
    (-1.7 * loss).backward()
    assert_close(leaf.grad, expected["dhidden"])


def test_labels_must_stay_until_backward():
    """Writing to the labels between forward and backward is an error, not another gradient."""
    case = make_case(ignored=0.0)
    case.weight.requires_grad_()
    logp, _ = srft_kernels.linear_logprobs(case.hidden, case.weight, case.labels)
    case.labels.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_retained_graph_of_linear_logprobs():
    """linear_logprobs may be differentiated twice, each time with its own upstream gradient."""
    case = make_case()
    case.weight.requires_grad_()
    logp, _ = srft_kernels.linear_logprobs(case.hidden, case.weight, case.labels)
    (first,) = torch.autograd.grad(logp.sum(), case.weight, retain_graph=True)
    (second,) = torch.autograd.grad(2 * logp.sum(), case.weight)
    assert_close(second, 2 * first)


def test_autocast_does_not_lower_the_precision():
    """Inside autocast fp32 inputs are still computed in fp32."""
    case = make_case()
    expected = run(grpo, srft_kernels, case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(grpo, srft_kernels, case)
    assert all(torch.equal(x, y) for x, y in zip(grads_of(actual), grads_of(expected), strict=True))
