"""Correctness, time and memory of loss heads, forward and backward, with the variants interleaved.

As a command, writes and prints one table per number of tokens:
python -m benchmarks.measure --names qwen2.5-0.5b --tokens 2048,16384 --what memory
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import device as devices
from benchmarks import memory, table
from benchmarks.heads import DTYPES, HEADS, Inputs, gradient_bytes, lacking, make_inputs
from benchmarks.losses import CASES
from benchmarks.variants import Variant, floor, gold, variants

# Largest relative RMS error against float64, of loss and both gradients. The others show that they compute the
# same thing: they may be less accurate, by sums over V that round to fp32 and, in 16 bit, by rounded logits.
BOUNDS = {
    "ours": {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3},
    "16-bit logits": {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3},
    "others": {"fp32": 1e-4, "bf16": 0.1, "fp16": 2e-2},
}
# a GPU cools and clocks up again before a cold call, and heats up for as long before a hot one is timed
IDLE_S, HOT_S = 0.3, 0.3

# option: (default, help); the command line has them as they are, pytest with the prefix head-
OPTIONS = {
    "names": ("qwen2.5-0.5b", f"heads, comma-separated, or all; of {', '.join(HEADS)}"),
    "tokens": ("2048", "numbers of tokens N, comma-separated, each a multiple of four sequences"),
    "dtype": ("fp32", f"one of {', '.join(DTYPES)}"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda; default: cuda if there is one"),
    "cases": ("grpo", f"losses, comma-separated, of {', '.join(CASES)}"),
    "variants": ("", "comma-separated; default: all that can run"),
    "what": ("time,memory", "of check, time and memory; time checks first"),
    "rounds": ("3", "timed calls of each variant"),
    "sequence": ("", "tokens of a sequence; default: 128 on CPU, 512 on a GPU"),
    "gate-tokens": ("", "N of the comparison with float64; default: four sequences"),
}


@dataclasses.dataclass
class Spec:
    """One table: a head at one number of tokens."""

    name: str
    tokens: int
    dtype: str
    device: torch.device
    cases: list[str]
    only: frozenset[str]  # names of variants; empty: all
    what: set[str]
    rounds: int
    sequence: int
    gate_tokens: int

    def __post_init__(self):
        for number in (self.tokens, self.gate_tokens):
            if number % (4 * self.sequence):
                raise ValueError(f"the numbers of tokens must be multiples of {4 * self.sequence}, got {number}")

    def inputs(self, tokens: int) -> Inputs:
        """Fresh inputs of this head."""
        return make_inputs(HEADS[self.name], DTYPES[self.dtype], tokens, self.sequence, self.device)


def specs(options: dict[str, str]) -> list[Spec]:
    """The tables that the options of ``OPTIONS`` ask for."""
    names = [name for name in HEADS if name != "tiny"] if options["names"] == "all" else options["names"].split(",")
    unknown = {*names} - {*HEADS} | {options["dtype"]} - {*DTYPES} | {*options["cases"].split(",")} - {*CASES}
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    sequence = int(options["sequence"] or (512 if options["device"] == "cuda" else 128))
    return [
        Spec(
            name,
            int(tokens),
            options["dtype"],
            torch.device(options["device"]),
            options["cases"].split(","),
            frozenset(filter(None, options["variants"].split(","))),
            {*options["what"].split(",")},
            int(options["rounds"]),
            sequence,
            int(options["gate-tokens"] or 4 * sequence),
        )
        for name in names
        for tokens in options["tokens"].split(",")
    ]


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative RMS error, and the largest error relative to the largest value."""
    actual, expected = torch.atleast_2d(actual), torch.atleast_2d(expected)
    square = total = largest = scale = 0.0
    # by parts: a copy of a whole weight in float64 is several GiB
    for a, e in zip(actual.split(8192), expected.split(8192), strict=True):
        e = e.double()
        difference = a.double() - e
        square, total = square + float(difference.square().sum()), total + float(e.square().sum())
        largest, scale = max(largest, float(difference.abs().max())), max(scale, float(e.abs().max()))
    return math.sqrt(square / total), largest / scale


def _attempt(row: dict, call: Callable[[], Any]) -> Any:
    """The result of a call; where a peer fails, the row says so and None comes back. Ours must not fail."""
    try:
        return call()
    except Exception as error:  # a peer may raise anything, and the others are still to be measured
        if row["name"].startswith("ours") and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        row["status"], row["reason"] = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None


class Table:
    """Measures what one ``Spec`` asks for; ``result`` grows step by step, and ``save`` is called at each."""

    def __init__(self, spec: Spec, save: Callable[[dict], None] = lambda result: None):
        self.spec, self.head, self.dtype = spec, HEADS[spec.name], DTYPES[spec.dtype]
        self.save = save
        self.variants: dict[tuple[str, str], Variant] = {}
        self.rows: dict[tuple[str, str], dict] = {}
        for case in spec.cases:
            for name, variant in variants(case, self.dtype, spec.device, spec.only).items():
                self.variants[case, name] = variant
                self.rows[case, name] = {"case": case, "name": name, "status": "ok"}
                if variant.run is None:
                    self.rows[case, name] |= {"status": "skipped", "reason": variant.reason}
        self.result: dict[str, Any] = {
            "head": spec.name, "width": self.head.width, "vocab": self.head.vocab, "tokens": spec.tokens,
            "dtype": spec.dtype, "sequence": spec.sequence, "rounds": spec.rounds, "load": [devices.load_average()],
            "gate_tokens": spec.gate_tokens, "gradient_bytes": gradient_bytes(self.head, self.dtype, spec.tokens),
            "rows": [],
        }  # fmt: skip

    def run(self) -> dict:
        """Everything, in order: correctness, time, memory."""
        spec = self.spec
        weight = self.head.vocab * self.head.width * self.dtype.itemsize
        if reason := lacking(3 * weight, spec.device):
            return self.skip(reason)
        for pair in self.live():
            reason = lacking(self.variants[pair].bytes(self.head, self.dtype, spec.tokens) + weight, spec.device)
            if reason:
                self.rows[pair] |= {"status": "skipped", "reason": reason}
        self.result["rows"] = list(self.rows.values())
        if self.live() and spec.what & {"check", "time"}:
            # in float64 the weight, its gradient and room for others' gradients; some [N, V] tensors
            need = 24 * self.head.vocab * self.head.width + 64 * self.head.vocab * spec.gate_tokens
            if reason := lacking(need, spec.device):
                return self.skip(f"the comparison with float64 at N={spec.gate_tokens} {reason}")
            self.gate()
        if self.live() and "time" in spec.what:
            self.time()
        if "memory" in spec.what:
            self.memory()
        self.result["load"].append(devices.load_average())
        self.save(self.result)
        return self.result

    def skip(self, reason: str) -> dict:
        """Leave out this table."""
        self.result |= {"skipped": reason, "rows": []}
        self.save(self.result)
        return self.result

    def live(self) -> list[tuple[str, str]]:
        """What is still to be measured."""
        return [pair for pair, row in self.rows.items() if row["status"] == "ok"]

    def judge(self, pair: tuple[str, str], rms: float, bound: float, where: str) -> None:
        """Ours must be within its bound; another that is not is reported as wrong, and not timed."""
        if rms <= bound:
            return
        assert not pair[1].startswith("ours"), f"{pair}: relative RMS error {rms:.1e} {where}, bound {bound:.0e}"
        self.rows[pair] |= {"status": "wrong", "reason": f"relative RMS error {rms:.1e} {where}, bound {bound:.0e}"}

    def gate(self) -> None:
        """Compare loss and both gradients with float64 at the full V and D and a few hundred tokens or more."""
        spec = self.spec
        inputs = spec.inputs(spec.gate_tokens)
        double = [x.detach().double().requires_grad_() for x in inputs[:2]]
        for case in spec.cases:
            expected = gold(case)(Inputs(*double, *inputs[2:]))
            for pair in [pair for pair in self.live() if pair[0] == case]:
                row, variant = self.rows[pair], self.variants[pair]
                actual = _attempt(row, lambda run=variant.run: run(inputs))
                if actual is None:
                    continue
                found = [errors(a, e) for a, e in zip(actual, expected, strict=True)]
                row["errors"] = dict(zip(("loss", "dhidden", "dweight"), found, strict=True))
                worst = max(rms if math.isfinite(rms) else math.inf for rms, _ in found)
                self.judge(pair, worst, BOUNDS[variant.bound][spec.dtype], "against float64")
                del actual
            self.save(self.result)

    def time(self) -> None:
        """Rounds of one call of everything, every second one in reverse order, after one that is not timed."""
        spec = self.spec
        inputs = spec.inputs(spec.tokens)
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, run in floor(self.head, self.dtype, spec.device).items():
            rows = spec.tokens if name == "unchunked" else 0
            if lacking(rows * self.head.vocab * self.dtype.itemsize + 10**9, spec.device) is None:
                calls["products", name] = lambda run=run: run(inputs)
                self.rows["products", name] = {"case": "products", "name": name, "status": "ok"}
                calls["products", name]()
        for pair in [pair for pair in self.live() if pair[0] != "products"]:
            calls[pair] = lambda run=self.variants[pair].run: run(inputs)
        self.agree(inputs, calls)
        self.result["load"].append(devices.load_average())
        kinds = ("seconds", "hot_seconds") if spec.device.type == "cuda" else ("seconds",)
        for number in range(spec.rounds):
            order = [pair for pair in calls if self.rows[pair]["status"] == "ok"]
            for pair in order if number % 2 == 0 else order[::-1]:
                for kind in kinds:
                    self.clock(pair, calls[pair], kind)
                inputs.hidden_states.grad = inputs.lm_head_weight.grad = None
            self.summarise(kinds)
            self.save(self.result)

    def clock(self, pair: tuple[str, str], call: Callable[[], Any], kind: str) -> None:
        """Add one time to the row of ``pair``."""
        row, device, repeats = self.rows[pair], self.spec.device, 1
        if device.type == "cuda" and kind == "seconds":
            torch.cuda.synchronize()
            time.sleep(IDLE_S)
        if kind == "hot_seconds":
            repeats = min(100, max(1, math.ceil(HOT_S / row["seconds"][-1])))
            devices.seconds(call, device, repeats)
        row.setdefault(kind, []).append(devices.seconds(call, device, repeats))

    def agree(self, inputs: Inputs, calls: dict[tuple[str, str], Callable[[], Any]]) -> None:
        """Warm up everything, and see that the gradients agree with each other at the timed size too."""
        bound = 2 * BOUNDS["others"][self.spec.dtype]
        for case in self.spec.cases:
            first = None
            for pair in [pair for pair in calls if pair[0] == case]:
                result = _attempt(self.rows[pair], calls[pair])
                if result is None:
                    continue
                first = first or result
                worst = max(errors(a, e)[0] for a, e in zip(result[1:], first[1:], strict=True))
                self.judge(pair, worst if math.isfinite(worst) else math.inf, bound, "between variants at full size")
                del result
            del first
            inputs.hidden_states.grad = inputs.lm_head_weight.grad = None
            gc.collect()

    def summarise(self, kinds: tuple[str, ...]) -> None:
        """Medians, and ratios to the products of the same rounds."""
        products = [row for row in self.rows.values() if row["case"] == "products"]
        self.result["rows"] = products + [row for row in self.rows.values() if row["case"] != "products"]
        flops = 6 * self.spec.tokens * self.head.width * self.head.vocab
        for kind in kinds:
            prefix = kind.removesuffix("seconds")
            base = min((row[kind] for row in products), key=statistics.median)
            for row in self.rows.values():
                if kind not in row:
                    continue
                median = statistics.median(row[kind])
                ratios = [a / b for a, b in zip(row[kind], base, strict=False)]
                row[f"{prefix}median_s"] = median
                row[f"{prefix}tflops"] = flops / median / 1e12
                row[f"{prefix}ratio"] = median / statistics.median(base)
                row[f"{prefix}ratio_range"] = [min(ratios), max(ratios)]
                row[f"{prefix}ratio_fastest"] = min(row[kind]) / min(base)

    def memory(self) -> None:
        """Peak memory that a call adds: in all, and beyond the two gradients."""
        spec = self.spec
        inputs = spec.inputs(spec.tokens) if spec.device.type == "cuda" else None
        for pair in [pair for pair in self.live() if pair[0] != "products"]:
            row = self.rows[pair]
            if inputs is None:
                arguments = (*pair, spec.name, spec.dtype, spec.tokens, spec.sequence)
                peak = _attempt(row, lambda arguments=arguments: memory.of_process(*arguments))
            else:
                run = self.variants[pair].run
                # the first call of one that was not timed compiles and tunes
                if "time" not in spec.what:
                    _attempt(row, lambda run=run: run(inputs))
                peak = _attempt(row, lambda run=run: memory.on_gpu(run, inputs)) if row["status"] == "ok" else None
            if peak is not None:
                row["peak_bytes"] = peak
                row["beyond_gradients_bytes"] = peak - self.result["gradient_bytes"]
            self.save(self.result)


def main() -> None:
    """Measure, and write the JSON as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{option}", default=default, help=text)
    parser.add_argument("--out", type=Path, help="JSON to write; default: a dated name in results/")
    arguments = parser.parse_args()
    options = {option: getattr(arguments, option.replace("-", "_")) for option in OPTIONS}
    wanted = specs(options)
    found = {**devices.facts(wanted[0].device), "command": options, "tables": []}
    out = arguments.out or table.result_path(found)
    for spec in wanted:
        found["tables"].append({})

        def save(result: dict) -> None:
            found["tables"][-1] = result
            table.write(found, out)

        Table(spec, save).run()
    print(table.render(found))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
