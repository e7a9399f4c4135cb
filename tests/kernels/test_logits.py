"""logprobs_from_logits: values and gradients against float64, in place and not, and what it refuses."""

import inspect
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import srft_kernels
from srft_kernels import logprobs_from_logits, reference
from srft_kernels.rows import cpu as row_cpu
from srft_kernels.rows import gpu as row_kernels
from tests.kernels.cases import case_id
from tests.kernels.test_mutations import faulty_package
from tests.numerics import assert_accurate

# under the interpreter bf16 is truncated where hardware rounds, and there is no float64 on a GPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DTYPES = DTYPES[:2] if row_kernels.INTERPRETED else DTYPES


def run_logits(module, logits, labels, **options) -> dict[str, torch.Tensor]:
    """Results of logprobs_from_logits and the gradient of a random signed loss of both."""
    leaf = logits.detach().requires_grad_()
    # the op under test may overwrite what it gets: not the leaf, but a copy with its strides
    given = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    given = given.copy_(leaf)
    logprobs, entropy = module.logprobs_from_logits(given, labels, **options)
    g = torch.Generator().manual_seed(7)
    upstream = [torch.randn(labels.shape, generator=g).to(logprobs) for _ in range(2)]
    loss = (logprobs * upstream[0]).sum()
    if entropy.requires_grad:
        loss = loss + (entropy * upstream[1]).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "dlogits": grad}


def assert_logits_match(logits, labels, module=srft_kernels, **options) -> dict[str, torch.Tensor]:
    """Compare logprobs_from_logits of ``module`` with float64, by the one rule; returns what it gave."""

    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) else x

    gold = run_logits(
        reference, logits.double(), labels, **{name: wide(value) for name, value in options.items()}
    )
    baseline = run_logits(reference, logits, labels, **options)
    actual = run_logits(module, logits, labels, **options)
    for name in actual:
        flat = (
            x[name].reshape(-1, logits.shape[-1]) if name == "dlogits" else x[name]
            for x in (actual, gold, baseline)
        )
        assert_accurate(name, *flat, gradient=name == "dlogits")
    return actual


def make_logits(shape=(37, 101), dtype=torch.float32, *, scale=3.0, ignored=0.2, seed=0):
    """Random logits and labels, some ignored; the first two labels are the ends of the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * scale).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
    labels = torch.where(torch.rand(shape[:-1], generator=g) < ignored, -100, labels)
    if labels.numel() > 2:
        labels.view(-1)[0], labels.view(-1)[1] = 0, shape[-1] - 1
    return logits, labels


OPTIONS = {
    "default": {},
    "entropy": {"entropy_grad": True},
    "temperature": {"temperature": 0.6},
    "softcap": {"logit_softcap": 3.0, "temperature": 1.3, "entropy_grad": True},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
each_place = pytest.mark.parametrize("inplace_backward", [False, True], ids=["new", "in-place"])


# a row of the interpreter takes milliseconds
SHAPES = [(13, 101), (2, 3, 257), (7,)] if row_kernels.INTERPRETED else [(37, 101), (3, 5, 257), (7,)]


@each_dtype
@each_place
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_match_float64(dtype, inplace_backward, options, shape, monkeypatch):
    """Values and gradients of 2-d, 3-d and single-row logits, several blocks each."""
    monkeypatch.setattr(row_cpu, "BLOCK_BYTES", 4 * 101 * 4)
    monkeypatch.setattr(row_kernels, "_MAX_BLOCK_V", 64)
    logits, labels = make_logits(shape, dtype)
    out = assert_logits_match(logits, labels, inplace_backward=inplace_backward, **options)
    assert out["logprobs"].shape == out["entropy"].shape == labels.shape
    ignored = labels == -100
    assert not any(out[name][ignored].any() for name in out)


@settings(max_examples=30)
@given(st.data())
def test_any_logits(data):
    """Random shapes, strides, dtypes and options agree with the reference, and in place gives the same bits."""
    # a row of the interpreter takes milliseconds
    largest = (4, 3, 70) if row_kernels.INTERPRETED else (9, 7, 70)
    rows, steps, vocab = (data.draw(st.integers(1, high)) for high in largest)
    dtype = data.draw(st.sampled_from(DTYPES))
    seed, scale = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    if dtype == torch.float16:
        # gradients below what fp16 can hold have no relative error
        scale = min(scale, 1.0)
    ignored = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    logits, labels = make_logits((rows, steps, vocab), dtype, scale=scale, ignored=ignored, seed=seed)
    layout = data.draw(st.sampled_from(["whole", "shifted", "transposed", "flat"]))
    if layout == "shifted":
        logits, labels = torch.cat([logits, logits[:, :1]], 1)[:, :-1], labels.clone()
    elif layout == "transposed":
        logits, labels = logits.transpose(0, 1), labels.transpose(0, 1)
    elif layout == "flat":
        logits, labels = logits.view(-1, vocab), labels.view(-1)
    options = {
        "temperature": data.draw(
            st.sampled_from([1.0, 0.6, torch.tensor(1.7), torch.rand(labels.shape) + 0.5])
        ),
        "logit_softcap": data.draw(st.sampled_from([None, 5.0 + scale])),
        "entropy_grad": data.draw(st.booleans()),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cpu, "BLOCK_BYTES", data.draw(st.sampled_from([0, 2**20])))
        new = assert_logits_match(logits, labels, **options)
        in_place = run_logits(srft_kernels, logits, labels, inplace_backward=True, **options)
    assert all(torch.equal(new[name], in_place[name]) for name in new)


@each_dtype
def test_masked_and_low_logits(dtype):
    """Words of -inf have no part in anything, and rows far below -88 lose nothing."""
    logits, labels = make_logits((29, 64), dtype, ignored=0.1)
    logits[:, 10:40] = -torch.inf
    labels = torch.where((labels >= 10) & (labels < 40), 3, labels)
    out = assert_logits_match(logits, labels, entropy_grad=True, inplace_backward=True)
    assert not out["dlogits"][:, 10:40].any()
    logits, labels = make_logits((29, 64), dtype)
    assert_logits_match(logits - 200, labels, entropy_grad=True)
    assert_logits_match(logits * 1e3, labels, entropy_grad=True)


@each_place
def test_no_rows_and_all_ignored(inplace_backward):
    """N = 0 gives empty results; with every label ignored all is exactly 0, whatever the logits."""
    out = run_logits(srft_kernels, *make_logits((0, 5)), inplace_backward=inplace_backward)
    assert out["dlogits"].shape == (0, 5) and out["logprobs"].shape == (0,)
    logits = torch.full((4, 9), torch.nan)
    out = run_logits(
        srft_kernels, logits, torch.full((4,), -100), entropy_grad=True, inplace_backward=inplace_backward
    )
    assert not any(x.any() for x in out.values())


def test_only_asked_for_gradients():
    """The entropy carries a gradient only with ``entropy_grad``, nothing does under no_grad."""
    logits, labels = make_logits()
    logits.requires_grad_()
    for wanted in (False, True):
        for module in (srft_kernels, reference):
            logprobs, entropy = module.logprobs_from_logits(logits, labels, entropy_grad=wanted)
            assert logprobs.requires_grad and entropy.requires_grad == wanted
    with torch.no_grad():
        # no backward will come, so there is nothing to refuse
        assert not logprobs_from_logits(logits, labels, inplace_backward=True)[0].requires_grad
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert grad.any()


def test_results_may_be_written_to():
    """Backward reads neither result: masking them in place is no error and changes no other row."""
    logits, labels = make_logits(ignored=0.0)
    logits.requires_grad_()
    logprobs, entropy = logprobs_from_logits(logits, labels)
    expected = torch.autograd.grad(logprobs[5:].sum(), logits, retain_graph=True)[0]
    logprobs[:5] = 0
    entropy.zero_()
    assert torch.equal(torch.autograd.grad(logprobs.sum(), logits)[0], expected)


class FreshMemory(TorchDispatchMode):
    """Remembers the storages that operations make, other than that of ``known``, and their largest size."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known, self.nbytes = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != self.known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@each_dtype
def test_memory(dtype, monkeypatch):
    """In place, no operation allocates a tensor of the size of the logits; else one does, the gradient."""
    monkeypatch.setattr(row_cpu, "BLOCK_BYTES", 0)
    leaf, labels = make_logits((16, 512), dtype)
    for inplace_backward in (True, False):
        logits = leaf.clone().requires_grad_() * 1
        address = logits.data_ptr()
        with FreshMemory(logits) as fresh:
            logprobs, _ = logprobs_from_logits(logits, labels, inplace_backward=inplace_backward)
        assert fresh.nbytes <= 2 * 512 * 8
        with FreshMemory(logits) as fresh:
            (grad,) = torch.autograd.grad(logprobs.sum(), logits)
        assert (grad.data_ptr() == address) == inplace_backward
        assert (fresh.nbytes <= 2 * 512 * 8) == inplace_backward
        assert fresh.nbytes <= logits.nbytes


def test_second_backward_in_place_raises():
    """What in place overwrote is never differentiated again, neither by this op nor by another."""
    leaf, labels = make_logits()
    leaf.requires_grad_()
    logits = leaf * 1
    logprobs, _ = logprobs_from_logits(logits, labels, inplace_backward=True)
    others = [logprobs_from_logits(logits, labels)[0], logits.square()]
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already differentiated"):
        logprobs.sum().backward()
    for other in others:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.sum().backward()


def test_in_place_beside_another_reader():
    """A reader that runs its backward first, in the same call, gets the logits and not their gradient."""
    leaf, labels = make_logits()
    leaf.requires_grad_()
    logits = leaf * 1
    logprobs, _ = logprobs_from_logits(logits, labels, inplace_backward=True)
    penalty = logits.logsumexp(-1).square().sum()
    (actual,) = torch.autograd.grad(logprobs.sum() + penalty, leaf)
    expected = logprobs_from_logits(leaf, labels)[0].sum() + leaf.logsumexp(-1).square().sum()
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaf)[0])


def test_in_place_refuses_leaves_and_shared_rows():
    """Overwriting a parameter, or rows that lie on one another, is an error and not a surprise."""
    leaf, labels = make_logits(ignored=0.0)
    leaf.requires_grad_()
    for logits in (leaf, leaf[:], leaf.view(37, 1, 101)[:, 0]):
        with pytest.raises(ValueError, match="leaf"):
            logprobs_from_logits(logits, labels, inplace_backward=True)
    one_row = leaf[0] * 1
    with pytest.raises(ValueError, match="share memory"):
        logprobs_from_logits(one_row.expand(37, 101), labels, inplace_backward=True)
    # not in place, rows that share memory are an ordinary input
    for actual, expected in zip(
        logprobs_from_logits(one_row.expand(37, 101), labels),
        logprobs_from_logits(one_row.repeat(37, 1), labels),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_retained_graph():
    """Not in place, the op may be differentiated twice; a second derivative is refused."""
    logits, labels = make_logits()
    logits.requires_grad_()
    logprobs, _ = logprobs_from_logits(logits, labels)
    (first,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    (second,) = torch.autograd.grad(2 * logprobs.sum(), logits, create_graph=True)
    torch.testing.assert_close(second, 2 * first)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(second.sum(), logits, allow_unused=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        second.sum().backward()


def test_rows_do_not_depend_on_each_other():
    """A row alone gives the bits it gives among others."""
    logits, labels = make_logits((9, 333), ignored=0.0)
    together = run_logits(srft_kernels, logits, labels)
    for i in range(9):
        alone = logprobs_from_logits(logits[i : i + 1], labels[i : i + 1])
        assert torch.equal(alone[0], together["logprobs"][i : i + 1])
        assert torch.equal(alone[1], together["entropy"][i : i + 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(37, 101).long()}, "logits must be bf16"),
        ({"logits": torch.zeros(101, 37).t()}, "stride 1 along the vocabulary"),
        ({"logits": torch.zeros(37, 0)}, "V >= 1"),
        ({"logits": [1.0]}, "must be a tensor"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, "shape of logits without V"),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, "labels.long"),
        ({"labels": torch.full((37,), 101)}, r"labels must be in \[0, V=101\) or ignore_index=-100, got 101"),
        ({"labels": torch.full((37,), -1)}, r"labels must be in \[0, V=101\) or ignore_index=-100, got -1"),
        ({"ignore_index": None}, "ignore_index must be an int"),
        ({"temperature": 0.0}, "temperature must be a number > 0"),
        ({"temperature": torch.zeros(37)}, "temperature must be > 0"),
        ({"temperature": torch.ones(36)}, "shape of labels"),
        ({"logit_softcap": -1.0}, "logit_softcap must be a number > 0"),
        ({"logit_softcap": float("inf")}, "logit_softcap must be finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_refused(changes, message):
    """Each mistake is a ValueError that names what was expected."""
    logits, labels = make_logits()
    arguments = {"logits": logits, "labels": labels, **changes}
    with pytest.raises(ValueError, match=message):
        logprobs_from_logits(**arguments)


def test_logits_api():
    """Exported, one signature with the reference, and every argument in the docstring."""
    assert "logprobs_from_logits" in srft_kernels.__all__
    signature = inspect.signature(logprobs_from_logits)
    assert signature == inspect.signature(reference.logprobs_from_logits)
    block = logprobs_from_logits.__doc__.split("Args:\n")[1].split("Returns:")[0]
    assert re.findall(r"^        (\w+): ", block, re.MULTILINE) == list(signature.parameters)


# name: (file, text, its replacement)
CPU_FAULTS = {
    "keep the statistics in 16 bits": (
        "rows/cpu.py",
        "z.new_zeros(count, dtype=dtype)",
        "z.new_zeros(count, dtype=z.dtype)",
    ),
    "give all rows the mean upstream gradient of the entropy": (
        "rows/cpu.py",
        "slope = (-dentropy * scale)[:, None]",
        "slope = (-dentropy * scale)[:, None].mean().expand(len(scale), 1)",
    ),
}
KERNEL_FAULTS = {
    "keep the statistics in 16 bits": (
        "rows/gpu.py",
        "z.new_empty(count, dtype=dtype)",
        "z.new_empty(count, dtype=z.dtype)",
    ),
    "keep the exponentials in 16 bits": (
        "rows/gpu.py",
        "exp = tl.exp(z - shift[None, :])",
        "exp = tl.exp(z - shift[None, :]).to(tl.float16).to(tl.float32)",
    ),
    "take the rows to lie side by side": ("rows/gpu.py", "row * stride_z", "row * vocab"),
    "scale the gradient by the log-probability twice": ("rows/gpu.py", "a *= grad_scale", "a *= 2 * grad_scale"),
}
COMMON_FAULTS = {
    "take the labels of the first rows": (
        "logprobs_from_logits.py",
        "labels=rows.labels[part]",
        "labels=rows.labels[: z.shape[0]]",
    ),
    "leave the gradient over the logits": (
        "logprobs_from_logits.py",
        "out=None if targets is None else targets[part]",
        "out=None",
    ),
}
FAULTS = COMMON_FAULTS | (KERNEL_FAULTS if row_kernels.INTERPRETED else CPU_FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_logits_fault_is_found(fault, tmp_path):
    """The check of 16-bit logits passes on a copy of the package and fails on one with a small fault."""
    logits, labels = make_logits((3, 9, 97), torch.float16 if row_kernels.INTERPRETED else torch.bfloat16)
    # rows with room after each row and each third
    logits = torch.nn.functional.pad(logits, (0, 3))[:, :-1, :97]
    file, text, replacement = FAULTS[fault]
    for folder, new_text in (("sound", text), ("faulty", replacement)):
        module = faulty_package(tmp_path / folder, file, text, new_text)
        arguments = {"logits": logits, "labels": labels[:, :-1], "entropy_grad": True}
        if folder == "sound":
            assert_logits_match(**arguments, module=module)
            continue
        with pytest.raises(AssertionError, match="error|differs|non-finite"):
            assert_logits_match(**arguments, module=module)
