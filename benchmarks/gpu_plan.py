"""The steps of gpu_sweep, the most wanted of each part first, at full size or tiny."""

from __future__ import annotations

import sys
from typing import NamedTuple

# peers with the seconds that each may take, ours beside it; those that are not installed say so at once
PEERS = {
    "liger-scaled-ce": 75, "verl-triton": 60, "cce-exact": 45, "quack": 75, "liger-grpo": 60, "torchtitan-grpo": 45,
    "trl": 45, "fast-llm-grpo": 45, "xtuner-grpo": 45, "torchtitan-ce": 45, "verl-torch": 45, "liger-ce": 45,
}  # fmt: skip
FIRST_TESTS = "ops_match or real_vocabulary or one_launch or no_host_sync"
COUNTERS = ["SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats"]


class Step(NamedTuple):
    """A process with a limit of time."""

    name: str
    part: int
    limit_s: float
    what: str
    command: list[str]  # module and options, or a tool of the system with "python" before the module
    reads: str = "json"  # where the result is: json, by --out, or the log of pytest or of a tool
    needs_ours: bool = True  # not run where 1a has failed


class _Plan:
    """Commands at one size."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.tokens, self.long = ("64", "128") if dry else ("16384", "65536")
        # D=3584 and D=1536
        self.big, self.small = ("tiny", "tiny") if dry else ("qwen2.5-7b", "qwen2.5-1.5b")
        self.both = self.big if dry else f"{self.big},{self.small}"
        self.tiny = ["--device=cpu", "--sequence=16", "--rounds=1"]

    def size(self) -> list[str]:
        """Dtype and device; the interpreter of a dry run has no bf16."""
        return ["--dtype=fp32", *self.tiny] if self.dry else ["--dtype=bf16", "--device=cuda"]

    def measure(self, name: str, tokens: str, what: str, case: str = "grpo") -> list[str]:
        options = [f"--names={name}", f"--tokens={tokens}", f"--what={what}", f"--cases={case}"]
        gate = ["--gate-tokens=64"] if self.dry else []
        return ["benchmarks.measure", *options, "--variants=ours,ours-16bit-logits", *self.size(), *gate]

    def step(self, step: str, name: str, tokens: str | None = None) -> list[str]:
        options = [f"--names={name}", f"--tokens={tokens or self.tokens}"]
        return ["benchmarks.gpu_steps", step, *options, *self.size()]

    def peer(self, name: str) -> list[str]:
        rounds = [] if self.dry else ["--rounds=2"]
        return [*self.step("peer", self.big), f"--peer={name}", *rounds]

    def rates(self, name: str) -> list[str]:
        rows = "16,64" if self.dry else "1152,1408,1639,2048,2304,2816,3584,4096,16384"
        repeats = ["--repeats=1"] if self.dry else []
        return ["benchmarks.gemm_rates", f"--name={name}", f"--rows={rows}", *self.size()[:2], *repeats]

    def tests(self, which: str) -> list[str]:
        options = ["-v", "-rs", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers"]
        where = ["tests/kernels/test_rows.py", "-k", "one_launch and fp32"]
        # four at a time: what takes long is to compile
        return ["pytest", *options, *(where if self.dry else ["-n", "4", "tests/kernels/test_gpu.py", "-k", which])]

    def under(self, *tool: str) -> list[str]:
        """Every op once, watched by a tool; a dry run has a stand-in, which runs the rest and ends as the tool does."""
        watcher = [sys.executable, "-m", "benchmarks.gpu_sweep", "--stand-in"] if self.dry else [*tool]
        tiny = [] if self.dry else ["--sequence=16"]
        return [*watcher, "python", *self.step("small", self.big), *tiny]


def steps(dry: bool) -> list[Step]:
    """All of them; a dry run has two more, made to fail and to hang."""
    plan = _Plan(dry)
    big, small, both, tokens = plan.big, plan.small, plan.both, plan.tokens
    batch = "64" if dry else "8192"
    watch = ["compute-sanitizer", "--error-exitcode=1", "--tool"]
    # each tensor is an allocation of its own, past whose end an access is seen
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    count = ["ncu", "--clock-control=none", "-k", "regex:_row_kernel", "-c", "2", *(f"--section={x}" for x in COUNTERS)]
    found = [
        Step("1a", 1, 60, "versions, one GRPO call against float64", plan.step("first", big), needs_ours=False),
        Step("1b", 1, 180, "the first tests on a GPU", plan.tests(FIRST_TESTS), "pytest"),
        Step("1c-7b", 1, 90, "rates of the products, D=3584", plan.rates(big), needs_ours=False),
        Step("1c-1.5b", 1, 75, "rates of the products, D=1536", plan.rates(small), needs_ours=False),
        Step("2a-7b", 2, 100, "GRPO, D=3584", plan.measure(big, tokens, "time")),
        Step("2a-1.5b", 2, 75, "GRPO, D=1536", plan.measure(small, tokens, "time")),
        Step("2b", 2, 60, "kernels of one call", plan.step("kernels", both)),
        Step("2c", 2, 75, "row kernel by block and warps", plan.step("row-kernel", big)),
        Step("2d", 2, 90, "size of the workspace and of the products", plan.step("workspace", both)),
        Step("2e", 2, 90, "peak memory", plan.measure(big, f"{tokens},{plan.long}", "memory")),
        *(Step(f"3-{name}", 3, limit_s, name, plan.peer(name), needs_ours=False) for name, limit_s in PEERS.items()),
        Step("4a-repeat", 4, 45, "the same call 20 times", plan.step("repeat", big)),
        Step("4a-rest", 4, 200, "the other tests on a GPU", plan.tests(f"not ({FIRST_TESTS})"), "pytest"),
        Step("4b-racecheck", 4, 75, "races in shared memory", plan.under(*watch, "racecheck"), "tool"),
        Step("4b-memcheck", 4, 60, "accesses out of bounds", plan.under(*alone, *watch, "memcheck"), "tool"),
        Step("4c-srft", 4, 75, "SRFT", plan.measure(big, tokens, "time", "srft")),
        Step("4c-graph", 4, 45, "forward and backward in a CUDA graph", plan.step("graph", big)),
        Step("4c-compile", 4, 60, "torch.compile around the op", plan.step("compiled", big)),
        Step("4b-ncu", 4, 60, "counters of the row kernel", plan.under(*count), "tool"),
        Step("4c-step", 4, 75, "a training step of a 1.5B shape", plan.step("train-step", small, batch)),
    ]
    if dry:
        # the limits above are those of a GPU
        found = [step._replace(limit_s=300) for step in found]
        found += [
            Step("x-fail", 4, 300, "made to fail", plan.step("fail", big)),
            Step("x-hang", 4, 12, "made to hang", plan.step("hang", big)),
        ]
    return found
