from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import device, table
from benchmarks.heads import DTYPES
from benchmarks.options import OPTIONS, QUICK, specs
from benchmarks.progress import Progress
from benchmarks.variants import variants

FOUND = pytest.StashKey[dict]()
PROGRESS = pytest.StashKey[Progress]()


def _options(config) -> dict[str, str]:
    return {option: config.getoption("head_" + option.replace("-", "_")) for option in OPTIONS}


def pytest_addoption(parser):
    group = parser.getgroup("heads", "loss heads")
    for option, (default, text) in OPTIONS.items():
        given = f"; here by default {QUICK[option]}" if option in QUICK else ""
        group.addoption(f"--head-{option}", default=QUICK.get(option, default), help=text + given)
    group.addoption("--head-out", type=Path, help="JSON to write; default: a dated name in results/")


def _through_capture(config) -> Callable[[str], None]:
    """Prints a line at once, whatever pytest withholds of a test's output."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            print(text, file=sys.stdout, flush=True)

    return say


def pytest_configure(config):
    try:
        config.stash[PROGRESS] = Progress(float(config.getoption("head_minutes")), _through_capture(config))
    except ValueError as error:
        raise pytest.UsageError(f"--head-minutes: {error}") from error


def pytest_collect_file(file_path, parent):
    # files named on the command line are collected by pytest itself
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    if "variant" not in metafunc.fixturenames:
        return
    config = metafunc.config
    try:
        wanted = specs(_options(config))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    found = []
    for spec in wanted:
        pairs = [("products", "chunked"), ("products", "unchunked")]
        for case in spec.cases:
            names = variants(case, DTYPES[spec.dtype], spec.device, spec.only, config.stash[PROGRESS].say)
            pairs += [(case, name) for name in names]
        found += [(spec.name, spec.tokens, *pair) for pair in pairs]
    ids = [f"{name}-N{tokens}-{case}-{variant}" for name, tokens, case, variant in found]
    metafunc.parametrize(("head", "tokens", "case", "variant"), found, ids=ids)


def pytest_collection_modifyitems(items):
    # pytest-benchmark 5.2.3 reads Node._nodeid, which pytest 9.2.0 no longer has
    for item in items:
        if not hasattr(item, "_nodeid"):
            item._nodeid = item.nodeid


@pytest.fixture(scope="session")
def progress(request) -> Progress:
    """Lines on what is being measured."""
    return request.config.stash[PROGRESS]


@pytest.fixture(scope="session")
def results(request) -> dict:
    """Facts of this run and its tables, as written to results/ after every step."""
    options = _options(request.config)
    # without times there is nothing to hand to pytest-benchmark
    options["what"] = ",".join(dict.fromkeys(["time", *options["what"].split(",")]))
    found = {**device.facts(specs(options)[0].device), "command": options, "tables": []}
    request.config.stash[FOUND] = found
    return found


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(FOUND, None)
    if found and found["tables"]:
        path = config.getoption("head_out") or table.result_path(found)
        table.write(found, path)
        terminalreporter.section("loss heads")
        terminalreporter.write_line(table.render(found))
        terminalreporter.write_line(f"\nwritten to {path}")
