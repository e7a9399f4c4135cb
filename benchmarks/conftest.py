from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import device, measure, table
from benchmarks.variants import variants

FOUND = pytest.StashKey[dict]()


def _options(config) -> dict[str, str]:
    return {option: config.getoption("head_" + option.replace("-", "_")) for option in measure.OPTIONS}


def pytest_addoption(parser):
    group = parser.getgroup("heads", "loss heads")
    for option, (default, text) in measure.OPTIONS.items():
        group.addoption(f"--head-{option}", default=default, help=text)
    group.addoption("--head-out", type=Path, help="JSON to write; default: a dated name in results/")


def pytest_collect_file(file_path, parent):
    # files named on the command line are collected by pytest itself
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    if "variant" not in metafunc.fixturenames:
        return
    try:
        wanted = measure.specs(_options(metafunc.config))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    found = []
    for spec in wanted:
        pairs = [("products", "chunked"), ("products", "unchunked")]
        for case in spec.cases:
            names = variants(case, measure.DTYPES[spec.dtype], spec.device, spec.only)
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
def results(request) -> dict:
    """Facts of this run and its tables, as written to results/ after every step."""
    options = _options(request.config)
    # without times there is nothing to hand to pytest-benchmark
    options["what"] = ",".join(dict.fromkeys(["time", *options["what"].split(",")]))
    found = {**device.facts(measure.specs(options)[0].device), "command": options, "tables": []}
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
