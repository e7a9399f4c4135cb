"""Seconds of a step by part: the work of each, by the rates of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from srft.config import Config
from srft.planning.devices import GPUS_A_NODE, HOST_LINK, TRAFFIC_SHARE
from srft.planning.memory import Layout, num_engines, samples, splits_head, uses_vllm
from srft.planning.models import ModelShape
from srft.planning.trace import BodyPasses

# Share of the peak that the fused head reaches: 88.1 ms on one H100 for N=16,384, D=3,584, V=152,064, 6NDV FLOPs.
_HEAD_SHARE = 0.61
# Attention's products against the others'
_ATTENTION_SHARE = 0.6
# Bytes that AdamW reads and writes a parameter, one operation after another
_ADAMW_TRAFFIC = 60


@dataclass(frozen=True)
class Tokens:
    """Lengths that a plan counts with, in tokens.

    Args:
        prompt: Of a prompt.
        response: Of a completion or demonstration.
    """

    prompt: int
    response: int

    @property
    def sequence(self) -> int:
        """Of both."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Pace:
    """Seconds of a step.

    Args:
        rollout: Completions are sampled.
        train: Forward, backward, optimizer.
        sync: Weights go to the engine.
        gathering: Of the training's, what parameters and gradients take on the network, whether hidden or not.
        computing: Of the training's, what the device computes.
        micro_batches: Of a rank, in all updates of a step.
        idle: Share of the ranks' tokens that are missing in their last micro-batch.
    """

    rollout: float
    train: float
    sync: float
    gathering: float
    computing: float
    micro_batches: int
    idle: float
    at_once: bool = False
    """Rollouts and training go on beside each other."""

    @property
    def step(self) -> float:
        """All of them, or the longer of the two that go on at once."""
        turn = max(self.rollout, self.train) if self.at_once else self.rollout + self.train
        return turn + self.sync


def training_flops(shape: ModelShape, tokens: float, responses: float, squares: float) -> float:
    """Return the FLOPs that a forward and backward pass needs, recomputation not counted.

    Args:
        shape: Of the model.
        tokens: Of all sequences.
        responses: Those of them that the head computes.
        squares: Sum of the squared lengths of the sequences.
    """
    # scores and their sums over values, causal: half of S^2 each
    attention = 3 * 2 * shape.layers * shape.heads * shape.head_dim * squares
    body = 4 * shape.products + 2 * shape.trained_products
    return body * tokens + attention + _head_flops(shape) * responses


def _head_flops(shape: ModelShape) -> int:
    return (6 if shape.head_trained else 4) * shape.head


def plan_pace(
    shape: ModelShape,
    passes: BodyPasses,
    config: Config,
    layout: Layout,
    lengths: Tokens,
    cache: int,
    sequences: float | None = None,
    teacher: ModelShape | None = None,
) -> Pace:
    """Estimate the seconds of a step.

    Args:
        shape: Of the model.
        passes: Of its body, for the layout's tokens and checkpointing.
        config: The whole configuration.
        layout: How the run lies on its devices.
        lengths: Expected, not the longest.
        cache: Bytes for the engine's keys and values.
        sequences: Of a step; None takes those of the options.
        teacher: The model that is held beside the policy to teach it, if one is.
    """
    train, device, micro_batch = config.train, layout.device, layout.tokens
    sequences = train.prompts_per_step * sequences_a_prompt(config) if sequences is None else sequences
    updates = train.updates_per_step
    own = sequences * lengths.sequence / updates / layout.ranks
    count = max(1, math.ceil(own / micro_batch))
    traffic = device.traffic * TRAFFIC_SHARE
    body = passes.flops / device.products + passes.moved / traffic
    attention = 3 * 2 * shape.layers * shape.heads * shape.head_dim * lengths.sequence * micro_batch
    head = _head_flops(shape) * micro_batch * lengths.response / lengths.sequence * (1 + _scores_first(config) / 3)
    one = body + attention / (device.flops * _ATTENTION_SHARE) + head / (
        device.flops * (_HEAD_SHARE if device.is_gpu else 1)
    )  # fmt: skip
    forwards = _forwards(shape, config, teacher)
    one *= 1 + forwards / 3
    head_stays = shape.head if splits_head(config, layout) else 0
    gather = _gathering(shape, layout, head_stays) * (1 + forwards / 3)
    filled = own / (count * micro_batch)
    computing = updates * count * one * filled
    seconds = updates * count * max(one * filled, gather)
    optimizer = updates * _ADAMW_TRAFFIC * shape.trained / layout.shard / (HOST_LINK if layout.offload else traffic)
    rollout = _rollout(shape, config, layout, lengths, cache) if samples(config) else 0.0
    weights = shape.parameters * config.engine_dtype.itemsize
    sync = weights / HOST_LINK * 2 if device.is_gpu else weights * 2 / device.traffic
    if layout.shard > 1:
        sync += 4 * shape.parameters / _link(layout)
    if not samples(config):
        sync = 0.0
    halved = 1
    at_once = _at_once(config, layout)
    if config.train.rollouts_only:
        return Pace(rollout, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
    if at_once and not device.is_gpu and config.engine.kind != "http":
        halved = 2  # each has half of the cores
    return Pace(
        halved * rollout, halved * (seconds + optimizer), sync, updates * count * gather, halved * computing,
        updates * count, 1 - filled, at_once,
    )  # fmt: skip


def _at_once(config: Config, layout: Layout) -> bool:
    """Whether rollouts go on beside training: they lag, and are made elsewhere, or by cores of their own."""
    elsewhere = config.engine.kind == "http" or layout.engines_apart > 0 or not layout.device.is_gpu
    return config.rollout.steps_ahead > 0 and samples(config) and elsewhere


def _scores_first(config: Config) -> bool:
    """Whether the forward pass of the only update goes through the head twice, first for what older tokens count."""
    once = config.train.updates_per_step == 1 and not config.method.needs_old
    return once and config.rollout.max_lag > 0 and samples(config)


def _forwards(shape: ModelShape, config: Config, teacher: ModelShape | None) -> float:
    """How often the sequences of an update pass through a model of the policy's size without a backward pass."""
    method, train = config.method, config.train
    # the policy as it sampled, the mean entropy of the update, the reference
    knows_old = train.updates_per_step > 1 or method.needs_old
    passes = float(knows_old + method.needs_entropy + method.needs_ref)
    if method.taught_by is not None:
        rollouts = train.rollouts_per_prompt / sequences_a_prompt(config)
        size = 1.0 if teacher is None else teacher.products / shape.products
        # who is shown a demonstration reads it, and the prompt twice
        passes += rollouts * size * (2 if method.shows_demos else 1)
    return passes


def expected_lengths(config: Config) -> Tokens:
    """Return the lengths that a plan counts with where nobody knows better: half of each limit.

    Args:
        config: The whole configuration.
    """
    return Tokens(max(1, config.data.max_prompt_tokens // 2), max(1, config.rollout.max_new_tokens // 2))


def sequences_a_prompt(config: Config) -> int:
    """Return how many sequences a prompt brings to the training.

    Args:
        config: The whole configuration.
    """
    method, train = config.method, config.train
    return method.needs_rollouts * train.rollouts_per_prompt + method.trains_demos * train.demos_per_prompt


def _link(layout: Layout) -> float:
    return layout.device.link if layout.shard <= GPUS_A_NODE else layout.device.network


def _gathering(shape: ModelShape, layout: Layout, head_stays: int) -> float:
    """Seconds on the network of one micro-batch: two gathers and a reduction in fp32, and one over the replicas.

    Without those of the parameters that stay where they are, whose hidden states travel instead and are few.
    """
    seconds = 0.0
    if layout.shard > 1:
        others = (layout.shard - 1) / layout.shard
        moved = 8 * (shape.parameters - head_stays) + 4 * (shape.trained - head_stays)
        seconds += moved * others / _link(layout)
    if layout.ranks > layout.shard:
        seconds += 2 * 4 * shape.trained / layout.shard / layout.device.network
    if layout.offload:
        seconds += (8 * shape.parameters + 4 * shape.trained) / layout.shard / HOST_LINK
    return seconds


def _rollout(shape: ModelShape, config: Config, layout: Layout, lengths: Tokens, cache: int) -> float:
    """Tokens come one after another; each reads the weights once for all sequences at work, and their caches."""
    device, traffic = layout.device, layout.device.traffic * TRAFFIC_SHARE
    engines, spread = num_engines(config, layout), 1 if config.engine.kind == "http" else layout.engine_ranks
    sequences = config.train.prompts_per_step * config.train.rollouts_per_prompt / engines
    at_once: float = config.engine.max_batch
    if uses_vllm(config, device) or (config.engine.kind == "http" and device.is_gpu):
        at_once = max(1.0, cache * spread / (shape.kv_bytes * lengths.sequence))
    at_once = min(at_once, sequences)
    reads = shape.parameters * config.engine_dtype.itemsize + at_once * shape.kv_bytes * lengths.sequence / 2
    computes = 2 * (shape.products + shape.head) * at_once / device.products
    one = max(reads / (traffic * spread), computes / spread)
    # the longest completion reaches the limit of a step, however few tokens the others have
    longest = -(-config.rollout.max_new_tokens // config.rollout.segments)
    steps = max(longest, sequences * lengths.response / at_once)
    return steps * one
