"""FusedLMHead on one process: the same values and gradients as the bare op, whoever else holds the weight."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from srft_kernels import (
    FusedLMHead,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_logprobs,
    linear_policy_loss,
    linear_srft_loss,
    reference,
)
from tests.kernels.cases import case_id, make_case

SHAPE = (37, 101, 53)


def make_head(case, *, bias=True, **options) -> FusedLMHead:
    """A head with copies of the case's weight and bias."""
    return FusedLMHead(
        nn.Parameter(case.weight.clone()), nn.Parameter(case.bias.clone()) if bias else None, **options
    )


def ops(case):
    """Every op with its own arguments bound, by name."""
    labels = case.labels
    return {
        "logprobs": partial(linear_logprobs, labels=labels, temperature=case.temperature),
        "cross_entropy": partial(linear_cross_entropy, labels=labels, num_tokens=50),
        "grpo": partial(
            linear_grpo_loss, labels=labels, advantages=case.advantages, old_logprobs=case.old_logprobs
        ),
        "srft": partial(
            linear_srft_loss,
            labels=labels,
            advantages=case.advantages,
            is_demo=case.is_demo,
            is_correct=case.is_correct,
            cu_seqlens=case.cu_seqlens,
        ),
        "policy": partial(linear_policy_loss, labels=labels, objective=lambda logp, h: (h - logp).sum()),
    }


def scalar(out):
    """The loss of an op's result."""
    if isinstance(out, torch.Tensor):
        return out
    return out.loss if hasattr(out, "loss") else out[0].sum()


class Body(nn.Module):
    """Two layers with an embedding before them and a norm after; returns [N, D]."""

    def __init__(self, vocab, width):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, reentrant=None):
        """Hidden states of ``ids`` [N]; ``reentrant`` chooses a form of activation checkpointing."""
        hidden = self.embedding(ids)
        for layer in self.layers:
            block = lambda x, layer=layer: x + torch.tanh(layer(x))  # noqa: E731
            hidden = block(hidden) if reentrant is None else checkpoint(block, hidden, use_reentrant=reentrant)
        return self.norm(hidden)


def gradients(module):
    """Gradients of every parameter by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(actual, expected):
    """Two dicts of tensors hold the same bits."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize("name", ["logprobs", "cross_entropy", "grpo", "srft", "policy"])
def test_call_is_the_bare_op(name):
    """Same result and gradients, to the bit, with bias, softcap and scale from the head."""
    case = make_case(SHAPE)
    op = ops(case)[name]
    head = make_head(case, logit_softcap=3.0, logit_scale=0.7)
    mine, bare = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
    out, expected = head(mine, op), op(bare, weight, bias=bias, logit_softcap=3.0, logit_scale=0.7)
    scalar(out).backward()
    scalar(expected).backward()
    assert torch.equal(scalar(out), scalar(expected))
    for actual, known in ((mine, bare), (head.weight, weight), (head.bias, bias)):
        assert torch.equal(actual.grad, known.grad)


def test_an_op_sees_only_what_the_head_has():
    """Without bias and softcap a function of two arguments will do."""
    case = make_case(SHAPE, bias=False)
    head = make_head(case, bias=False)
    assert torch.equal(head(case.hidden, F.linear), case.hidden @ case.weight.T)
    assert head(case.hidden, lambda hidden, weight: (hidden, weight))[1] is head.weight


def test_several_ops_in_one_call():
    """A function may use the weight more than once; gradients add up."""
    case = make_case(SHAPE, torch.float64)
    head, labels = make_head(case), case.labels

    def both(hidden_states, lm_head_weight, **options):
        logprobs, _ = linear_logprobs(hidden_states, lm_head_weight, labels, **options)
        return logprobs.sum() + linear_cross_entropy(hidden_states, lm_head_weight, labels, **options)

    head(case.hidden, both).backward()
    found = head.weight.grad.clone()
    head.weight.grad = None
    (head(case.hidden, partial(linear_logprobs, labels=labels))[0].sum()).backward()
    head(case.hidden, partial(linear_cross_entropy, labels=labels)).backward()
    assert (found - head.weight.grad).norm() <= 1e-12 * head.weight.grad.norm()


def test_from_linear_shares_and_keeps_the_keys():
    """Parameters are the layer's own; checkpoints of an nn.Linear load, and go back."""
    linear = nn.Linear(53, 101)
    head = FusedLMHead.from_linear(linear, logit_softcap=30.0)
    assert head.weight is linear.weight and head.bias is linear.bias
    assert head.state_dict().keys() == linear.state_dict().keys()
    other = nn.Linear(53, 101)
    head.load_state_dict(other.state_dict())
    assert torch.equal(linear.weight, other.weight) and torch.equal(linear.bias, other.bias)
    other.load_state_dict(head.state_dict())
    assert FusedLMHead.from_linear(nn.Linear(5, 7, bias=False)).state_dict().keys() == {"weight"}


def test_repr():
    """Sizes, the softcap and the scale are shown."""
    assert repr(FusedLMHead.from_linear(nn.Linear(53, 101), logit_softcap=30.0, logit_scale=0.5)) == (
        "FusedLMHead(in_features=53, out_features=101, bias=True, logit_softcap=30.0, logit_scale=0.5)"
    )
    assert "softcap" not in repr(FusedLMHead.from_linear(nn.Linear(53, 101)))


def test_a_copy_stands_alone():
    """A copy of the head alone, by whatever means, and a head whose layer is gone keep their weight."""
    case = make_case(SHAPE, bias=False)
    linear = nn.Linear(53, 101, bias=False)
    head = FusedLMHead.from_linear(linear)
    op = partial(linear_cross_entropy, labels=case.labels)
    expected = head(case.hidden, op)
    copied = copy.deepcopy(head)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    linear.weight.data.zero_()
    for other in (copied, loaded):
        assert torch.equal(other(case.hidden, op), expected)
    del linear
    assert not torch.equal(head(case.hidden, op), expected)
    with torch.no_grad():
        head.weight.copy_(copied.weight)
    assert torch.equal(head(case.hidden, op), expected)


def test_fp32_weight_under_bf16_hidden_states():
    """The weight is rounded to bf16, and its fp32 gradient holds what the bf16 op gives."""
    case = make_case(SHAPE)
    head = make_head(case)
    hidden = case.hidden.bfloat16().requires_grad_()
    op = partial(linear_grpo_loss, labels=case.labels, advantages=case.advantages)
    out = head(hidden, op)
    out.loss.backward()
    weight = case.weight.bfloat16().requires_grad_()
    expected = op(hidden.detach(), weight, bias=case.bias)
    expected.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert head.weight.grad.dtype == torch.float32
    assert torch.equal(head.weight.grad, weight.grad.float())
    assert head.bias.grad.dtype == torch.float32


def test_autocast_around_body_and_head():
    """In an autocast region the dtype of the hidden states decides, and gradients are those outside it."""
    case = make_case(SHAPE, bias=False)
    ids = torch.randint(101, (37,))
    body, head = Body(101, 53), make_head(case, bias=False)
    op = partial(linear_grpo_loss, labels=case.labels, advantages=case.advantages)
    found = []
    for outside in (False, True):
        both = nn.ModuleList((body, head))
        both.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(ids).bfloat16()
            out = None if outside else head(hidden, op)
        out = head(hidden, op) if out is None else out
        out.loss.backward()
        assert out.logprobs.dtype == torch.float32 and head.weight.grad.dtype == torch.float32
        found.append(gradients(both))
    assert_same(*found)
    with torch.autocast("cpu", torch.bfloat16):
        exact = head(case.hidden, partial(linear_logprobs, labels=case.labels))[0]
    assert torch.equal(exact, linear_logprobs(case.hidden, case.weight, case.labels)[0])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["logprobs", "grpo"])
def test_activation_checkpointing_of_the_body(name, reentrant):
    """Recomputing the body in backward changes no bit, whether the op's gradients come in forward or backward."""
    case = make_case(SHAPE)
    body, op = Body(101, 53), ops(case)[name]
    head = FusedLMHead(body.embedding.weight)
    ids = torch.randint(101, (37,))
    found = []
    for how in (None, reentrant):
        body.zero_grad()
        scalar(head(body(ids, how), op)).backward()
        found.append(gradients(body))
    assert_same(*found)


def test_tied_embedding_sums_both_gradients():
    """The one gradient is that of autograd through materialised logits, in float64."""
    case = make_case(SHAPE, torch.float64)
    body = Body(101, 53).double()
    head = FusedLMHead(body.embedding.weight)
    ids = torch.randint(101, (37,))
    op = partial(linear_cross_entropy, labels=case.labels)
    head(body(ids), op).backward()
    tied = head.weight.grad.clone()
    body.zero_grad()
    F.cross_entropy(body(ids) @ head.weight.T, case.labels).backward()
    assert torch.allclose(tied, head.weight.grad, rtol=1e-9, atol=1e-12)
    body.zero_grad()
    head(body(ids).detach(), op).backward()
    assert not torch.allclose(tied, head.weight.grad, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_frozen_head(dtype):
    """A frozen weight gets no gradient and stays out of the graph, cast or not; hidden states get theirs."""
    case = make_case(SHAPE)
    head = make_head(case).requires_grad_(False)
    hidden = case.hidden.to(dtype).requires_grad_()
    seen = []

    def op(hidden_states, lm_head_weight, **options):
        seen.append(lm_head_weight.requires_grad)
        return linear_grpo_loss(hidden_states, lm_head_weight, case.labels, case.advantages, **options)

    head(hidden, op).loss.backward()
    assert seen == [False]
    assert head.weight.grad is None and head.bias.grad is None
    assert hidden.grad.any()


@pytest.mark.parametrize("cast", [False, True], ids=["fp64", "bf16-hidden"])
def test_gradients_of_micro_batches_add_up(cast):
    """Over three micro-batches with common denominators, gradients are those of one call."""
    case = make_case(SHAPE, torch.float64)
    hidden = case.hidden.bfloat16() if cast else case.hidden
    head = make_head(case)
    total = int((case.labels != -100).sum())
    found = []
    for bounds in ([0, 37], [0, 9, 20, 37]):
        head.zero_grad()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            op = partial(
                linear_grpo_loss,
                labels=case.labels[start:stop],
                advantages=case.advantages[start:stop],
                num_tokens=total,
            )
            head(hidden[start:stop], op).loss.backward()
        found.append(gradients(head))
    # each bf16 call rounds its weight gradient once
    tolerance = 2**-7 if cast else 1e-12
    for name, whole in found[0].items():
        error = (found[1][name] - whole).norm() / whole.norm()
        assert error < tolerance, (name, error)


def test_fp32_gradient_without_rounding():
    """``weight_grad=head.weight.grad`` spares the fp32 weight of a bf16 head the rounding, and adds up over calls."""
    case = make_case(SHAPE)
    hidden = case.hidden.bfloat16()
    gold = FusedLMHead(nn.Parameter(case.weight.bfloat16().double()))
    rounded, exact = make_head(case, bias=False), make_head(case, bias=False)
    exact.weight.grad = torch.zeros_like(exact.weight)
    options = {"labels": case.labels, "num_tokens": 30}
    for _ in range(2):
        gold(hidden.double(), partial(reference.linear_cross_entropy, **options)).backward()
        rounded(hidden, partial(linear_cross_entropy, **options)).backward()
        added = partial(linear_cross_entropy, weight_grad=exact.weight.grad, **options)
        exact(hidden.requires_grad_(), added).backward()
    norm = gold.weight.grad.norm()
    assert (exact.weight.grad - gold.weight.grad).norm() < 1e-5 * norm
    assert (rounded.weight.grad - gold.weight.grad).norm() > 1e-4 * norm


def test_reference_ops_take_the_same_head():
    """The eager twin of an op fits where the op does."""
    case = make_case(SHAPE, torch.float64)
    head = make_head(case, logit_softcap=5.0)
    options = {"labels": case.labels, "advantages": case.advantages}
    ours = head(case.hidden, partial(linear_grpo_loss, **options)).loss
    eager = head(case.hidden, partial(reference.linear_grpo_loss, **options)).loss
    assert torch.allclose(ours, eager, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(7, 5),), {}, r"weight must be .* nn.Parameter \[V, D\], got Tensor torch.float32 \[7, 5\]"),
        ((nn.Parameter(torch.zeros(7)),), {}, r"weight must be .*\[V, D\], got Parameter torch.float32 \[7\]"),
        ((nn.Parameter(torch.zeros(7, 5).to(torch.uint8), False),), {}, "weight must be .*torch.uint8"),
        ((nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(6))), {}, r"bias must be \[V\]=\[7\], got \[6\]"),
        ((nn.Parameter(torch.zeros(7, 5)), torch.zeros(7)), {}, "bias must be .*nn.Parameter"),
        ((nn.Parameter(torch.zeros(7, 5)),), {"logit_softcap": 0.0}, "logit_softcap must be a number > 0"),
        ((nn.Parameter(torch.zeros(7, 5)),), {"logit_scale": -1.0}, "logit_scale must be a number > 0"),
        ((nn.Parameter(torch.zeros(7, 5)),), {"grad_reduction": "avg"}, "grad_reduction must be one of 'mean', 'sum'"),
    ],
    ids=["tensor", "rank", "quantised", "bias-shape", "bias-tensor", "softcap", "scale", "reduction"],
)
def test_wrong_parameters(arguments, options, message):
    """Each names what is wrong."""
    with pytest.raises(ValueError, match=message):
        FusedLMHead(*arguments, **options)


def test_wrong_calls():
    """The order of the arguments, an op that is none, and a layer that is none."""
    head = FusedLMHead.from_linear(nn.Linear(5, 7))
    with pytest.raises(ValueError, match=r"hidden_states must be .*, got function; call head\(hidden_states, op\)"):
        head(linear_grpo_loss, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="hidden_states must be a floating point tensor, got torch.int64"):
        head(torch.zeros(3, 5).long(), linear_grpo_loss)
    with pytest.raises(ValueError, match=r"op must be callable, got Tensor; bind .*partial\(linear_grpo_loss"):
        head(torch.zeros(3, 5), torch.zeros(3).long())
    with pytest.raises(ValueError, match="module must be an nn.Linear, .*got Embedding; pass"):
        FusedLMHead.from_linear(nn.Embedding(7, 5))
