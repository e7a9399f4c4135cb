"""The adapters of loss heads that compute the logits once: against the library, or against what its source asks for."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

from benchmarks import heads, measure, peers
from benchmarks.variants import gold, variants

CPU = torch.device("cpu")
CASES = {"grpo": "grpo", "ce": "cross_entropy"}


def inputs(dtype: torch.dtype = torch.float32) -> heads.Inputs:
    """Sequences of the tiny head, more tokens than one chunk of xtuner."""
    return heads.make_inputs(heads.HEADS["tiny"], dtype, 2048, 64, CPU)


def assert_right(name: str) -> None:
    """Loss and gradients of the variant ``name`` are those of float64."""
    case = CASES[name.rpartition("-")[2]]
    variant = variants(case, torch.float32, CPU, frozenset([name]))[name]
    assert variant.run is not None, variant.reason
    x = inputs()
    double = [tensor.detach().double().requires_grad_() for tensor in x[:2]]
    expected = gold(case)(heads.Inputs(*double, *x[2:]))
    for actual, exact in zip(variant.run(x), expected, strict=True):
        assert measure.errors(actual, exact)[0] < 1e-5


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are imported anew."""
    monkeypatch.setattr(peers, "_LOADED", {})


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Put a module, and empty packages above it, where an import finds them."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:number]), types.ModuleType(".".join(parts[:number])))
    vars(sys.modules[name]).update(contents)


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs requirements/peers.txt")
@pytest.mark.parametrize("name", ["torchtitan-grpo", "torchtitan-ce"])
def test_torchtitan(name: str) -> None:
    """ChunkedLossWrapper with torchtitan's own losses gives loss and gradients of float64."""
    assert_right(name)


@pytest.mark.parametrize("name", ["xtuner-grpo", "xtuner-ce"])
def test_xtuner_is_called_as_its_source_asks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six arguments, in which a function gets states [1, rows, D], weight, no bias and the arguments of its chunk."""
    seen = []

    class ChunkLoss:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, bias: None, function, arguments: list, rows: int):
            assert hidden.dim() == 3 and len(hidden) == 1 and bias is None
            parts = hidden.split(rows, dim=1)
            assert len(parts) == len(arguments) == 2
            losses = []
            for part, given in zip(parts, arguments, strict=True):
                loss, (logits, extra) = function(part, weight, None, given)
                assert loss.dim() == 0 and logits is None and extra == {}
                losses.append(loss)
                seen.append(part.shape[1])
            return sum(losses), {}

    module(monkeypatch, "xtuner.v1.loss.chunk_loss", ChunkLoss=ChunkLoss)
    assert_right(name)
    assert seen == [1024, 1024]


@pytest.mark.parametrize("name", ["fast-llm-grpo", "fast-llm-ce"])
def test_fast_llm_is_called_as_its_source_asks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a split, then losses of the whole divided by all tokens and the gradient of the logits come back."""
    calls = []

    def kernel(logits, labels, grad_logits, logits_scale_factor, group, divisor, *, ce=None, grpo=None):
        assert logits.is_contiguous() and labels.is_contiguous()
        assert (grad_logits, logits_scale_factor, group, divisor) == (None, 1.0, None, 2048)
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            logprobs = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
            if grpo is None:
                assert ce == (1.0,)
                loss = -logprobs.sum() / divisor
            else:
                advantages, old, dloss, low, high, counts = grpo
                assert advantages.is_contiguous() and old.is_contiguous() and (dloss, counts) == (1.0, None)
                ratio = torch.exp(logprobs - old)
                loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).sum() / divisor
            (dlogits,) = torch.autograd.grad(loss, logits)
        calls.append(len(labels))
        by_kind = (None, None, loss.detach(), None) if grpo else (loss.detach(), None, None, None)
        return *by_kind, dlogits, None, None

    monkeypatch.setattr(peers, "_only", lambda device, kind: None)
    name_of_module = "fast_llm.functional.triton.monolithic_loss"
    module(monkeypatch, name_of_module, triton_monolithic_loss_forward_backward=kernel)
    assert_right(name)
    assert calls == [2048 // peers.FAST_LLM_SPLITS] * peers.FAST_LLM_SPLITS


@pytest.mark.parametrize("name", ["xtuner-grpo", "fast-llm-ce", "torchtitan-grpo"])
def test_absence_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, the reason says which module was not found."""
    package = {"xtuner-grpo": "xtuner", "fast-llm-ce": "fast_llm", "torchtitan-grpo": "torchtitan"}[name]
    monkeypatch.setitem(sys.modules, package, None)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(peers, "_only", lambda device, kind: None)
    function, reason = peers.load(name, CPU)
    assert function is None and "import failed: ModuleNotFoundError" in reason and package in reason
