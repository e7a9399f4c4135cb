"""Memory of one rank: what stands all the time, and what each moment of a step adds to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from srft.config import Config
from srft.engine.placement import ASLEEP_BYTES
from srft.planning.devices import Device
from srft.planning.models import ModelShape
from srft.planning.trace import BodyPasses, Held
from srft_kernels.head.chunks import VOCAB_TILE, chunk_sizes

_FP32 = 4
# a CUDA context with the libraries' workspaces, NCCL's buffers, and the share that an allocator loses to fragments
_CONTEXT, _NCCL, _FRAGMENTS = int(0.8 * 2**30), 2**30, 0.03
# what a vLLM process needs beside weights and cache: its activations, graphs and context
_ENGINE_OVERHEAD = 3 * 2**30
ENGINE_SHARE = "engine, by its share of the device"
ENGINE_ASLEEP = "engine, asleep"
# what servers are taken to give their weights and cache of a device like the trainer's
_SERVERS_SHARE = 0.9
OVERHEAD = "context, NCCL, fragments"
_ROOT, _BLOCKS = "gathered: embedding, norm, head", "gathered: two blocks, fp32"


@dataclass(frozen=True)
class Layout:
    """How a run lies on its devices.

    Args:
        device: Each of them.
        tokens: Of a micro-batch.
        ranks: How many.
        shard: Ranks that share one copy of weights, gradients and moments.
        checkpointing: Recompute activations in backward.
        offload: Keep that copy in the memory of the host.
        engine_ranks: Ranks that share one engine; devices of one, where it has its own.
        engines_apart: Engines on devices of their own, which are beside the ranks'; 0: on the ranks'.
    """

    device: Device
    tokens: int
    ranks: int = 1
    shard: int = 1
    checkpointing: bool = False
    offload: bool = False
    engine_ranks: int = 1
    engines_apart: int = 0

    @property
    def gathers(self) -> bool:
        """Parameters are brought together, or from the host, before they are used."""
        return self.ranks > 1 or self.offload


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Args:
        standing: What is there all the time, by part.
        moments: What each moment of a step adds, by part.
        host: Bytes in the memory of the host that are this rank's.
        engine_cache: Bytes for the engine's keys and values; below 0 where not even its weights fit.
        device: Where.
    """

    standing: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: int
    engine_cache: int
    device: Device

    @property
    def worst(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at that moment, all parts together."""
        return self.at(self.worst)

    @property
    def fits(self) -> bool:
        """Whether the device holds it, and the engine has a cache."""
        return self.trains and self.engine_cache > 0

    @property
    def trains(self) -> bool:
        """Whether the device and its host hold what training needs."""
        return self.peak <= self.device.memory and (not self.host or self.host <= self.device.host)

    @property
    def shown(self) -> str:
        """The moment whose parts tell most: the worst, but of training where an engine sleeps meanwhile."""
        training = {name: parts for name, parts in self.moments.items() if name != "rollout"}
        return replace(self, moments=training).worst if ENGINE_ASLEEP in self.standing else self.worst

    def at(self, moment: str) -> int:
        """Return the bytes of all parts together at a moment.

        Args:
            moment: Its name.
        """
        return sum(self.standing.values()) + sum(self.moments[moment].values())

    def parts(self, moment: str | None = None) -> dict[str, int]:
        """Return every part at a moment, those of no size left out.

        Args:
            moment: Its name; None takes the worst.
        """
        return {name: size for name, size in (self.standing | self.moments[moment or self.worst]).items() if size}


def plan_memory(
    shape: ModelShape,
    passes: BodyPasses,
    config: Config,
    layout: Layout,
    rows: int,
    teacher: ModelShape | None = None,
) -> Memory:
    """Add up what one rank holds.

    Args:
        shape: Of the model.
        passes: Of its body, from ``trace.trace_body`` for the layout's tokens and checkpointing.
        config: The whole configuration.
        layout: How the run lies on its devices.
        rows: Tokens of a micro-batch that are counted in the loss.
        teacher: The model that is held beside the policy to teach it, if one is.
    """
    standing = {
        "weights, fp32": _FP32 * shape.parameters // layout.shard,
        "gradients, fp32": _FP32 * shape.trained // layout.shard,
        "AdamW's moments, fp32": 2 * _FP32 * shape.trained // layout.shard,
    }
    if config.train.rollouts_only:  # nothing but the policy is held, and nothing computed but rollouts
        standing, teacher = {"weights, fp32": standing["weights, fp32"]}, None
    # under adapters the policy is its own; a model of model.reference is taken to be as large
    elif config.wants_reference and not config.model.lora.rank:
        standing["reference, fp32"] = _FP32 * shape.parameters // layout.shard
    if teacher is not None:
        standing["teacher, fp32"] = _FP32 * teacher.parameters // layout.shard
    host = 0
    if layout.offload:
        host, standing = sum(standing.values()), {}
    engine, sampling, cache = _engine(shape, config, layout)
    standing |= engine
    if layout.device.is_gpu:
        standing[OVERHEAD] = int(
            _CONTEXT + (layout.ranks > 1) * _NCCL + _FRAGMENTS * layout.device.memory
        )
    moments = {"rollout": {}} if config.train.rollouts_only else _moments(shape, passes, config, layout, rows)
    if teacher is not None:
        moments["forward of the teacher"] = _teaching(teacher, config, layout, rows)
    if sampling:
        moments["rollout"] = sampling
    if samples(config) and not uses_vllm(config, layout.device) and config.engine.kind != "http":
        sequences = min(config.engine.max_batch, config.train.prompts_per_step * config.train.rollouts_per_prompt)
        wide = config.engine_dtype.itemsize / 2
        moments["rollout"] = {"keys and values": int(sequences * config.longest_sequence * shape.kv_bytes * wide)}
    return Memory(standing, moments, host, cache, layout.device)


def uses_vllm(config: Config, device: Device) -> bool:
    """Say whether a run samples by vLLM on such a device, where it is installed.

    Args:
        config: The whole configuration.
        device: One of the run's.
    """
    return config.engine.kind == "vllm" or (config.engine.kind == "auto" and device.is_gpu)


def samples(config: Config) -> bool:
    """Say whether a run's rollouts are sampled while it trains, neither absent nor recorded.

    Args:
        config: The whole configuration.
    """
    return config.method.needs_rollouts and not config.train.replay


def sleeps(config: Config, layout: Layout) -> bool:
    """Say whether the engine gives its memory back while training goes on.

    Args:
        config: The whole configuration.
        layout: How the run lies on its devices.
    """
    if not uses_vllm(config, layout.device) or layout.engines_apart or not layout.device.is_gpu:
        return False
    takes_turns = not config.rollout.steps_ahead and not config.train.rollouts_only
    return takes_turns if config.engine.sleep is None else config.engine.sleep


def num_engines(config: Config, layout: Layout) -> float:
    """Return how many engines divide what all ranks ask.

    Args:
        config: The whole configuration.
        layout: How the run lies on its devices.
    """
    if config.engine.kind == "http":
        return len(config.engine.urls)
    return layout.engines_apart or layout.ranks / layout.engine_ranks


def splits_head(config: Config, layout: Layout) -> bool:
    """Say whether each rank keeps its rows of the head, and hidden states are gathered instead.

    Args:
        config: The whole configuration.
        layout: How the run lies on its devices; the head is split where one copy is sharded over all ranks.
    """
    return config.train.vocab_parallel and 1 < layout.ranks == layout.shard


def _engine(shape: ModelShape, config: Config, layout: Layout) -> tuple[dict[str, int], dict[str, int], int]:
    """What the engine takes of each device all the time and while it samples, and what is left for keys and values."""
    weights, on_servers = shape.parameters * config.engine_dtype.itemsize, config.engine.kind == "http"
    if not samples(config):
        return {}, {}, 1
    if not on_servers and not uses_vllm(config, layout.device):
        return {"engine's copy of the weights": weights}, {}, 1
    if not layout.device.is_gpu:
        return {}, {}, 1  # processes of their own, which have a memory of their own
    share = int((_SERVERS_SHARE if on_servers else config.engine.gpu_memory_utilization) * layout.device.memory)
    cache = share - weights // (1 if on_servers else layout.engine_ranks) - _ENGINE_OVERHEAD
    if on_servers:
        return {}, {}, max(1, cache)  # whether they fit is not the trainer's to say
    if layout.engines_apart:
        return {}, {}, cache
    if sleeps(config, layout):
        return {ENGINE_ASLEEP: ASLEEP_BYTES}, {ENGINE_SHARE: max(0, share - ASLEEP_BYTES)}, cache
    return {ENGINE_SHARE: share}, {}, cache


def _moments(
    shape: ModelShape, passes: BodyPasses, config: Config, layout: Layout, rows: int
) -> dict[str, dict[str, int]]:
    gathers, split = layout.gathers, splits_head(config, layout)
    dhead = _FP32 * shape.head * shape.head_trained * (not split)
    gathered_root = gathers * _FP32 * (shape.root - split * shape.head)
    gathered_blocks = gathers * 2 * _FP32 * shape.block
    # a tied gradient waits for its other half, a sharded one for the end of the pass
    waiting = dhead if shape.tied or gathers else 0
    # gradients of a block in whole, and what they are reduced in
    unreduced = gathers * 2 * _FP32 * shape.trained_block

    def body(held: Held) -> dict[str, int]:
        return {"activations": held.activations, f"weights in {config.model.compute_dtype}": held.copies}

    head_now, head_after = _head(shape, config, layout, rows, split=split)
    root = {_ROOT: gathered_root}
    return {
        "forward": body(passes.forward) | root | {_BLOCKS: gathered_blocks},
        "loss": body(passes.between) | root | head_now,
        "backward of the head": body(passes.between) | root | head_after,
        "backward of the blocks": body(passes.backward) | root
        | {_BLOCKS: gathered_blocks, "gradients before they are reduced": unreduced, "gradient of the head": waiting},
        "backward of the embedding": body(passes.embedding) | root | {"gradient of the head": waiting},
        "optimizer": {"AdamW's temporaries": _optimizer(shape, layout)},
    }  # fmt: skip


def _teaching(teacher: ModelShape, config: Config, layout: Layout, rows: int) -> dict[str, int]:
    """What scoring adds to the weights of a teacher, whose head no rank keeps a part of; activations are few."""
    scored, _ = _head(replace(teacher, head_trained=False), config, layout, rows, split=False)
    whole = layout.gathers * _FP32
    return {_ROOT: whole * teacher.root, _BLOCKS: whole * 2 * teacher.block} | scored


def _head(
    shape: ModelShape, config: Config, layout: Layout, rows: int, *, split: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """What the fused head holds while it computes the loss, and while its gradients are rounded and handed on."""
    dtype, on_gpu = config.compute_dtype, layout.device.is_gpu
    parts = layout.ranks if split else 1
    # each rank has its words for the tokens of all
    vocab, rows, head = -(-shape.vocab // parts), rows * parts, shape.head // parts
    sizes = chunk_sizes(
        vocab, shape.hidden, torch.float32, dtype, together=getattr(config.method, "scope", "token") != "token",
        in_gpu_memory=on_gpu, on_cpu=not on_gpu,
    )  # fmt: skip
    workspace = min(rows, sizes.scores) * vocab * _FP32
    if sizes.gathered:
        workspace += min(rows, sizes.products) * vocab * dtype.itemsize
    hidden = rows * shape.hidden * (dtype.itemsize + _FP32)
    copy, sum_ = 0, _FP32 * head * shape.head_trained
    if dtype != torch.float32:
        copy = head * dtype.itemsize
        if not on_gpu:  # 16-bit factors are made fp32, some columns at a time
            workspace += VOCAB_TILE * (2 * shape.hidden + min(rows, sizes.scores)) * _FP32
    now = {"head: workspace": workspace, "head: hidden states and their gradient": hidden,
           "head: weight and its gradient": copy + sum_}  # fmt: skip
    # the rounded gradient lies in the memory of the sum; beside it the one in fp32 again
    after = {"head: hidden states and their gradient": hidden,
             "head: weight and its gradient": copy + sum_ * (1 + (dtype != torch.float32))}  # fmt: skip
    return now, after


def _optimizer(shape: ModelShape, layout: Layout) -> int:
    if layout.device.is_gpu and not layout.gathers:
        return _FP32 * shape.trained  # the roots of all second moments at once
    return 2 * _FP32 * shape.largest // layout.shard
