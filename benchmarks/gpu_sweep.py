"""Everything that is worth knowing about one GPU, in under eight minutes: python -m benchmarks.gpu_sweep.

Each step is a process of its own with a limit of time, so that one that hangs or crashes takes nothing with it; the
JSON is written after each. In every step ours and the bare products run interleaved with the others. --tiny runs
the same steps on any device within minutes, to show that they run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import device as devices
from benchmarks import table
from benchmarks.heads import HEADS
from benchmarks.peers import PEERS

ROOT = Path(__file__).parents[1]
# a step that would have less than this is not started
SHORTEST_S = 15


class Step(NamedTuple):
    name: str
    module: str
    options: dict[str, str]
    limit_s: float


def _peer_steps(common: dict[str, str], peers: list[str], limit_s: float) -> list[Step]:
    """One step for each peer that compiles kernels of its own, and may fail in ways that end the process."""
    steps = []
    for name in peers:
        case = PEERS[name].gives if PEERS[name].gives in ("grpo", "cross_entropy") else "grpo"
        options = {**common, "cases": case, "variants": f"ours,ours-16bit-logits,{name}"}
        steps.append(Step(name, "measure", options, limit_s))
    return steps


def steps(tiny: bool, device: str) -> list[Step]:
    """What is measured, the most wanted first."""
    main, others = "qwen2.5-7b", [name for name in HEADS if name not in ("qwen2.5-7b", "tiny")]
    tokens, long, rows = "16384", "65536", "1024,2048,4096"
    common = {"names": main, "tokens": tokens, "dtype": "bf16", "device": device, "rounds": "3"}
    own = "ours,ours-16bit-logits,ours-logprobs"
    plain = "naive,torch,torch-chunked,trl,verl-torch"
    if tiny:
        main, others, tokens, long, rows, own = "tiny", ["tiny"], "512", "1024", "64", "ours"
        # on a CPU each figure of memory is a process of its own
        common |= {"names": main, "tokens": tokens, "sequence": "64", "rounds": "1", "what": "time"}
    brief = common | {"rounds": "1" if tiny else "2"}
    found = [
        Step("gemm", "gemm_rates", {"name": main, "rows": rows, "dtype": "bf16", "device": device}, 60),
        Step("grpo", "measure", {**common, "cases": "grpo", "variants": f"{own},{plain}"}, 120),
        Step("long", "measure", {**common, "tokens": long, "variants": f"{own},trl,verl-torch", "what": "memory"}, 60),
        Step("cross entropy", "measure", {**common, "cases": "cross_entropy", "variants": f"{own},{plain}"}, 90),
        *_peer_steps(brief, ["liger-scaled-ce", "cce-exact", "cce-filtered", "verl-triton", "quack"], 45),
        Step("srft", "measure", {**common, "cases": "srft", "variants": f"{own},naive"}, 45),
        *(Step(name, "measure", {**brief, "names": name, "variants": own, "what": "time"}, 40) for name in others),
        *_peer_steps(brief, ["liger-grpo", "liger-ce"], 45),
        Step("compiled", "measure", {**common, "variants": "ours,naive-compiled"}, 60),
    ]
    # the limits are those of a GPU
    return [step._replace(limit_s=600) for step in found] if tiny else found


def _run(step: Step, limit_s: float, folder: Path) -> tuple[dict, str]:
    """What the step has written, and what went wrong."""
    out = folder / f"{step.name}.json"
    command = [sys.executable, "-m", f"benchmarks.{step.module}", "--out", str(out)]
    command += [part for option, value in step.options.items() for part in (f"--{option}", value)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT)
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        wrong = lines[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        wrong = f"stopped after {limit_s:.0f} s"
    return json.loads(out.read_text()) if out.exists() else {}, wrong


def main() -> None:
    """Run the steps that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--only", default="", help="names of steps, comma-separated; default: all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="JSON; default: a dated name in results/")
    arguments = parser.parse_args()
    start = time.monotonic()
    found = {**devices.facts(torch.device(arguments.device)), "gemm": [], "tables": [], "notes": []}
    found["command"] = {"dtype": "bf16", "names": "sweep", "tokens": "16384", "cases": "all", "what": "time,memory"}
    out = arguments.out or table.result_path(found)
    only = {*filter(None, arguments.only.split(","))}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(arguments.tiny, arguments.device):
            left = arguments.minutes * 60 - (time.monotonic() - start)
            if only and step.name not in only:
                continue
            if left < SHORTEST_S:
                found["notes"].append(f"{step.name}: not started, the {arguments.minutes:g} minutes are over")
                continue
            began = time.monotonic()
            written, wrong = _run(step, min(left, step.limit_s), Path(folder))
            found["gemm"] += written.get("gemm", [])
            found["tables"] += [part | {"step": step.name} for part in written.get("tables", []) if part]
            found["notes"] += [f"{step.name}: {wrong}"] if wrong else []
            table.write(found, out)
            print(f"{step.name}: {time.monotonic() - began:.0f} s {wrong}", flush=True)
    print(table.render(found))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
