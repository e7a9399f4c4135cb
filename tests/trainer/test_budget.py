"""The tokens of a forward pass: fixed on a CPU, and on a GPU the most that leaves room for what comes later."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from srft.batch import Batch
from srft.config import Config
from srft.engine.placement import ASLEEP_BYTES
from srft.engine.start import engine_bytes
from srft.policy import budget
from srft.policy.budget import choose_tokens_per_microbatch
from srft.policy.parallel import World
from tests.trainer.tiny import CPU, plain_model, policy, tiny_config

AUTO = "train.tokens_per_microbatch=auto"
GPU = World(device=torch.device("cuda", 0))


@dataclass
class Memory:
    """A GPU whose policy takes ``fixed`` bytes and ``each`` a token; beyond ``free`` it runs out."""

    free: int = 10**8
    total: int = 2 * 10**8
    held: int = 10**6
    fixed: float = 4e6
    each: float = 1200.0
    measured: list[int] = field(default_factory=list)

    def peak(self, model: Any, config: Config, sequences: int, world: World) -> int:
        tokens = sequences * config.longest_sequence
        self.measured.append(tokens)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        size = int(self.fixed + self.each * tokens)
        if size > self.free + self.held:
            raise torch.OutOfMemoryError("out of memory")
        return size

    def usable(self) -> float:
        return self.free + self.held - 0.1 * self.total


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    gpu = Memory()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.free, gpu.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gpu.held)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(budget, "_peak", gpu.peak)
    return gpu


def test_a_cpu_has_a_fixed_number() -> None:
    """16384, or the longest sequence; a number that is given stands, on a GPU too."""
    model = policy(plain_model())
    assert choose_tokens_per_microbatch(tiny_config(AUTO), model, World()) == 16384
    long = tiny_config(AUTO, "data.max_prompt_tokens=20000")
    assert choose_tokens_per_microbatch(long, model, World()) == 20012
    for world in (World(), GPU):
        assert choose_tokens_per_microbatch(tiny_config("train.tokens_per_microbatch=777"), model, world) == 777


@pytest.mark.parametrize("longest", [20, 1500, 9000])
def test_a_gpu_is_filled(memory: Memory, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next multiple it would be overfull; the moments of Adam, the engine and a tenth are kept free."""
    model, config = policy(plain_model()), tiny_config(AUTO, f"data.max_prompt_tokens={longest - 12}")
    moments, engine = 7 * 10**6, 3 * 10**6
    monkeypatch.setattr(budget, "_moments", lambda model, device: moments)
    chosen = choose_tokens_per_microbatch(config, model, GPU, engine)
    assert chosen % 1024 == 0 and chosen >= longest

    def taken(tokens: int) -> float:
        return memory.fixed + memory.each * tokens + moments + engine

    assert taken(chosen) <= memory.usable() < taken(chosen + 1024)
    assert len(memory.measured) == 3 and memory.measured[2] == 2 * memory.measured[1]
    assert all(n % longest == 0 for n in memory.measured) and max(memory.measured) <= max(2 * 2048 + 2 * longest, 8192)
    assert all(p.grad is None for p in model.parameters())


def test_the_number_stays_within_bounds(memory: Memory) -> None:
    """A model that counts positions along the row sets one; a sequence between two multiples is taken whole."""
    model, config = policy(plain_model()), tiny_config(AUTO)
    memory.each = 0.0
    assert choose_tokens_per_microbatch(config, model, GPU) == 65536
    model.config.floor_scale = 8192
    assert choose_tokens_per_microbatch(config, model, GPU) == 8192
    memory.each = (memory.usable() - memory.fixed) / 5000
    config = tiny_config(AUTO, "data.max_prompt_tokens=4800")
    assert choose_tokens_per_microbatch(config, model, GPU) == 4812


@pytest.mark.parametrize("each", [30_000.0, 10**6], ids=["beside-the-engine", "not-at-all"])
def test_no_room_is_an_error(memory: Memory, each: float) -> None:
    """Whether it is found by the measurement or in it."""
    model, config = policy(plain_model()), tiny_config(AUTO, "data.max_prompt_tokens=1500")
    memory.each = each
    with pytest.raises(ValueError, match="no room for a sequence of .* = 1512 tokens .* set model.gradient_checkpoint"):
        choose_tokens_per_microbatch(config, model, GPU, engine_bytes=5 * 10**7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("other", [3000, 0], ids=["less", "nothing"])
def test_ranks_agree_on_the_least(memory: Memory, other: int) -> None:
    """The smallest number counts, and an error of one is an error of all."""

    class Ranks(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, other]

    model, world = policy(plain_model()), Ranks(device=torch.device("cuda", 0))
    if other:
        assert choose_tokens_per_microbatch(tiny_config(AUTO), model, world) == 2048
    else:
        with pytest.raises(ValueError, match="no room"):
            choose_tokens_per_microbatch(tiny_config(AUTO), model, world)


def test_moments_are_of_what_is_trained_and_lies_there() -> None:
    """Two numbers in fp32 a parameter; none for a frozen one, or for one that was offloaded."""
    model = policy(plain_model())
    model.lm_head.weight.requires_grad_(False)
    assert budget._moments(model, CPU) == 8 * sum(p.numel() for p in model.model.parameters())
    assert budget._moments(model, GPU.device) == 0


def test_what_is_measured_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of the greatest length, all tokens of which count, forward and backward between reset and reading."""
    model, config = policy(plain_model()), tiny_config()
    seen: list[object] = []
    forward = budget.packed_forward

    def noted(model: Any, batch: Batch, dtype: torch.dtype) -> Any:
        seen.append(batch)
        return forward(model, batch, dtype)

    monkeypatch.setattr(budget, "packed_forward", noted)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    assert budget._peak(model, config, 3, World(device=CPU)) == 12345
    reset, batch = seen
    assert reset == "reset" and isinstance(batch, Batch)
    assert batch.cu_seqlens.tolist() == [0, 20, 40, 60] and batch.max_seqlen == 20
    assert len(batch.labels) == 3 * 19 and len(set(batch.input_ids.tolist())) > 10
    assert all(p.grad is not None for p in model.parameters())


def test_what_an_engine_takes(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    """A share of the GPU, less while it sleeps, or a copy of the policy; nothing on a CPU, or by what is elsewhere."""
    model = policy(plain_model())
    size = sum(p.numel() for p in model.parameters())
    vllm = tiny_config("engine.kind=vllm", "engine.gpu_memory_utilization=0.3", "engine.sleep=false")
    assert engine_bytes(vllm, model, GPU) == int(0.3 * memory.total)
    assert engine_bytes(tiny_config("engine.kind=vllm"), model, GPU) == ASLEEP_BYTES
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert engine_bytes(tiny_config("engine.kind=vllm", "engine.devices=[1]"), model, GPU) == 0
    assert engine_bytes(tiny_config("engine.kind=hf"), model, GPU) == 4 * size
    assert engine_bytes(tiny_config("engine.kind=hf", "model.compute_dtype=bfloat16"), model, GPU) == 2 * size
    assert engine_bytes(vllm, model, World()) == 0
    servers = tiny_config("engine.kind=http", "engine.urls=http://a:1", "engine.weights_dir=/w")
    assert engine_bytes(servers, model, GPU) == 0
