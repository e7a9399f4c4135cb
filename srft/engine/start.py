"""Where engines are started: an engine is its own file, a branch here, and its options in ``config.EngineConfig``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from srft.engine.base import Engine
from srft.engine.hf import HfEngine
from srft.policy.checkpoint import export_model
from srft.policy.learner import Learner


def start_engine(learner: Learner, folder: Path) -> Engine:
    """Start the rollout engine of a run on the policy's current weights.

    Args:
        learner: Holds the policy.
        folder: For the engine's log and the model that it loads, where it has a process of its own.

    Raises:
        ValueError: When vLLM is asked for and not installed.
    """
    config, on_gpu = learner.config, learner.model.device.type == "cuda"
    kind = config.engine.kind
    if kind == "auto":
        kind = "vllm" if on_gpu and importlib.util.find_spec("vllm") else "hf"
    if kind == "hf":
        return start_in_process(learner, config.engine_dtype)
    from srft.engine.vllm import VllmEngine

    export_model(folder / "model", learner.model, learner.tokenizer)
    return VllmEngine(
        folder / "model",
        dtype=str(config.engine_dtype).removeprefix("torch."),
        max_model_len=config.longest_sequence,
        python=config.engine.python,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        log_path=folder / "vllm.log",
        tokenizer=learner.tokenizer if config.rollout.stop else None,
        seed=config.train.seed,
        trust_remote_code=config.model.trust_remote_code,
    )


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
