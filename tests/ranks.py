"""Gloo ranks, each a process of its own on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
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
    command = f"import sys, pathlib; from {module} import rank_main; from tests.ranks import run_forked; "
    command += f"run_forked(rank_main, {ranks}, pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    parent = subprocess.Popen(
        [sys.executable, "-c", command, str(folder)], env=environment, cwd=ROOT, start_new_session=True
    )
    try:
        assert parent.wait(timeout=seconds) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def run_forked(main: Callable[[int, Path], None], ranks: int, folder: Path) -> None:
    """Run ``main(rank, folder)`` in a child for each rank, which need not import again what this process has.

    Raises:
        SystemExit: With the statuses that are not 0.
    """
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            main(rank, folder)
            return
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        sys.exit(f"the ranks ended with {statuses}")
