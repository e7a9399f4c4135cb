"""Blocks through torch.compile compute what they do as they are written, and are compiled a few times in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from srft.batch import pack
from srft.config import LoraConfig
from srft.policy import compiled
from srft.policy.compiled import refuse_no_compiler
from srft.policy.forwards import own_logprobs, packed_forward
from srft.policy.lora import adapted, attach, b_of, base_policy
from srft.policy.model import prepare_policy
from srft.policy.parallel import joined, whole
from srft.policy.proof import prove
from srft.policy.weights import named_weights
from srft.responses import Response
from tests.trainer.tiny import CPU, plain_model, policy, relative_error, sequence, tiny_config


@pytest.fixture(scope="module")
def graphs() -> Iterator[CompileCounterWithBackend]:
    """Counts what is compiled, by a backend that runs the graphs of forward and backward and builds nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "BACKEND", counter)
        yield counter
    torch._dynamo.reset()


def sequences(*lengths: int) -> list[Response]:
    """Of that many tokens, a third of them a prompt, and at least one."""
    parts = [(max(1, n // 3), n) for n in lengths]
    return [sequence([2 + i % 30 for i in range(p)], [2 + (n + 7 * i) % 30 for i in range(n - p)]) for p, n in parts]


def outcome(
    model: PreTrainedModel, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a packed batch, and the gradient of a sum of them."""
    (batch,) = pack(sequences(*lengths), 64, CPU)
    model.zero_grad(set_to_none=True)
    both = torch.cat(packed_forward(model, batch, dtype))
    (both * torch.linspace(-1, 1, len(both))).sum().backward()
    found = [whole(p.grad).flatten() for p in model.parameters() if p.grad is not None]
    return both.detach(), torch.cat(found)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], most: float = 1e-6) -> None:
    """The graphs have the operations of the model; in their backward pass sums may come in another order."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and relative_error(a, e) < most


def test_compiled_blocks_compute_the_same(graphs: CompileCounterWithBackend) -> None:
    """Log-probabilities and gradients, for any number of tokens, with nothing compiled after the first batch."""
    model = plain_model()
    fast, slow = policy(model, "model.compile=true"), policy(model)
    assert_same(outcome(fast, (5, 9, 4)), outcome(slow, (5, 9, 4)))
    first = graphs.frame_count
    assert first > 0
    for lengths in ((6, 3), (11, 12, 13, 4, 4), (2,), (9, 9)):
        assert_same(outcome(fast, lengths), outcome(slow, lengths))
    again = policy(model, "model.compile=true", "model.gradient_checkpointing=true")
    assert_same(outcome(again, (5, 9, 4)), outcome(slow, (5, 9, 4)))
    assert graphs.frame_count == first, "another number of tokens, or recomputation, was compiled anew"
    assert [name for name, _ in named_weights(fast)] == [name for name, _ in named_weights(slow)]
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_compiled_blocks_in_16_bit(graphs: CompileCounterWithBackend) -> None:
    """Under autocast they round where the model does."""
    model = plain_model()
    fast, slow = policy(model, "model.compile=true"), policy(model)
    assert_same(outcome(fast, (5, 9, 4), torch.bfloat16), outcome(slow, (5, 9, 4), torch.bfloat16), 1e-2)


def test_the_proof_compares_with_the_model_as_it_is_written(graphs: CompileCounterWithBackend) -> None:
    """The model's own forward runs no compiled block, whose parts would not see the hooks that add rounding."""
    fast = policy(plain_model(), "model.compile=true")
    before = graphs.frame_count
    own, rounded = (own_logprobs(fast, sequences(5, 9), torch.float32, round_again=again) for again in (False, True))
    assert graphs.frame_count == before
    assert not torch.equal(own, rounded)
    outcome(fast, (5, 9))
    assert all(block._compiled_call_impl is not None for block in fast.model.layers)


def test_adapters_of_compiled_blocks(graphs: CompileCounterWithBackend) -> None:
    """They are trained, and left out where the base is to score."""
    model = plain_model()
    attach(model, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), base="base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_(std=0.3)
    fast, slow = policy(model, "model.compile=true"), policy(model)
    whole_policy = outcome(slow, (5, 9))
    assert_same(outcome(fast, (5, 9)), whole_policy)
    assert all(b_of(layer).grad is not None for layer in adapted(fast).values())
    (batch,) = pack(sequences(5, 9), 64, CPU)
    with torch.no_grad(), base_policy(fast), base_policy(slow):
        actual, expected = (torch.cat(packed_forward(each, batch, torch.float32)) for each in (fast, slow))
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(actual, whole_policy[0]) > 1e-3


def test_compiled_blocks_are_sharded(graphs: CompileCounterWithBackend) -> None:
    """FSDP2 gathers what a compiled block reads, and reduces its gradients."""
    config = tiny_config("train.cpu_offload=true", "model.compile=true")
    model = plain_model()
    expected = outcome(policy(model), (5, 9, 4))
    with joined(config, CPU) as world:
        sharded = prepare_policy(plain_model(), config.model, 64, world)
        assert_same(outcome(sharded, (5, 9, 4)), expected)
        first = graphs.frame_count
        assert_same(outcome(sharded, (5, 9, 4)), expected)
        outcome(sharded, (7, 8))
        assert graphs.frame_count == first


def test_what_blocks_are_compiled_under_is_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any thread, as those of autograd recompute blocks; nothing else in the process is compiled otherwise."""
    settings = torch._dynamo.config
    before, seen = settings.get_config_copy(), set()

    def noting(graph: torch.fx.GraphModule, _examples: list[Tensor]) -> torch.fx.GraphModule:
        seen.add((settings.recompile_limit, settings.specialize_float))
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", noting)
    fast = policy(plain_model(), "model.compile=true")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(outcome, fast, (5, 9)).result()
    assert seen == {(64, True)}
    assert settings.get_config_copy() == before
    torch._dynamo.reset()


def test_no_compiler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is missing, the variable that would name it, and the way without."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    refuse_no_compiler(False, CPU)
    with pytest.raises(ValueError, match=r"no /nowhere/c\+\+; install one, name it by CXX, or set model.compile=false"):
        policy(plain_model(), "model.compile=true")
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(ValueError, match="on cuda, and there is no /nowhere/cc"):
        refuse_no_compiler(True, torch.device("cuda"))
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        refuse_no_compiler(True, torch.device("cuda"))


def test_the_proof_refuses_what_a_compiler_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled blocks compute otherwise ends the run before step 0, and is not taken for a fault of packing."""

    def careless(graph: torch.fx.GraphModule, _examples: list[Tensor]) -> Callable[..., tuple[object, ...]]:
        return lambda *inputs: tuple(1.01 * x if isinstance(x, Tensor) else x for x in graph(*inputs))

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", careless)
    with pytest.raises(ValueError, match="likely cause: what torch.compile makes of its blocks"):
        prove(policy(plain_model(), "model.compile=true"), tiny_config("model.compile=true"))
    torch._dynamo.reset()
