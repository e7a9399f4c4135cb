"""The process of an engine, seen from the trainer: it answers JSON on two pipes and cannot outlive who started it."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from srft.engine.base import EngineError, EngineLost
from srft.engine.guarded import read_message, shared_memory_of, write_message

_CLOSE_PATIENCE_S = 10.0
_LOG_LINES_QUOTED = 20
_LAUNCHER_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Child:
    """A process group that ends with the trainer, and the folders that weights pass through.

    Args:
        python: Interpreter that runs ``vllm_worker``.
        log_path: File that takes everything it prints; its folder is made, earlier text is kept.
        environment: Its variables, from ``child_environment``.
        deadline_s: Seconds without a message in a call after which it counts as hung, > 0.

    Raises:
        ValueError: When the interpreter cannot be run.
    """

    def __init__(self, python: str, log_path: Path, environment: dict[str, str], deadline_s: float) -> None:
        self.log_path = log_path
        self._deadline_s = deadline_s
        self._owner_pid = os.getpid()
        # true until the process says hello
        self._busy = True
        self._closed = False
        self.folders = [
            Path(tempfile.mkdtemp(prefix="srft-weights-", dir=parent)) for parent in _transport_parents()
        ]
        """Where weights are put for it, the fastest first."""
        self._shared: set[Path] = set()
        self._process = self._spawn(python, environment)
        self.pid: int = self._process.pid
        """Process id, and process group."""
        atexit.register(self.close)

    def call(
        self,
        op: str,
        start_timeout_s: float | None = None,
        told: Callable[[Any], None] | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Ask for something and return the answer.

        Args:
            op: What.
            start_timeout_s: Seconds that the start of a model may take, instead of the deadline.
            told: Gets what signs of progress say, where they say more than that.
            **fields: What JSON can hold.

        Raises:
            EngineLost: When the process died, or hung and was killed.
            EngineError: When it says that it failed.
        """
        if self._closed:
            raise EngineError("this engine is closed; start another")
        if self._busy:
            raise EngineError("this engine is in a call, or one was interrupted; start another")
        # stays set when an interrupt breaks out, as the reply would then answer the next call
        self._busy = True
        try:
            write_message(self._request_fd, {"op": op, **fields}, self._deadline_s)
        except BrokenPipeError:
            self._fail_dead(op)
        except TimeoutError:
            self._fail_late(op, None)
        return self.receive(op, start_timeout_s, told)

    def receive(
        self, op: str, start_timeout_s: float | None = None, told: Callable[[Any], None] | None = None
    ) -> dict[str, Any]:
        """Return what it answers, passing over signs of progress.

        Args:
            op: What it was asked for.
            start_timeout_s: As ``call`` has it.
            told: As ``call`` has it.

        Raises:
            EngineLost: As ``call`` does.
            EngineError: As ``call`` does.
        """
        try:
            while "progress" in (reply := read_message(self._reply_fd, start_timeout_s or self._deadline_s)):
                if told is not None and reply["progress"]:
                    told(reply["progress"])
        except EOFError:
            self._fail_dead(op)
        except TimeoutError:
            self._fail_late(op, start_timeout_s)
        self._busy = False
        if "error" in reply:
            if op == "start":
                self.close()
            raise EngineError(self._explain(op, reply["error"]))
        return reply

    def note_shared_memory(self) -> None:
        """Remember what its processes have in common in memory, which stays when they are killed, for ``close``."""
        self._shared = shared_memory_of(self.pid)

    def close(self) -> None:
        """Ask the process to end, then kill its whole group; safe to call twice."""
        # a fork of the trainer runs its own exit handlers, and must leave the engine to the trainer
        if self._closed or os.getpid() != self._owner_pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not self._busy:
            try:
                write_message(self._request_fd, {"op": "close"}, _CLOSE_PATIENCE_S)
                self._wait_unreaped(_CLOSE_PATIENCE_S)
            except (BrokenPipeError, TimeoutError):
                pass
        # not reaped yet, so the id of the group cannot have passed to anybody else
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        os.close(self._request_fd)
        os.close(self._reply_fd)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for path in self._shared:
            path.unlink(missing_ok=True)

    def _spawn(self, python: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        child_request_fd, self._request_fd = os.pipe()
        self._reply_fd, child_reply_fd = os.pipe()
        # a long request does not fit into the pipe, and one that hangs never reads the rest
        os.set_blocking(self._request_fd, False)
        # the kernel ties a child to the thread that made it, so only the main thread may ask for that
        parent_pid = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        # -P: this folder has files named like vllm and http, which must not be found as modules
        command = [python, "-P", str(Path(__file__).with_name("vllm_worker.py"))]
        command += [str(child_request_fd), str(child_reply_fd), str(parent_pid), *map(str, self.folders)]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    pass_fds=(child_request_fd, child_reply_fd),
                    start_new_session=True,
                )
            except OSError as error:
                for fd in (self._request_fd, self._reply_fd):
                    os.close(fd)
                for folder in self.folders:
                    shutil.rmtree(folder, ignore_errors=True)
                raise ValueError(f"python={python!r} cannot be run: {error}") from error
            finally:
                os.close(child_request_fd)
                os.close(child_reply_fd)
        return process

    def _fail_dead(self, op: str) -> NoReturn:
        # the pipe may close a moment before the exit status is there
        self._wait_unreaped(_CLOSE_PATIENCE_S)
        self.close()
        code = self._process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise EngineLost(self._explain(op, f"its process died ({how})"))

    def _fail_late(self, op: str, start_timeout_s: float | None) -> NoReturn:
        self.close()
        late = f"it made no progress for engine.deadline_s={self._deadline_s:g} s and was killed"
        reason = late if start_timeout_s is None else f"not ready after start_timeout_s={start_timeout_s:g} s"
        raise EngineLost(self._explain(op, reason)) from None

    def _explain(self, op: str, reason: str) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 64 * 1024))
            lines = log.read().decode(errors="replace").splitlines()[-_LOG_LINES_QUOTED:]
        return f"vLLM failed in {op}: {reason}\nlast lines of {self.log_path}:\n" + "\n".join(lines)

    def _wait_unreaped(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < deadline and not os.waitid(os.P_PID, self.pid, flags):
            time.sleep(0.02)


def child_environment(num_threads: int | None, visible_devices: str | None) -> dict[str, str]:
    """Return this process's environment with what an engine needs, and without what makes a rank.

    Args:
        num_threads: OMP_NUM_THREADS of the process; None is that of the environment, else half the cores.
        visible_devices: CUDA_VISIBLE_DEVICES of the process; None inherits it.
    """
    # a launcher's variables would make vLLM join the trainer's process group
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    if visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices
    defaults = {
        # tiny models lose most of their speed to waiting threads, and the trainer wants cores too
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return {**defaults, **environment}


def _transport_parents() -> list[str]:
    return [*(["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []), tempfile.gettempdir()]
