"""Where engines are started: an engine is its own file, a branch here, and its options in ``engine_config``."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from srft.config import Config
from srft.engine.base import Engine
from srft.engine.hf import HfEngine
from srft.engine.placement import ASLEEP_BYTES, Placement, place_engines
from srft.engine.shared import SharedEngine
from srft.policy.export import export_model
from srft.policy.learner import Learner
from srft.policy.parallel import World
from srft.policy.weights import whole_tensors

if TYPE_CHECKING:
    from srft.engine.vllm import VllmEngine


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
    overlaps = config.rollout.steps_ahead and not config.train.replay
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
        ValueError: When vLLM is asked for and not installed, as ``placement.place_engines``, or when a server of
            ``engine.urls`` does not fit the policy.
        EngineError: When it cannot be started.
    """
    config, world = learner.config, learner.world
    place = place_engines(config, world)
    start: Callable[[], Engine]
    if place.kind == "hf":
        return start_in_process(learner, config.engine_dtype)
    if place.kind == "http":
        start = partial(_meet_servers, learner, folder, count())
    else:
        export_model(folder / "model", learner.model, learner.tokenizer, world)
        threads = _threads(place.ranks_per_engine, threads) if world.size > 1 else threads
        start = partial(_start_vllm, learner, folder, threads, place)
    weights, most = partial(whole_tensors, learner.model, config.engine_dtype), config.engine.restarts
    lags = config.rollout.steps_ahead > 0
    return SharedEngine(
        start, weights, world.beside(), place.ranks_per_engine, most, sleeps=place.sleeps, keeps_weights=lags
    )


def engine_bytes(config: Config, model: PreTrainedModel, world: World) -> int:
    """Return what an engine takes of the memory of a rank's GPU while training goes on: vLLM's share, unless it sleeps,
    or a copy of the policy.

    On a CPU, of servers, and of engines on GPUs of their own, 0.

    Args:
        config: The whole configuration.
        model: The policy.
        world: The ranks.
    """
    place = place_engines(config, world)
    if not place.shares_device:
        return 0
    if place.sleeps:
        return ASLEEP_BYTES
    if place.kind == "vllm":
        return int(config.engine.gpu_memory_utilization * torch.cuda.mem_get_info(world.device)[1])
    return sum(p.numel() for p in model.parameters()) * config.engine_dtype.itemsize


def _start_vllm(learner: Learner, folder: Path, threads: int | None, place: Placement) -> Engine:
    """The engine of a group of ranks, or all of them, each with a log of its own."""
    from srft.engine.replicas import Replicas

    several = len(place.visible) > 1
    starts = []
    for number, visible in enumerate(place.visible):
        which = (str(learner.world.rank),) * (learner.world.rank > 0 or several) + (str(number),) * several
        log_path = folder / f"{'-'.join(('vllm', *which))}.log"
        starts.append(partial(_start_one, learner, folder, log_path, threads, visible, place.sleeps))
    return Replicas(starts) if several else starts[0]()


def _start_one(
    learner: Learner, folder: Path, log_path: Path, threads: int | None, visible: str | None, sleeps: bool
) -> VllmEngine:
    from srft.engine.vllm import VllmEngine

    config, spread = learner.config, learner.config.engine.tensor_parallel
    return VllmEngine(
        folder / "model",
        dtype=str(config.engine_dtype).removeprefix("torch."),
        max_model_len=config.longest_sequence,
        python=config.engine.python,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        num_threads=threads and max(1, threads // spread),
        visible_devices=visible,
        tensor_parallel=spread,
        sleeps=sleeps,
        log_path=log_path,
        tokenizer=learner.tokenizer if config.rollout.stop else None,
        seed=config.train.seed,
        trust_remote_code=config.model.trust_remote_code,
        deadline_s=config.engine.deadline_s,
    )


def _meet_servers(learner: Learner, folder: Path, starts: Iterator[int]) -> Engine:
    """The servers that run already; of those that were met before and lost, one is waited for."""
    from srft.engine.http import HttpEngine

    config, model = learner.config, learner.model
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
        patience_s=config.engine.deadline_s if next(starts) else 0.0,
    )


def _threads(sharing: int, share: int | None) -> int:
    """Threads of an engine that so many ranks ask: what each leaves it, or where all wait for its answers theirs."""
    return sharing * (share or int(os.environ.get("OMP_NUM_THREADS", "1")))


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
