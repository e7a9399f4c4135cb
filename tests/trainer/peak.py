"""Measure the peak memory of updates in this process, beside what was planned for them.

``python -m tests.trainer.peak cpu SETTING...`` prints a JSON object a setting; under torchrun, of the largest rank.
Start it with MALLOC_MMAP_THRESHOLD_=1000000, which makes the C library give back what is freed: what it keeps otherwise
depends on the order of everything before.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig, Qwen2Config

from srft.config import Config
from srft.learning import update
from srft.options import load_config
from srft.planning.devices import Device
from srft.planning.memory import ENGINE_SHARE, OVERHEAD, Layout, plan_memory
from srft.planning.models import build_policy, measure_shape
from srft.planning.trace import trace_body
from srft.policy.learner import Learner
from srft.policy.model import byte_tokenizer, prepare_policy
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import World, joined
from srft.responses import Response

TOKENS, LENGTH = 1024, 128
SETTINGS = {
    "fp32-tied": ([], True),
    "bf16": (["model.compute_dtype=bfloat16"], False),
    "bf16-recomputed": (["model.compute_dtype=bfloat16", "model.gradient_checkpointing=true"], False),
    # over several ranks alone
    "bf16-split-head": (
        ["model.compute_dtype=bfloat16", "model.gradient_checkpointing=true", "train.vocab_parallel=true"], False,
    ),
}


def main(kind: str, *names: str) -> None:
    """Print what was planned and what was measured, of each setting that is named, on "cpu" or "cuda"."""
    for name in names:
        options, tied = SETTINGS[name]
        config = load_config(
            [f"train.tokens_per_microbatch={TOKENS}", f"data.max_prompt_tokens={LENGTH // 2}",
             f"rollout.max_new_tokens={LENGTH // 2}", "method.name=sft", "engine.kind=vllm", *options]
        )  # fmt: skip
        with joined(config, torch.device(kind)) as world:
            # loads code and starts threads, which are there without the model
            _updates(config, _shape(64, 2, 1000, tied), world)
            gc.collect()
            before = _in_use(world)
            shape = _shape(512, 8, 24000, tied)
            measured = max(world.gather(_updates(config, shape, world) - before))
            if world.is_first:
                found = {"name": name, "planned": planned(config, shape, world), "measured": measured}
                print(json.dumps(found), flush=True)


def planned(config: Config, shape: PretrainedConfig, world: World) -> int:
    """Return the planned peak of training alone."""
    checkpointing, rows = config.model.gradient_checkpointing, TOKENS // 2
    with torch.device("meta"):
        sizes = measure_shape(build_policy(shape, config))
    passes = trace_body(shape, config, TOKENS, rows, checkpointing=checkpointing)
    device = Device("any", 2**40, 1e11, 1e10, 1e9, 1e9, is_gpu=world.device.type == "cuda")
    layout = Layout(device, TOKENS, world.size, world.size, checkpointing)
    memory = plan_memory(sizes, passes, config, layout, rows)
    # of what no allocator counts, and of an engine that is not there
    return memory.peak - sum(memory.standing.get(part, 0) for part in (OVERHEAD, ENGINE_SHARE))


def _shape(width: int, layers: int, vocab: int, tied: bool) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=tied,
    )  # fmt: skip


def _updates(config: Config, shape: PretrainedConfig, world: World) -> int:
    """Make two updates, and return the peak of the second, of two micro-batches."""
    model = prepare_policy(build_policy(shape, config), config.model, TOKENS, world)
    learner = Learner(config, model, byte_tokenizer(), make_optimizer(model, config), world)
    sequences = [_demonstration(i, shape.vocab_size) for i in range(2 * TOKENS // LENGTH)]
    update(learner, sequences[:1], 1)
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    update(learner, sequences, 2)
    return torch.cuda.max_memory_allocated() if world.device.type == "cuda" else _status("VmHWM")


def _in_use(world: World) -> int:
    return torch.cuda.memory_allocated() if world.device.type == "cuda" else _status("VmRSS")


def _demonstration(seed: int, vocab: int) -> Response:
    ids = torch.randint(vocab, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Response(ids[: LENGTH // 2], ids[LENGTH // 2 :], True, False, [], "", reward=1.0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
