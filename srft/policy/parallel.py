"""The ranks of a run: how they meet, what they tell each other, and how a policy is sharded over them.

One process is a world of one: it has no process group, shards nothing, and every method here gives back what it got.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from srft.config import Config
from srft.policy.lost import lost_ranks_named, note_place

_T = TypeVar("_T")


class Elsewhere(RuntimeError):
    """Another rank failed, which says why itself."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, as one of them sees it; all of them call every method of it in the same order.

    Args:
        rank: This one, from 0.
        size: How many there are.
        device: Where this one computes.
        mesh: Replicas by shards; None for a world of one that shards nothing.
        cpu_offload: Keep parameters, gradients and moments in the CPU's memory.
        vocab_parallel: Leave each rank's rows of the head where they are, and gather hidden states instead.
        deadline_s: How long a collective waits for the other ranks.
        group: Carries what they tell each other; None: the group that training uses.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    mesh: DeviceMesh | None = None
    cpu_offload: bool = False
    vocab_parallel: bool = False
    deadline_s: float = 1800.0
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the record."""
        return self.rank == 0

    def own(self, items: Sequence[_T]) -> list[_T]:
        """Return this rank's share of what every rank holds: one of every ``size``.

        Args:
            items: The same on every rank.
        """
        return list(items[self.rank :: self.size])

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers over the ranks, in float64.

        Args:
            numbers: As many on every rank.
        """
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers.

        Args:
            number: This rank's.
        """
        return max(self.gather(number))

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's value, in the order of ranks; for what is small.

        Args:
            value: This rank's.
        """
        if self.size == 1:
            return [value]
        values: list[_T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: _T) -> _T:
        """Return the first rank's value; for what is small.

        Args:
            value: Looked at on the first rank alone.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def on_first(self, make: Callable[[], _T]) -> _T:
        """Return what the first rank makes, which it does alone while the others wait.

        Args:
            make: Called on the first rank; what it raises is raised there.

        Raises:
            Elsewhere: On the other ranks, when it raised.
        """
        if self.size == 1:
            return make()
        if not self.is_first:
            made, value = self.first((False, None))
            if not made:
                raise Elsewhere("the first rank failed")
            return value  # type: ignore[return-value]
        try:
            result = make()
        except BaseException:
            self.first((False, None))
            raise
        return self.first((True, result))[1]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over every rank's elements, 0-d in the dtype of ``x``.

        Args:
            x: Of any size, empty on some ranks.
        """
        if self.size == 1:
            return x.mean()
        total, count = self.sum([float(x.double().sum()), x.numel()])
        return x.new_tensor(total / count)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def beside(self) -> World:
        """Return the same ranks with traffic of its own between CPUs, for a thread beside the one that trains.

        Collectives of two threads over one group would be taken for each other.
        """
        if self.size == 1:
            return self
        return World(self.rank, self.size, deadline_s=self.deadline_s, group=self.new_group(range(self.size)))

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """Return a group of some ranks with traffic of its own between CPUs; all ranks call this, in the same order.

        Args:
            ranks: Its members.
        """
        return dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=self.deadline_s))

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """While entered, a collective that fails says which rank is missing; what this encloses is left first.

        Raises:
            LostRank: In place of what torch.distributed raised.
        """
        with lost_ranks_named(self.rank, self.size, self.deadline_s) if self.size > 1 else nullcontext():
            yield

    def at(self, place: str) -> None:
        """Note where this rank is, for the diagnosis of a rank that others wait for in vain.

        Args:
            place: Such as "step 3, rollout"; empty: nowhere.
        """
        if self.size > 1:
            note_place(self.rank, place, beside=self.group is not None)


ALONE = World()
"""One process on a CPU."""


@contextmanager
def joined(config: Config, device: torch.device) -> Iterator[World]:
    """Meet the other ranks that the launcher has started; alone where it has started none.

    Args:
        config: The whole configuration.
        device: "cpu", or "cuda" for the GPU of this rank's place on its machine.

    Raises:
        ValueError: When ``train.ranks``, ``train.shard_ranks`` or ``train.vocab_parallel`` does not fit the number of
            ranks.
        LostRank: When a collective fails because another rank is not there, or comes too late.
    """
    train, size = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    if train.ranks is not None and train.ranks != size:
        raise ValueError(
            f"train.ranks={train.ranks}, but this process was started as one of {size}; leave train.ranks unset under "
            "torchrun, or start python -m srft.train without it"
        )
    shard = train.shard_ranks or size
    if size % shard:
        raise ValueError(f"train.shard_ranks={shard} must divide the number of ranks, {size}")
    if train.vocab_parallel and (size == 1 or shard < size):
        raise ValueError(
            f"train.vocab_parallel=true splits the head over all ranks, got {size // shard} replicas of {shard}; start "
            "several with train.ranks=N and leave train.shard_ranks unset, or set train.vocab_parallel=false"
        )
    if size == 1 and not train.cpu_offload:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    deadline = timedelta(seconds=train.collective_deadline_s)
    if size > 1:
        dist.init_process_group(backend, timeout=deadline)
    else:
        dist.init_process_group(backend, timeout=deadline, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicas", "shards"))
        world = World(
            dist.get_rank(), size, device, mesh, train.cpu_offload, train.vocab_parallel, train.collective_deadline_s
        )
        with world.naming_lost():
            yield world
    finally:
        dist.destroy_process_group()


def shard(model: PreTrainedModel, world: World) -> None:
    """Shard a policy's parameters over the ranks by FSDP2: each block is a unit, the rest another.

    Gradients are summed over the ranks, not averaged: every loss is divided by counts over all of them. The model may
    lie on the meta device; its parameters are then to be filled in afterwards.

    Args:
        model: From ``prepare_policy``; parameters of it that are DTensors already stay as they are.
        world: With a mesh.
    """
    assert world.mesh is not None
    mesh = world.mesh if world.mesh.size(0) > 1 else world.mesh["shards"]
    offload: OffloadPolicy = OffloadPolicy()
    if world.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    split: set[Any] = {p for p in model.parameters() if isinstance(p, DTensor)}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=split)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, and NCCL's zeroes 16-bit gradients in some versions
            module.set_force_sum_reduction_for_comms(True)


def open_to(model: nn.Module, method: str) -> None:
    """Let a method of a policy read its whole parameters, as its forward does.

    Args:
        model: Sharded or not.
        method: Its name.
    """
    register_fsdp_forward_method(model, method)


def let_go(model: nn.Module) -> None:
    """Free what a forward pass without a backward has left gathered, so that ``parameters()`` are the rank's own again.

    Args:
        model: Sharded or not.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Say whether a policy is sharded.

    Args:
        model: Any.
    """
    return isinstance(model, FSDPModule)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that a causal LM repeats: the members of its largest list of modules.

    Args:
        model: Any.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def whole(x: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold a part; every rank must ask.

    Args:
        x: A parameter, its gradient, or a norm.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x
