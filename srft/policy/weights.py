"""The weights of a policy by the names of its checkpoint, wherever their rows lie."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srft.policy.lora import merged
from srft.policy.parallel import whole


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint holds of a model: parameters and persistent buffers, tied ones under one name.

    Args:
        model: Sharded or not; of a sharded one each parameter is the part that this rank holds.

    Yields:
        (name, tensor), the model's own.
    """
    seen: set[int] = set()
    # those names first that parameters() knows them by, so that an optimizer's and a checkpoint's are the same
    for name, tensor in model.named_parameters():
        seen.add(id(tensor))
        yield name, tensor
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def whole_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a policy one after another, each of them whole; every rank walks through all of them.

    Adapters are added to the weights that they change, which then have the names and places of the base's.

    Args:
        model: Sharded or not.
        dtype: Of what is yielded, where it is floating-point; each rank rounds its part before the parts are
            gathered. None leaves it as it is.

    Yields:
        (name, tensor), detached; a sharded one's lies on the device that its ranks compute on.
    """
    for name, tensor in merged(named_weights(model), model):
        tensor = tensor.detach()
        rounded = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not isinstance(tensor, DTensor):
            yield name, tensor.to(rounded)
            continue
        # rows kept in the CPU's memory travel between GPUs
        part = tensor.to_local().to(tensor.device_mesh.device_type, rounded)
        yield name, whole(with_rows(tensor, part))


def own_part(x: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank holds: the storage itself, not a copy.

    Args:
        x: Sharded or not.
    """
    return x.to_local() if isinstance(x, DTensor) else x


def own_rows(x: Tensor) -> tuple[int, int]:
    """Say which rows of a tensor this rank holds; the whole first dimension where it is not sharded.

    Args:
        x: Of one dimension or more.

    Returns:
        (first, beyond): the range of its first dimension, empty for a rank without rows.
    """
    first, beyond = 0, x.shape[0]
    if isinstance(x, DTensor):
        for dim, placement in enumerate(x.placements):
            if placement.is_shard():
                assert placement.is_shard(0), f"only rows are sharded, got {x.placements}"
                rows = -(-(beyond - first) // x.device_mesh.size(dim))
                start = first + rows * x.device_mesh.get_local_rank(dim)
                first, beyond = min(start, beyond), min(start + rows, beyond)
        assert beyond - first == x.to_local().shape[0]
    return first, beyond


def with_rows(like: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor that is sharded as another one is.

    Args:
        like: Sharded or not.
        rows: Those that this rank holds of the new tensor; as many as of ``like``.
    """
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
