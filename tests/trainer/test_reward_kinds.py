"""A verifier that cannot be found or loaded is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from srft.rewards.pool import RewardPool


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("exakt", "did you mean 'exact'"),
        ("judge", "choose from exact, numeric, countdown, math"),
        ("nowhere/rewards.py:score", "no such file nowhere/rewards.py"),
        ("{custom}:", "is not a function name"),
        ("{custom}", "unknown reward"),
    ],
)
def test_wrong_kind_fails_at_once(kind: str, message: str) -> None:
    """Names that cannot be right are refused before any process starts."""
    with pytest.raises(ValueError, match=message):
        RewardPool(kind.format(custom=__file__), 1, 1.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("grade", "has no function 'grade'; it has: graded, trouble"),
        ("not_a_function", "no function 'not_a_function'"),
    ],
)
def test_missing_function_fails_in_prewarm(tmp_path: Path, function: str, message: str) -> None:
    """A function that the file lacks is reported with those it has."""
    path = tmp_path / "rewards.py"
    path.write_text("def graded(c, a, r): ...\ndef trouble(c, a, r): ...\nnot_a_function = 3\n")
    with RewardPool(f"{path}:{function}", 2, 1.0) as pool, pytest.raises(ValueError, match=message):
        pool.prewarm()


@pytest.mark.parametrize(
    ("code", "message"),
    [("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
     ("def f(:", "SyntaxError"),
     ("import os\nos._exit(7)", "ended with exit code 7 while loading"),
     ("import sys\nsys.exit(2)", "exit code 2")],
    ids=["import", "syntax", "crash", "exit"],
)  # fmt: skip
def test_file_that_fails_to_import(tmp_path: Path, code: str, message: str) -> None:
    """Whatever goes wrong while loading reaches the caller, from prewarm and from score alike."""
    path = tmp_path / "broken.py"
    path.write_text(code)
    with RewardPool(f"{path}:f", 1, 1.0) as pool:
        for call in (pool.prewarm, lambda: pool.score([("", "", {})])):
            with pytest.raises(ValueError, match=message):
                call()


def test_custom_file_imports_its_neighbours(tmp_path: Path) -> None:
    """A verifier file may be split over modules that lie beside it."""
    (tmp_path / "beside_it.py").write_text("VALUE = 0.25\n")
    (tmp_path / "reward.py").write_text("from beside_it import VALUE\ndef f(c, a, r):\n    return VALUE\n")
    with RewardPool(f"{tmp_path}/reward.py:f", 1, 5.0) as pool:
        assert pool.score([("", "", {})])[0].value == 0.25


def test_unknown_reasoning_gym_task_fails_in_prewarm() -> None:
    """The nearest task is named."""
    pytest.importorskip("reasoning_gym")
    with (
        RewardPool("reasoning_gym:gdc", 1, 1.0) as pool,
        pytest.raises(ValueError, match="no task 'gdc'; nearest: gcd"),
    ):
        pool.prewarm()
