"""How the ranks of a test meet and share a mesh."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from srft.policy.parallel import World


def world_of(rank: int, folder: Path, shards: int | None = None) -> World:
    """Meet the other ranks, inside of ``rank_main``.

    Args:
        rank: This one.
        folder: As given to ``results_of_ranks``.
        shards: Ranks that share the parameters, the others being replicas; None for all of them.
    """
    size = int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    shards = shards or size
    mesh = init_device_mesh("cpu", (size // shards, shards), mesh_dim_names=("replicas", "shards"))
    return World(rank, size, torch.device("cpu"), mesh)
