"""Packed attention equals padded attention, by the kernel that runs here and, up to the call, by those that do not."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from srft.batch import pack
from srft.policy import attention
from srft.policy.attention import PACKED_NAMES, UnsupportedAttention, register_packed_attention
from srft.policy.attention_choice import choose_attention
from srft.policy.flash import PACKAGES
from srft.policy.model import own_attention
from tests.trainer.architectures import build
from tests.trainer.flash_stand_ins import MODULES, SEEN, attend, module_of
from tests.trainer.tiny import (
    CPU,
    flat_gradient,
    hidden_states_of,
    plain_model,
    policy,
    relative_error,
    sequence,
    tiny_config,
)

BOUNDS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
GPU = torch.device("cuda", 0)
BF16 = "model.compute_dtype=bfloat16"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """No flash-attn is installed but what a test installs."""
    for place, _ in MODULES.values():
        monkeypatch.setitem(sys.modules, place, None)

    def install(*kernels: str) -> None:
        for kernel in kernels:
            monkeypatch.setitem(sys.modules, *MODULES[kernel])

    return types.SimpleNamespace(install=install)


def wide_model(head_dim: int, window: int | None) -> PreTrainedModel:
    """Two layers, 4 heads that share 2 key heads, fp32; both layers see ``window`` tokens, or all."""
    config = transformers.MistralConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, sliding_window=window, max_position_embeddings=64,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.MistralForCausalLM(config).float().eval()


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_equals_padded(head_dim: int, window: int | None) -> None:
    """Hidden states and gradients of a model on packed rows, against its eager attention on padded ones."""
    plain = wide_model(head_dim, window)
    packed = policy(plain, "model.attention=sdpa")
    lengths = [2, 3, 5, 6, 7, 11, 17]
    ids = [torch.randint(2, 37, (n,)).tolist() for n in lengths]
    (batch,) = pack([sequence(tokens[:1], tokens[1:]) for tokens in ids], 100, CPU)
    actual = hidden_states_of(packed, batch, torch.float32)
    rows = [s.prompt_ids + s.response_ids for s in batch.sequences]
    padded = torch.zeros(len(rows), 17, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    hidden = plain.model(padded, attention_mask=mask).last_hidden_state
    expected = torch.cat([hidden[row, : len(tokens) - 1] for row, tokens in enumerate(rows)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    direction = torch.randn(expected.shape)
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    assert relative_error(flat_gradient(packed), flat_gradient(plain)) <= 1e-5


def inputs_of(kv_heads: int, width: int, value_width: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values of 17 tokens, and the sinks of 4 heads."""
    shapes = (4, width), (kv_heads, width), (kv_heads, value_width)
    return [torch.randn(1, heads, 17, n, requires_grad=True) for heads, n in shapes], torch.randn(4, requires_grad=True)


def assert_same(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients to 1e-5."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    direction = torch.randn(expected.shape)
    for ours, theirs in zip(
        torch.autograd.grad((actual * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize("needs", ["nothing", "softcap", "sinks", "both"])
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 8), (2, 64), (1, 128)])
def test_by_length_equals_plain_attention(kv_heads: int, width: int, needs: str, window: int | None) -> None:
    """Output and gradients, those of sinks too, in uneven sequences one of which is a single token."""
    inputs, sinks = inputs_of(kv_heads, width, width)
    softcap = 1.5 if needs in ("softcap", "both") else None
    used = sinks if needs in ("sinks", "both") else None
    actual, weights = attention._packed_attention(
        "sdpa", torch.nn.Module(), *inputs, None, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=used,
        cu_seq_lens_q=BOUNDS, max_length_q=11,
    )  # fmt: skip
    assert weights is None and actual.shape == (1, 17, 4, width)
    q, k, v = (x[0].transpose(0, 1) for x in inputs)
    expected = attend(q, k, v, BOUNDS, 0.3, None if window is None else window - 1, softcap or 0.0, used)
    assert_same(actual[0], expected, [*inputs, *([] if used is None else [sinks])])


@pytest.mark.parametrize("value_width", [8, 6])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize(("kernel", "needs"), [
    *((kernel, needs) for kernel in MODULES for needs in ("nothing", "softcap")), ("flash_attention_4", "sinks")
])  # fmt: skip
def test_what_a_package_is_asked_for_is_the_same_attention(
    kernel: str, needs: str, window: int | None, value_width: int, packages: types.SimpleNamespace
) -> None:
    """By the signature of each package: output and gradients for shared heads, windows, caps, sinks, narrow values."""
    packages.install(kernel)
    inputs, sinks = inputs_of(2, 8, value_width)
    softcap, used = (1.5 if needs == "softcap" else None), (sinks if needs == "sinks" else None)
    actual = attention._by_package(kernel, *inputs, 0.3, window, BOUNDS, 11, softcap, used)
    expected = attention._by_length(*inputs, 0.3, window, BOUNDS, softcap, used)
    assert_same(actual, expected, [*inputs, *([] if used is None else [sinks])])


class OnGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU; ``moved`` are the results of moving some there."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.is_cuda.__get__:
            return True
        if func == Tensor.device.__get__:
            return GPU
        if func == Tensor.to and GPU in args:
            self.moved.append(func(*[CPU if x == GPU else x for x in args], **(kwargs or {})))
            return self.moved[-1]
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """bf16, which ``torch.autocast`` turns on for a GPU alone where there is one."""
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", was[0])
        torch.set_autocast_dtype("cuda", was[1])


@pytest.mark.parametrize("window", [None, 4, 11], ids=["full", "window", "window-of-the-longest"])
@pytest.mark.parametrize("kernel", MODULES)
def test_the_call_of_a_package(kernel: str, window: int | None, packages: types.SimpleNamespace) -> None:
    """On a GPU, under autocast: what arrives there, on which device and in which dtype, and nothing else."""
    packages.install(kernel)
    inputs, _ = inputs_of(2, 64, 64)
    with autocast_of_a_gpu(), OnGpu() as gpu:
        y, _ = attention._packed_attention(
            kernel, torch.nn.Module(), *inputs, None, scaling=0.3, sliding_window=window,
            cu_seq_lens_q=BOUNDS.long(), max_length_q=11,
        )  # fmt: skip
    assert y.shape == (1, 17, 4, 64) and y.dtype == torch.bfloat16
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        x = SEEN[name]
        assert x.shape == (17, heads, 64) and x.is_contiguous() and x.dtype == torch.bfloat16
    (bounds,) = gpu.moved
    assert SEEN["cu_seqlens_q"] is SEEN["cu_seqlens_k"] is bounds
    assert bounds.dtype == torch.int32 and bounds.tolist() == BOUNDS.tolist()
    assert SEEN["max_seqlen_q"] == 11 and SEEN["softmax_scale"] == 0.3 and SEEN["softcap"] == 0.0
    assert SEEN["deterministic"] is False and SEEN.get("learnable_sink") is None
    everything = (PACKAGES[kernel].unlimited,) * 2
    assert SEEN["window_size"] == ((3, 0) if window == 4 else everything)


def test_deterministic_algorithms_are_asked_of_a_package(packages: types.SimpleNamespace) -> None:
    """As of torch's own."""
    packages.install("flash_attention_2")
    inputs, _ = inputs_of(2, 8, 8)
    torch.use_deterministic_algorithms(True)
    try:
        attention._by_package("flash_attention_2", *inputs, None, None, BOUNDS, 11, None, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert SEEN["deterministic"] is True and SEEN["softmax_scale"] is None


def test_fp32_is_computed_by_length_whatever_the_kernel(packages: types.SimpleNamespace) -> None:
    """The proof computes in fp32 too, for which no package is called."""
    inputs, _ = inputs_of(2, 8, 8)
    expected = attention._by_length(*inputs, None, None, BOUNDS)
    for kernel in PACKED_NAMES:
        actual, _ = attention._packed_attention(
            kernel, torch.nn.Module(), *inputs, None, cu_seq_lens_q=BOUNDS, max_length_q=11
        )
        assert torch.equal(actual[0], expected)


@pytest.mark.parametrize(("name", "installed", "kernel", "said"), [
    ("qwen2", (), "varlen", "varlen_attn"),
    ("qwen2", ("flash_attention_2", "flash_attention_4"), "varlen", "varlen_attn"),
    ("gemma2", (), "sdpa", r"gemma2 has a cap on scores.*flash_attention_2 is not installed.*srft\[flash\]"),
    ("gemma2", ("flash_attention_2",), "flash_attention_2", "since gemma2 has a cap on scores"),
    ("gpt-oss", ("flash_attention_2",), "sdpa", r"gpt_oss has sinks.*flash_attention_4 is not.*srft\[flash4\]"),
    ("gpt-oss", ("flash_attention_4",), "flash_attention_4", "since gpt_oss has sinks"),
])  # fmt: skip
def test_auto_on_a_gpu(
    name: str, installed: tuple[str, ...], kernel: str, said: str, packages: types.SimpleNamespace
) -> None:
    """varlen_attn unless the model needs more; then what is installed and has it, else sdpa; said with its reason."""
    packages.install(*installed)
    model = plain_model() if name == "qwen2" else build(name)
    chosen = choose_attention(model, tiny_config(BF16).model, GPU)
    assert chosen.kernel == kernel
    assert re.search(said, chosen.sentence), chosen.sentence
    assert choose_attention(model, tiny_config().model, GPU).kernel == "sdpa", "no other kernel has fp32"
    assert choose_attention(model, tiny_config(BF16).model, CPU).kernel == "sdpa"


@pytest.mark.parametrize("kernel", [k for k in PACKED_NAMES if k != "sdpa"])
def test_what_a_kernel_needs(kernel: str, packages: types.SimpleNamespace) -> None:
    """It is taken where it runs; a CPU, fp32, a missing package and a need of the model are errors with a remedy."""
    model, wanted = plain_model(), f"model.attention={kernel}"
    for words, device in (((wanted,), GPU), ((wanted, BF16), CPU)):
        with pytest.raises(ValueError, match=f"{wanted} computes in 16 bit on a GPU, got .* set model.attention=sdpa"):
            choose_attention(model, tiny_config(*words).model, device)
    config = tiny_config(wanted, BF16).model
    if kernel in PACKAGES:
        command = re.escape(PACKAGES[kernel].command)
        with pytest.raises(ValueError, match=rf"not installed .*run {command}.* set model.attention=auto"):
            choose_attention(model, config, GPU)
        packages.install(kernel)
    chosen = choose_attention(model, config, GPU)
    assert chosen.kernel == kernel and kernel in chosen.sentence
    for name, missing, computes in (
        ("gemma2", "a cap on scores", kernel != "varlen"), ("gpt-oss", "sinks", kernel == "flash_attention_4")
    ):  # fmt: skip
        if computes:
            assert choose_attention(build(name), config, GPU).kernel == kernel
        else:
            with pytest.raises(ValueError, match=f"has {missing} in its attention, which {wanted} does not compute"):
                choose_attention(build(name), config, GPU)


def test_packages_that_are_not_what_they_seem(
    packages: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """flash_attn of another version, one without caps, one built for another torch: each is told apart."""
    model, config = build("gemma2"), tiny_config("model.attention=flash_attention_2", BF16).model
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # as flash-attn 4 alone leaves it
    with pytest.raises(ValueError, match="not installed .*no attribute 'flash_attn_varlen_func'"):
        choose_attention(model, config, GPU)
    old = module_of(lambda q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False: q)
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    with pytest.raises(ValueError, match="gemma2 has a cap on scores in its attention"):
        choose_attention(model, config, GPU)
    assert choose_attention(model, tiny_config(BF16).model, GPU).kernel == "sdpa"
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c105')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="flash_attn is installed but does not import: undefined symbol: _ZN3c105"):
        choose_attention(model, config, GPU)


def test_a_model_that_needs_more_than_varlen_is_refused_there() -> None:
    """What the configuration did not tell is told by the first layer."""
    inputs, sinks = inputs_of(2, 8, 8)
    for need in ({"softcap": 2.0}, {"s_aux": sinks}):
        with (
            autocast_of_a_gpu(),
            OnGpu(),
            pytest.raises(UnsupportedAttention, match="a cap on scores or sinks.* set model.attention=sdpa"),
        ):
            attention._packed_attention(
                "varlen", torch.nn.Module(), *inputs, None, cu_seq_lens_q=BOUNDS, max_length_q=11, **need
            )


@pytest.mark.parametrize("name", ["gpt-oss", "mamba"])
def test_transformers_takes_no_name_for_one_of_its_own(name: str) -> None:
    """It would fetch a kernel from the Hub, or refuse the model."""
    register_packed_attention()
    model = build(name)
    for packed in PACKED_NAMES.values():
        model.set_attn_implementation(packed)
        assert model.config._attn_implementation == packed
        assert not is_flash_attention_requested(model.config)


def test_the_model_s_own_attention_caps_scores_too() -> None:
    """What samples and what the proof compares with is eager where transformers' sdpa leaves the cap out."""
    model = policy(build("gemma2"))
    with own_attention(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == PACKED_NAMES["sdpa"] == model.srft_traits.packed.name
    assert policy(plain_model()).srft_traits.attention == "sdpa"
