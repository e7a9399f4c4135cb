"""Where engines are started: an engine is its own file, a branch here, and its options in ``engine_config``."""

from __future__ import annotations

import importlib.util
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import torch
from transformers import PreTrainedModel

from srft.config import Config
from srft.engine.base import Engine
from srft.engine.hf import HfEngine
from srft.engine.shared import SharedEngine
from srft.policy.export import export_model
from srft.policy.learner import Learner
from srft.policy.parallel import World
from srft.policy.weights import whole_tensors


@contextmanager
def cores_divided(config: Config, world: World) -> Iterator[int | None]:
    """While entered, half of this process's threads are the engine's where it samples while the trainer computes.

    Two pools of threads that share cores are several times slower than one each of its own.

    Args:
        config: The whole configuration.
        world: The ranks.

    Yields:
        Threads of the engine; None where it and the trainer take turns, compute on a GPU, or it is on servers.
    """
    overlaps = config.rollout.max_lag and not config.train.replay
    if not overlaps or world.device.type == "cuda" or config.engine.kind == "http":
        yield None
        return
    every = torch.get_num_threads()
    engine = max(1, every // 2)
    torch.set_num_threads(max(1, every - engine))
    try:
        yield engine
    finally:
        torch.set_num_threads(every)


def start_engine(learner: Learner, folder: Path, threads: int | None = None) -> Engine:
    """Start the rollout engine of a run on the policy's current weights; every rank of the run must.

    Args:
        learner: Holds the policy.
        folder: For the engine's log and the model that it loads, where it has a process of its own. The first rank
            writes that model once for all of them.
        threads: This rank's share of those of an engine with a process of its own; None: the environment's
            OMP_NUM_THREADS, or in a run of one process half the cores.

    Raises:
        ValueError: When vLLM is asked for and not installed, ``engine.ranks_per_engine`` does not fit the ranks, or a
            server of ``engine.urls`` does not fit the policy.
        EngineError: When it cannot be started.
    """
    config, world = learner.config, learner.world
    kind = _kind(config, world)
    sharing = _ranks_per_engine(learner, kind)
    if kind == "hf":
        return start_in_process(learner, config.engine_dtype)
    if kind == "http":
        starts = count()
        start = lambda: _meet_servers(learner, folder, again=next(starts) > 0)  # noqa: E731
    else:
        export_model(folder / "model", learner.model, learner.tokenizer, world)
        threads = _threads(sharing, threads) if world.size > 1 else threads
        start = partial(_start_vllm, learner, folder, threads)
    weights = partial(whole_tensors, learner.model, config.engine_dtype)
    lags = config.rollout.max_lag > 0
    return SharedEngine(start, weights, world.beside(), sharing, config.engine.restarts, keeps_weights=lags)


def _kind(config: Config, world: World) -> str:
    if config.engine.kind != "auto":
        return config.engine.kind
    return "vllm" if world.device.type == "cuda" and importlib.util.find_spec("vllm") else "hf"


def engine_bytes(config: Config, model: PreTrainedModel, world: World) -> int:
    """Return what an engine will take of the memory of a rank's GPU: vLLM's share, or a copy of the policy.

    On a CPU, and of servers, 0.

    Args:
        config: The whole configuration.
        model: The policy.
        world: The ranks.
    """
    if world.device.type != "cuda" or config.engine.kind == "http":
        return 0
    if _kind(config, world) == "vllm":
        return int(config.engine.gpu_memory_utilization * torch.cuda.mem_get_info(world.device)[1])
    return sum(p.numel() for p in model.parameters()) * config.engine_dtype.itemsize


def _ranks_per_engine(learner: Learner, kind: str) -> int:
    """How many ranks share an engine.

    On a GPU each rank's own device has room for one of its own. Ranks on CPUs share those: a second vLLM there costs
    2.3 GB and was slower than one (two replicas on two cores).
    """
    asked, world = learner.config.engine.ranks_per_engine, learner.world
    if kind == "http":  # the first rank gives the servers their weights, and asks them for all
        return world.size
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    sharing = asked or (here if kind == "vllm" and world.device.type == "cpu" else 1)
    if kind == "hf" and sharing > 1:
        raise ValueError(
            f"engine.ranks_per_engine={sharing}, but engine.kind=hf samples in each rank's own process; leave it "
            "unset, or set engine.kind=vllm"
        )
    if here % sharing:
        raise ValueError(
            f"engine.ranks_per_engine={sharing} must divide the number of ranks on a machine, {here}; take 1 or {here}"
        )
    return sharing


def _start_vllm(learner: Learner, folder: Path, threads: int | None) -> Engine:
    from srft.engine.vllm import VllmEngine

    config, world = learner.config, learner.world
    return VllmEngine(
        folder / "model",
        dtype=str(config.engine_dtype).removeprefix("torch."),
        max_model_len=config.longest_sequence,
        python=config.engine.python,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        num_threads=threads,
        visible_devices=_own_device(world) if world.size > 1 else None,
        log_path=folder / (f"vllm-{world.rank}.log" if world.rank else "vllm.log"),
        tokenizer=learner.tokenizer if config.rollout.stop else None,
        seed=config.train.seed,
        trust_remote_code=config.model.trust_remote_code,
        deadline_s=config.engine.deadline_s,
    )


def _meet_servers(learner: Learner, folder: Path, again: bool) -> Engine:
    from srft.engine.http import HttpEngine

    config, model = learner.config, learner.model
    assert config.engine.weights_dir is not None
    text = model.config.get_text_config()
    # the name of this run's own folder: that of an earlier start of the run, which was killed, is removed with it
    place = f"{socket.gethostname()}:{folder.resolve()}"
    return HttpEngine(
        config.engine.urls,
        weights_dir=config.engine.weights_dir,
        owner=f"{config.name}-{zlib.crc32(place.encode()):08x}",
        model={
            # fully_shard puts a class of its own in front, named after the model's
            "architecture": type(model).__name__.removeprefix("FSDP"),
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
        },
        dtype=str(config.engine_dtype).removeprefix("torch."),
        max_model_len=config.longest_sequence,
        tokenizer=learner.tokenizer if config.rollout.stop else None,
        deadline_s=config.engine.deadline_s,
        patience_s=config.engine.deadline_s if again else 0.0,
    )


def _threads(sharing: int, share: int | None) -> int:
    """Threads of an engine that so many ranks ask: what each leaves it, or where all wait for its answers theirs."""
    return sharing * (share or int(os.environ.get("OMP_NUM_THREADS", "1")))


def _own_device(world: World) -> str | None:
    """The one GPU that this rank's engine may see, as CUDA_VISIBLE_DEVICES names it."""
    if world.device.type != "cuda":
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = world.device.index or 0
    return visible[index] if visible else str(index)


def start_in_process(learner: Learner, dtype: torch.dtype) -> HfEngine:
    """Start the engine that needs no process and no folder.

    Args:
        learner: Holds the policy.
        dtype: Precision of the engine's weights.
    """
    tokenizer = learner.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    max_batch = learner.config.engine.max_batch
    return HfEngine(learner.model, dtype=dtype, pad_token_id=pad, max_batch=max_batch, tokenizer=tokenizer)
