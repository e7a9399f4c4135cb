"""Vectors of tokens as a sweep takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..head.chunks import Tokens, scalar
from ..objectives import TokenObjective


def count_of(given: int | Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """``given``, or the number of true entries of ``counted``, as a 0-d tensor beside ``counted``."""
    return scalar(counted.sum() if given is None else given, dtype, counted.device)


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, and 1 where there is nothing to divide."""
    return torch.where(count > 0, count, 1.0).reciprocal()


def pack(tokens: Tokens, dtype: torch.dtype, fields: tuple[str, ...], **vectors: Tensor | None) -> Tensor:
    """[K, n] inputs of a formula from [N] ``vectors``, None being zeros, named by ``fields`` in their order."""
    assert tuple(vectors) == fields, f"expected {fields}, got {tuple(vectors)}"
    zeros = torch.zeros_like(tokens.valid, dtype=dtype)
    return torch.stack([zeros if x is None else tokens.take(x.detach().to(dtype)) for x in vectors.values()])


def host_bounds(objective: TokenObjective, cu_seqlens: Tensor | None) -> list[int] | None:
    """Sequence bounds in computed rows, where the host knows them."""
    if objective.offsets is None or cu_seqlens is None:
        return None
    if objective.offsets.device.type == "cpu":
        return objective.offsets.tolist()
    return cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else None
