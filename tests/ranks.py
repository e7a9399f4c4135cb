"""Gloo ranks, each a process of its own on this machine."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.forks import run_forked


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
        SystemExit: With the statuses that are not 0.
    """
    main = importlib.import_module(module).rank_main
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                main(rank, Path(folder))
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        sys.exit(f"the ranks ended with {statuses}")
