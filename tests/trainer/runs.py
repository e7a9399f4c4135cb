"""What the end-to-end tests share: very small runs, in this process or in one of their own, and what they leave."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from srft.config import Config
from srft.options import load_config
from srft.train import fit, main
from tests.forks import in_children, run_forked

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"

SMALL = {
    "train.device": "cpu",
    "train.steps": 2,
    "train.prompts_per_step": 4,
    "train.rollouts_per_prompt": 3,
    "train.eval_every": 1,
    "train.save_every": 1,
    "train.tokens_per_microbatch": 256,
    # which take longer to draw than the steps
    "train.page": False,
    "data.limit": 64,
    "data.eval_limit": 8,
    "data.max_prompt_tokens": 32,
    "rollout.max_new_tokens": 32,
    "engine.kind": "hf",
    "model.tiny.hidden_size": 32,
    "model.tiny.num_layers": 1,
    "model.tiny.num_heads": 2,
    "model.tiny.intermediate_size": 64,
    "model.warm_start.max_steps": 0,
    "reward.workers": 1,
}


def arguments(folder: Path, **changes: object) -> list[str]:
    """Command-line words of a small run under ``folder``; in ``changes`` two underscores stand for a dot."""
    settings = {"name": "run", "runs_dir": folder / "runs", "cache_dir": folder / "cache", **SMALL}
    if changes.get("data__train", "chain") == "chain":
        settings["data.task.max_ops"] = 3
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    ]


def small_config(folder: Path, **changes: object) -> Config:
    return load_config(arguments(folder, **changes))


def train(folder: Path, **changes: object) -> Path:
    """Train in this process with one thread, as such small runs want and as ``train_process`` does.

    Returns the folder of the run, the first of its name unless another existed.
    """
    config = small_config(folder, **changes)
    threads = torch.get_num_threads()
    # the order of sums depends on it, so equal runs need an equal number
    torch.set_num_threads(1)
    try:
        fit(config)
    finally:
        torch.set_num_threads(threads)
    return config.run_dir


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "srft.train", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train_process(words: list[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``python -m srft.train`` as a user does."""
    return subprocess.run(
        command(words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def train_forked(words: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """What ``train_process`` does, without the seconds of its imports; several ranks as torchrun starts them.

    What happens before the imports is left out, and the number of threads is 1.
    """
    status, out, err = run_forked("tests.trainer.runs:train_here", [words, ranks], environment(), seconds=240)
    return subprocess.CompletedProcess(words, status, out, err)


def train_here(words: list[str], ranks: int) -> None:
    """Train with a command line in this process, or in a child for each rank."""
    sys.argv = ["srft.train", *words]
    if ranks == 1:
        main()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def train_rank(rank: int) -> None:
        os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        main()

    in_children(train_rank, ranks)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


OF_A_LAYOUT = ("canary/", "tokens/shared")
"""How metrics begin that differ with ranks or micro-batches: an engine each, and where a prompt met its sequences."""


def comparable_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what a clock said."""
    rows = read_lines(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in rows]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def assert_same_run(run: Path, expected: Path) -> None:
    """The two have the same metrics, samples and model, and the same last checkpoint, to the last bit."""
    assert comparable_rows(run) == comparable_rows(expected)
    assert read_lines(run / "samples.jsonl") == read_lines(expected / "samples.jsonl")
    assert weights(run) == weights(expected)
    last = max((expected / "checkpoints").iterdir())
    for name in ("optimizer.safetensors", "model.safetensors"):
        assert (run / "checkpoints" / last.name / name).read_bytes() == (last / name).read_bytes(), name


def during_call(
    patch: pytest.MonkeyPatch, where: str, call: int, entered: Callable[[], AbstractContextManager[None]]
) -> None:
    """Enter ``entered()`` for the ``call``-th call of the function or method at ``where``, a dotted path."""
    module, _, name = where.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module(module.rpartition(".")[0]), module.rpartition(".")[2])
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        with entered() if calls == call else nullcontext():
            return original(*args, **kwargs)

    patch.setattr(owner, name, counted)


def kill_runs(runs: list[tuple[str, int, list[str]]]) -> None:
    """Train with each of these command lines and send SIGKILL at the n-th call of a function, a dotted path."""
    status, _, said = run_forked("tests.trainer.runs:train_until_killed", [runs], environment(), seconds=240)
    assert status == 0, said


def train_until_killed(runs: list[tuple[str, int, list[str]]]) -> None:
    """Train as ``kill_runs`` says, each in a fork of this process.

    Raises:
        SystemExit: Where one was not killed.
    """
    statuses = set()
    for where, call, words in runs:
        if child := os.fork():
            statuses.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            continue
        during_call(pytest.MonkeyPatch(), where, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
        sys.argv[1:] = words
        main()
        os._exit(0)
    if statuses != {-signal.SIGKILL}:
        sys.exit(f"ended with {statuses}")
