"""Time, memory and error of loss heads, forward and backward, with the variants interleaved."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.variants import CASES, DTYPES, GOLD, PRODUCTS, SEQUENCE, Inputs, make_inputs

pytestmark = pytest.mark.timeout(3600)

# Largest relative RMS error against float64. The others show that they compute the same thing: they may be less
# accurate, by sums over V that round to fp32 and, in bf16, by logits that round to bf16.
BOUND = {"fp32": 1e-5, "bf16": 5e-3}
OTHERS_BOUND = {"fp32": 1e-4, "bf16": 0.1}


def _error(actual: Tensor, gold: Tensor) -> float:
    # by parts: a copy of a whole weight in float64 is 1 GiB
    parts = zip(actual.split(8192), gold.split(8192), strict=True)
    square = sum((a.double() - g.double()).square().sum() for a, g in parts)
    return float((square / sum(g.double().square().sum() for g in gold.split(8192))).sqrt())


def _gate(pairs: list[tuple[str, str]], dtype: str) -> dict[tuple[str, str], list[float]]:
    """Errors of loss, dhidden and dweight at N=512 and the full V and D, asserted to be within bounds."""
    # four sequences, which is more than one chunk of logits
    inputs = make_inputs(DTYPES[dtype], 4 * SEQUENCE)
    double = [x.detach().double().requires_grad_() for x in inputs[:2]]
    errors = {}
    for case in dict.fromkeys(case for case, _ in pairs):
        gold = GOLD[case](Inputs(*double, *inputs[2:]))
        for name in [name for own, name in pairs if own == case]:
            actual = CASES[case][name](inputs)
            errors[case, name] = [_error(a[None] if a.dim() == 0 else a, g[None] if g.dim() == 0 else g)
                                  for a, g in zip(actual, gold, strict=True)]  # fmt: skip
            bound = (BOUND if name == "ours" else OTHERS_BOUND)[dtype]
            assert max(errors[case, name]) <= bound, f"{case} {name}: {errors[case, name]}"
    return errors


def _interleaved(pairs: list[tuple[str, str]], inputs: Inputs, rounds: int, dtype: str) -> dict[tuple, list]:
    """Seconds of every variant, one call of each per round; every second round runs in reverse order.

    The results of the first round are compared with each other, so that they agree at the timed size too.
    """
    seconds: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    first: dict[str, tuple[Tensor, ...]] = {}
    for number in range(rounds):
        for case, name in pairs if number % 2 == 0 else pairs[::-1]:
            run = PRODUCTS[name] if case == "products" else CASES[case][name]
            inputs.hidden_states.grad = inputs.lm_head_weight.grad = None
            start = time.perf_counter()
            result = run(inputs)
            seconds[case, name].append(time.perf_counter() - start)
            if case != "products" and number == 0:
                # cases follow one another in the first round: no two of them are held at once
                if case not in first:
                    first = {case: result}
                for actual, expected in zip(result[1:], first[case][1:], strict=True):
                    assert _error(actual, expected) <= 2 * OTHERS_BOUND[dtype], f"{case} {name} at full size"
            del result
        first = {}
    return seconds


def _extra_mib(case: str, name: str, dtype: str, tokens: int) -> float:
    command = [sys.executable, "-m", "benchmarks.variants", case, name, dtype, str(tokens)]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout)


@pytest.fixture(scope="session")
def measured(request, results) -> dict[tuple[str, str], dict]:
    """Everything that is measured, in one go before the first test; the tests hand it to pytest-benchmark."""
    pairs = [item.callspec.params for item in request.session.items if "measured" in item.fixturenames]
    pairs = [(params["case"], params["name"]) for params in pairs]
    losses = [pair for pair in pairs if pair[0] != "products"]
    pairs = [("products", name) for name in PRODUCTS] + losses
    dtype, tokens = results["dtype"], results["tokens"]
    if tokens % (4 * SEQUENCE):
        raise pytest.UsageError(f"--head-tokens must be a multiple of {4 * SEQUENCE}, got {tokens}")
    load = [os.getloadavg()[0]]
    errors = _gate(losses, dtype)
    memory = {pair: _extra_mib(*pair, dtype, tokens) for pair in losses}
    load.append(os.getloadavg()[0])
    seconds = _interleaved(pairs, make_inputs(DTYPES[dtype], tokens), results["rounds"], dtype)
    results["load"] = [*load, os.getloadavg()[0]]
    base = min((seconds["products", name] for name in PRODUCTS), key=statistics.median)
    for case, name in pairs:
        own = seconds[case, name]
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        row = {"case": case, "name": name, "seconds": own, "median_s": statistics.median(own)}
        row |= {"ratio": row["median_s"] / statistics.median(base), "ratio_range": [min(ratios), max(ratios)]}
        if case != "products":
            row |= {"extra_mib": memory[case, name], "error_loss_dhidden_dweight": errors[case, name]}
        results["rows"].append(row)
    return {(row["case"], row["name"]): row for row in results["rows"]}


class _Replay:
    """A clock that a call moves on by the next measured time: pytest-benchmark then sees those times."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = _Replay()


@pytest.mark.benchmark(timer=CLOCK)
def test_loss_head(benchmark, measured, case, name):
    """Hand over the interleaved times; the correctness gate has passed, and no time is asserted."""
    row = measured[case, name]
    times = iter(row["seconds"])

    def replay():
        CLOCK.now += next(times)

    benchmark.group = "loss heads, forward and backward"
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "seconds"})
    benchmark.pedantic(replay, rounds=len(row["seconds"]))
    assert torch.isfinite(torch.tensor(row["seconds"])).all()
