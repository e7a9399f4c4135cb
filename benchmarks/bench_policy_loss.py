"""Time, memory and error of loss heads, forward and backward, handed to pytest-benchmark."""

from __future__ import annotations

import math

import pytest

from benchmarks.measure import Table, of_ours
from benchmarks.options import specs

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="session")
def measured(results, progress) -> dict[tuple[str, int], dict]:
    """Every table, measured in one go before the first test: pytest-benchmark cannot interleave its tests."""
    found = {}
    for spec in specs(results["command"]):
        results["tables"].append({})
        place = len(results["tables"]) - 1

        def save(result: dict, place: int = place) -> None:
            results["tables"][place] = result

        found[spec.name, spec.tokens] = Table(spec, save, progress).run()
    return found


class _Replay:
    """A clock that a call moves on by the next measured time: pytest-benchmark then sees those times."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = _Replay()


@pytest.mark.benchmark(timer=CLOCK)
def test_loss_head(benchmark, measured, head, tokens, case, variant):
    """Hand over the interleaved times; the comparison with float64 has passed, and no time is asserted."""
    table = measured[head, tokens]
    rows = {(row["case"], row["name"]): row for row in table["rows"]}
    row = rows.get((case, variant), {"status": "skipped", "reason": table.get("skipped", "does not fit")})
    if of_ours({"name": variant, **row}):
        pytest.fail(row.get("traceback", row["reason"]), pytrace=False)
    if row["status"] != "ok":
        pytest.skip(f"{row['status']}: {row['reason']}")
    times = iter(row["seconds"])

    def replay():
        CLOCK.now += next(times)

    benchmark.group = f"{head}, N={tokens}, {table['dtype']}, forward and backward"
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "seconds"})
    benchmark.pedantic(replay, rounds=len(row["seconds"]))
    assert all(math.isfinite(x) and x > 0 for x in row["seconds"])
