"""A policy forward and backward with compiled blocks and as they are written: python -m benchmarks.compiled_blocks.

One policy, one packed batch, both ways in turn in every round, so that what else the machine does touches both.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks import device as devices
from srft.batch import Batch, pack
from srft.config import ModelConfig
from srft.policy.compiled import as_written
from srft.policy.forwards import packed_forward
from srft.policy.model import compute, prepare_policy
from srft.policy.parallel import World
from srft.responses import Response
from srft_kernels import linear_cross_entropy


class Shape(NamedTuple):
    """Of a Qwen2 with random weights, and of its batch."""

    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    sequences: int
    tokens: int  # of a sequence, at most; the shortest has half as many


SHAPES = {
    "step": Shape(256, 3, 672, 4, 4, 258, 128, 74),
    "0.5b": Shape(896, 24, 4864, 14, 2, 151_936, 16, 1024),
    "1.5b": Shape(1536, 28, 8960, 12, 2, 151_936, 8, 1024),
}


def build(shape: Shape, config: ModelConfig, device: torch.device) -> transformers.PreTrainedModel:
    """A policy on its device, as training has it."""
    with device:
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                tie_word_embeddings=False,
            )
        )  # fmt: skip
    return prepare_policy(model.float(), config, shape.sequences * shape.tokens, World(device=device))


def batch_of(shape: Shape, seed: int, device: torch.device) -> Batch:
    """Random sequences, a seventh of each a prompt, in one packed batch."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(shape.vocab) for _ in range(count)]

    sequences = []
    for _ in range(shape.sequences):
        length = rng.randint(shape.tokens // 2, shape.tokens)
        sequences.append(Response(ids(length // 7), ids(length - length // 7), False, False, [], ""))
    (batch,) = pack(sequences, shape.sequences * shape.tokens, device)
    return batch


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="bfloat16 on a GPU by default")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, shape = torch.device(options.device), SHAPES[options.shape]
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    dtype = getattr(torch, name)
    config = ModelConfig(compute_dtype=name, gradient_checkpointing=options.checkpointing, compile=True)
    model = build(shape, config, device)
    batches = [batch_of(shape, seed, device) for seed in range(options.rounds + 1)]

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        loss, _ = compute(model, batch, dtype, functools.partial(linear_cross_entropy, labels=batch.labels))
        loss.backward()

    def seconds(run: Callable[[], object]) -> float:
        if device.type == "cpu":
            start = time.process_time()
            run()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    ways: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
        "as written": lambda: as_written(model), "compiled": contextlib.nullcontext,
    }  # fmt: skip
    found: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = dict.fromkeys(ways, 0.0)
    said: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        for way, scope in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with scope():
                found[way].append(seconds(lambda batch=batch: step(batch)))
                if number == 0:
                    with torch.no_grad():
                        said[way] = packed_forward(model, batch, dtype)[0]
            if device.type == "cuda" and number:
                peaks[way] = max(peaks[way], torch.cuda.max_memory_allocated() / 2**30)
    about = devices.facts(device)
    print(
        f"{about['date']}, {about['device']['name']}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {about['commit']}; {options.shape}, {name}"
        f"{', recomputed' if options.checkpointing else ''}, about {batches[0].input_ids.numel():,} tokens; medians of "
        f"{options.rounds} rounds, {'seconds computed' if device.type == 'cpu' else 'seconds by the clock'}"
    )
    for way, each in found.items():
        peak = f", {peaks[way]:.1f} GiB" if device.type == "cuda" else ""
        print(
            f"{way}: {statistics.median(each[1:]):.4f} s ({min(each[1:]):.4f} to {max(each[1:]):.4f}), "
            f"the first {each[0]:.1f} s{peak}"
        )
    ratio = statistics.median(c / w for c, w in zip(found["compiled"][1:], found["as written"][1:], strict=True))
    largest = float((said["compiled"] - said["as written"]).abs().max())
    print(f"compiled / as written {ratio:.3f}; log-probabilities within {largest:.1e} nats")


if __name__ == "__main__":
    main()
