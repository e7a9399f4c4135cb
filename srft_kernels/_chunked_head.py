"""The lm_head on a chunk of rows: chunk sizes, three matrix products, and the gradients they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _row_cpu as row_cpu
from . import row_kernels
from ._row_cpu import Rows

# Scores of one chunk. More rows make the weight gradient, which is read and written once a chunk, cheaper.
CPU_WORKSPACE_BYTES = 256 * 2**20
GPU_WORKSPACE_BYTES = 2**30
# Rows of a 16-bit weight that are upcast at a time on CPU, where a 16-bit product accumulates in no more than
# its inputs.
VOCAB_TILE = 8192


class Head(NamedTuple):
    """The arguments that every op shares, of the rows that are computed."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [n]
    bias: Tensor | None  # [V] in the compute dtype
    inv_temperature: Tensor | None  # [n]
    softcap: float | None
    ignore_index: int

    def rows(self, rows: slice) -> Rows:
        """The part of the arguments that the row kernel needs for ``rows``."""
        inv_temperature = None if self.inv_temperature is None else self.inv_temperature[rows]
        return Rows(
            self.labels[rows], inv_temperature, self.bias, self.softcap, self.ignore_index, self.hidden.dtype
        )


class Tokens:
    """Which of the N rows are computed, and the maps between vectors over all rows and over those.

    On CPU the ignored rows are dropped. On a GPU that would need a device sync, so they stay, with inputs and
    results 0.
    """

    def __init__(self, labels: Tensor, ignore_index: int):
        """Rows of ``labels`` [N] that are not ``ignore_index``."""
        self.mask = labels != ignore_index
        self.kept = None
        if not labels.is_cuda and not row_kernels.INTERPRETED and not bool(self.mask.all()):
            self.kept = self.mask.nonzero()[:, 0]
        self.valid = self.mask if self.kept is None else self.mask[self.kept]

    def select(self, x: Tensor) -> Tensor:
        """Rows of ``x`` [N, ...] that are computed."""
        return x if self.kept is None else x[self.kept]

    def take(self, x: Tensor) -> Tensor:
        """As ``select`` for a vector [N], with 0 for whatever the caller left at ignored rows."""
        return (
            torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
            if self.kept is None
            else x[self.kept]
        )

    def put(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Inverse of ``select``; ignored rows get ``fill``."""
        if self.kept is None:
            return x
        return x.new_full((self.mask.numel(), *x.shape[1:]), fill).index_copy_(0, self.kept, x)

    def offsets(self, cu_seqlens: Tensor | None) -> Tensor:
        """Sequence bounds [B+1] int64 in rows that are computed, on their device."""
        assert cu_seqlens is not None
        cu_seqlens = cu_seqlens.to(self.mask.device, torch.int64, non_blocking=True)
        if self.kept is None:
            return cu_seqlens
        return torch.cat([cu_seqlens.new_zeros(1), self.mask.cumsum(0)])[cu_seqlens]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for anything less."""
    return torch.promote_types(dtype, torch.float32)


def max_rows(head: Head) -> int:
    """Rows whose scores fit in the workspace."""
    size = CPU_WORKSPACE_BYTES if head.hidden.device.type == "cpu" else GPU_WORKSPACE_BYTES
    rows = size // (head.weight.shape[0] * compute_dtype(head.hidden.dtype).itemsize)
    return max(16, rows // 16 * 16)


def even_chunks(count: int, limit: int) -> list[slice]:
    """Split ``count`` rows into the fewest chunks of at most ``limit`` rows, of about equal size."""
    if count == 0:
        return []
    step = -(-count // -(-count // limit))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def sequence_chunks(bounds: list[int], limit: int) -> list[slice] | None:
    """Chunks of at most ``limit`` rows that end where a sequence ends; None where a sequence is longer.

    Args:
        bounds: B+1 sequence bounds, from 0 to the number of rows.
        limit: Largest number of rows in a chunk.
    """
    chunks, start = [], 0
    for end, following in zip(bounds[1:], [*bounds[2:], None], strict=True):
        if end - start > limit:
            return None
        if end > start and (following is None or following - start > limit):
            chunks.append(slice(start, end))
            start = end
    return chunks


def workspace(head: Head, chunks: list[slice]) -> Tensor:
    """Uninitialised [rows, V] scores for the largest chunk."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty(
        rows, head.weight.shape[0], dtype=compute_dtype(head.hidden.dtype), device=head.hidden.device
    )


def _tiles(head: Head) -> list[slice]:
    vocab = head.weight.shape[0]
    return [slice(start, min(start + VOCAB_TILE, vocab)) for start in range(0, vocab, VOCAB_TILE)]


def project(head: Head, rows: slice, space: Tensor) -> Tensor:
    """Scores hidden[rows] @ weight.T in fp32 or better, [C, V], in the first rows of ``space``."""
    hidden = head.hidden[rows]
    scores = space[: hidden.shape[0]]
    if hidden.dtype == scores.dtype:
        return torch.mm(hidden, head.weight.t(), out=scores)
    if hidden.is_cuda:
        return torch.mm(hidden, head.weight.t(), out_dtype=scores.dtype, out=scores)
    hidden = hidden.to(scores.dtype)
    for tile in _tiles(head):
        torch.mm(hidden, head.weight[tile].to(scores.dtype).t(), out=scores[:, tile])
    return scores


class Gradients:
    """Gradients of hidden, weight and bias, added up chunk by chunk; one not wanted costs nothing.

    They stay in the compute dtype until ``finish``, so that each is rounded to the dtype of its parameter
    only once.
    """

    def __init__(self, head: Head, wants: tuple[bool, ...]):
        """``wants``: whether hidden, weight and bias need a gradient."""
        self._wants = wants
        self._dtypes = (head.hidden.dtype, head.weight.dtype)
        self._shape = head.weight.shape
        self._device = device = head.hidden.device
        dtype = compute_dtype(head.hidden.dtype)
        self._dhidden = torch.zeros(head.hidden.shape, dtype=dtype, device=device) if wants[0] else None
        self._dweight: Tensor | None = None
        self._dbias = torch.zeros(self._shape[0], dtype=dtype, device=device) if wants[2] else None

    def add(self, head: Head, dscores: Tensor, rows: slice) -> None:
        """Add what the gradient with respect to the scores of ``rows``, [C, V], sends back."""
        hidden = head.hidden[rows]
        dtype = compute_dtype(hidden.dtype)
        if self._dbias is not None:
            self._dbias += dscores.sum(0, dtype=dtype)
        first = self._dweight is None
        if self._wants[1] and first:
            self._dweight = torch.empty(self._shape, dtype=dtype, device=hidden.device)
        dhidden = None if self._dhidden is None else self._dhidden[rows]
        if hidden.dtype == dtype or hidden.is_cuda:
            if dhidden is not None:
                _add_product(dhidden, dscores, head.weight, True)
            if self._dweight is not None:
                _add_product(self._dweight, dscores.t(), hidden, first)
            return
        hidden = hidden.to(dtype)
        for tile in _tiles(head):
            part = dscores[:, tile].to(dtype)
            if dhidden is not None:
                dhidden.addmm_(part, head.weight[tile].to(dtype))
            if self._dweight is not None:
                _add_product(self._dweight[tile], part.t(), hidden, first)

    def finish(
        self, put: Callable[[Tensor], Tensor], bias_dtype: torch.dtype | None, scale: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients times ``scale``, each in its dtype, that of hidden through ``put``; may run once."""
        if self._wants[1] and self._dweight is None:
            dtype = compute_dtype(self._dtypes[1])
            self._dweight = torch.zeros(self._shape, dtype=dtype, device=self._device)
        if self._dhidden is not None:
            self._dhidden = put(self._dhidden)
        totals = self._dhidden, self._dweight, self._dbias
        # the caller's reference must be the last one: autograd then takes the tensor instead of a copy
        self._dhidden = self._dweight = self._dbias = None
        dtypes: tuple[torch.dtype | None, ...] = (*self._dtypes, bias_dtype)
        if scale is not None:
            for total in totals:
                if total is not None:
                    total *= scale
        return tuple(None if x is None else x.to(d) for x, d in zip(totals, dtypes, strict=True))


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left @ right to ``total`` in its dtype; the first product overwrites it."""
    if left.dtype == total.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def rows_backend(head: Head):
    """The module whose ``stats`` and ``gradient`` work on rows of ``head``."""
    return row_kernels if head.hidden.is_cuda or row_kernels.INTERPRETED else row_cpu
