"""The command line of suites."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from srft.disk import WriteError, writing
from srft.experiments.findings import SUITE, read_findings
from srft.experiments.page import render
from srft.experiments.preview import preview
from srft.experiments.suite import describe_suite, find_suite, plan_runs, read_suite, suite_names
from srft.experiments.tables import make_tables, markdown
from srft.record.files import locked, write_atomically
from srft.report.table import on_terminal, plain
from srft.stop import ends_in_a_line

_EPILOG = """\
section.key=value is for every arm and wins over its own options; a recipe takes the place of what the suite's arms have
in common. Killed at any moment, the same command goes on: what has ended is not made again."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a suite, or report on one.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    parser = _parser()
    given = parser.parse_intermixed_args(argv)
    with ends_in_a_line(ValueError, WriteError):
        if given.list:
            _list()
            return
        if given.suite is None:
            parser.error("give a suite: its name, as --list has them, or path/to/suite.toml")
        out = given.out or Path("runs") / Path(given.suite).stem
        if given.report:
            _report(out)
        elif not _run(given, out):
            sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srft.experiments", description="Run the arms of a suite on the same seeds and compare them.",
        epilog=_EPILOG,
    )  # fmt: skip
    parser.add_argument("suite", nargs="?", help="name of a suite, or path/to/suite.toml")
    parser.add_argument("words", nargs="*", metavar="option", help="recipe.toml or section.key=value, for every arm")
    parser.add_argument("--seeds", type=_positive, default=5, help="seeds of each arm, from 0 (default: 5)")
    parser.add_argument("--jobs", type=_positive, help="runs at once (default: one a core, one where there is a GPU)")
    parser.add_argument("--out", type=Path, help="the suite's folder (default: runs/<suite>)")
    parser.add_argument("--report", action="store_true", help="make tables, figures and page from results alone")
    parser.add_argument("--list", action="store_true", help="name the suites")
    parser.add_argument("--dry-run", action="store_true", help="check every arm and show the runs")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _list() -> None:
    for name in suite_names():
        suite = read_suite(find_suite(name))
        print(f"{name:20s} {suite.title}: {len(suite.arms)} arms. {suite.question}")


def _run(given: argparse.Namespace, out: Path) -> bool:
    """Plan, run and report; whether every run is complete."""
    path = find_suite(given.suite)
    suite = read_suite(path)
    runs = plan_runs(suite, path, given.words, range(given.seeds), out)
    if given.dry_run:
        print(preview(suite, runs, out))
        return True
    # which imports all that a run needs, in seconds
    from srft.experiments.runner import make_runs

    with locked(out, f"another process runs a suite in {out}; wait for it, or set another --out"):
        write_atomically(out / SUITE, json.dumps(describe_suite(suite, runs), indent=1) + "\n")
        jobs = min(given.jobs or _default_jobs(), len(runs))
        results = make_runs(runs, out, jobs, max(1, _cores() // jobs))
    _report(out)
    return not any(result.error for result in results)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_jobs() -> int:
    # without this the question itself would begin work on the GPU, which no fork survives
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return 1 if torch.cuda.is_available() else _cores()


def _report(out: Path) -> None:
    findings = read_findings(out)
    tables = make_tables(findings)
    # here, so that nothing else waits for matplotlib
    from srft.experiments.figures import draw_figures

    write_atomically(out / "table.md", markdown(findings, tables))
    with writing(out / "figures"):
        figures = draw_figures(findings, out / "figures")
    write_atomically(out / "report.html", render(findings, tables, figures))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(plain(findings.title, style="bold"))
    for table in tables:
        console.print(on_terminal(table))
    for warning in findings.warnings:
        console.print(plain(f"Warning: {warning}"), soft_wrap=True)
    console.print(plain(str(out / "report.html")), soft_wrap=True)
