from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import table
from benchmarks.variants import CASES, DTYPES, SEQUENCE

RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("heads", "loss heads")
    group.addoption("--head-cases", default="srft,grpo", help=f"comma-separated, of {', '.join(CASES)}")
    group.addoption("--head-dtype", default="fp32", choices=DTYPES)
    group.addoption("--head-tokens", type=int, default=2048, help=f"N, a multiple of {4 * SEQUENCE}")
    group.addoption("--head-rounds", type=int, default=3)


def pytest_collect_file(file_path, parent):
    # files named on the command line are collected by pytest itself
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    if {"case", "name"} <= set(metafunc.fixturenames):
        cases = metafunc.config.getoption("head_cases").split(",")
        pairs = [(case, name) for case in cases for name in CASES[case]]
        pairs = [("products", "unchunked"), ("products", "chunked"), *pairs]
        metafunc.parametrize(("case", "name"), pairs, ids=["-".join(pair) for pair in pairs])


def pytest_collection_modifyitems(items):
    # pytest-benchmark 5.2.3 reads Node._nodeid, which pytest 9.2.0 does not have
    for item in items:
        if not hasattr(item, "_nodeid"):
            item._nodeid = item.nodeid


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def _cpu_model() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


@pytest.fixture(scope="session")
def results(request) -> dict:
    """Facts of this run, to which the benchmark adds ``rows``; written and printed at the end."""
    options = request.config.option
    found = {
        "date": datetime.date.today().isoformat(),
        "device": {
            "cpu": _cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_kernels": bool(_git("status", "--porcelain", "--", "../srft_kernels")),
        "cases": options.head_cases.split(","),
        "dtype": options.head_dtype,
        "tokens": options.head_tokens,
        "rounds": options.head_rounds,
        "rows": [],
    }
    request.config.stash[RESULTS] = found
    return found


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(RESULTS, None)
    if not found or not found["rows"]:
        return
    device = re.sub(r"[^a-z0-9]+", "-", found["device"]["cpu"].lower()).strip("-")
    name = f"{found['date']}-{device}-{found['dtype']}-N{found['tokens']}-{'-'.join(found['cases'])}.json"
    path = table.RESULTS / name
    path.write_text(json.dumps(found, indent=1) + "\n")
    terminalreporter.section("loss heads")
    terminalreporter.write_line(table.render(found))
    terminalreporter.write_line(f"\nwritten to {path}")
