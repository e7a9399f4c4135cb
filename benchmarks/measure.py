"""Correctness, time and memory of loss heads, forward and backward, with the variants interleaved.

As a command, writes and prints one table per number of tokens:
python -m benchmarks.measure --names qwen2.5-0.5b --tokens 2048,16384 --what memory
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import device as devices
from benchmarks import memory, table
from benchmarks.heads import DTYPES, HEADS, Inputs, gradient_bytes, lacking
from benchmarks.options import OPTIONS, Spec, specs
from benchmarks.progress import Pair, Progress
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
# of a limit of time, what the comparison with float64 may take: each variant is to be called a second time
GATE_SHARE = 0.5
# calls in fp32 that one in float64 takes as long as, about
FLOAT64 = 3


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


def of_ours(row: dict) -> bool:
    """Whether this row is a fault of this package, with which no run passes."""
    return row["name"].startswith("ours") and row["status"] in ("failed", "wrong")


class Table:
    """Measures what one ``Spec`` asks for; ``result`` grows step by step, and ``save`` is called at each."""

    def __init__(
        self, spec: Spec, save: Callable[[dict], None] = lambda result: None, progress: Progress | None = None
    ):
        self.spec, self.head, self.dtype = spec, HEADS[spec.name], DTYPES[spec.dtype]
        self.save = save
        self.progress = progress or Progress()
        self.variants: dict[Pair, Variant] = {}
        self.rows: dict[Pair, dict] = {}
        for case in spec.cases:
            for name, variant in variants(case, self.dtype, spec.device, spec.only, self.progress.say).items():
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
        self.say(f"{', '.join(sorted(spec.what))} of {', '.join(spec.cases)}")
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

    def say(self, text: str) -> None:
        """A line of progress that names this table."""
        self.progress.say(f"{self.title()}: {text}")

    def title(self) -> str:
        """Head, tokens and dtype."""
        return f"{self.spec.name} N={self.spec.tokens} {self.spec.dtype}"

    def skip(self, reason: str) -> dict:
        """Leave out this table."""
        self.say(f"left out, {reason}")
        self.result |= {"skipped": reason, "rows": []}
        self.save(self.result)
        return self.result

    def live(self) -> list[Pair]:
        """What is still to be measured."""
        return [pair for pair, row in self.rows.items() if row["status"] == "ok"]

    def mark(self, pair: Pair, status: str, reason: str) -> None:
        """Measure no more of a variant."""
        self.rows[pair] |= {"status": status, "reason": reason}
        self.progress.drop(pair)
        self.say(f"{' '.join(pair)} {status}, {reason}")

    def leave_out(self, pair: Pair, share: float = 1) -> bool:
        """Whether this share of the time is over, and then the row says so; ours is never left out."""
        progress = self.progress
        if pair[1] == "ours" or not progress.over(60 * progress.minutes * (1 - share)):
            return False
        self.mark(pair, "skipped", f"no time left of {progress.minutes:g} minutes")
        return True

    def attempt(self, pair: Pair, call: Callable[[], Any]) -> Any:
        """The result of a call, or None where it fails, and then its row says why."""
        try:
            return call()
        except Exception as error:  # a peer may raise anything, and the others are still to be measured
            self.rows[pair]["traceback"] = traceback.format_exc()
            self.mark(pair, "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])
            return None

    def judge(self, pair: Pair, rms: float, bound: float, where: str) -> None:
        """What is not within its bound is reported as wrong, and not timed."""
        if not rms <= bound:
            self.mark(pair, "wrong", f"relative RMS error {rms:.1e} {where}, bound {bound:.0e}")

    def plan(self) -> None:
        """Tell the progress which calls are to come."""
        spec, pairs = self.spec, self.live()
        calls = [(("float64", case), FLOAT64 * spec.gate_tokens) for case in spec.cases]
        calls += [(pair, spec.gate_tokens) for pair in pairs]
        if "time" in spec.what:
            warm_up = [] if spec.gate_tokens == spec.tokens else pairs
            products = [("products", name) for name in floor(self.head, self.dtype, spec.device)]
            calls += [(pair, spec.tokens) for pair in products + warm_up + (products + pairs) * spec.rounds]
        self.progress.plan(calls)

    def step(self, what: str, pair: Pair, tokens: int) -> contextlib.AbstractContextManager[None]:
        """A call of ``pair`` in the progress."""
        return self.progress.step(f"{self.title()}: {what}, {' '.join(pair)}", pair, tokens)

    def gate(self) -> None:
        """Compare loss and both gradients with float64 at the full V and D and a few hundred tokens or more."""
        spec = self.spec
        self.plan()
        inputs = spec.inputs(spec.gate_tokens)
        double = [x.detach().double().requires_grad_() for x in inputs[:2]]
        for case in spec.cases:
            with self.step(f"gate at N={spec.gate_tokens}", ("float64", case), FLOAT64 * spec.gate_tokens):
                expected = gold(case)(Inputs(*double, *inputs[2:]))
            pairs = [pair for pair in self.live() if pair[0] == case]
            for number, pair in enumerate(pairs, 1):
                if self.leave_out(pair, GATE_SHARE):
                    continue
                row, variant = self.rows[pair], self.variants[pair]
                with self.step(f"gate {number} of {len(pairs)}", pair, spec.gate_tokens):
                    actual = self.attempt(pair, lambda run=variant.run: run(inputs))
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
        calls: dict[Pair, Callable[[], Any]] = {}
        for name, run in floor(self.head, self.dtype, spec.device).items():
            rows = spec.tokens if name == "unchunked" else 0
            if lacking(rows * self.head.vocab * self.dtype.itemsize + 10**9, spec.device) is None:
                pair = "products", name
                calls[pair] = lambda run=run: run(inputs)
                self.rows[pair] = {"case": "products", "name": name, "status": "ok"}
                with self.step("warm-up", pair, spec.tokens):
                    calls[pair]()
        for pair in [pair for pair in self.live() if pair[0] != "products"]:
            calls[pair] = lambda run=self.variants[pair].run: run(inputs)
        # at the size of the gate, each has been called and has agreed with float64
        if spec.gate_tokens != spec.tokens:
            self.agree(inputs, calls)
        self.result["load"].append(devices.load_average())
        kinds = ("seconds", "hot_seconds") if spec.device.type == "cuda" else ("seconds",)
        for number in range(spec.rounds):
            order = [pair for pair in calls if self.rows[pair]["status"] == "ok"]
            if number > 0 and self.progress.over(self.progress.left([(pair, spec.tokens) for pair in order]) or 0):
                self.say(f"round {number + 1} and on left out, not to take more than {self.progress.minutes:g} minutes")
                self.result["rounds"] = number
                break
            for place, pair in enumerate(order if number % 2 == 0 else order[::-1], 1):
                if number == 0 and pair[0] != "products" and self.leave_out(pair):
                    continue
                with self.step(f"round {number + 1} of {spec.rounds}, {place} of {len(order)}", pair, spec.tokens):
                    for kind in kinds:
                        self.clock(pair, calls[pair], kind)
                inputs.hidden_states.grad = inputs.lm_head_weight.grad = None
            self.summarise(kinds)
            self.save(self.result)

    def clock(self, pair: Pair, call: Callable[[], Any], kind: str) -> None:
        """Add one time to the row of ``pair``."""
        row, device, repeats = self.rows[pair], self.spec.device, 1
        if device.type == "cuda" and kind == "seconds":
            torch.cuda.synchronize()
            time.sleep(IDLE_S)
        if kind == "hot_seconds":
            repeats = min(100, max(1, math.ceil(HOT_S / row["seconds"][-1])))
            devices.seconds(call, device, repeats)
        row.setdefault(kind, []).append(devices.seconds(call, device, repeats))

    def agree(self, inputs: Inputs, calls: dict[Pair, Callable[[], Any]]) -> None:
        """Warm up everything, and see that the gradients agree with each other at the timed size too."""
        bound = 2 * BOUNDS["others"][self.spec.dtype]
        for case in self.spec.cases:
            first = None
            for pair in [pair for pair in calls if pair[0] == case]:
                if self.leave_out(pair):
                    continue
                with self.step("warm-up", pair, self.spec.tokens):
                    result = self.attempt(pair, calls[pair])
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
        pairs = [pair for pair in self.live() if pair[0] != "products"]
        self.progress.plan([(pair, spec.tokens) for pair in pairs])
        for number, pair in enumerate(pairs, 1):
            if pair[1] != "ours" and self.progress.over():
                self.say(f"memory of {' '.join(pair)} left out, no time left of {self.progress.minutes:g} minutes")
                continue
            with self.step(f"memory {number} of {len(pairs)}", pair, spec.tokens):
                peak = self.attempt(pair, functools.partial(self.peak, pair, inputs))
            if peak is not None:
                row = self.rows[pair]
                row["peak_bytes"] = peak
                row["beyond_gradients_bytes"] = peak - self.result["gradient_bytes"]
            self.save(self.result)

    def peak(self, pair: Pair, inputs: Inputs | None) -> int:
        """Bytes that a call adds at its peak: on a CPU, where ``inputs`` is None, that of a process of its own."""
        spec = self.spec
        if inputs is None:
            return memory.of_process(*pair, spec.name, spec.dtype, spec.tokens, spec.sequence)
        run = self.variants[pair].run
        assert run is not None
        # the first call of one that was not timed compiles and tunes
        if "time" not in spec.what:
            run(inputs)
        return memory.on_gpu(run, inputs)


def main() -> None:
    """Measure, and write the JSON as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{option}", default=default, help=text)
    parser.add_argument("--out", type=Path, help="JSON to write; default: a dated name in results/")
    arguments = parser.parse_args()
    options = {option: getattr(arguments, option.replace("-", "_")) for option in OPTIONS}
    wanted = specs(options)
    progress = Progress(float(options["minutes"]))
    found = {**devices.facts(wanted[0].device), "command": options, "tables": []}
    out = arguments.out or table.result_path(found)
    for spec in wanted:
        found["tables"].append({})

        def save(result: dict) -> None:
            found["tables"][-1] = result
            table.write(found, out)

        Table(spec, save, progress).run()
    print(table.render(found))
    print(f"\nwritten to {out}")
    if broken := [row for result in found["tables"] for row in result["rows"] if of_ours(row)]:
        sys.exit("\n".join(row.get("traceback") or f"{row['name']}: {row['reason']}" for row in broken))


if __name__ == "__main__":
    main()
