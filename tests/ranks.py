"""Gloo ranks, each a process of its own on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


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
    command = f"import sys, pathlib; from {module} import rank_main; "
    command += "rank_main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    workers = [
        subprocess.Popen([sys.executable, "-c", command, str(rank), str(folder)], env=environment, cwd=ROOT)
        for rank in range(ranks)
    ]
    try:
        assert [worker.wait(timeout=seconds) for worker in workers] == [0] * ranks
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
