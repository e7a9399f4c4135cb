"""The sweep of a GPU goes on whatever a step does, keeps what each has printed, and its plan names what exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gemm_rates, gpu_plan, gpu_steps, gpu_sweep, heads, peers
from benchmarks.gpu_plan import Step
from benchmarks.options import OPTIONS, specs
from srft_kernels.head import chunks as chunked_head
from srft_kernels.rows import gpu as row_kernels

ROOT = Path(__file__).parents[1]
# what a step may do; each call adds a line to the file calls
STEPPER = """
import json, os, pathlib, subprocess, sys, time
what, out = sys.argv[1], [x.removeprefix("--out=") for x in sys.argv if x.startswith("--out=")]
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join([what, *sys.argv[3:]]) + "\\n")
print("begins", what, flush=True)
if what == "ok":
    pathlib.Path(out[0]).write_text(json.dumps({"headline": "all is well"}))
elif what == "raise":
    def inner():
        raise ValueError("the reason")
    inner()
elif what == "garbage":
    pathlib.Path(out[0]).write_text('{"headline": ')
elif what == "kill":
    os.kill(os.getpid(), 9)
elif what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)
"""


class Bench:
    """A folder of results, and a module of steps that do as told."""

    def __init__(self, folder: Path):
        (folder / "stepper.py").write_text(STEPPER)
        self.folder, self.calls = folder / "out", folder / "calls"
        path = os.pathsep.join([str(folder), str(ROOT)])
        self.environment = os.environ | {"PYTHONPATH": path, "CALLS": str(self.calls)}

    def sweep(self, wanted: list[Step], minutes: float = 5, again: tuple[str, ...] = ()) -> dict[str, dict]:
        """Lines by step, as a fresh process would find them on disk."""
        record = gpu_sweep.Record(self.folder, self.folder.parent / "all.tgz")
        gpu_sweep.sweep(wanted, record, minutes, {*again}, self.environment)
        return gpu_sweep.Record(self.folder, None).lines

    def called(self) -> list[str]:
        """What has been run since the last look."""
        lines = self.calls.read_text().split("\n")[:-1] if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """An empty folder of results."""
    return Bench(tmp_path)


def step(name: str, what: str, limit_s: float = 60, **others) -> Step:
    """A step that does ``what``."""
    return Step(name, 1, limit_s, what, ["stepper", what], **others)


def test_one_that_fails_or_hangs_stops_no_other(bench: Bench) -> None:
    """Each failure has its kind, its log in full and its line on disk; what a hanging step started is gone too."""
    tool = Step("tool", 1, 60, "no such tool", ["no-such-tool-here", "python", "stepper", "ok"], "tool")
    wanted = [
        step("raises", "raise"), step("hangs", "hang", limit_s=2), step("dies", "kill"), step("empty", "nothing"),
        step("garbage", "garbage"), tool, step("good", "ok"),
    ]  # fmt: skip
    lines = bench.sweep(wanted)
    assert {name: line["status"] for name, line in lines.items()} == {
        "raises": "failed", "hangs": "timeout", "dies": "failed", "empty": "failed", "garbage": "failed",
        "tool": "failed", "good": "ok",
    }  # fmt: skip
    assert lines["good"]["headline"] == "all is well" and lines["good"]["result"] == {"headline": "all is well"}
    log = (bench.folder / "raises.log").read_text()
    assert "Traceback" in log and "in inner" in log and "ValueError: the reason" in lines["raises"]["why"]
    assert "stopped after 2 s" in lines["hangs"]["why"] and "exit status -9" in lines["dies"]["why"]
    assert "ended without a result" in lines["empty"]["why"] and "could not be read" in lines["garbage"]["headline"]
    assert "no-such-tool-here" in lines["tool"]["why"]
    hung = (bench.folder / "hangs.log").read_text()
    assert "begins hang" in hung
    child = int(re.search(r"child (\d+)", hung)[1])
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {child} of the step that hung is still there")
    table = (bench.folder / "summary.md").read_text()
    assert table.count("\n") == 2 + len(wanted) and "| good | ok | ok |" in table
    with tarfile.open(bench.folder.parent / "all.tgz") as archive:
        assert {"sweep/steps.jsonl", "sweep/raises.log", "sweep/good.json"} <= {*archive.getnames()}


def test_what_has_ended_is_not_run_again_unless_asked(bench: Bench) -> None:
    """Failures count as ended; a name, a status or all asks; a line cut off in the middle is of a step that is run."""
    wanted = [step("first", "ok"), step("second", "raise"), step("third", "ok")]
    bench.sweep(wanted[:2])
    assert bench.called() == ["ok", "raise"]
    path = bench.folder / "steps.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": "third", "status": "ok"})[:-5])
    assert bench.sweep(wanted)["third"]["status"] == "ok" and bench.called() == ["ok"]
    bench.sweep(wanted, again=("failed",))
    assert bench.called() == ["raise"]
    bench.sweep(wanted, again=("first",))
    assert bench.called() == ["ok"]
    bench.sweep(wanted, again=("all",))
    assert bench.called() == ["ok", "raise", "ok"]


def test_without_our_kernels_products_and_peers_go_on(bench: Bench, capsys: pytest.CaptureFixture) -> None:
    """Where 1a fails, loudly, steps of ours say why they are skipped, and peers are told to go without ours."""
    peer = Step("peer", 1, 60, "a peer", ["stepper", "ok", "peer"], needs_ours=False)
    first = step("1a", "raise", needs_ours=False)
    wanted = [first, step("ours", "ok"), step("products", "ok", needs_ours=False), peer]
    lines = bench.sweep(wanted)
    assert [line["status"] for line in lines.values()] == ["failed", "skipped", "ok", "ok"]
    assert "1a: failed" in lines["ours"]["why"] and "1a FAILED" in capsys.readouterr().out
    assert bench.called()[-1].endswith("--without-ours")
    mended = [first._replace(command=["stepper", "ok"]), *wanted[1:]]
    assert bench.sweep(mended, again=("1a",))["ours"]["status"] == "ok"


def test_the_time_is_kept(bench: Bench) -> None:
    """What does not fit says so, ends no step, and is run the next time."""
    lines = bench.sweep([step("late", "ok")], minutes=0.01)
    assert lines["late"]["status"] == "not started" and bench.called() == []
    assert bench.sweep([step("late", "ok")])["late"]["status"] == "ok"


def test_each_part_fits_a_command_of_ten_minutes() -> None:
    """With what is killed last and the table, and parts hold about the minutes that they are given."""
    assert 60 * gpu_sweep.PART_MINUTES + 15 < 600
    for part in (1, 2, 3, 4):
        limits = sum(step.limit_s for step in gpu_plan.steps(dry=False) if step.part == part)
        assert 300 < limits < 780


@pytest.mark.parametrize("dry", [False, True], ids=["full", "dry"])
def test_the_plan_names_what_exists(dry: bool) -> None:
    """Options of each command are known to it, peers and steps exist, and the first tests are some of test_gpu.py."""
    planned = gpu_plan.steps(dry)
    assert len({step.name for step in planned}) == len(planned)
    for planned_step in planned:
        command = planned_step.command
        given = dict(x.removeprefix("--").split("=", 1) for x in command if x.startswith("--") and "=" in x)
        if "benchmarks.measure" in command:
            assert {*given} <= {*OPTIONS}
            assert specs({option: given.get(option, default) for option, (default, _) in OPTIONS.items()})
        elif "benchmarks.gpu_steps" in command:
            assert command[command.index("benchmarks.gpu_steps") + 1] in gpu_steps.STEPS
            assert given.get("peer", "trl") in peers.PEERS
    text = (ROOT / "tests/kernels/test_gpu.py").read_text()
    for name in gpu_plan.FIRST_TESTS.split(" or "):
        assert re.search(rf"def test_\w*{name}", text), name


def test_what_the_steps_take_of_the_package_is_there() -> None:
    """The constants that steps set, and the kernel that they look for, are those of the package."""
    assert all(hasattr(row_kernels, name) for name in ("_MAX_BLOCK_V", "_NUM_WARPS", "_row_kernel"))
    assert all(hasattr(chunked_head, name) for name in ("GPU_WORKSPACE_BYTES", "CPU_WORKSPACE_BYTES", "_PRODUCT_ROWS"))


def test_rates_of_products() -> None:
    """Each product of a chunk has a time and a rate, or the reason why it is not there."""
    rows = gemm_rates.rates(heads.HEADS["tiny"], 16, torch.bfloat16, torch.device("cpu"), repeats=1)
    assert {row["product"] for row in rows} >= {"X W'", "G W", "G' X added (G strided)"}
    assert all(row["tflops"] > 0 if "median_s" in row else row["reason"] for row in rows)
    assert gpu_sweep.HEADLINES["json"]({"gemm": rows}, "").startswith("best ")


@pytest.mark.parametrize(
    ("reads", "text", "headline"),
    [
        ("pytest", "F.\nFAILED a.py::test_b[x] - boom\n1 failed in 3s\n", "1 failed in 3s; test_b[x]"),
        ("pytest", "=== 4 passed, 1 skipped in 60.00s (0:01:00) ===\n", "4 passed, 1 skipped in 60.00s (0:01:00)"),
        ("pytest", "a.py::test_b PASSED [ 50%]\na.py::test_c FAILED [ 99%]\n", "1 passed, 1 failed before the end"),
        ("pytest", "[gw1] [ 9%] FAILED tests/a.py::test_c[y] \n", "1 failed before the end; test_c[y]"),
        ("pytest", "Killed\n", ""),
        ("tool", "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        ("tool", "========= RACECHECK SUMMARY: 1 hazard displayed\n", "RACECHECK SUMMARY: 1 hazard displayed"),
        ("tool", "    Duration      us    891\n    DRAM Throughput    %   8\n", "Duration us 891; DRAM Throughput % 8"),
        ("tool", "==WARNING== No kernels were profiled.\n", ""),
    ],
)  # fmt: skip
def test_what_a_log_says_in_a_line(reads: str, text: str, headline: str) -> None:
    """The closing lines of pytest and of the tools; nothing where there is none, which is a failure."""
    assert gpu_sweep.HEADLINES[reads](None, text) == headline


def test_a_dry_run_measures_and_fails_as_it_should(tmp_path: Path) -> None:
    """The command end to end: a call through Triton's interpreter, and a step that is made to fail."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu_sweep", "--dry-run", "--only=1a,x-fail", f"--out={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    lines = gpu_sweep.Record(tmp_path, None).lines
    assert {name: line["status"] for name, line in lines.items()} == {"1a": "ok", "x-fail": "failed"}
    assert max(lines["1a"]["result"]["errors"].values()) < 1e-5 and "triton" in lines["1a"]["headline"]
    assert "RuntimeError: this step is made to fail" in done.stdout and "| 1a | " in done.stdout
