"""Rates of the matrix products that a chunk of a loss head is made of: python -m benchmarks.gemm_rates --out FILE.

On a GPU, which has fp32 output from 16-bit inputs (``out_dtype``), the weight's gradient is measured with a
contiguous chunk of score gradients and with one that lies in the front halves of fp32 rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import device as devices
from benchmarks import table
from benchmarks.heads import DTYPES, HEADS, HeadShape

Product = tuple[str, str, Callable[[], Tensor]]


def _products(head: HeadShape, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Product]:
    """(what, dtype of the result, call) of each product of a chunk, into memory that is there already."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    hidden, weight, dscores = randn(rows, head.width), randn(head.vocab, head.width), randn(rows, head.vocab)
    wide = torch.empty(rows, head.vocab, dtype=torch.float32, device=device)
    # a 16-bit gradient written into its own fp32 score
    front = wide.view(dtype)[:, : head.vocab]
    front.copy_(dscores)
    for out_dtype in (dtype, torch.float32):
        name = str(out_dtype).removeprefix("torch.")
        kind = {} if out_dtype == dtype else {"out_dtype": out_dtype}
        scores = torch.empty(rows, head.vocab, dtype=out_dtype, device=device)
        dhidden = torch.empty(rows, head.width, dtype=out_dtype, device=device)
        dweight = torch.zeros(head.vocab, head.width, dtype=out_dtype, device=device)
        yield "X W'", name, partial(torch.mm, hidden, weight.t(), out=scores, **kind)
        for where, g in (("", dscores), (" (G strided)", front)):
            yield f"G W{where}", name, partial(torch.mm, g, weight, out=dhidden, **kind)
            yield f"G' X{where}", name, partial(torch.mm, g.t(), hidden, out=dweight, **kind)
            yield f"G' X added{where}", name, partial(torch.addmm, dweight, g.t(), hidden, out=dweight, **kind)


def rates(head: HeadShape, rows: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict]:
    """Median times, or why a product is not there."""
    found = []
    for what, out_dtype, call in _products(head, rows, dtype, device):
        row: dict = {"product": what, "rows": rows, "output": out_dtype}
        try:
            devices.seconds(call, device, 3)
            row["median_s"] = statistics.median(devices.seconds(call, device, 3) for _ in range(repeats))
            row["tflops"] = 2 * rows * head.vocab * head.width / row["median_s"] / 1e12
        except (RuntimeError, NotImplementedError) as error:
            row["reason"] = str(error).splitlines()[0][:120]
        found.append(row)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="qwen2.5-7b", choices=HEADS)
    parser.add_argument("--rows", default="1024,2048,4096")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found = {**devices.facts(device), "gemm": [], "tables": []}
    for rows in map(int, arguments.rows.split(",")):
        found["gemm"] += rates(HEADS[arguments.name], rows, DTYPES[arguments.dtype], device, arguments.repeats)
        if arguments.out:
            table.write(found, arguments.out)
    print(table.render(found))


if __name__ == "__main__":
    main()
