"""Where the engines of a run are: beside training on its own devices, on GPUs of their own, or on servers."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from srft.config import Config
from srft.policy.parallel import World

# of an engine that sleeps: a context, captured graphs; what others report, not measured here
ASLEEP_BYTES = int(1.5 * 2**30)


@dataclass(frozen=True)
class Placement:
    """The engines of a rank's group of ranks, which the first of them runs.

    Args:
        kind: "hf", "vllm" or "http".
        ranks_per_engine: Ranks of a group, neighbours.
        visible: CUDA_VISIBLE_DEVICES of each engine of the group, or server; None inherits it.
        shares_device: An engine takes memory of a GPU that training computes on.
        sleeps: It gives that memory back while training goes on.
    """

    kind: str
    ranks_per_engine: int
    visible: tuple[str | None, ...] = (None,)
    shares_device: bool = False
    sleeps: bool = False

    @property
    def engines(self) -> int:
        """How many share what the group asks."""
        return len(self.visible)


def _kind(config: Config, world: World) -> str:
    """Return ``engine.kind``, chosen where it is "auto".

    Args:
        config: The whole configuration.
        world: The ranks.
    """
    if config.engine.kind != "auto":
        return config.engine.kind
    return "vllm" if world.device.type == "cuda" and importlib.util.find_spec("vllm") else "hf"


def place_engines(config: Config, world: World) -> Placement:
    """Say where the engines of a rank are, from the options and what this machine has; nothing is started.

    On a GPU each rank's own device has room for an engine of its own. Ranks on CPUs share those: a second vLLM there
    costs 2.3 GB and was slower than one (two replicas on two cores).

    Args:
        config: The whole configuration.
        world: The ranks.

    Raises:
        ValueError: When the options ask for what the engine's kind, the ranks or the GPUs do not allow.
    """
    kind, options, here = _kind(config, world), config.engine, _ranks_here(world)
    takes_turns = not config.rollout.steps_ahead and not config.train.rollouts_only
    if options.sleep and (not takes_turns or options.devices or world.device.type != "cuda"):
        raise ValueError(
            "engine.sleep=true is for an engine on the GPU that training computes on, the two in turn, without "
            "engine.devices, rollout.max_lag and train.rollouts_only; leave it unset"
        )
    if kind != "vllm":
        if kind == "hf" and (options.ranks_per_engine or 1) > 1:
            raise ValueError(
                f"engine.ranks_per_engine={options.ranks_per_engine}, but engine.kind=hf samples in each rank's own "
                "process; leave it unset, or set engine.kind=vllm"
            )
        options.refuse_unless_vllm(kind)
        # the first rank gives the servers their weights, and asks them for all
        if kind == "http":
            return Placement(kind, world.size, (None,) * len(options.urls))
        return Placement(kind, 1, shares_device=world.device.type == "cuda")
    if options.devices:
        return _apart(config, world, here)
    on_gpu, spread = world.device.type == "cuda", options.tensor_parallel
    sharing = options.ranks_per_engine or (spread if on_gpu else here)
    if here % sharing:
        raise ValueError(
            f"engine.ranks_per_engine={sharing} must divide the number of ranks on a machine, {here}; "
            f"take 1 or {here}{', or set engine.tensor_parallel lower' if options.ranks_per_engine is None else ''}"
        )
    if not on_gpu:
        return Placement(kind, sharing)
    if spread > sharing:
        raise ValueError(
            f"engine.tensor_parallel={spread}, but the {sharing} ranks of engine.ranks_per_engine have a GPU each; "
            f"leave engine.ranks_per_engine unset, or name {spread} GPUs of the engine's own in engine.devices"
        )
    first = _local_rank(world) // sharing * sharing
    visible = _visible(range(first, first + spread)) if world.size > 1 else None
    sleeps = takes_turns if options.sleep is None else options.sleep
    return Placement(kind, sharing, (visible,), shares_device=True, sleeps=sleeps)


def _apart(config: Config, world: World, here: int) -> Placement:
    """Engines on GPUs on which nobody trains, divided among the groups of ranks."""
    options, there, spread = config.engine, torch.cuda.device_count(), config.engine.tensor_parallel
    named, of_ranks = f"engine.devices={options.devices}", here if world.device.type == "cuda" else 0
    if absent := [number for number in options.devices if number >= there]:
        seen = f"{there} GPU{'' if there == 1 else 's'}" + (", from 0" if there else "")
        raise ValueError(f"{named} has {absent[0]}, but torch sees {seen}; name GPUs that are there, or unset it")
    if shared := [number for number in options.devices if number < of_ranks]:
        raise ValueError(
            f"{named} has {shared[0]}, but training computes on the first {of_ranks}, one a rank; name GPUs from "
            f"{of_ranks} on, set train.ranks lower, or unset engine.devices for engines beside training"
        )
    engines = len(options.devices) // spread
    if engines % here and here % engines:
        raise ValueError(
            f"{named} makes {engines} engines of {spread} for {here} ranks of this machine; one of the two numbers "
            "must divide the other"
        )
    sharing, each = max(1, here // engines), max(1, engines // here)
    first = _local_rank(world) // sharing * each * spread
    own = options.devices[first : first + each * spread]
    visible = tuple(_visible(own[i : i + spread]) for i in range(0, len(own), spread))
    return Placement("vllm", sharing, visible)


def _ranks_here(world: World) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def _local_rank(world: World) -> int:
    return world.device.index or 0 if world.device.type == "cuda" else world.rank % _ranks_here(world)


def _visible(numbers: range | list[int]) -> str:
    """These GPUs of those that torch sees, as CUDA_VISIBLE_DEVICES names them."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(names[number] if names else str(number) for number in numbers)
