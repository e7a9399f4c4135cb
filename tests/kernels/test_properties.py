"""What must hold exactly or in a limit: ignored rows, determinism, splits, closed forms, memory."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import srft_kernels
from srft_kernels import LoraDelta, reference
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import loss as known_loss
from srft_kernels.head import sweep
from srft_kernels.rows import cpu as row_cpu
from srft_kernels.rows import gpu as row_kernels
from srft_kernels.rows.types import RowArguments
from tests.kernels.cases import (
    DTYPES,
    OPS,
    Case,
    assert_close,
    assert_matches_reference,
    case_id,
    cross_entropy,
    each_op,
    grads_of,
    grpo,
    logprobs,
    make_case,
    policy,
    run,
    srft,
    token_loss,
)
from tests.numerics import assert_accurate, assert_sum


def part(case: Case, rows: slice) -> Case:
    """The tokens ``rows`` of a case, as one sequence."""
    vectors = (
        "hidden",
        "labels",
        "advantages",
        "old_logprobs",
        "ref_logprobs",
        "weights",
        "is_demo",
        "is_correct",
    )
    count = len(range(case.labels.numel())[rows])
    return replace(
        case,
        temperature=case.temperature[rows],
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        **{name: getattr(case, name)[rows] for name in vectors},
    )


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_ignored_rows_are_exactly_zero(op, dtype):
    """Ignored rows have output 0 and gradient 0, whatever their other inputs hold."""
    case = make_case(dtype=dtype)
    ignored = case.labels == -100
    assert 0 < ignored.sum() < ignored.numel()
    clean = run(op, srft_kernels, case)
    rubbish = 0.0 if op in (policy, logprobs) else float("nan")
    for name in ("advantages", "old_logprobs", "ref_logprobs", "weights"):
        setattr(case, name, getattr(case, name).masked_fill(ignored, rubbish))
    out = run(op, srft_kernels, case)
    live = ~ignored & ~out.get("clipped", ignored)
    assert not out["dhidden"][ignored].any() and out["dhidden"][live].any(1).all()
    assert torch.equal(out["dweight"], clean["dweight"])
    if op is not cross_entropy:
        assert not out["logprobs"][ignored].any() and not out["entropy"][ignored].any()
        assert (out["ratio"][ignored] == 1).all() and not out["clipped"][ignored].any()


@each_op
def test_all_ignored(op):
    """With every label ignored the loss and all gradients are exactly 0."""
    out = run(op, srft_kernels, replace(make_case(), labels=torch.full((37,), -100)))
    assert out["loss"] == 0 and not any(grad.any() for grad in grads_of(out))


@each_op
def test_no_tokens(op):
    """With N = 0 the loss is 0 (NaN for a user's mean) and there are only empty or zero gradients."""
    out = run(op, srft_kernels, make_case((0, 11, 5)))
    assert out["dhidden"].shape == (0, 5) and not out["dweight"].any()
    assert op is policy or out["loss"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_logprobs_and_entropy_are_in_range(dtype):
    """Log-probabilities are at most 0 and entropies in [0, log V]."""
    for scale in (0.0, 1.0, 30.0):
        case = make_case((90, 33, 8), dtype, scale=scale, bias=False)
        logp, entropy = srft_kernels.linear_logprobs(case.hidden, case.weight, case.labels)
        assert (logp <= 0).all() and (entropy >= 0).all()
        assert (entropy <= torch.tensor(33.0).log() * (1 + 1e-6)).all()


@each_op
def test_two_runs_are_bitwise_equal(op):
    """The same call twice gives the same bits."""
    case = make_case((130, 257, 40))
    first, second = (run(op, srft_kernels, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("overwrite", [False, True])
def test_row_is_independent_of_its_chunk(overwrite):
    """The row kernel gives a row the same bits whatever rows stand beside it."""
    backend = row_kernels if row_kernels.INTERPRETED else row_cpu
    scores, labels = torch.randn(9, 333) * 3, torch.randint(0, 333, (9,))
    dlogp = torch.randn(9)

    def compute(part):
        rows = RowArguments(labels[part], None, None, None, -100, torch.float32)
        z = scores[part].clone()
        known = backend.stats(z, rows, overwrite)
        return *known, backend.gradient(z, rows, known, dlogp[part], None, overwrite)

    together = compute(slice(0, 9))
    for i in range(9):
        alone = compute(slice(i, i + 1))
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.skipif(row_kernels.INTERPRETED, reason="the products are those of the CPU path")
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
def test_forward_is_independent_of_the_batch(dtype, rounded, monkeypatch):
    """A token's log-probability and entropy have the same bits alone, in company, and whatever the chunks."""
    case = make_case((150, 257, 56), dtype, ignored=0.0)
    head = {"bias": case.bias, "logits_dtype": dtype if rounded else None}
    expected = srft_kernels.linear_logprobs(case.hidden, case.weight, case.labels, **head)
    for workspace in (2**28, 0):
        monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", workspace)
        for start, stop in ((0, 1), (3, 5), (7, 18), (20, 149)):
            rows = slice(start, stop)
            actual = srft_kernels.linear_logprobs(case.hidden[rows], case.weight, case.labels[rows], **head)
            assert all(torch.equal(x, y[rows]) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (cross_entropy, {"num_tokens": 29}),
        (grpo, {"everything": True}),
        (srft, {"everything": True, "entropy_scope": "token", "preset": "official"}),
        (srft, {"everything": True, "entropy_scope": "batch", "batch_entropy": 0.7}),
        (srft, {"everything": True, "preset": "upt"}),
        (grpo, {"everything": True, "loss_type": "gspo"}),
        (token_loss, {"everything": True, "entropy_scope": "sequence"}),
        (token_loss, {"everything": True, "policy": "gspo"}),
    ],
    ids=lambda x: x.__name__ if callable(x) else case_id(x),
)
def test_split_with_common_denominators(op, options):
    """Two micro-batches with the denominators of the whole add up to its loss, terms and gradients."""
    case = make_case((40, 97, 24))
    case.cu_seqlens = torch.tensor([0, 23, 40], dtype=torch.int32)
    whole = run(op, srft_kernels, case, **options)
    halves = [run(op, srft_kernels, part(case, rows), **options) for rows in (slice(0, 23), slice(23, 40))]
    for name in ("dweight", "dbias"):
        assert_close(halves[0][name] + halves[1][name], whole[name])
    assert_close(torch.cat([half["dhidden"] for half in halves]), whole["dhidden"])
    gold, baseline = (run(op, reference, case.to(dtype), **options) for dtype in (torch.float64, torch.float32))
    for name in (name for name in whole if name == "loss" or name.startswith("terms/")):
        for found in (halves[0][name] + halves[1][name], whole[name]):
            assert_accurate(name, found, gold[name], baseline[name])


def test_terms_add_up_to_the_loss():
    """The terms that enter the loss sum to it."""
    case = make_case()
    out = run(srft, srft_kernels, case, preset="official", everything=True)
    names = ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative", "entropy_bonus")
    assert_adds_up(out["loss"], [out[f"terms/{name}"] for name in names])
    out = run(grpo, srft_kernels, case, everything=True)
    assert_adds_up(out["loss"], [out[f"terms/{name}"] for name in ("policy", "kl", "entropy_bonus")])
    out = run(token_loss, srft_kernels, case, everything=True)
    names = ("policy", "sft", "shaped", "kl", "entropy_bonus")
    assert_adds_up(out["loss"], [out[f"terms/{name}"] for name in names])


def assert_adds_up(loss, terms):
    """A loss is the sum of its terms, to the rounding of these."""
    assert_sum("loss", loss, sum(terms), sum(abs(term.item()) for term in terms), noise=1e-6)


def test_old_equal_to_current_gives_reinforce():
    """Where the old policy is the current one, clipped losses have the gradient of REINFORCE."""
    case = make_case()
    logp, _ = srft_kernels.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)
    case.old_logprobs = logp.detach()
    expected = run(grpo, srft_kernels, case, loss_type="reinforce")
    for options in ({}, {"on_policy": True}, {"loss_type": "cispo"}):
        actual = run(grpo, srft_kernels, case, **options)
        for x, y in zip(grads_of(actual), grads_of(expected), strict=True):
            assert_close(x, y, 1e-5)
        assert (actual["ratio"] - 1).abs().max() < 1e-5


def test_infinite_clip_gives_the_unclipped_gradient():
    """clip = inf clips nothing: the gradient of -r A, written out with linear_logprobs."""
    case = make_case()
    inf = float("inf")
    actual = run(grpo, srft_kernels, case, clip_low=inf, clip_high=inf)
    assert not actual["clipped"].any()

    def unclipped(module, case):
        logp, _ = module.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)
        valid = case.labels != -100
        return -((logp - case.old_logprobs).exp() * case.advantages)[valid].sum() / valid.sum()

    expected = run(unclipped, srft_kernels, case)
    for x, y in zip(grads_of(actual), grads_of(expected), strict=True):
        assert_close(x, y, 1e-5)


def test_clipped_tokens_have_no_gradient():
    """``clipped`` marks exactly the valid tokens with A not 0 whose gradient is 0; both clips are there."""
    out = run(grpo, srft_kernels, make_case((80, 97, 24), seed=6))
    valid = make_case((80, 97, 24), seed=6).labels != -100
    assert torch.equal(out["clipped"], valid & ~out["dhidden"].any(1))
    assert out["terms/clip_low_sum"] > 0 and out["terms/clip_high_sum"] > 0
    assert out["terms/clip_low_sum"] + out["terms/clip_high_sum"] == out["clipped"].sum()


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "cispo", "reinforce"])
def test_zero_advantage_gives_zero_gradient(loss_type):
    """With every advantage 0 each gradient is exactly 0."""
    case = replace(make_case(), advantages=torch.zeros(37))
    assert not any(grad.any() for grad in grads_of(run(grpo, srft_kernels, case, loss_type=loss_type)))


def test_gspo_of_single_tokens_is_grpo():
    """With sequences of one token the sequence ratio is the token ratio."""
    case = replace(make_case(ignored=0.0), cu_seqlens=torch.arange(38, dtype=torch.int32))
    actual = run(grpo, srft_kernels, case, loss_type="gspo")
    expected = run(grpo, srft_kernels, case)
    assert_close(actual["dweight"], expected["dweight"], 1e-5)
    assert torch.equal(actual["clipped"], expected["clipped"])


@pytest.mark.parametrize("demo", [True, False], ids=["demonstrations", "rollouts"])
def test_srft_of_one_kind_is_its_part(demo):
    """Only demonstrations, or only rollouts: the closed form of that part, with token entropy."""
    case = make_case()
    case.is_demo = torch.full((37,), demo)

    def closed_form(module, case):
        logp, entropy = module.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)
        valid = case.labels != -100
        if demo:
            loss = -0.5 * (-entropy).exp() * logp - case.advantages * logp.exp()
        else:
            loss = torch.where(case.is_correct, -0.1 * entropy.exp() * logp, logp)
        return loss[valid].sum() / valid.sum()

    actual = run(srft, srft_kernels, case, entropy_scope="token")
    expected, gold = (run(closed_form, reference, case.to(dtype)) for dtype in (torch.float32, torch.float64))
    assert_accurate("loss", actual["loss"], gold["loss"], expected["loss"])
    for x, y in zip(grads_of(actual), grads_of(expected), strict=True):
        assert_close(x, y, 1e-5)
    absent = ["rollout_positive", "rollout_negative"] if demo else ["demo_sft", "demo_rl"]
    assert all(actual[f"terms/{name}"] == 0 for name in absent)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_no_tensor_of_tokens_by_vocabulary(op, dtype, monkeypatch):
    """No operation of forward or backward returns more than a chunk of logits or one gradient."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    n, v, d = shape = (600, 2000, 32)
    case = make_case(shape, dtype)
    case.weight.requires_grad_()
    case.hidden.requires_grad_()
    with LargestTensor() as seen:
        result = op(srft_kernels, case)
        (result if isinstance(result, torch.Tensor) else result.loss).backward()
    assert 16 * v <= seen.numel <= max(2 * 16 * v, v * d)
    with LargestTensor() as seen:
        op(reference, case)
    assert seen.numel == n * v


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_options(data):
    """Random shapes, sequences, masks, chunks and options of every op agree with the reference."""
    shape = tuple(data.draw(st.integers(low, high)) for low, high in ((1, 70), (1, 60), (1, 12)))
    ignored = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    case = make_case(
        shape, seed=data.draw(st.integers(0, 10**6)), bias=data.draw(st.booleans()), ignored=ignored
    )
    generator = torch.Generator().manual_seed(0)
    dead = torch.rand(shape[0], generator=generator) < data.draw(st.sampled_from([0.0, 0.5]))
    case.advantages = case.advantages.masked_fill(dead, 0.0)
    options = {
        "temperature": data.draw(st.sampled_from([1.0, 0.6, case.temperature])),
        "logit_softcap": data.draw(st.sampled_from([None, 5.0])),
        "logit_scale": data.draw(st.sampled_from([1.0, 0.25])),
    }
    if data.draw(st.booleans()):
        a, b = (torch.randn(size, generator=generator) for size in ((2, shape[2]), (shape[1], 2)))
        options["lora"] = LoraDelta(a, b, 0.02)
    op = data.draw(st.sampled_from(OPS))
    if op in (grpo, srft):
        options["everything"] = data.draw(st.booleans())
        options["entropy_coef"] = data.draw(st.sampled_from([0.0, 0.01]))
    if op is grpo:
        options["loss_type"] = data.draw(st.sampled_from(["grpo", "gspo", "cispo", "reinforce"]))
        options["on_policy"] = data.draw(st.booleans())
        options["dual_clip"] = data.draw(st.sampled_from([None, 1.5]))
    if op is srft:
        options["preset"] = data.draw(st.sampled_from(["paper", "official", "upt"]))
        options["entropy_scope"] = data.draw(st.sampled_from(["token", "sequence", "batch"]))
        options["off_policy"] = data.draw(st.booleans())
    if op is token_loss:
        options["everything"] = data.draw(st.booleans())
        options["policy"] = data.draw(st.sampled_from(["clip", "gspo", "cispo", "reinforce"]))
        options["entropy_scope"] = data.draw(st.sampled_from(["token", "sequence", "batch"]))
        options["on_policy"] = data.draw(st.booleans())
        options["shaped_weights"] = data.draw(st.sampled_from([None, case.weights]))
        if options["everything"] and options["shaped_weights"] is None:
            options["shaping_gamma"] = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", data.draw(st.sampled_from([0, 2**20])))
        patch.setattr(known_loss, "CPU_DEFERRED_BYTES", data.draw(st.sampled_from([0, 2**30])))
        patch.setattr(sweep, "DEFERRED_CHUNKS", 2)
        assert_matches_reference(op, case, **options)
