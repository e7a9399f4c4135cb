"""Which layout to take on so many devices, and what stands in the way of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from transformers import PretrainedConfig

from srft.config import Config
from srft.planning.devices import GPUS_A_NODE, Device
from srft.planning.memory import ENGINE_ASLEEP, ENGINE_SHARE, Layout, Memory, plan_memory, uses_vllm
from srft.planning.models import ModelShape, build_policy, measure_shape, read_shape, read_teacher
from srft.planning.pace import Pace, Tokens, expected_lengths, plan_pace
from srft.planning.trace import BodyPasses, trace_body


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes.

    Args:
        layout: How the run lies on its devices.
        memory: Of one rank.
        pace: Of a step.
        share: ``engine.gpu_memory_utilization``.
    """

    layout: Layout
    memory: Memory
    pace: Pace
    share: float


class Planner:
    """Plans of one run on any number of devices.

    Args:
        config: The whole configuration.
        lengths: Expected of prompts and responses; None takes ``pace.expected_lengths``.

    Raises:
        ValueError: When the shape of the model or of its teacher cannot be read, or it cannot be planned.
    """

    def __init__(self, config: Config, lengths: Tokens | None = None):
        self.config = config
        self.lengths = lengths or expected_lengths(config)
        self._shape: PretrainedConfig = read_shape(config)
        with torch.device("meta"):
            self.shape: ModelShape = measure_shape(build_policy(self._shape, config))
        self.teacher = read_teacher(config)
        self._passes = lru_cache(self._trace)

    def _trace(self, tokens: int, checkpointing: bool) -> BodyPasses:
        return trace_body(self._shape, self.config, tokens, self._rows(tokens), checkpointing=checkpointing)

    def _rows(self, tokens: int) -> int:
        """As many as can be counted: prompts may be short."""
        return max(1, tokens - tokens // self.config.longest_sequence)

    def plan(self, layout: Layout, share: float | None = None) -> Plan:
        """Plan one layout.

        Args:
            layout: How the run lies on its devices.
            share: ``engine.gpu_memory_utilization``, (0, 1]; None takes that of the options.
        """
        config, passes = self.config, self._passes(layout.tokens, layout.checkpointing)
        if share is not None:
            engine = config.engine.model_copy(update={"gpu_memory_utilization": share})
            config = config.model_copy(update={"engine": engine})
        memory = plan_memory(self.shape, passes, config, layout, self._rows(layout.tokens), self.teacher)
        cache = max(0, memory.engine_cache)
        pace = plan_pace(self.shape, passes, config, layout, self.lengths, cache, teacher=self.teacher)
        return Plan(layout, memory, pace, config.engine.gpu_memory_utilization)

    def as_configured(self, device: Device, ranks: int) -> Plan:
        """Plan the layout that the options ask for.

        Args:
            device: Each of the devices.
            ranks: How many.

        Raises:
            ValueError: When ``train.shard_ranks`` does not divide them.
        """
        train = self.config.train
        shard = train.shard_ranks or ranks
        if ranks % shard:
            raise ValueError(f"train.shard_ranks={shard} must divide the number of ranks, {ranks}")
        checkpointing, tokens = self.config.model.gradient_checkpointing, self.config.microbatch_tokens
        spread, apart = self.config.engine.tensor_parallel, engines_apart(self.config, ranks)
        return self.plan(Layout(device, tokens, ranks, shard, checkpointing, train.cpu_offload, spread, apart))

    def recommended(self, device: Device, ranks: int, engine_ranks: int | None = None) -> Plan:
        """Return the plainest layout that fits and is about as fast as any; the nearest to fitting where none does.

        Args:
            device: Each of the devices.
            ranks: How many.
            engine_ranks: Devices of an engine; None takes ``engine.tensor_parallel``.
        """
        engine_ranks = engine_ranks or self.config.engine.tensor_parallel
        plans = [self._roomy(layout) for layout in _layouts(self.config, device, ranks, engine_ranks)]
        if fitting := [plan for plan in plans if plan.memory.fits]:
            limit = _ABOUT_AS_FAST * min(plan.pace.step for plan in fitting)
            return next(plan for plan in fitting if plan.pace.step <= limit)
        trains = [plan for plan in plans if plan.memory.trains]
        return min(trains, key=lambda plan: plan.pace.train) if trains else min(plans, key=lambda p: p.memory.peak)

    def _roomy(self, layout: Layout) -> Plan:
        """A layout whose engine gets what training leaves, in hundredths."""
        if not (self.config.method.needs_rollouts and layout.device.is_gpu and uses_vllm(self.config, layout.device)):
            return self.plan(layout)
        if layout.engines_apart:
            return self.plan(layout, 0.9)
        least, whole = self.plan(layout, 0.01), layout.device.memory
        if not least.memory.trains:
            return least
        # an engine that sleeps stands beside what stands, one that is awake beside the worst moment of training
        asleep = least.memory.standing.get(ENGINE_ASLEEP)
        taken = sum(least.memory.standing.values()) - asleep if asleep else least.memory.peak - int(0.01 * whole)
        left = (whole - taken) / whole
        return self.plan(layout, min(0.9, max(0.01, math.floor(100 * left) / 100)))

    def obstacle(self, plan: Plan) -> str:
        """Say what breaks first: what does not fit, or what the time goes into.

        Args:
            plan: Of this run.
        """
        memory, pace, ranks, gib = plan.memory, plan.pace, plan.layout.ranks, 2**30
        whole = plan.layout.device.memory
        if memory.peak > whole:
            name, size = max(memory.parts().items(), key=lambda part: part[1])
            return f"memory: {memory.peak / gib:.0f} of {whole / gib:.0f} GiB, {size / gib:.0f} of it {name}"
        if not memory.trains:
            return f"memory of the host: {memory.host / gib:.0f} GiB a rank"
        if memory.engine_cache <= 0:
            short = -memory.engine_cache / gib
            return f"engine: with its weights {short:.0f} GiB too large for what is left of {_gpus(plan.layout)}"
        prompts = self.config.train.prompts_per_step
        if ranks > prompts:
            return f"prompts: {ranks - prompts} of {ranks} ranks have none of train.prompts_per_step={prompts}"
        if pace.rollout > pace.train:
            return f"rollouts: {pace.rollout / pace.step:.0%} of the step"
        if pace.gathering > pace.computing:
            return f"transfers: {pace.gathering:.0f} s to gather and reduce hide {pace.computing:.0f} s of computing"
        if pace.idle > 0.3:
            return f"micro-batches: filled to {1 - pace.idle:.0%}"
        return f"computing: {pace.computing / pace.step:.0%} of the step"


# a layout is taken before a less plain one that would save no more than this factor of a step
_ABOUT_AS_FAST = 1.15


def _gpus(layout: Layout) -> str:
    return f"{layout.engine_ranks} GPU{'s' if layout.engine_ranks > 1 else ''}"


def _layouts(config: Config, device: Device, ranks: int, engine_ranks: int) -> Iterator[Layout]:
    """Layouts that the options can make, the plain ones first."""
    sizes = sorted({config.microbatch_tokens, config.longest_sequence}, reverse=True)
    shards = sorted({s for s in (1, min(ranks, GPUS_A_NODE), ranks) if ranks % s == 0})
    offloads = (False, True) if device.is_gpu else (False,)
    if config.train.vocab_parallel:  # which goes with neither replicas nor offload
        shards, offloads = [ranks], (False,)
    for offload, checkpointing, tokens, shard in product(offloads, (False, True), sizes, shards):
        apart = engines_apart(config, ranks)
        spread = engine_ranks if apart else min(engine_ranks, ranks)
        yield Layout(device, tokens, ranks, shard, checkpointing, offload, spread, apart)


def engines_apart(config: Config, ranks: int) -> int:
    """Return how many engines have devices of their own, on all machines together.

    Args:
        config: The whole configuration.
        ranks: Of training, as many on a machine as it has devices beside those.
    """
    devices = len(config.engine.devices)
    machines = math.ceil(ranks / max(1, GPUS_A_NODE - devices))
    return devices // config.engine.tensor_parallel * machines


def settings(plan: Plan) -> list[str]:
    """Return the options that make a layout, as on the command line.

    Args:
        plan: Of a run.
    """
    layout = plan.layout
    options = [f"train.tokens_per_microbatch={layout.tokens}"]
    options += [f"model.gradient_checkpointing={str(layout.checkpointing).lower()}"]
    if layout.shard != layout.ranks:
        options.append(f"train.shard_ranks={layout.shard}")
    if layout.offload:
        options.append("train.cpu_offload=true")
    if layout.engine_ranks > 1:
        options.append(f"engine.tensor_parallel={layout.engine_ranks}")
    if layout.engines_apart or ENGINE_SHARE in plan.memory.standing or ENGINE_ASLEEP in plan.memory.standing:
        options.append(f"engine.gpu_memory_utilization={plan.share:g}")
    return options
