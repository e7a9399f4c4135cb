"""LoRA on the head, a buffer for the weight gradient, rounded logits, autocast: all ops against the reference."""

import weakref
from dataclasses import replace

import pytest
import torch

import srft_kernels
from srft_kernels import LoraDelta, VocabParallel, reference
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import gradients as head_gradients
from tests.kernels.cases import (
    assert_matches_reference,
    case_id,
    each_op,
    grpo,
    logprobs,
    make_case,
    run,
    srft,
)
from tests.numerics import assert_accurate


class NoGroup:
    """Looks like a process group."""

    def size(self):
        """One rank."""
        return 1


def loss_of(result):
    """The scalar of a result."""
    return result if isinstance(result, torch.Tensor) else result.loss


def lora_gradients(op, module, case, parts, scale, base, **options):
    """Gradients of a, b and the base inputs named in ``base``."""
    a, b = (x.clone().requires_grad_() for x in parts)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in base}
    result = op(module, replace(case, **leaves), lora=LoraDelta(a, b, scale), **options)
    (loss_of(result) * -1.7).backward()
    return {"a": a.grad, "b": b.grad} | {name: x.grad for name, x in leaves.items()}


@each_op
@pytest.mark.parametrize("base", [("hidden",), ("hidden", "weight", "bias"), ()], ids="+".join)
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=case_id,
)
def test_lora(op, base, dtype, lora_dtype, monkeypatch):
    """Gradients of a, b and whatever else is trained, in one chunk and in chunks of 16 rows."""
    case = make_case(dtype=dtype)
    g = torch.Generator().manual_seed(5)
    parts = [torch.randn(*size, generator=g).to(lora_dtype) * 0.5 for size in ((3, 53), (101, 3))]
    double = [x.double() for x in parts]
    gold = lora_gradients(op, reference, case.to(torch.float64), double, 0.25, base)
    baseline = lora_gradients(op, reference, case, parts, 0.25, base)
    for workspace in (2**20, 0):
        monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", workspace)
        actual = lora_gradients(op, srft_kernels, case, parts, 0.25, base)
        for name, x in actual.items():
            assert_accurate(f"d{name}", x, gold[name], baseline[name], gradient=True)


def test_lora_is_a_change_of_the_weight():
    """The same loss and gradient of hidden as with weight + scale b a."""
    case = make_case(dtype=torch.float64)
    a, b = torch.randn(2, 53, dtype=torch.float64), torch.randn(101, 2, dtype=torch.float64)
    merged = replace(case, weight=case.weight + 0.3 * b @ a)
    for options in ({"loss_type": "gspo"}, {"everything": True, "logit_softcap": 4.0, "logit_scale": 1.7}):
        expected = run(grpo, srft_kernels, merged, **options)
        actual = run(grpo, srft_kernels, case, lora=LoraDelta(a, b, 0.3), **options)
        for name in ("loss", "dhidden", "dbias", "logprobs"):
            torch.testing.assert_close(actual[name], expected[name])


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_weight_grad_is_added_to(op, dtype, monkeypatch):
    """Two micro-batches fill the buffer with the sum of their gradients; autograd gives the weight none."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    start = torch.randn(101, 53)
    buffer, expected = start.clone(), start.clone()
    for seed in (0, 1):
        case = make_case(dtype=dtype, seed=seed)
        wide = make_case(dtype=dtype, seed=seed).to(torch.float32)
        wide.weight.requires_grad_()
        loss_of(op(reference, wide)).backward()
        expected += wide.weight.grad
        case.weight.requires_grad_()
        case.hidden.requires_grad_()
        loss_of(op(srft_kernels, case, weight_grad=buffer)).backward()
        assert case.weight.grad is None and case.hidden.grad.any()
    # fp32 from bf16 inputs: nothing was rounded to bf16 on the way
    assert ((buffer - expected).norm() / (expected - start).norm()) < 1e-5


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_weight_gradient_is_rounded_once(op, dtype, monkeypatch):
    """Over many chunks the 16-bit gradient of the weight is the fp32 sum, rounded, to the last bit."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(head_gradients, "_ROUNDED_FIRST", 1000)
    case, buffer = make_case((130, 101, 53), dtype), torch.zeros(101, 53)
    case.weight.requires_grad_()
    loss_of(op(srft_kernels, case)).backward()
    assert case.weight.grad.is_contiguous()
    loss_of(op(srft_kernels, case, weight_grad=buffer)).backward()
    assert torch.equal(case.weight.grad, buffer.to(dtype)) and buffer.any()


def test_weight_grad_is_not_the_weight():
    """A buffer in the memory of the weight would overwrite it."""
    case = make_case()
    case.weight.requires_grad_()
    with pytest.raises(ValueError, match="must not share the memory"):
        grpo(srft_kernels, case, weight_grad=case.weight.detach())


def test_weight_may_go_before_backward():
    """A loss keeps its gradients, not the weight they are of: a cast copy is freed when the op returns."""
    case = make_case(dtype=torch.bfloat16)
    master = case.weight.float().requires_grad_()
    copy = master.bfloat16()
    loss = grpo(srft_kernels, replace(case, weight=copy)).loss
    seen = weakref.ref(copy)
    del copy
    assert seen() is None
    loss.backward()
    assert master.grad.any()


def test_weight_grad_refuses_a_factor():
    """The one-pass losses fill the buffer in forward; a factor that comes later is an error, not a wrong sum."""
    case = make_case()
    case.weight.requires_grad_()
    loss = grpo(srft_kernels, case, weight_grad=torch.zeros(101, 53)).loss
    with pytest.raises(RuntimeError, match="factor 1, got 0.5"):
        (loss * 0.5).backward()
    # linear_logprobs computes its gradients in backward, where the factor is known
    buffer = torch.zeros(101, 53)
    (0.5 * logprobs(srft_kernels, case, weight_grad=buffer).loss).backward()
    assert buffer.any()


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_rounded_logits(op, dtype):
    """Logits kept in 16 bits: as accurate as plain PyTorch with logits of that dtype."""
    options = {"logits_dtype": dtype}
    case = make_case((130, 257, 40), dtype)
    gold = run(op, reference, case.to(torch.float64))
    baseline = run(op, reference, case, **options)
    actual = run(op, srft_kernels, case, **options)
    rounding = torch.finfo(dtype).eps
    for name, x in actual.items():
        if name == "clipped":
            continue
        error = (x.double() - gold[name]).norm()
        allowed = 2 * (baseline[name].double() - gold[name]).norm() + rounding * gold[name].norm()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"
    exact = run(op, srft_kernels, case)
    # a single sum may round to the same number, a whole gradient does not
    assert not torch.equal(actual["dhidden"], exact["dhidden"])


def test_logits_dtype_of_fp32_is_the_default():
    """Naming the dtype in which logits are kept anyway changes nothing."""
    case = make_case(dtype=torch.bfloat16)
    first, second = (run(grpo, srft_kernels, case, logits_dtype=d) for d in (None, torch.float32))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_op
def test_autocast_takes_a_weight_in_fp32(op):
    """Under autocast 16-bit states meet an fp32 weight, whose gradient comes back in fp32."""
    case = make_case(dtype=torch.bfloat16)
    expected = run(op, srft_kernels, case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(op, srft_kernels, replace(case, weight=case.weight.float()))
    assert actual["dweight"].dtype == torch.float32
    assert torch.equal(actual["dweight"], expected["dweight"].float())
    assert torch.equal(actual["dhidden"], expected["dhidden"])


@each_op
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoraDelta(torch.ones(2, 5), torch.ones(11, 2), 1.0)}, r"lora.a must be \[r, D=4\]"),
        ({"lora": LoraDelta(torch.ones(2, 4), torch.ones(11, 2), float("nan"))}, "lora.scale must be a finite"),
        ({"lora": LoraDelta(torch.ones(2, 4).long(), torch.ones(11, 2), 1.0)}, "lora.a must be a floating-point"),
        ({"lora": (torch.ones(2, 4), torch.ones(11, 2))}, "lora must be a LoraDelta"),
        ({"weight_grad": torch.zeros(4, 11)}, r"weight_grad must be a torch.float32 tensor \[11, 4\]"),
        ({"weight_grad": torch.zeros(11, 4).bfloat16()}, "weight_grad must be a torch.float32"),
        ({"weight_grad": torch.zeros(11, 4)}, "lm_head_weight does not require a gradient"),
        ({"weight_grad": torch.zeros(11, 4, requires_grad=True)}, "weight_grad must be contiguous and need no"),
        ({"weight_grad": torch.zeros(1, 4).expand(11, 4)}, "weight_grad must be contiguous"),
        ({"logits_dtype": torch.bfloat16}, "logits_dtype must be None, torch.float32 or the dtype of hidden"),
        ({"vocab_parallel": 3}, "vocab_parallel must be a VocabParallel"),
        ({"vocab_parallel": VocabParallel(None, 0, 11)}, "vocab_parallel.group must be a process group"),
        ({"vocab_parallel": VocabParallel(NoGroup(), 5, 11)}, "this rank's 11 rows of the weight, got vocab_start=5"),
        ({"ignore_index": None}, "ignore_index must be an int"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments(op, options, message):
    """Each is a ValueError that names the argument."""
    with pytest.raises(ValueError, match=message):
        op(srft_kernels, make_case((8, 11, 4)), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("op", [grpo, logprobs], ids=lambda op: op.__name__)
def test_frozen_head(op, dtype):
    """Only the hidden states are trained, with every upstream gradient a signed number of its own."""
    case = make_case((130, 97, 24), dtype)
    options = {"entropy_grad": False} if op is logprobs else {}
    for extra in ({}, {"temperature": case.temperature, "logit_softcap": 4.0}):
        full = run(op, srft_kernels, case, **options, **extra)
        leaf = case.hidden.clone().requires_grad_()
        (loss_of(op(srft_kernels, replace(case, hidden=leaf), **options, **extra)) * -1.7).backward()
        assert ((leaf.grad - full["dhidden"]).norm() / full["dhidden"].norm()) < torch.finfo(dtype).eps * 4


def test_frozen_head_can_be_differentiated_again():
    """The saved directions serve every backward of a retained graph."""
    case = make_case()
    case.hidden.requires_grad_()
    logp, entropy = srft_kernels.linear_logprobs(case.hidden, case.weight, case.labels)
    assert not entropy.requires_grad
    (first,) = torch.autograd.grad(logp.sum(), case.hidden, retain_graph=True)
    (second,) = torch.autograd.grad((2 * logp).sum(), case.hidden)
    assert torch.equal(2 * first, second)


def test_lora_under_the_one_tolerance_rule():
    """A frozen LoRA delta is a part of the head like any other."""
    lora = LoraDelta(torch.randn(2, 53), torch.randn(101, 2), 0.1)
    assert_matches_reference(srft, make_case(), lora=lora, preset="official", off_policy=True)
