"""On a GPU: every op against float64, no host sync, bounded memory, and offsets beyond 32 bits."""

from dataclasses import fields, replace

import pytest
import torch

import srft_kernels
from srft_kernels import LoraDelta
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import gradients as head_gradients
from srft_kernels.head import loss as known_loss
from srft_kernels.head import sweep
from srft_kernels.objectives import CROSS_ENTROPY
from srft_kernels.rows import gpu as row_kernels
from srft_kernels.rows.types import RowArguments
from tests.kernels.cases import (
    Case,
    assert_matches_reference,
    case_id,
    cross_entropy,
    each_op,
    grpo,
    logprobs,
    make_case,
    run,
    srft,
    token_loss,
)
from tests.kernels.test_logits import OPTIONS, assert_logits_match, make_logits, run_logits
from tests.kernels.test_scopes import SCOPES, long_case, scopes, with_ref

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_gpu(case: Case) -> Case:
    """The case on the GPU; sequence bounds stay where the op reads them without waiting, on the CPU."""
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return replace(case, **{n: x.cuda() for n, x in values.items() if x is not None and n != "cu_seqlens"})


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("workspace", [0, 2**30], ids=["chunks16", "one-chunk"])
def test_ops_match_the_reference(op, dtype, workspace, monkeypatch):
    """Values and gradients with shapes that fill no block."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", workspace)
    assert_matches_reference(op, on_gpu(make_case((257, 1031, 96), dtype, scale=3.0)))


@scopes
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("budget", [0, 2**31], ids=["stats-first", "deferred"])
def test_scopes_match_the_reference(op, options, dtype, budget, monkeypatch):
    """Sequences longer than a chunk and the batch scope, over chunks of 16 rows."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(known_loss, "GPU_DEFERRED_BYTES", budget)
    monkeypatch.setattr(sweep, "DEFERRED_CHUNKS", 3)
    case = on_gpu(long_case(dtype, ignored=0.0, scale=3.0))
    assert_matches_reference(op, case, **with_ref(case, options))


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_options_of_the_head(op, dtype, monkeypatch):
    """LoRA, rounded logits and a buffer for the weight gradient run, and agree with the plain call."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 0)
    case = on_gpu(make_case((130, 257, 64), dtype))
    lora = LoraDelta(torch.randn(2, 64, device="cuda"), torch.randn(257, 2, device="cuda"), 0.02)
    assert_matches_reference(op, case, lora=lora)
    exact, rounded = run(op, srft_kernels, case), run(op, srft_kernels, case, logits_dtype=dtype)
    for name in ("dhidden", "dweight"):
        error = (exact[name].float() - rounded[name].float()).norm() / exact[name].float().norm()
        # rounding may move a token across a clip bound
        assert 0 < error < 0.3
    buffer = torch.zeros(257, 64, device="cuda")
    case.weight.requires_grad_()
    result = op(srft_kernels, case, weight_grad=buffer)
    (result if isinstance(result, torch.Tensor) else result.loss).backward()
    expected = exact["dweight"].float() / -1.7
    assert (buffer - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_frozen_head(dtype):
    """The gradient of the hidden states alone is that of the full call."""
    case = on_gpu(make_case((130, 257, 64), dtype))
    full = run(logprobs, srft_kernels, case, entropy_grad=False)
    case.hidden.requires_grad_()
    (logprobs(srft_kernels, case, entropy_grad=False).loss * -1.7).backward()
    error = (case.hidden.grad - full["dhidden"]).norm() / full["dhidden"].norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("op", [grpo, srft], ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_real_vocabulary(op, dtype):
    """A vocabulary of 151936 words, with softcap, temperature and an entropy gradient."""
    case = on_gpu(make_case((96, 151936, 64), dtype))
    assert_matches_reference(op, case, temperature=0.8, logit_softcap=20.0, entropy_coef=0.01)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (cross_entropy, {}),
        (grpo, {}),
        (srft, {"preset": "official"}),
        (token_loss, {"everything": True}),
        (logprobs, {}),
        *SCOPES[:-1],
    ],
    ids=lambda x: x.__name__ if callable(x) else case_id(x),
)
def test_no_host_sync(op, options, monkeypatch):
    """Forward and backward never wait for the GPU, over many chunks and in every scope."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 0)
    case = on_gpu(long_case(torch.bfloat16))
    options = with_ref(case, options)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    op(srft_kernels, case, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = op(srft_kernels, case, **options)
        (result if isinstance(result, torch.Tensor) else result.loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize(("shape", "first"), [((1000, 257), 64), ((40_000, 1536), 2**24)], ids=["small", "real"])
def test_a_scaled_gradient_is_rounded_in_its_own_memory(shape, first, dtype, monkeypatch):
    """Every part of it, to the bits of a product in fp32 that is rounded elsewhere."""
    monkeypatch.setattr(head_gradients, "_ROUNDED_FIRST", first)
    total, scale = torch.randn(shape, device="cuda"), torch.tensor([9.0, -1.7], device="cuda", dtype=dtype)[1]
    expected, place = (total * scale).to(dtype), total.data_ptr()
    actual = head_gradients._rounded(total, dtype, scale)
    assert torch.equal(actual, expected) and actual.data_ptr() == place


def test_memory_does_not_grow_with_tokens_by_vocabulary():
    """Beyond the gradients, twice the tokens take no more than their own vectors and hidden gradient."""

    def extra(n: int) -> int:
        hidden = torch.randn(n, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(100_000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(0, 100_000, (n,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        srft_kernels.linear_cross_entropy(hidden, weight, labels).backward()
        return torch.cuda.max_memory_allocated() - before

    extra(8192)
    assert extra(16384) - extra(8192) < 8192 * (6 * 256 + 256)


def test_offsets_beyond_32_bits(monkeypatch):
    """A chunk of more than 2^31 logits: its last rows agree with a chunk of their own."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 2**34)
    monkeypatch.setattr(chunked_head, "_PRODUCT_ROWS", 2**15)
    n, v = 17_000, 131_072
    hidden = torch.randn(n, 16, device="cuda")
    weight = torch.randn(v, 16, device="cuda")
    labels = torch.randint(0, v, (n,), device="cuda")
    logp, entropy = srft_kernels.linear_logprobs(hidden, weight, labels)
    tail_logp, tail_entropy = srft_kernels.linear_logprobs(hidden[-64:], weight, labels[-64:])
    torch.testing.assert_close(logp[-64:], tail_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy[-64:], tail_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(257, 1031), (64, 151936), (3, 9, 4097)], ids=str)
def test_logits_match_the_reference(dtype, options, shape):
    """Values and gradients from logits with vectors and without, and in place the same bits."""
    logits, labels = (x.cuda() for x in make_logits(shape, dtype))
    new = assert_logits_match(logits, labels, **options)
    in_place = run_logits(srft_kernels, logits, labels, inplace_backward=True, **options)
    assert all(torch.equal(new[name], in_place[name]) for name in new)


def test_in_place_gradient_is_the_same_every_time():
    """Thousands of rows in place, many times over: no thread reads what another has overwritten."""
    logits, labels = (x.cuda() for x in make_logits((4096, 32003), torch.bfloat16))
    expected = run_logits(srft_kernels, logits, labels, entropy_grad=True)
    for _ in range(20):
        actual = run_logits(srft_kernels, logits, labels, entropy_grad=True, inplace_backward=True)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_one_launch_is_the_same_every_time(dtype):
    """In one launch, in place, no thread reads what another has overwritten, and the result is that of two."""
    z, labels = (x.cuda() for x in make_logits((4096, 32003), dtype))
    rows = RowArguments(labels, None, None, None, -100, dtype)
    weight = torch.randn(1, 4096, device="cuda")
    arguments = (rows, CROSS_ENTROPY.formulas[""], weight, (), False)
    known, dz = row_kernels.objective_gradient(z.clone(), *arguments)
    expected = row_kernels.gradient(z, rows, known, -weight[0], None, False, out=torch.empty_like(z))
    torch.testing.assert_close(dz, expected)
    for actual, again in zip(known, row_kernels.stats(z, rows, False), strict=True):
        torch.testing.assert_close(actual, again)
    for _ in range(20):
        other, actual = row_kernels.objective_gradient(z.clone(), *arguments)
        assert torch.equal(actual, dz)
        assert all(torch.equal(x, y) for x, y in zip(known, other, strict=True))


@pytest.mark.parametrize("vocab", [152_064, 151_655], ids=["aligned", "odd"])
def test_one_launch_of_a_real_chunk(vocab):
    """fp32 scores in, bf16 gradient out, in rows as the ops lay them out: those of two launches, every time."""
    stride = -(-vocab // 16) * 16
    z = torch.randn(1024, stride, device="cuda")[:, :vocab]
    labels = torch.randint(0, vocab, (1024,), device="cuda")
    labels[::7] = -100
    rows, weight = RowArguments(labels, None, None, None, -100, torch.bfloat16), torch.randn(1, 1024, device="cuda")
    dz, expected = (torch.full((1024, stride), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    known = row_kernels.stats(z, rows, False)
    row_kernels.gradient(z, rows, known, -weight[0], None, False, out=expected[:, :vocab])
    for _ in range(20):
        arguments = (z, rows, CROSS_ENTROPY.formulas[""], weight, (), False)
        other, actual = row_kernels.objective_gradient(*arguments, out=dz[:, :vocab])
        # one compiler's fusions in one kernel are not those in two
        torch.testing.assert_close(actual, expected[:, :vocab])
        assert all(torch.equal(x, y) for x, y in zip(known, other, strict=True))
        assert (dz[:, vocab:] == 7.0).all() and not dz[::7, :vocab].any()


@each_op
def test_ignored_rows_may_hold_anything(op, monkeypatch):
    """NaN and inf in the hidden states of ignored rows change no bit, over products of several chunks."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 0)
    case = on_gpu(make_case((130, 257, 64), torch.bfloat16, ignored=0.3))
    ignored = (case.labels == -100).nonzero()[:, 0]
    case.hidden[ignored] = 0.0
    clean = run(op, srft_kernels, case)
    case.hidden[ignored], case.hidden[ignored[::2]] = torch.nan, torch.inf
    dirty = run(op, srft_kernels, case)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["new", "in-place"])
def test_logits_without_host_sync_or_copies(inplace_backward):
    """Nothing waits for the GPU, and memory grows by the gradient and vectors of tokens alone."""
    leaf = torch.randn(2048, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 32000, (2048,), device="cuda")
    for _ in range(2):
        logits = leaf * 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            logprobs, _ = srft_kernels.logprobs_from_logits(
                logits, labels, temperature=0.7, inplace_backward=inplace_backward
            )
            (dlogits,) = torch.autograd.grad(logprobs.sum(), logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # what was asked for: the allocator gives a block whole where less than 1 MiB of it would be left
        extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        assert (dlogits.data_ptr() == logits.data_ptr()) == inplace_backward
        assert extra < 16 * labels.nbytes + (0 if inplace_backward else logits.nbytes)


def test_logits_beyond_32_bits():
    """More than 2^31 logits: the last rows agree bitwise with those rows alone."""
    logits = torch.randn(17_000, 131_072, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 131_072, (17_000,), device="cuda")
    tail = run_logits(srft_kernels, logits[-64:], labels[-64:])
    logits.requires_grad_()
    logprobs, entropy = srft_kernels.logprobs_from_logits(logits, labels)
    assert torch.equal(logprobs[-64:], tail["logprobs"]) and torch.equal(entropy[-64:], tail["entropy"])
    logprobs[-64:].sum().backward()
    assert not logits.grad[:-64].any() and logits.grad[-64:].any(1).all()
