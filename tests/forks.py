"""Calls in processes of their own, forks of one that has imported torch, transformers and the trainer."""

from __future__ import annotations

import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
_server: subprocess.Popen[str] | None = None


def run_forked(target: str, arguments: list[Any], environment: dict[str, str], seconds: float) -> tuple[int, str, str]:
    """Call a function in a new process, whose group ends with it, and return its status and what it printed.

    What it imports may have been imported before, in the environment of an earlier call.

    Args:
        target: Module and function, such as tests.ranks:run_ranks.
        arguments: What JSON can hold.
        environment: Its variables.
        seconds: After which it hangs, and is killed.

    Returns:
        Exit status, negative for a signal, what it wrote to stdout, and to stderr.
    """
    server = _started()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        server.stdin.write(json.dumps([target, arguments, environment, *map(str, said)]) + "\n")
        server.stdin.flush()
        group, hangs = int(server.stdout.readline()), True
        try:
            hangs = not select.select([server.stdout], [], [], seconds)[0]
        finally:
            if hangs:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            status = int(server.stdout.readline())
        out, err = (path.read_text() for path in said)
    assert not hangs, f"{target} has not ended after {seconds} s:\n{err}"
    return status, out, err


def _started() -> subprocess.Popen[str]:
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-c", "from tests.forks import _serve; _serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return _server


def _serve() -> None:
    """Fork for each line until there is no one who could write another."""
    importlib.import_module("pytest")
    importlib.import_module("torch.distributed.fsdp")
    importlib.import_module("transformers.models.qwen2.modeling_qwen2")
    importlib.import_module("srft.train")
    # every child begins with these
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _call(*json.loads(line))
        print(child, flush=True)
        # until it is reaped its number is its group's
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _call(target: str, arguments: list[Any], environment: dict[str, str], out: str, err: str) -> NoReturn:
    """What is asked for, in a session of its own, with what it prints in files."""
    os.setsid()
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    module, _, name = target.partition(":")
    _end_with(lambda: getattr(importlib.import_module(module), name)(*arguments))


def in_children(call: Callable[[int], None], count: int) -> None:
    """Call ``call(number)`` in so many children of this process at once, and wait for them.

    Raises:
        SystemExit: With the statuses, where one is not 0.
    """
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            _end_with(partial(call, number))
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        sys.exit(f"the children ended with {statuses}")


def _end_with(call: Callable[[], None]) -> NoReturn:
    """Call it, and end this process as an interpreter would."""
    status = 0
    try:
        call()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
