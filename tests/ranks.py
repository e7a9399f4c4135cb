"""Gloo ranks, each a process of its own on this machine."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from tests.forks import in_children, run_forked


def results_of_two_ranks(module: str, folder: Path) -> list[Any]:
    """As ``results_of_ranks`` for two."""
    return results_of_ranks(module, folder, 2)


def results_of_ranks(module: str, folder: Path, ranks: int, seconds: int = 280) -> list[Any]:
    """What ``rank_main(rank, folder)`` of a test module saves as rank0.pt, rank1.pt, ...; no process is left.

    Args:
        module: Its name, such as tests.kernels.test_vocab_parallel.
        folder: An empty folder, which also holds the store where the ranks meet.
        ranks: How many; each finds the number in its environment as WORLD_SIZE.
        seconds: After which one that has not ended hangs.
    """
    environment = {**os.environ, "WORLD_SIZE": str(ranks)}
    status, _, said = run_forked("tests.ranks:run_ranks", [module, ranks, str(folder)], environment, seconds)
    assert status == 0, said
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def run_ranks(module: str, ranks: int, folder: str) -> None:
    """Run ``rank_main(rank, folder)`` of a module in a child for each rank.

    Raises:
        SystemExit: With the statuses, where one is not 0.
    """
    main = importlib.import_module(module).rank_main
    in_children(lambda rank: main(rank, Path(folder)), ranks)
