"""What gpu_sweep runs beside measure and gemm_rates, each as a command: python -m benchmarks.gpu_steps STEP --out FILE.

Each writes JSON with a line of text, "headline", and whatever it has measured, as it goes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import device as devices
from benchmarks import gpu_modes, peers, table
from benchmarks.gpu_job import Job
from benchmarks.heads import DTYPES, HEADS, HeadShape, Inputs, make_inputs
from benchmarks.measure import BOUNDS, Table, errors, of_ours
from benchmarks.options import OPTIONS, specs
from benchmarks.variants import floor, gold, variants
from srft_kernels.head import chunks as chunked_head
from srft_kernels.rows import gpu as row_kernels

# blocks of columns and warps of the row kernel that are tried
GRID = ((4096, 4), (4096, 8), (8192, 16), (16384, 32))
# GiB of workspace, and rows of a product of the backward pass at most, that are tried: one of both is what limits
WORKSPACES = ((0.5, 8192), (1, 8192), (2, 8192), (4, 8192), (4, 2304), (4, 3584), (4, 4096))
# of modules that a peer has loaded, those that say which of its kernels it took
BACKENDS = ("cutlass", "cutedsl", "cutile", "cute", "tvm_ffi", "quack")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"


def first(job: Job) -> None:
    """Versions, and one call of the GRPO loss against float64; an error is not caught, for its whole traceback."""
    import triton

    print(f"torch {torch.__version__}, triton {triton.__version__}, {sys.version}, driver {_driver()}", flush=True)
    job.save(**devices.facts(job.device), triton=triton.__version__, driver=_driver())
    print(job.found, flush=True)
    x = make_inputs(HeadShape(96, 1031), job.dtype, 4 * job.sequence, job.sequence, job.device)
    actual = job.ours("ours")(x)
    double = [tensor.detach().double().requires_grad_() for tensor in x[:2]]
    expected = gold("grpo")(Inputs(*double, *x[2:]))
    found = {name: errors(a, e)[0] for name, a, e in zip(("loss", "dX", "dW"), actual, expected, strict=True)}
    bound = BOUNDS["ours"][job.dtype_name]
    text = f"torch {torch.__version__}, triton {triton.__version__}: relative RMS error of loss, dX, dW "
    job.save(errors=found, headline=text + ", ".join(f"{error:.0e}" for error in found.values()))
    assert all(error <= bound for error in found.values()), f"relative RMS errors {found}, bound {bound:.0e}"


def _kernels(call: Callable[[], Any], device: torch.device) -> list[dict]:
    """What a call launches on a GPU, or runs on a CPU, longest first."""
    gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    call()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if gpu:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [
        {"name": event.key, "calls": event.count, "ms": getattr(event, attribute) / 1000}
        for event in profile.key_averages()
        if getattr(event, attribute) > 0
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _print_kernels(title: str, rows: list[dict], most: int = 12) -> None:
    total = sum(row["ms"] for row in rows)
    print(f"\n{title}: {total:.2f} ms in all")
    for row in rows[:most]:
        print(f"{row['ms']:9.3f} ms {100 * row['ms'] / total:5.1f} % {row['calls']:6d} x {row['name'][:110]}")
    sys.stdout.flush()


def kernels(job: Job) -> None:
    """A profiler's table of the kernels of one call, for each head."""
    parts = []
    for name in job.names:
        x = job.inputs(HEADS[name])
        for own in job.own_names():
            rows = _kernels(functools.partial(job.ours(own), x), job.device)
            _print_kernels(f"{own}, {name}, N={job.tokens}", rows)
            total = sum(row["ms"] for row in rows)
            mine = sum(row["ms"] for row in rows if "_row_kernel" in row["name"])
            parts.append(f"{own} {name} {total:.1f} ms, row kernel {mine:.1f}")
            job.save(**{f"{own} {name}": rows}, headline="; ".join(parts))


@contextlib.contextmanager
def _setting(module: Any, **values: Any) -> Iterator[None]:
    """Constants of a module of the package, for a while."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def row_kernel(job: Job) -> None:
    """Traffic of the row kernel in TB/s within a call, by block, warps and logits: two reads, one 16-bit write."""
    head = HEADS[job.names[0]]
    x = job.inputs(head)
    found, best = [], ("", 0.0)
    for own in job.own_names():
        logits = 4 if own == "ours" else job.dtype.itemsize
        size = job.tokens * head.vocab * (2 * logits + job.dtype.itemsize)
        for block, warps in GRID:
            row: dict[str, Any] = {"variant": own, "block": block, "warps": warps}
            try:
                with _setting(row_kernels, _MAX_BLOCK_V=block, _NUM_WARPS=warps):
                    launched = _kernels(functools.partial(job.ours(own), x), job.device)
                # on a CPU the interpreter's work is all that there is
                ours = [kernel for kernel in launched if "_row_kernel" in kernel["name"] or job.device.type == "cpu"]
                row |= {"ms": sum(kernel["ms"] for kernel in ours), "launches": sum(kernel["calls"] for kernel in ours)}
                row["tb_s"] = size / row["ms"] / 1e9
                best = max(best, (f"{own} {block}x{warps}", row["tb_s"]), key=lambda pair: pair[1])
            except Exception as error:  # one that does not compile or launch must not take the others along
                traceback.print_exc()
                row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            found.append(row)
            print(row, flush=True)
            job.save(rows=found, headline=f"best {best[0]}: {best[1]:.3g} TB/s")
    assert any("tb_s" in row for row in found), "no setting ran"


def workspace(job: Job) -> None:
    """Time of a call by the size of the workspace and the rows of a product, beside the bare products."""
    constant = f"{'GPU' if job.device.type == 'cuda' else 'CPU'}_WORKSPACE_BYTES"
    found, parts = [], []
    for name in job.names:
        x = job.inputs(HEADS[name])
        bare = floor(HEADS[name], job.dtype, job.device)
        products = min(job.median(functools.partial(run, x)) for run in bare.values())
        for own in job.own_names():
            for gib, product_rows in WORKSPACES:
                with _setting(chunked_head, **{constant: int(gib * 2**30)}, _PRODUCT_ROWS=product_rows):
                    seconds = job.median(functools.partial(job.ours(own), x))
                row = {"head": name, "variant": own, "gib": gib, "product_rows": product_rows, "median_s": seconds}
                row["ratio"] = seconds / products
                found.append(row)
                print(row, flush=True)
                job.save(rows=found, products_s=products)
        ours = [row for row in found if row["head"] == name]
        best = min(ours, key=lambda row: row["median_s"])
        where = f"{best['gib']} GiB and {best['product_rows']} rows"
        parts.append(f"{name}: best {best['variant']} at {where}, {best['ratio']:.2f} of the products")
        job.save(headline="; ".join(parts))


def peer(job: Job) -> None:
    """One peer with ours beside it: correctness and time; then the kernels and backends that it took."""
    adapter = peers.PEERS[job.peer]
    try:
        adapter.load(job.device)
    except Exception as error:  # the import of a package that is not ours may raise anything
        traceback.print_exc()
        job.save(headline=f"{job.peer} left out: {type(error).__name__}: {error}".splitlines()[0])
        return
    case = adapter.gives if adapter.gives in ("grpo", "cross_entropy") else "grpo"
    own = [] if job.without_ours else ["ours", "ours-16bit-logits"]
    options = {option: default for option, (default, _) in OPTIONS.items()} | {
        "names": job.names[0], "tokens": str(job.tokens), "sequence": str(job.sequence), "dtype": job.dtype_name,
        "device": str(job.device), "cases": case, "variants": ",".join([*own, job.peer]), "rounds": str(job.rounds),
        "what": "time",
    }  # fmt: skip
    (spec,) = specs(options)
    job.save(**devices.facts(job.device), command=options)
    Table(spec, lambda result: job.save(tables=[result])).run()
    rows = {row["name"]: row for row in job.found["tables"][0]["rows"]}
    row = rows.get(job.peer, {"status": "skipped", "reason": job.found["tables"][0].get("skipped", "")})
    print(table.render(job.found), flush=True)
    if row["status"] == "ok":
        x = job.inputs(HEADS[job.names[0]])
        run = variants(case, job.dtype, job.device, frozenset([job.peer]))[job.peer].run
        assert run is not None
        launched = _kernels(lambda: run(x), job.device)
        _print_kernels(job.peer, launched)
        parts = {module: module.split(".") for module in sys.modules}
        loaded = sorted(module for module, own in parts.items() if own[0] != "torch" and {*own} & {*BACKENDS})
        job.save(kernels=launched, backends=loaded)
        print(f"modules: {', '.join(loaded) or 'none of ' + ', '.join(BACKENDS)}")
    broken = [x for x in rows.values() if of_ours(x)] + [row] * (row["status"] in ("failed", "wrong"))
    if broken:
        sys.exit("\n".join(x.get("traceback") or f"{x['name']}: {x['reason']}" for x in broken))


STEPS: dict[str, Callable[[Job], None]] = {
    step.__name__.replace("_", "-"): step
    for step in (
        first, kernels, row_kernel, workspace, peer, gpu_modes.repeat, gpu_modes.small, gpu_modes.graph,
        gpu_modes.compiled, gpu_modes.train_step, gpu_modes.fail, gpu_modes.hang,
    )
}  # fmt: skip


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--names", default="qwen2.5-7b", help="heads, comma-separated")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", default="", help="for the step peer")
    parser.add_argument("--without-ours", action="store_true", help="for the step peer")
    arguments = parser.parse_args()
    job = Job(arguments)
    STEPS[arguments.step](job)
    print(job.found["headline"])


if __name__ == "__main__":
    main()
