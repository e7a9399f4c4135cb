"""What a run's folder comes to, what survives in results.jsonl, and what tables and warnings make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srft.experiments.command import main
from srft.experiments.findings import Findings, read_findings
from srft.experiments.results import Budget, Result, append_result, read_results, summarise
from srft.experiments.suite import Run
from srft.experiments.tables import make_tables, markdown
from srft.options import load_config
from tests.trainer.test_report import HOSTILE, Page


def result(arm: str, seed: int, final: float, **changes: Any) -> Result:
    budget = Budget(prompts=40, sampled_tokens=1000, trained_tokens=2000, updates=10, flops=1e9, seconds=3.0)
    whole = Result(
        arm=arm, seed=seed, identity="x", steps=10, evaluations=[(0, 0.25, 0.0), (10, final, 1e9)],
        entropy=(1.0, 0.5, 0.25), curves={"step": [1, 10], "flops": [1e8, 1e9], "entropy/rollout": [1.0, 0.25]},
        budget=budget, threads=1, commit="abc",
    )  # fmt: skip
    return whole.model_copy(update=changes)


def suite_folder(folder: Path, results: list[Result], **changes: Any) -> Path:
    about = {"title": "A", "question": "B?", "reference": "a", "equal": [], "arms": {"a": [], "b": ["x=1"]}}
    about |= {"config": "steps = 10\n"} | changes
    seeds = sorted({r.seed for r in results} or {0})
    about["runs"] = [[arm, seed, "x"] for arm in (*about["arms"], *changes.get("hidden", ())) for seed in seeds]
    (folder / "suite.json").write_text(json.dumps(about))
    for each in results:
        append_result(folder, each)
    return folder


def run_folder(folder: Path, name: str, rows: list[dict[str, Any]], source: Run | None = None) -> Run:
    path = folder / name
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "run.json").write_text(json.dumps({"summary": {"parameters": 100}, "sessions": [{"commit": "abc"}]}))
    borrowed = {"model.name": "model"} if source else {}
    config = load_config(["train.prompts_per_step=4"])
    return Run(name, 0, (), (), borrowed, source, config, path, "x")


def rows(*, steps: int, accuracy: float, entropy: float | None, sampled: int) -> list[dict[str, Any]]:
    every: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.1, "time/elapsed": 0.5}]
    for step in range(1, steps + 1):
        row = {"step": step, "tokens/sampled": sampled, "tokens/trained": 30, "updates/made": 2, "time/elapsed": step}
        every.append(row | {"weight/sft": step / 10} | ({} if entropy is None else {"entropy/rollout": entropy * step}))
    every[-1]["eval/accuracy"] = accuracy
    return every


def test_what_a_run_comes_to(tmp_path: Path) -> None:
    """Accuracies, entropies, means over its steps, and budgets as they are defined."""
    lines = rows(steps=4, accuracy=0.6, entropy=0.5, sampled=20)
    lines[2]["groups/resampled"] = 3
    got = summarise(run_folder(tmp_path, "a", lines), threads=2)
    flops = 100 * (6 * 120 + 2 * 80)
    assert got.evaluations == [(0, 0.1, 0), (4, 0.6, flops)] and (got.final, got.best, got.steps) == (0.6, 0.6, 4)
    assert got.area == pytest.approx(0.35)
    assert got.entropy == pytest.approx((0.5, 1.25, 2.0))
    assert got.means["weight/sft"] == pytest.approx(0.25)
    assert got.budget == Budget(
        prompts=4 * 4 + 3, sampled_tokens=80, trained_tokens=120, updates=8, flops=flops, seconds=4
    )
    assert (got.threads, got.commit, got.error) == (2, "abc", "")


def test_a_run_goes_on_where_its_source_ended(tmp_path: Path) -> None:
    """Curves follow each other and budgets add up; the means, which others borrow, are its own."""
    first = run_folder(tmp_path, "a", rows(steps=4, accuracy=0.6, entropy=None, sampled=0))
    second = run_folder(tmp_path, "b", rows(steps=2, accuracy=0.7, entropy=0.5, sampled=20), source=first)
    got = summarise(second, threads=1)
    flops = [100 * 6 * 30 * 4, 100 * (6 * 30 * 6 + 2 * 20 * 2)]
    assert got.evaluations == [(0, 0.1, 0), (4, 0.6, flops[0]), (6, 0.7, flops[1])] and got.steps == 6
    assert got.area == pytest.approx((0.35 * flops[0] + 0.65 * (flops[1] - flops[0])) / flops[1])
    assert got.curves["step"] == [1, 2, 3, 4, 5, 6]
    assert got.curves["entropy/rollout"] == [None] * 4 + [0.5, 1.0]
    assert got.entropy == (0.5, 0.75, 1.0)
    assert got.means["weight/sft"] == pytest.approx(0.15)
    assert got.budget is not None
    assert (got.budget.prompts, got.budget.sampled_tokens, got.budget.updates, got.budget.seconds) == (24, 40, 12, 6)


def test_long_curves_are_averaged(tmp_path: Path) -> None:
    """130 steps become points of three neighbours each, and of the one that is left."""
    got = summarise(run_folder(tmp_path, "a", rows(steps=130, accuracy=0.6, entropy=0.5, sampled=1)), threads=1)
    assert got.curves["step"][:2] == [2, 5] and got.curves["step"][-1] == 130 and len(got.curves["step"]) == 44
    assert got.curves["weight/sft"][:2] == pytest.approx([0.2, 0.5])


def test_a_run_that_nobody_judged(tmp_path: Path) -> None:
    """Without an accuracy there is no result."""
    lines = [{k: v for k, v in row.items() if k != "eval/accuracy"}
             for row in rows(steps=1, accuracy=0.0, entropy=None, sampled=0)]  # fmt: skip
    with pytest.raises(ValueError, match="has no accuracy"):
        summarise(run_folder(tmp_path, "a", lines), threads=1)


@pytest.mark.parametrize("cut", [1, 40, -1], ids=["one", "many", "newline"])
def test_a_torn_line_costs_only_itself(tmp_path: Path, cut: int) -> None:
    """Whatever a kill left of the last line, the next result stands on a line of its own."""
    kept, torn, after = result("a", 0, 0.5), result("a", 1, 0.6), result("b", 0, 0.7)
    append_result(tmp_path, kept)
    whole = (path := tmp_path / "results.jsonl").stat().st_size
    append_result(tmp_path, torn)
    text = path.read_bytes()
    path.write_bytes(text[: whole + cut] if cut > 0 else text[:cut])
    append_result(tmp_path, after)
    assert read_results(tmp_path) == ([kept, after] if cut > 0 else [kept, torn, after])


def test_the_newest_result_of_a_run_counts(tmp_path: Path) -> None:
    """A run that failed and was made again is complete; a line of another version is refused by its place."""
    append_result(tmp_path, Result(arm="a", seed=0, identity="x", error="out of luck"))
    append_result(tmp_path, result("a", 0, 0.5))
    assert read_results(tmp_path) == [result("a", 0, 0.5)]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"arm": "a"}\n')
    with pytest.raises(ValueError, match="results.jsonl:3 is no result: seed"):
        read_results(tmp_path)


def found(folder: Path, results: list[Result], **changes: Any) -> Findings:
    return read_findings(suite_folder(folder, results, **changes))


def test_differences_are_between_runs_of_one_seed(tmp_path: Path) -> None:
    """A seed that either arm lacks takes no part in them."""
    results = [result("a", 0, 0.5), result("a", 1, 0.7), result("a", 2, 0.1), result("b", 1, 0.8), result("b", 2, 0.15)]
    findings = found(tmp_path, results)
    a, b = findings.arms
    assert a.final_difference is None and b.final_difference is not None and b.final is not None
    assert b.final_difference.count == 2 and b.final_difference.mean == pytest.approx(0.075)
    # of 0.1 and 0.05, s = 0.05 / sqrt(2), t(1) = 12.7062
    assert b.final_difference.half == pytest.approx(12.7062047362 * 0.05 / 2)
    assert b.missing == [0] and findings.warnings == ["Not made yet: b (seeds 0)."]
    table = make_tables(findings)[1]
    assert table.rows == [["b", "2", "+7.5 ± 31.8", "", "+3.8 ± 15.9", ""]]


def test_a_sign_is_told_where_the_interval_leaves_out_zero(tmp_path: Path) -> None:
    """Three differences of -10, -11 and -12 points are below; the first arm's three zeros are no difference."""
    results = [result("a", s, 0.5) for s in range(3)] + [result("b", s, 0.4 - s / 100) for s in range(3)]
    assert make_tables(found(tmp_path, results))[1].rows[0][2:4] == ["-11.0 ± 2.5", "below"]


def test_unequal_budgets_are_warned_of(tmp_path: Path) -> None:
    """Beyond a tenth, in what the suite wants equal, and in nothing else."""
    budget = result("a", 0, 0.5).budget
    assert budget is not None
    more = budget.model_copy(update={"sampled_tokens": 1101, "prompts": 44, "updates": 99})
    results = [result("a", 0, 0.5), result("b", 0, 0.5, budget=more)]
    (warning,) = found(tmp_path, results, equal=["prompts", "sampled_tokens"]).warnings
    assert warning.startswith("Unequal sampled tokens: b had 1,101, a 1,000")


def test_what_failed_and_what_is_of_other_options_is_told(tmp_path: Path) -> None:
    """An error is a warning, and no number of that seed; results of another identity count for nothing."""
    stale = result("b", 0, 0.9).model_copy(update={"identity": "old"})
    failed = Result(arm="b", seed=0, identity="x", error="the loss is nan")
    hidden = failed.model_copy(update={"arm": "start", "error": "no room"})
    findings = found(tmp_path, [result("a", 0, 0.5), stale, failed, hidden], hidden=["start"])
    assert findings.arms[1].final is None and findings.arms[1].failed == {0: "the loss is nan"}
    assert findings.warnings == [
        "start (hidden), seed 0, ended early: no room.",
        "b, seed 0, ended early: the loss is nan.",
        "1 results in the folder are of other seeds or options, and take no part.",
    ]
    text = markdown(findings, make_tables(findings))
    assert "| b | 0 of 1 | – | – | – |" in text and "**Warning:** b, seed 0" in text


@pytest.mark.parametrize("kept", [["a", "b"], ["a"], []], ids=["both", "reference", "none"])
def test_report_from_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: list[str]) -> None:
    """Tables, figures and page of whatever has ended, without a run's folder; the page runs and loads nothing."""
    results = [result(arm, seed, 0.5 + seed / 10) for arm in kept for seed in range(2)]
    suite_folder(tmp_path, results, title=HOSTILE, question=HOSTILE, arms={"a": [], "b": [HOSTILE]}, config=HOSTILE)
    main(["a", "--report", "--out", str(tmp_path)])
    assert "Accuracy" in capsys.readouterr().out
    page = Page(tmp_path / "report.html")
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags) and "\x1b" not in page.html
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")} if kept else set()
    curves = {"accuracy", "entropy"} if kept else set()
    assert drawn == curves | ({"differences"} if "b" in kept else set()) and page.tags.count("svg") == len(drawn)
    assert (tmp_path / "table.md").read_text().count("## ") == 5


def test_no_suite_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to report."""
    with pytest.raises(SystemExit):
        main(["a", "--report", "--out", str(tmp_path)])
    assert "run the suite first" in capsys.readouterr().err


def test_steps_of_one_evaluation(tmp_path: Path) -> None:
    """The mean over the run of a single evaluation is that evaluation; of a run without FLOPs it is over the steps."""
    assert result("a", 0, 0.5).model_copy(update={"evaluations": [(0, 0.25, 0.0)]}).area == 0.25
    idle = [(0, 0.2, 0.0), (1, 0.2, 0.0), (4, 0.4, 0.0)]
    assert result("a", 0, 0.5).model_copy(update={"evaluations": idle}).area == pytest.approx(0.275)
    run = run_folder(tmp_path, "a", rows(steps=2, accuracy=0.6, entropy=None, sampled=0))
    assert summarise(replace(run, seed=3), threads=1).entropy is None
