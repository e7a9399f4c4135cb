"""Which layout to take on so many devices, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import PretrainedConfig

from srft.config import Config
from srft.planning.devices import GPUS_A_NODE, Device
from srft.planning.memory import Layout, Memory, plan_memory
from srft.planning.models import ModelShape, build_policy, measure_shape, read_shape
from srft.planning.pace import Pace, Tokens, plan_pace
from srft.planning.trace import BodyPasses, trace_body


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes.

    Args:
        layout: How the run lies on its devices.
        memory: Of one rank.
        pace: Of a step.
    """

    layout: Layout
    memory: Memory
    pace: Pace


class Planner:
    """Plans of one run on any number of devices.

    Args:
        config: The whole configuration.
        lengths: Expected of prompts and responses; None takes half of each limit.

    Raises:
        ValueError: When the shape of the model cannot be read, or it cannot be planned.
    """

    def __init__(self, config: Config, lengths: Tokens | None = None):
        self.config = config
        limits = config.data.max_prompt_tokens, config.rollout.max_new_tokens
        self.lengths = lengths or Tokens(*(max(1, limit // 2) for limit in limits))
        self._shape: PretrainedConfig = read_shape(config)
        with torch.device("meta"):
            self.shape: ModelShape = measure_shape(build_policy(self._shape, config))
        self.tokens = config.microbatch_tokens
        # prompts are short beside what they are answered with: as many rows as there can be
        self.rows = max(1, self.tokens - self.tokens // config.longest_sequence)
        self._passes = lru_cache(self._trace)

    def _trace(self, checkpointing: bool) -> BodyPasses:
        return trace_body(self._shape, self.config, self.tokens, self.rows, checkpointing=checkpointing)

    def plan(self, layout: Layout) -> Plan:
        """Plan one layout.

        Args:
            layout: How the run lies on its devices.
        """
        passes = self._passes(layout.checkpointing)
        memory = plan_memory(self.shape, passes, self.config, layout, self.tokens, self.rows)
        pace = plan_pace(
            self.shape, passes, self.config, layout, self.lengths, self.tokens, max(0, memory.engine_cache)
        )
        return Plan(layout, memory, pace)

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
        return self.plan(
            Layout(device, ranks, shard, self.config.model.gradient_checkpointing, train.cpu_offload)
        )

    def recommended(self, device: Device, ranks: int) -> Plan:
        """Return the fastest layout that fits, or the smallest where none does.

        Args:
            device: Each of the devices.
            ranks: How many.
        """
        plans = [self.plan(layout) for layout in _layouts(device, ranks)]
        fitting = [plan for plan in plans if plan.memory.fits]
        if fitting:
            return min(fitting, key=lambda plan: plan.pace.step)
        return min(plans, key=lambda plan: plan.memory.peak)

    def obstacle(self, device: Device, ranks: int) -> str:
        """Say what breaks first on so many devices: what does not fit, or what the time goes into.

        Args:
            device: Each of the devices.
            ranks: How many.
        """
        plan = self.recommended(device, ranks)
        memory, pace, gib = plan.memory, plan.pace, 2**30
        if not memory.fits:
            if memory.peak <= device.memory:
                return f"the engine's weights and cache lack {-memory.engine_cache / gib:.0f} GiB of its share"
            name, size = max(memory.parts().items(), key=lambda part: part[1])
            whole = f"memory, {memory.peak / gib:.0f} of {device.memory / gib:.0f} GiB"
            return f"{whole}; most of it {name}, {size / gib:.0f}"
        if ranks > self.config.train.prompts_per_step:
            return f"{ranks - self.config.train.prompts_per_step} ranks have no prompt of {_prompts(self.config)}"
        if pace.rollout > pace.train:
            return f"rollouts, {pace.rollout / pace.step:.0%} of the step"
        if pace.gathering > pace.computing:
            return f"gathering in fp32, {pace.gathering:.0f} s against {pace.computing:.0f} s of computing"
        if pace.idle > 0.3:
            return f"micro-batches are filled to {1 - pace.idle:.0%}"
        return f"computing, {pace.computing / pace.step:.0%} of the step"


def _prompts(config: Config) -> str:
    return f"train.prompts_per_step={config.train.prompts_per_step}"


def _layouts(device: Device, ranks: int) -> Iterator[Layout]:
    """Layouts that the options can make, the plain ones first."""
    shards = sorted({s for s in (1, min(ranks, GPUS_A_NODE), ranks) if ranks % s == 0})
    for offload in (False, True) if device.is_gpu else (False,):
        for shard in shards:
            for checkpointing in (False, True):
                yield Layout(device, ranks, shard, checkpointing, offload)


def settings(layout: Layout) -> list[str]:
    """Return the options that make a layout, as on the command line.

    Args:
        layout: Of a plan.
    """
    options = [f"train.shard_ranks={layout.shard}"] if layout.shard != layout.ranks else []
    options.append(f"model.gradient_checkpointing={str(layout.checkpointing).lower()}")
    return options + (["train.cpu_offload=true"] if layout.offload else [])


def with_layout(layout: Layout, ranks: int) -> Layout:
    """Return a layout of the same kind on another number of devices.

    Args:
        layout: Of a plan.
        ranks: How many; one that its shards do not divide shards over all.
    """
    shard = layout.shard if ranks % layout.shard == 0 else ranks
    return replace(layout, ranks=ranks, shard=shard)
