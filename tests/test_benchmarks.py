"""The benchmarks run at tiny shapes, notice a wrong result, and the pages show what the results say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import heads, losses, measure, peers, plot, table, trainer_step
from benchmarks.options import OPTIONS as ALL_OPTIONS
from benchmarks.options import QUICK, specs
from benchmarks.progress import Progress
from benchmarks.variants import Variant, gold
from srft.engine.base import Sampling
from srft.engine.hf import HfEngine
from srft.options import load_config
from srft.planning.models import measure_shape
from srft.policy.model import build_tiny, byte_tokenizer
from srft_kernels import reference

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FAST = "ours,ours-16bit-logits,ours-logprobs,naive,trl,verl-torch,quack"
OPTIONS = {option: default for option, (default, _) in ALL_OPTIONS.items()} | {
    "names": "tiny", "tokens": "512", "sequence": "64", "device": "cpu", "variants": FAST, "rounds": "2",
    "what": "time",
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A command of the benchmarks in a process of its own."""
    # a worker of pytest-xdist has no benchmarks, and its children would take themselves for it
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def measured(**options: str) -> dict:
    """The table of the tiny head."""
    (spec,) = specs(OPTIONS | options)
    return measure.Table(spec).run()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_case_is_measured(dtype: str) -> None:
    """Each loss has times, ratios and errors for ours and naive, and a reason for whatever is left out."""
    result = measured(cases=",".join(losses.CASES), dtype=dtype)
    rows = {(row["case"], row["name"]): row for row in result["rows"]}
    for case in losses.CASES:
        for name in ("ours", "ours-logprobs", "naive"):
            row = rows[case, name]
            assert row["status"] == "ok", row
            assert len(row["seconds"]) == 2 and row["ratio"] > 0 and row["tflops"] > 0
            assert row["errors"]["dweight"][0] <= measure.BOUNDS["others"][dtype]
    for row in rows.values():
        assert row["status"] == "ok" or (row["reason"] and row["status"] == "skipped"), row
    if ("cross_entropy", "quack") in rows:
        assert rows["cross_entropy", "quack"]["reason"] == "runs on cuda only"


SMALL_STEP = ("--rounds=1", "--prompts=2", "--rollouts=4", "--tokens=5", "--width=16", "--layers=1", "--mlp=16")


def test_a_whole_step_is_measured() -> None:
    """Floor and ours by part; what is left out says how to get it."""
    done = run("-m", "benchmarks.trainer_step", *SMALL_STEP, "--no-trl")
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split(" | ")[:2]): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert {("| floor", "step"), ("| ours", "rollout"), ("| ours", "train"), ("| ours", "sync")} <= rows.keys()
    assert "nan" not in done.stdout and all(s in done.stdout for s in ("pip install", "prompts of 10", "GFLOP/s"))


def test_a_step_with_copies_of_the_prompt_is_measured_beside() -> None:
    """In turn with one that computes it once, at the length that is asked for."""
    done = run("-m", "benchmarks.trainer_step", *SMALL_STEP, "--no-trl", "--copies", "--prompt=13")
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split(" | ")[:2]) for line in done.stdout.splitlines() if line.startswith("| ")}
    assert {("| ours", "train"), ("| ours, copies", "train")} <= rows and "prompts of 13" in done.stdout


def test_the_floor_counts_the_products_of_a_rollout() -> None:
    """Those that the engine calls, but for attention's."""
    tokenizer = byte_tokenizer()
    config = load_config(["model.tiny.hidden_size=16", "model.tiny.num_layers=2", "model.tiny.intermediate_size=24"])
    model = build_tiny(config.model, tokenizer, 64, 0)
    engine = HfEngine(model, dtype=torch.float32, pad_token_id=0, max_batch=64)
    prompts, group, new = [list(range(p, p + trainer_step.PROMPT)) for p in range(3)], 4, 6
    with FlopCounterMode(display=False) as counted:
        engine.generate(prompts, Sampling(1.0, new, ()), [list(range(group)) for _ in prompts])
    products = sum(counted.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    shape, longest = measure_shape(model), trainer_step.PROMPT + new
    pairs = 2 * shape.layers * shape.heads * shape.head_dim * ((longest - 1) ** 2 - trainer_step.PROMPT**2)
    found = trainer_step.floors(shape, len(prompts) * group, group, new)["rollout"]
    # of a prompt the head is computed once, where the floor has it for every completion
    shared = 2 * shape.vocab * shape.hidden * len(prompts) * (group - 1)
    assert products == pytest.approx(found - len(prompts) * group * pairs - shared)


@pytest.mark.parametrize("case", losses.CASES)
def test_losses_are_those_of_the_package(case: str) -> None:
    """The losses that the peers are given equal the package's reference in float64."""
    inputs = heads.make_inputs(heads.HEADS["tiny"], torch.float64, 512, 64, CPU)
    loss = losses.CASES[case](*reference.linear_logprobs(*inputs[:3]), inputs)
    loss.backward()
    actual = loss.detach(), inputs.hidden_states.grad, inputs.lm_head_weight.grad
    for mine, theirs in zip(actual, gold(case)(inputs), strict=True):
        assert measure.errors(mine, theirs)[0] < 1e-12


def test_clipping_acts_and_no_ratio_is_at_a_bound() -> None:
    """About two tokens in three lie outside the clip bounds, and none close to one."""
    inputs = heads.make_inputs(heads.HEADS["tiny"], torch.float32, 4096, 64, CPU)
    with torch.no_grad():
        logprobs, _ = losses.naive(inputs, False)
    log_ratio = logprobs - inputs.old_logprobs
    bounds = torch.tensor([0.8, 1.2]).log()
    # 0.1 at the heads of models: with few columns, the inputs know their log-probabilities less well
    assert (log_ratio[:, None] - bounds).abs().min() > 0.02
    outside = ((log_ratio < bounds[0]) | (log_ratio > bounds[1])).float().mean()
    assert 0.5 < outside < 0.8


def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant whose gradient is off by a factor of two has no time; one that raises has its message."""
    real = measure.variants

    def broken(*given) -> dict[str, Variant]:
        found = real(*given)
        honest = found["naive"].run

        def double(x: heads.Inputs):
            loss, dhidden, dweight = honest(x)
            return loss, dhidden, 2 * dweight

        def fail(x: heads.Inputs):
            raise RuntimeError("no kernel here")

        return {"ours": found["ours"], "naive": Variant(double), "trl": Variant(fail)}

    monkeypatch.setattr(measure, "variants", broken)
    rows = {row["name"]: row for row in measured()["rows"]}
    assert rows["naive"]["status"] == "wrong" and "seconds" not in rows["naive"]
    assert rows["trl"]["status"] == "failed" and "no kernel here" in rows["trl"]["reason"]
    assert "seconds" in rows["ours"]


def test_ours_must_be_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where ours is beyond its bound it has no time, the others have theirs, and the command fails and says why."""
    monkeypatch.setitem(measure.BOUNDS, "ours", {"fp32": 1e-12})
    out = tmp_path / "result.json"
    given = {**OPTIONS, "variants": "ours,naive", "out": str(out)}
    monkeypatch.setattr(sys, "argv", ["measure", *(f"--{key}={value}" for key, value in given.items())])
    with pytest.raises(SystemExit, match="ours: relative RMS error"):
        measure.main()
    rows = {row["name"]: row for row in json.loads(out.read_text())["tables"][0]["rows"]}
    assert rows["ours"]["status"] == "wrong" and "seconds" not in rows["ours"]
    assert len(rows["naive"]["seconds"]) == 2


def test_where_ours_raises_its_traceback_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row has the whole traceback, counts as a fault of this package, and the others are measured."""

    def fail(x: heads.Inputs):
        raise RuntimeError("no driver")

    real = measure.variants
    monkeypatch.setattr(measure, "variants", lambda *given: real(*given) | {"ours": Variant(fail, bound="ours")})
    rows = {row["name"]: row for row in measured(variants="ours,naive")["rows"]}
    assert measure.of_ours(rows["ours"]) and "no driver" in rows["ours"]["reason"]
    assert "Traceback" in rows["ours"]["traceback"] and "in fail" in rows["ours"]["traceback"]
    assert "seconds" in rows["naive"] and not measure.of_ours(rows["naive"])


def test_the_quick_default_needs_no_second_warm_up() -> None:
    """By default make bench has one table, whose comparison with float64 calls each variant as it is timed."""
    (spec,) = specs(OPTIONS | {"variants": "", "sequence": ""} | QUICK)
    assert spec.gate_tokens == spec.tokens
    assert {*spec.only} <= {*peers.PEERS, "ours", "ours-16bit-logits", "ours-logprobs", "naive"}
    assert 0 < float(QUICK["minutes"]) < 5


def test_each_step_is_said_before_it_starts() -> None:
    """Gate, warm-up and rounds of every variant have a line each, with an estimate from the second call on."""
    lines: list[str] = []
    (spec,) = specs(OPTIONS | {"variants": "ours,naive"})
    measure.Table(spec, progress=Progress(say=lines.append)).run()
    steps = [line.split(": ", 1)[1].split(";")[0] for line in lines[1:]]
    calls = ["products chunked", "products unchunked", "grpo ours", "grpo naive"]
    assert steps[:3] == ["gate at N=256, float64 grpo", "gate 1 of 2, grpo ours", "gate 2 of 2, grpo naive"]
    assert steps[3:7] == [f"warm-up, {call}" for call in calls]
    assert steps[7:11] == [f"round 1 of 2, {place} of 4, {call}" for place, call in enumerate(calls, 1)]
    assert steps[11:] == [f"round 2 of 2, {place} of 4, {call}" for place, call in enumerate(calls[::-1], 1)]
    assert all("about" in line and line.endswith("left") for line in lines[2:])


def test_a_limit_of_time_leaves_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all, ours is measured once; others, further rounds and their memory say why not."""
    lines: list[str] = []
    (spec,) = specs(OPTIONS | {"variants": "ours,naive,trl", "rounds": "3", "what": "time,memory"})
    monkeypatch.setattr(measure.memory, "of_process", lambda *given: 2**30)
    result = measure.Table(spec, progress=Progress(1e-9, lines.append)).run()
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows["ours"]["seconds"]) == len(rows["chunked"]["seconds"]) == result["rounds"] == 1
    assert "peak_bytes" in rows["ours"]
    for name in ("naive", "trl"):
        assert rows[name]["status"] == "skipped" and "no time left of 1e-09 minutes" in rows[name]["reason"]
    assert any("round 2 and on left out" in line for line in lines)
    assert any("of work and 0:00 of time left" in line for line in lines)
    with pytest.raises(ValueError, match="minutes must be"):
        Progress(-1)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for it, nothing is started, and the reason says so."""
    monkeypatch.setattr(heads, "free_bytes", lambda device: 1000)
    result = measured()
    assert "are free" in result["skipped"] and result["rows"] == []


def test_memory_of_a_fresh_process() -> None:
    """The peak holds at least both gradients."""
    result = measured(what="memory", variants="ours")
    (row,) = result["rows"]
    assert row["status"] == "ok", row
    assert row["peak_bytes"] >= 0 and row["beyond_gradients_bytes"] == row["peak_bytes"] - result["gradient_bytes"]


def test_command_table_and_plot(tmp_path: Path) -> None:
    """The command writes JSON, from which the table and a picture are made."""
    out = tmp_path / "result.json"
    options = {**OPTIONS, "variants": "ours,naive"}
    done = run("-m", "benchmarks.measure", *(f"--{key}={value}" for key, value in options.items()), f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    text = table.render(found)
    assert text in done.stdout and "| grpo | ours |" in text
    plot.draw(found, tmp_path / "result.png")
    assert (tmp_path / "result.png").stat().st_size > 10_000


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ["pytest_benchmark", "pytest_timeout"]),
    reason="needs pytest-benchmark and pytest-timeout",
)
def test_pytest_benchmark_gets_the_times(tmp_path: Path) -> None:
    """The documented command collects and passes."""
    options = {**OPTIONS, "variants": "ours,quack", "cases": "cross_entropy", "out": str(tmp_path / "result.json")}
    given = [f"--head-{key}={value}" for key, value in options.items()]
    done = run("-m", "pytest", "benchmarks/", "--benchmark-only", "-p", "no:cacheprovider", *given)
    assert done.returncode == 0 and "3 passed, 1 skipped" in done.stdout, done.stdout[-3000:]
    assert "importing what quack needs" in done.stdout and "round 1 of 2, 3 of 3, cross_entropy ours" in done.stdout
    assert "runs on cuda only" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["tables"][0]["rows"][0]["case"] == "products"


def test_peers_have_a_reason_or_a_function() -> None:
    """No peer is left out without a word."""
    for name in peers.PEERS:
        function, reason = peers.load(name, CPU)
        assert (function is None) == bool(reason)


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_pages_show_the_results(page: str) -> None:
    """The generated tables equal what the files they name give."""
    text = (ROOT / page).read_text()
    assert table.filled(text) == text, f"python -m benchmarks.table --fill {page}"
