"""Peak memory that one variant adds, gradients included.

On a CPU as a command, in a fresh process that prints bytes:
python -m benchmarks.memory CASE NAME HEAD DTYPE TOKENS SEQUENCE
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.heads import DTYPES, HEADS, HeadShape, Inputs, make_inputs
from benchmarks.variants import Run, variants


def of_process(case: str, name: str, head: str, dtype: str, tokens: int, sequence: int) -> int:
    """Run this file as a command."""
    command = [sys.executable, "-m", "benchmarks.memory", case, name, head, dtype, str(tokens), str(sequence)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return int(done.stdout.splitlines()[-1])


def on_gpu(run: Run, inputs: Inputs) -> int:
    """Peak of the allocator during one call, less what was allocated before."""
    inputs.hidden_states.grad = inputs.lm_head_weight.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main(case: str, name: str, head: str, dtype: str, tokens: str, sequence: str) -> None:
    """Print the peak that a call adds to this process."""
    device = torch.device("cpu")
    variant = variants(case, DTYPES[dtype], device, frozenset([name]))[name]
    assert variant.run is not None, variant.reason
    # loads code and starts threads, which would be there without the loss
    small = HeadShape(HEADS[head].width, 1000)
    variant.run(make_inputs(small, DTYPES[dtype], 4 * int(sequence), int(sequence), device))
    inputs = make_inputs(HEADS[head], DTYPES[dtype], int(tokens), int(sequence), device)
    if variant.compiled:
        # compiles for this shape
        variant.run(inputs)
    inputs.hidden_states.grad = inputs.lm_head_weight.grad = None
    gc.collect()
    before = _status_bytes("VmRSS")
    # resets VmHWM, which the making of the inputs has raised
    Path("/proc/self/clear_refs").write_text("5")
    variant.run(inputs)
    print(_status_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
