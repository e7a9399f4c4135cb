"""Gradients, weights, figures and entropies are those of one process, whatever the ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from srft.config import Config
from srft.policy.exchange import assignment
from srft.policy.parallel import ALONE
from tests.ranks import results_of_ranks
from tests.trainer.layout_ranks import LAYOUTS, RUNS, every_run, is_run

# the first test waits for the runs of all worlds
pytestmark = pytest.mark.timeout(900)

# of the norm of the whole: fp32 adds up in another order; float64 shows that nothing else differs
GRADIENTS = {torch.float32: 2e-6, torch.float64: 1e-11}
WEIGHTS = {torch.float64: 1e-11}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every run, on one, two and four ranks."""
    own = Config.compute_dtype
    try:
        found = dict(every_run({1: ALONE}, LAYOUTS[1]))
    finally:
        Config.compute_dtype = own  # type: ignore[method-assign]
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found |= results_of_ranks("tests.trainer.layout_ranks", folder, ranks, seconds=600)[0]
    return found


def relative(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, all parameters together."""
    assert set(actual) == set(expected)
    squares = [((actual[n] - expected[n]).double().square().sum(), expected[n].double().square().sum()) for n in actual]
    return float((sum(d for d, _ in squares) / sum(e for _, e in squares)) ** 0.5)


COMPARED = [
    pytest.param(ranks, layout, case, dtype, id=f"{layout}-{case}-{dtype}")
    for ranks, layouts in LAYOUTS.items()
    for layout in layouts
    for case, dtype in RUNS
    if layout != "1x1" and is_run(layout, case, dtype)
]


@pytest.mark.parametrize(("ranks", "layout", "case", "dtype"), COMPARED)
def test_the_layout_changes_nothing(
    runs: dict[str, Any], ranks: int, layout: str, case: str, dtype: torch.dtype
) -> None:
    """Against one rank and one micro-batch."""
    gold, found = runs[f"1x1/{case}/{dtype}"], runs[f"{layout}/{case}/{dtype}"]
    assert gold["micro_batches"] == 1
    if case == "token" and layout.endswith(tuple("0123456789")):
        assert layout.endswith(f"{ranks}x{found['micro_batches']}")
    assert relative(found["gradients"], gold["gradients"]) <= GRADIENTS[dtype]
    assert found["loss"] == pytest.approx(gold["loss"], rel=1e-5)
    # which prompts are computed once is of the layout
    shared = [one["figures"].pop("tokens/shared", 0) for one in (found, gold)]
    assert (shared[0] > 0) == (layout == "shared prompts")
    if dtype in WEIGHTS:
        assert relative(found["weights"], gold["weights"]) <= WEIGHTS[dtype]
        assert found["figures"] == pytest.approx(gold["figures"], rel=1e-6, abs=1e-9)
        assert found["entropies"] == pytest.approx(gold["entropies"], rel=1e-6)


def test_every_rank_has_about_as_many_tokens() -> None:
    """The longest go first, so that ranks differ by no more than one response; what need not move stays."""
    lengths = [[900, 20, 30], [10] * 40, [], [500, 400]]
    chosen = assignment(lengths)
    loads = [0] * 4
    for of_rank, to in zip(lengths, chosen, strict=True):
        for tokens, rank in zip(of_rank, to, strict=True):
            loads[rank] += tokens
    assert loads == [900, 430, 420, 500]
    assert chosen[0][0] == 0 and assignment([[5], [5]]) == [[0], [1]]
