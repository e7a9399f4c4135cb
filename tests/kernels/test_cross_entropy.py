"""linear_cross_entropy with smoothing, z-loss, weights and reductions: against PyTorch's own and float64."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import srft_kernels
from srft_kernels import LoraDelta, linear_cross_entropy, reference
from srft_kernels.head import chunks as chunked_head
from srft_kernels.rows import gpu as row_kernels
from tests.kernels.cases import DTYPES, assert_matches_reference, case_id, cross_entropy, make_case
from tests.numerics import assert_accurate

SMOOTHED = {
    "smoothing": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z": {"z_loss_coef": 0.02},
    "both": {"label_smoothing": 0.3, "z_loss_coef": 0.01, "temperature": 0.7},
    "softcap": {"label_smoothing": 0.2, "z_loss_coef": 0.05, "logit_softcap": 2.0, "logit_scale": 1.4},
}
SHAPE = (19, 71, 8)
dtypes = [torch.float32, torch.float16] if row_kernels.INTERPRETED else DTYPES


def weighted_sum(module, case, **options):
    """A signed sum of the losses of the tokens."""
    losses = cross_entropy(module, case, reduction="none", **options)
    assert losses.shape == case.labels.shape and not losses[case.labels == -100].any()
    return (losses * case.advantages.to(losses)).sum()


def chunks_of_16_rows(monkeypatch):
    """Several chunks, and several blocks of words in each."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(row_kernels, "_MAX_BLOCK_V", 64)
    monkeypatch.setattr(row_kernels, "_lanes", lambda _: 16)


@pytest.mark.parametrize("dtype", dtypes, ids=case_id)
@pytest.mark.parametrize("op", [cross_entropy, weighted_sum], ids=["reduced", "none"])
@pytest.mark.parametrize("options", SMOOTHED.values(), ids=SMOOTHED)
def test_against_float64(options, op, dtype, monkeypatch):
    """Loss and every gradient, by the one rule, with weights of the tokens and a denominator."""
    chunks_of_16_rows(monkeypatch)
    case = make_case(SHAPE, dtype, scale=3.0)
    more = {} if op is weighted_sum else {"num_tokens": 23}
    weights = case.weights - 0.9
    assert_matches_reference(op, case, token_weights=weights, **more, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_is_pytorchs(reduction, label_smoothing):
    """The same numbers as torch.nn.functional.cross_entropy, ignored rows included."""
    case = make_case(SHAPE, torch.float64)
    logits = (case.hidden @ case.weight.T + case.bias).requires_grad_()
    upstream = torch.randn(19).double() if reduction == "none" else torch.tensor(-1.7).double()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    expected = F.cross_entropy(logits, case.labels, **options)
    expected.backward(upstream)
    for module in (srft_kernels, reference):
        hidden = case.hidden.clone().requires_grad_()
        loss = cross_entropy(module, replace(case, hidden=hidden), **options)
        loss.backward(upstream)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(hidden.grad, logits.grad @ case.weight)


def test_z_loss_by_hand():
    """z_loss_coef times the squared log-sum-exp is all that it adds."""
    case = make_case((11, 31, 8), torch.float64, ignored=0.0)
    logits = 1.3 * (case.hidden @ case.weight.T + case.bias) / 0.7
    expected = F.cross_entropy(logits, case.labels) + 0.2 * logits.logsumexp(-1).square().mean()
    found = cross_entropy(srft_kernels, case, z_loss_coef=0.2, logit_scale=1.3, temperature=0.7)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(row_kernels.INTERPRETED, reason="in float64, which the kernels do not have")
@pytest.mark.parametrize(("module", "reduction"), [(reference, "mean"), (srft_kernels, "none")], ids=["twin", "op"])
def test_gradcheck(module, reduction, monkeypatch):
    """Derivatives by finite differences; the twin's stand for those of a fused loss, which has one backward."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    case = make_case((19, 13, 5), torch.float64)
    options = {"label_smoothing": 0.3, "z_loss_coef": 0.1, "logit_softcap": 3.0, "temperature": case.temperature}
    options |= {"reduction": reduction, "token_weights": case.weights}
    op = partial(module.linear_cross_entropy, labels=case.labels, **options)
    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    assert gradcheck(lambda hidden, weight, bias: op(hidden, weight, bias=bias) * 1.5, inputs)


@pytest.mark.parametrize("op", [cross_entropy, weighted_sum], ids=["reduced", "none"])
@pytest.mark.parametrize("options", SMOOTHED.values(), ids=SMOOTHED)
def test_words_out_of_a_padded_vocabulary(options, op, monkeypatch):
    """Columns that a bias of -inf takes out are no words: the loss is that of the vocabulary without them."""
    chunks_of_16_rows(monkeypatch)
    case = make_case(SHAPE)
    case.labels = torch.where(case.labels >= 60, 7, case.labels)
    short = replace(case, weight=case.weight[:60], bias=case.bias[:60])
    padded = replace(case, bias=torch.where(torch.arange(71) < 60, case.bias, -torch.inf))
    results = []
    for module, used in ((srft_kernels, padded), (reference, padded), (srft_kernels, short)):
        leaves = [x.clone().requires_grad_() for x in (used.hidden, used.weight, used.bias)]
        loss = op(module, replace(used, **dict(zip(("hidden", "weight", "bias"), leaves, strict=True))), **options)
        (-1.7 * loss).backward()
        results.append([loss.detach(), leaves[0].grad, leaves[1].grad[:60], leaves[2].grad[:60]])
        assert not leaves[1].grad[60:].any() and not leaves[2].grad[60:].any()
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss_coef": 0.01}], ids=["plain", "smoothed"])
def test_a_weight_of_0_leaves_a_token_out(reduction, options):
    """Loss and gradients are those of a label of -100, whatever the hidden states and the label of the token are."""
    case = make_case(SHAPE)
    out = torch.rand(19) < 0.3
    weights = case.weights.masked_fill(out, 0.0)
    hidden = case.hidden.masked_fill(out[:, None], torch.nan)
    labels = torch.where(out, -100, case.labels)
    if reduction == "mean":
        options = {**options, "num_tokens": 20}
    found = []
    for used, given in ((hidden, case.labels), (case.hidden, labels)):
        leaves = [x.clone().requires_grad_() for x in (used, case.weight)]
        loss = linear_cross_entropy(*leaves, given, token_weights=weights, reduction=reduction, **options)
        (loss * torch.linspace(-1, 1, 19) if reduction == "none" else loss).sum().backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    assert all(torch.isfinite(x).all() for x in found[0]) and found[0][1].any()
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_weights_do_not_change_the_denominator():
    """The mean is over the labels that count, so that weights of 1 / length make a mean over sequences."""
    case = make_case(SHAPE)
    valid = case.labels != -100
    losses = cross_entropy(reference, case, reduction="none")
    expected = (losses * case.weights).sum() / valid.sum()
    torch.testing.assert_close(cross_entropy(srft_kernels, case, token_weights=case.weights), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_frozen_head(label_smoothing):
    """Without a gradient of the head the losses of the tokens cost 4NDV and are the same."""
    case = make_case(SHAPE, torch.float64)
    found = []
    for module in (srft_kernels, reference):
        hidden = case.hidden.clone().requires_grad_()
        used = replace(case, hidden=hidden)
        loss = weighted_sum(module, used, label_smoothing=label_smoothing, z_loss_coef=0.1)
        loss.backward()
        found.append((loss.detach(), hidden.grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_lora_and_weight_grad():
    """The other options of a head go with it."""
    case = make_case(SHAPE, torch.float64)
    options = {"label_smoothing": 0.2, "z_loss_coef": 0.1}
    found = []
    for module in (srft_kernels, reference):
        generator = torch.Generator().manual_seed(2)
        a, b = (torch.randn(*size, generator=generator).double() for size in ((2, 8), (71, 2)))
        a, b = a.requires_grad_(), b.requires_grad_()
        weight = case.weight.clone().requires_grad_()
        buffer = torch.zeros_like(case.weight)
        more = {"weight_grad": buffer} if module is srft_kernels else {}
        cross_entropy(module, replace(case, weight=weight), lora=LoraDelta(a, b, 0.3), **more, **options).backward()
        found.append([buffer if module is srft_kernels else weight.grad, a.grad, b.grad])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_compiled(reduction, dtype):
    """torch.compile takes every reduction whole, with the bits of eager mode."""
    if row_kernels.INTERPRETED:
        pytest.skip("of the CPU path")
    case = make_case(SHAPE, dtype)

    def model(hidden, weight, weights):
        loss = linear_cross_entropy(
            hidden.tanh(), weight, case.labels, token_weights=weights, reduction=reduction,
            label_smoothing=0.1, z_loss_coef=0.01,
        )  # fmt: skip
        return (loss * case.advantages).sum() if reduction == "none" else loss * -1.7

    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        loss = run(*leaves, case.weights)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_no_grad_and_no_tokens():
    """Values without a graph, and zeros of nothing."""
    case = make_case(SHAPE)
    for reduction, count in itertools.product(("mean", "sum", "none"), (19, 0)):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss_coef": 0.1}
        given = (case.hidden[:count].requires_grad_(), case.weight, case.labels[:count])
        with torch.no_grad():
            loss = linear_cross_entropy(*given, **options)
        assert not loss.requires_grad
        assert_accurate("loss", loss, reference.linear_cross_entropy(*given, **options).double(), loss)
        assert count or not loss.any()


@pytest.mark.parametrize("module", [srft_kernels, reference], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "batchmean"}, "reduction must be one of 'mean', 'sum', 'none', got 'batchmean'"),
        ({"label_smoothing": 1.1}, r"label_smoothing must be a number in \[0, 1\], got 1.1"),
        ({"label_smoothing": None}, "label_smoothing must be a number"),
        ({"z_loss_coef": -1.0}, "z_loss_coef must be a finite number >= 0, got -1.0"),
        ({"token_weights": torch.ones(5)}, r"token_weights must be \[N\]=\[19\], got \[5\]"),
        ({"reduction": "sum", "num_tokens": 3}, "num_tokens is read only with reduction=\"mean\", got 'sum'"),
        ({"reduction": "none", "num_tokens": 3}, "num_tokens is read only"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments(module, options, message):
    """Each is named, in the op and its twin."""
    with pytest.raises(ValueError, match=message):
        cross_entropy(module, make_case(SHAPE), **options)
