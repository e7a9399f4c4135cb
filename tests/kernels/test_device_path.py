"""The GPU path without a GPU: bytes moved and memory at real sizes, and its numbers in the interpreter."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

import srft_kernels
from srft_kernels import LoraDelta, VocabParallel, reference
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import gradients as head_gradients
from srft_kernels.head import sweep
from srft_kernels.rows import gpu as row_kernels
from tests.kernels import cases
from tests.kernels.cases import (
    OPS,
    assert_matches_reference,
    case_id,
    cross_entropy,
    grpo,
    logprobs,
    make_case,
    policy,
    run,
    srft,
)
from tests.kernels.device_path import device_path
from tests.kernels.test_scopes import SCOPES, with_ref

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V = 152_064
def name_of(x):
    return x.__name__ if callable(x) else case_id(x)


interpreted = pytest.mark.skipif(not row_kernels.INTERPRETED, reason="computes what the interpreter runs")
sizes_only = pytest.mark.skipif(row_kernels.INTERPRETED, reason="computes nothing, so that once is enough")


def head_of(vocab=V, width=3584, dtype=BF16, scores=FP32):
    """A head on a GPU, as far as its sizes and dtypes go."""
    hidden, weight = (torch.empty(1, width, dtype=dtype, device="cuda") for _ in range(2))
    return chunked_head.HeadRows(
        hidden, weight.expand(vocab, width), hidden[:, 0].long(), None, None, None, -100, None, None, scores
    )


def counted(op, n, d=3584, vocab=V, dtype=BF16, frozen=False, **options):
    """What forward and backward of an op do, on tensors without memory."""
    case = make_case((2, 3, 4), dtype, bias=False)
    with device_path("meta") as traffic:
        case.hidden = torch.empty(n, d, dtype=dtype, device="cuda", requires_grad=True)
        case.weight = torch.empty(vocab, d, dtype=dtype, device="cuda", requires_grad=not frozen)
        case.labels = torch.empty(n, dtype=torch.int64, device="cuda")
        for name in ("advantages", "old_logprobs", "ref_logprobs", "is_demo", "is_correct"):
            setattr(case, name, torch.empty(n, dtype=getattr(case, name).dtype, device="cuda"))
        traffic.live = traffic.peak = 0
        result = op(srft_kernels, case, **options)
        (result if isinstance(result, torch.Tensor) else result.loss).backward()
    return traffic


@sizes_only
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        # products of these rows fill 132 multiprocessors to 99 and 100 %
        ({"width": 3584}, (1024, 3584)),
        ({"width": 1536}, (1024, 2816)),
        ({"width": 3584, "scores": BF16}, (3584, 3584)),
        ({"width": 3584, "dtype": FP32}, (3456, 3456)),
        # a small vocabulary takes no more rows, a large one as many as fit
        ({"width": 3584, "vocab": 32_000}, (1024, 3584)),
        ({"width": 3584, "vocab": 262_144}, (640, 2304)),
        ({"width": 64, "vocab": 10_000_000}, (16, 64)),
    ],
    ids=str,
)
def test_rows_of_a_chunk(options, rows):
    """Rows of scores and of products follow from the sizes of the head, and fit in the workspace."""
    with device_path("meta"):
        head = head_of(**options)
        sizes, together = chunked_head.chunking(head), chunked_head.chunking(head, together=True)
    assert (sizes.scores, sizes.products) == rows
    for found in (sizes, together):
        memory = found.scores * head.scores_dtype.itemsize
        memory += found.products * head.hidden.dtype.itemsize if found.gathered else 0
        assert memory * head.weight.shape[0] <= chunked_head.GPU_WORKSPACE_BYTES
        assert found.scores % 128 == found.products % 128 == 0 or head.weight.shape[0] > 10**6
    # as many rows as today's budget allows see each other's statistics before their gradients are due
    assert together.scores >= sizes.scores and together.products <= 2 * together.scores


@sizes_only
@pytest.mark.parametrize("n", [1, 127, 1024, 3584, 3585, 8192, 16_384, 20_001])
def test_chunks_do_not_depend_on_the_number_of_tokens(n):
    """But for the last, every chunk begins and ends where it would among any number of tokens."""
    with device_path("meta"):
        sizes = chunked_head.chunking(head_of())
    chunks, endless = sizes.split(0, n), sizes.split(0, 10**6)
    assert chunks[:-1] == endless[: len(chunks) - 1] and chunks[-1].start == endless[len(chunks) - 1].start
    assert chunks[-1].stop == n and all(chunk.start % 128 == 0 for chunk in chunks)


@sizes_only
@pytest.mark.parametrize(
    ("op", "options"),
    [
        (cross_entropy, {}),
        (grpo, {}),
        (grpo, {"logits_dtype": BF16}),
        (srft, {"entropy_scope": "batch"}),
        (policy, {}),
        (logprobs, {}),
        (logprobs, {"entropy_grad": False, "frozen": True}),
    ],
    ids=name_of,
)
def test_memory_does_not_grow_with_tokens_by_vocabulary(op, options):
    """Beyond the workspace each token takes its own vectors and its gradient alone, whatever the number of tokens."""
    d, vocab = 256, 100_000
    if op is srft:
        options = {**options, "temperature": 0.9}
    peaks = {n: counted(op, n, d, vocab, **options).peak for n in (8192, 9000, 16_384, 16_500)}
    for more in (9000, 16_384, 16_500):
        assert 0 < peaks[more] - peaks[8192] < (more - 8192) * (6 * d + 256)
    weight = 0 if options.get("frozen") else vocab * d * 4
    assert peaks[8192] < weight + chunked_head.GPU_WORKSPACE_BYTES + 8192 * (6 * d + 256) + 2**26


@sizes_only
@pytest.mark.parametrize(("d", "rows"), [(3584, 3584), (1536, 2816)], ids=["D3584", "D1536"])
@pytest.mark.parametrize("scores", [FP32, BF16], ids=case_id)
def test_bytes_moved(d, rows, scores):
    """The weight's gradient is read and written once a product, of thousands of rows, and once in the end."""
    n, chunk = 16_384, 1024 if scores == FP32 else rows
    moved = counted(grpo, n, d, logits_dtype=None if scores == FP32 else scores)
    products = [min(rows, n - start) for start in range(0, n, rows)]
    chunks = [min(chunk, product - start) for product in products for start in range(0, product, chunk)]
    weight, states, size = V * d, n * d, scores.itemsize
    calls = [shapes[0][0] for name, shapes in moved.calls if name == "row_kernel"]
    assert calls == chunks
    project = len(chunks) * weight * 2 + states * 2 + n * V * size
    dhidden = len(products) * weight * 2 + n * V * 2 + states * 4
    assert moved.bytes["mm"] == project + dhidden
    # two passes read the scores, one writes their gradient
    assert moved.bytes["row_kernel"] == n * V * (2 * size + 2)
    assert moved.bytes["addmm"] == n * V * 2 + states * 2 + (2 * len(products) - 1) * weight * 4
    # the factor of the loss and the rounding of both gradients take one pass, in a few launches
    assert sum(name == "scaled_kernel" for name, _ in moved.calls) <= 10
    tail = (weight + states) * (4 + 2)
    assert moved.bytes["scaled_kernel"] == tail
    counted_above = sum(moved.bytes[name] for name in ("mm", "row_kernel", "addmm", "scaled_kernel"))
    elementwise = sum(moved.bytes.values()) - counted_above
    # the hidden states are copied, for each projection and each product, to clear ignored rows
    assert elementwise < states * (2 * 4 + 4) + n * 1000 + 2**27


@pytest.fixture
def on_device(monkeypatch):
    """Ops of the package compute on the GPU path, on CPU tensors, in chunks of 16 rows and products of 64."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 0)
    counted = []

    def run_on_device(op, module, case, **options):
        if module is reference:
            return run(op, module, case, **options)
        with device_path("cpu") as traffic:
            counted.append(traffic)
            return run(op, module, case, **options)

    monkeypatch.setattr(cases, "run", run_on_device)
    return counted


@interpreted
@pytest.mark.parametrize(("op", "dtype"), [*((op, FP16) for op in OPS), (grpo, FP32), (logprobs, FP32)], ids=name_of)
def test_gathered_gradients_match_the_reference(op, dtype, on_device):
    """A product of four chunks and a rest, as a GPU computes products, with a temperature and an upstream gradient."""
    assert_matches_reference(op, make_case((70, 67, 24), dtype, scale=3.0), temperature=0.8)
    rows = [shapes[1][1] for name, shapes in on_device[0].calls if name == "addmm" and len(shapes) == 3]
    # where coefficients depend on several rows, chunks are large and products are theirs
    gathered = dtype == FP16 and op not in (policy, srft)
    assert rows == [64, 6] if gathered else sorted(rows)[1:] == [16] * (len(rows) - 1) and sum(rows) == 70




@interpreted
@pytest.mark.parametrize("factor", [FP32, FP16, torch.float64], ids=case_id)
@pytest.mark.parametrize("shape", [(1,), (7,), (8, 8), (13, 517)], ids=str)
def test_a_scaled_gradient_is_rounded_in_its_own_memory(shape, factor, monkeypatch):
    """Every part of it, to the bits of a product in fp32 that is rounded elsewhere."""
    monkeypatch.setattr(head_gradients, "_ROUNDED_FIRST", 7)
    total, scale = torch.randn(shape), torch.tensor([9.0, -1.7], dtype=factor)[1]
    expected, place = (total * scale).half(), total.data_ptr()
    with device_path("cpu") as traffic:
        actual = head_gradients._rounded(total, FP16, scale)
    assert torch.equal(actual, expected) and actual.shape == shape and actual.data_ptr() == place
    parts = [shapes[0][0] for name, shapes in traffic.calls if name == "scaled_kernel"]
    assert sum(parts) == total.numel() and all(later <= sum(parts[:i]) for i, later in enumerate(parts) if i)


def gradients(op, case, lora=None, frozen=(), **options):
    """Everything an op returns and sends back, for a factor of -1.7."""
    leaves = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias")}
    if lora is not None:
        leaves |= {"a": lora.a.clone(), "b": lora.b.clone()}
    for name in set(leaves) - set(frozen):
        leaves[name].requires_grad_()
    if lora is not None:
        options["lora"] = LoraDelta(leaves["a"], leaves["b"], lora.scale)
    result = op(srft_kernels, replace(case, **{name: leaves[name] for name in ("hidden", "weight", "bias")}), **options)
    if isinstance(result, torch.Tensor):
        result = srft_kernels.PolicyLoss(result, *[result.detach()] * 4, {})
    (result.loss * -1.7).backward()
    return {**result._asdict(), **{name: x.grad for name, x in leaves.items() if name not in frozen}}


@contextmanager
def one_rank(wanted):
    """A process group of this process alone, if one is wanted."""
    if not wanted:
        yield None
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


LORA = LoraDelta(torch.linspace(-1, 1, 16).view(2, 8), torch.linspace(1, -1, 66).view(33, 2), 0.3)


@interpreted
@pytest.mark.parametrize(
    ("op", "options"),
    [
        *((op, {}) for op in OPS),
        *SCOPES[:3],
        (grpo, {"loss_type": "gspo", "kl_coef": 0.3, "with_ref": True}),
        (grpo, {"lora": LORA}),
        (grpo, {"lora": LORA, "frozen": ("hidden", "weight", "bias")}),
        (grpo, {"logits_dtype": FP16}),
        (cross_entropy, {"group": True}),
        (logprobs, {"lora": LORA, "temperature": 0.7, "logit_softcap": 3.0}),
        (logprobs, {"entropy_grad": False, "frozen": ("weight", "bias")}),
    ],
    ids=lambda x: x.__name__ if callable(x) else "+".join(x) or "default",
)
def test_ignored_rows_may_hold_anything(op, options, monkeypatch):
    """NaN and inf in the hidden states of ignored rows change no bit of any value or gradient."""
    monkeypatch.setattr(chunked_head, "GPU_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(sweep, "DEFERRED_CHUNKS", 2)
    options, case = with_ref(make_case(), options), make_case((34, 33, 8), FP16, ignored=0.3)
    if "ref_logprobs" in options:
        options["ref_logprobs"] = case.ref_logprobs
    case.cu_seqlens = torch.tensor([0, 3, 22, 34], dtype=torch.int32)
    ignored = (case.labels == -100).nonzero()[:, 0]
    found = []
    for fill in (0.0, torch.nan):
        case.hidden[ignored] = fill
        if fill != 0.0:
            case.hidden[ignored[::3]], case.hidden[ignored[1::3], 1:] = torch.inf, -torch.inf
        with one_rank(options.get("group")) as group, device_path("cpu"):
            shard = {"vocab_parallel": VocabParallel(group, 0, 33)} if group else {}
            found.append(gradients(op, case, **shard, **{k: v for k, v in options.items() if k != "group"}))
    for name, x in found[0].items():
        for one, two in zip(tree_leaves(x), tree_leaves(found[1][name]), strict=True):
            assert torch.equal(one, two) and one.isfinite().all(), name


@interpreted
@pytest.mark.parametrize("inplace_backward", [False, True], ids=["new", "in-place"])
def test_ignored_rows_of_logits_may_hold_anything(inplace_backward):
    """NaN and inf in the logits of ignored rows give 0, forward and backward."""
    logits, labels = torch.randn(9, 33).half(), torch.arange(9)
    labels[2:5] = -100
    logits[2], logits[3], logits[4, 1:] = torch.nan, torch.inf, -torch.inf
    with device_path("cpu"):
        leaf = logits.clone().requires_grad_()
        logp, entropy = srft_kernels.logprobs_from_logits(
            leaf * 1, labels, entropy_grad=True, inplace_backward=inplace_backward, temperature=torch.rand(9) + 0.5
        )
        (logp * 3 - entropy).sum().backward()
    for x in (logp, entropy, leaf.grad):
        assert not x[2:5].any() and x.isfinite().all() and x[:2].any()
