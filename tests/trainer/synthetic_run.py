"""Rows and samples like those of a run on demonstrations and rollouts."""

from __future__ import annotations

import sys
from pathlib import Path

from srft.methods.srft import Method
from srft.record.log import RunLog
from srft.report.build import build_report


def open_log(
    run_dir: Path, total_steps: int = 4, resume_step: int | None = None, quiet: bool = True
) -> RunLog:
    return RunLog(
        run_dir, total_steps=total_steps, config_text='[method]\nname = "srft"\n', title="a run",
        resume_step=resume_step, report=build_report, curves=Method.curves, quiet=quiet,
    )  # fmt: skip


def srft_row(step: int) -> dict[str, float]:
    """A row with every key a run on demonstrations and rollouts records."""
    row: dict[str, float] = {
        "step": step,
        "reward/mean": 0.1 * step,
        "entropy/rollout": 1.0,
        "entropy/demo": 0.5,
    }
    row |= {"weight/sft": 0.2, "weight/rl": 0.3, "loss/total": 0.4, "grad_norm": 1.0, "tokens/step": 1000}
    for name in ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative"):
        row |= {f"loss/{name}": 0.1, f"loss/{name}_unweighted": -0.2}
    row |= {f"time/{name}": 1.0 for name in ("rollout", "reward", "train", "sync")} | {"time/step": 4.5}
    row |= {"groups/all_right": 0.1, "groups/all_wrong": 0.2, "length/mean": 30.0, "length/truncated": 0.0}
    return row


def scored(row: dict[str, float]) -> dict[str, float]:
    return row | {"eval/accuracy": 0.5, "eval/ci_low": 0.4, "eval/ci_high": 0.6, "time/eval": 2.0}


def sample(**changes: object) -> dict[str, object]:
    row = {"prompt": "1 + 1 =", "completion": "2", "demo": False, "reward": 1.0, "status": "ok"}
    return row | {"advantage": 0.5, "entropy": 0.3, "answer": "2"} | changes


def log_a_run(run_dir: Path) -> None:
    """Log 30 steps with all that reaches a terminal: sentences, rows, values that are not finite, a table."""
    with open_log(run_dir, total_steps=30, quiet=False) as log:
        log.say("[bold]plain[/bold] \x1b[31m sentence")
        for step in range(31):
            row = srft_row(step) | {"loss/total": float("nan") if step in (3, 4) else 1.0}
            log.metrics(scored(row) if step % 10 == 0 else row)
        log.finish({"checkpoint": "somewhere"})


if __name__ == "__main__":
    log_a_run(Path(sys.argv[1]))
    print("The process goes on.", flush=True)
