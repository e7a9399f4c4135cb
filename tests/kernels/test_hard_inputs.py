"""Inputs at the edge of what floating point and shapes allow."""

from dataclasses import replace

import pytest
import torch

import srft_kernels
from srft_kernels import reference
from tests.kernels.cases import (
    OPS,
    assert_matches_reference,
    cross_entropy,
    grpo,
    logprobs,
    make_case,
    policy,
    run,
    srft,
    token_loss,
)
from tests.numerics import assert_accurate

each_op = pytest.mark.parametrize("op", [op for op in OPS if op is not policy], ids=lambda op: op.__name__)


@each_op
@pytest.mark.parametrize("low", [-1e4, -200.0], ids=lambda x: f"down-to-{x:g}")
def test_huge_logits(op, low):
    """Logits of many thousands, and rows where all of them lie below -88."""
    case = make_case((19, 97, 24), bias=False)
    bias = torch.linspace(low, low / 2, 97)
    assert_matches_reference(op, replace(case, bias=bias, old_logprobs=case.old_logprobs.clamp(min=-3)))


def test_one_hot_rows():
    """One logit far above the others: log-probability 0 and entropy 0, exactly."""
    weight = torch.eye(33)
    hidden = 1e4 * torch.eye(33)[[0, 7, 32]]
    logp, entropy = srft_kernels.linear_logprobs(hidden, weight, torch.tensor([0, 7, 32]))
    assert logp.tolist() == [0, 0, 0] and entropy.tolist() == [0, 0, 0]


def test_equal_rows():
    """Equal logits: entropy log V and log-probability -log V, at any level."""
    hidden, weight = torch.tensor([[1.0], [1e4], [-300.0]]), torch.ones(101, 1)
    logp, entropy = srft_kernels.linear_logprobs(hidden, weight, torch.tensor([0, 50, 100]))
    expected = torch.full((3,), 101.0).log()
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logp, -expected, rtol=1e-6, atol=0)


@each_op
def test_label_on_the_last_column(op):
    """Every label on the last column, which belongs to the last, partly filled block."""
    case = make_case((19, 97, 24))
    assert_matches_reference(op, replace(case, labels=torch.full((19,), 96)))


@each_op
def test_vocabulary_of_one(op):
    """V = 1: probability 1, no gradient."""
    assert_matches_reference(op, make_case((7, 1, 5)))


@each_op
def test_masked_words(op):
    """Words that a bias of -inf removes have probability 0 and no part in entropy or gradient."""
    case = make_case((19, 97, 24))
    case.bias[10:60] = -float("inf")
    case.labels = torch.where((case.labels >= 10) & (case.labels < 60), 3, case.labels)
    assert_matches_reference(op, case)
    assert_matches_reference(op, case, temperature=0.5)


def test_first_block_of_masked_words():
    """A run of -inf that fills whole blocks at the start of a row does not spoil the maximum."""
    v = 9000
    case = make_case((2, v, 4))
    case.bias[: v - 3] = -float("inf")
    case.labels[:] = v - 1
    assert_matches_reference(grpo, case, entropy_coef=0.1)


@each_op
def test_several_blocks(op):
    """A vocabulary of several blocks of the row kernel, the last of them partly filled."""
    assert_matches_reference(op, make_case((3, 9001, 8)))


@each_op
def test_non_contiguous_inputs(op):
    """Every input strided: transposed hidden and weight, every other element of the vectors."""
    case = make_case((20, 33, 12), ignored=0.1)

    def spread(x):
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    names = (
        "labels",
        "advantages",
        "old_logprobs",
        "ref_logprobs",
        "weights",
        "is_demo",
        "is_correct",
        "bias",
    )
    strided = replace(
        case,
        hidden=case.hidden.t().contiguous().t(),
        weight=case.weight.t().contiguous().t(),
        **{name: spread(getattr(case, name)) for name in names},
    )
    assert not strided.hidden.is_contiguous() and not strided.labels.is_contiguous()
    assert_matches_reference(op, strided)


def test_label_that_is_masked_out():
    """A label with a logit of -inf: an infinite negative log-likelihood, and ratios of 0 that stay finite."""
    case = make_case((19, 97, 24), ignored=0.0)
    case.bias[5] = -float("inf")
    case.labels[4] = 5
    case.old_logprobs = case.old_logprobs.clamp(min=-8)
    assert srft_kernels.linear_cross_entropy(case.hidden, case.weight, case.labels, bias=case.bias) == float("inf")
    for loss_type in ("grpo", "reinforce"):
        out = run(grpo, srft_kernels, case, loss_type=loss_type)
        assert loss_type == "reinforce" or torch.isfinite(out["loss"])
        assert torch.isfinite(out["dweight"]).all() and torch.isfinite(out["dhidden"]).all()
    case.is_demo[4] = False
    out = run(srft, srft_kernels, case, preset="official", off_policy=True)
    assert torch.isfinite(out["loss"]) and torch.isfinite(out["dweight"]).all()


def test_reference_that_is_not_used():
    """Log-probabilities of a reference far away change nothing while the KL has no weight."""
    case = make_case((19, 97, 24), scale=40.0)
    case.ref_logprobs = torch.full((19,), -1.0)
    # without options grpo() passes no reference
    gold, baseline = (run(grpo, reference, case.to(dtype))["loss"] for dtype in (torch.float64, torch.float32))
    for module in (srft_kernels, reference):
        out = run(grpo, module, case, ref_logprobs=case.ref_logprobs)
        assert torch.isfinite(out["loss"]) and out["terms/kl"] == 0
        assert_accurate("loss", out["loss"], gold, baseline)


@each_op
def test_softcap_of_a_padded_vocabulary(op):
    """Words that a bias of -inf removes have no part in values and gradients under a softcap either."""
    case = make_case((7, 33, 8), ignored=0.3)
    removed = torch.tensor([0, 1, 2, 17, 29, 30, 31, 32])
    case.bias[removed] = -float("inf")
    kept = torch.tensor([i for i in range(33) if i not in removed])
    case.labels = torch.where(torch.isin(case.labels, removed), 7, case.labels)
    entropy = {
        cross_entropy: {},
        logprobs: {"entropy_grad": True},
        token_loss: {"entropy_weights": case.weights},
    }.get(op, {"entropy_coef": 0.1})
    options = {"logit_softcap": 2.0, "temperature": case.temperature, **entropy}
    assert_matches_reference(op, case, **options)
    # as if the words had never been there
    labels = torch.where(case.labels == -100, -100, torch.searchsorted(kept, case.labels))
    small = replace(case, weight=case.weight[kept], bias=case.bias[kept], labels=labels)
    out = run(op, srft_kernels, case, **options)
    gold, baseline = (run(op, reference, small.to(dtype), **options) for dtype in (torch.float64, torch.float32))
    assert_accurate("loss", out["loss"], gold["loss"], baseline["loss"])
    assert_accurate("dweight", out["dweight"][kept], gold["dweight"], baseline["dweight"], gradient=True)
    assert not out["dweight"][removed].any() and not out["dbias"][removed].any()


def test_softcap_of_a_label_that_is_removed():
    """Such a label has log-probability -inf; through the softcap, flat there, it has no gradient of its own."""
    case = make_case((7, 33, 8), ignored=0.0)
    case.bias[5], case.labels[4] = -float("inf"), 5
    for module in (srft_kernels, reference):
        out = run(logprobs, module, case, logit_softcap=2.0)
        assert out["logprobs"][4] == -float("inf")
        assert torch.isfinite(out["dweight"]).all() and not out["dweight"][5].any()


@each_op
def test_temperature_of_ignored_rows(op):
    """What stands for the temperature of a row to skip is not looked at, and changes nothing."""
    case = make_case((7, 33, 8), ignored=0.0)
    case.labels[2:6] = -100
    spoiled = case.temperature.clone()
    spoiled[2:6] = torch.tensor([0.0, -1.0, float("nan"), float("inf")])
    for module in (srft_kernels, reference):
        expected = run(op, module, case, temperature=case.temperature)
        actual = run(op, module, case, temperature=spoiled)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
