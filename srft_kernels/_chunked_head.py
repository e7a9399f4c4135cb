"""The lm_head on a chunk of rows: which rows are computed, how many at a time, and their scores."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _row_cpu as row_cpu
from . import row_kernels
from ._checks import check_vectors
from ._row_cpu import Rows, Stats
from .vocab_parallel import VocabParallel, merge

# Scores of one chunk. More rows make the weight gradient, which is read and written once a chunk, cheaper.
CPU_WORKSPACE_BYTES = 256 * 2**20
GPU_WORKSPACE_BYTES = 2**30
# Rows of a 16-bit weight that are upcast at a time on CPU, where a 16-bit product accumulates in no more than
# its inputs.
VOCAB_TILE = 8192


class LoraDelta(NamedTuple):
    """A low-rank change of an lm_head: its logits gain ``scale`` (hidden a^T) b^T."""

    a: Tensor
    """[r, D] floating point, may need a gradient."""
    b: Tensor
    """[V, r] floating point, may need a gradient; with VocabParallel this rank's rows."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""


class Head(NamedTuple):
    """The arguments that every op shares, of the rows that are computed."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [n], counted from the first row of weight
    bias: Tensor | None  # [V] in the compute dtype
    inv_temperature: Tensor | None  # [n]
    softcap: float | None
    ignore_index: int
    lora: LoraDelta | None
    vocab_parallel: VocabParallel | None
    scores_dtype: torch.dtype

    def at(self, rows: slice | Tensor) -> Head:
        """The same for some of the rows, a slice or indices."""
        inv_temperature = None if self.inv_temperature is None else self.inv_temperature[rows]
        return self._replace(
            hidden=self.hidden[rows], labels=self.labels[rows], inv_temperature=inv_temperature
        )

    def rows(self, grad_scale: float = 1.0) -> Rows:
        """The part of the arguments that the row kernel needs."""
        return Rows(
            self.labels, self.inv_temperature, self.bias, self.softcap, self.ignore_index,
            self.hidden.dtype, grad_scale,
        )  # fmt: skip


class Tokens:
    """Which of the N rows are computed, and the maps between vectors over all rows and over those.

    On CPU the ignored rows are dropped. On a GPU that would need a device sync, so they stay, with inputs and
    results 0.
    """

    def __init__(self, labels: Tensor, ignore_index: int):
        """Rows of ``labels`` [N] that are not ``ignore_index``."""
        self.mask = labels != ignore_index
        self.kept = None
        if rows_backend(labels) is row_cpu and not bool(self.mask.all()):
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


def taking_part(labels: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    """``labels``, with ``ignore_index`` at tokens of weight 0, so that nothing else of theirs is looked at.

    What is of the wrong kind is left to the checks of the head.
    """
    if token_weights is None or not (isinstance(labels, Tensor) and isinstance(ignore_index, int)):
        return labels
    check_vectors(labels, token_weights=token_weights)
    return torch.where(token_weights == 0, ignore_index, labels)


class Live(NamedTuple):
    """Rows of a chunk that take part in its gradient products; the others' coefficients are 0."""

    positions: Tensor | None
    """[m] their positions, in order, or None for every row."""
    blocks: list[slice]
    """Of the m rows, those in each block of rows of the chunk."""


# Rows that one product adds to the weight gradient on CPU. The library sums a block of at most 192 fp32 rows
# one by one, so that rows of zeros can be left out without a change of any bit; measured, it costs no time. Logits
# in 16 bits and LoRA have other products, where the last bits may change.
_BLOCK_ROWS = 128
# A CPU's product of a multiple of 16 rows gives each row the same bits, whatever the number of rows: found so for
# fp32, fp64 and bf16 and one or several threads. For some D that are no multiple of 4 the place of a row counts too.
_ROW_MULTIPLE = 16


def live_rows(count: int, dlogp: Tensor | None, dentropy: Tensor | None, drop: bool) -> Live:
    """Which of ``count`` rows have a coefficient that is not 0.

    Gradients of the others are exactly 0. On a GPU, to leave them out would make the host wait for their
    number, so they stay.

    Args:
        count: Rows of the chunk.
        dlogp: [count] coefficients; None for all live.
        dentropy: The same, or None for zeros.
        drop: Leave dead rows out; needs the rows on CPU.
    """
    if not drop:
        return Live(None, [slice(0, count)])
    if dlogp is None:
        return Live(None, _blocks(count))
    live = dlogp != 0
    if dentropy is not None:
        live |= dentropy != 0
    number = int(live.sum())
    padded = min(count, _padded(number))
    if padded == count:
        return Live(None, _blocks(count))
    live[(~live).nonzero()[: padded - number, 0]] = True
    positions = live.nonzero()[:, 0]
    edges = torch.searchsorted(positions, torch.arange(0, count + _BLOCK_ROWS, _BLOCK_ROWS)).tolist()
    return Live(positions, [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]])


def keep_live(scores: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (rising) of ``scores`` [C, V], moved to its front; row by row, for memory."""
    for target, source in enumerate(index.tolist()):
        if target != source:
            scores[target] = scores[source]
    return scores[: len(index)]


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK_ROWS, count)) for start in range(0, count, _BLOCK_ROWS)]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for anything less."""
    return torch.promote_types(dtype, torch.float32)


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` as a tensor on ``device``; a copy of a Python number would make a GPU wait."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)


def rows_backend(like: Tensor):
    """The module whose ``stats`` and ``gradient`` work on rows on the device of ``like``."""
    return row_kernels if like.is_cuda or row_kernels.INTERPRETED else row_cpu


def drops_dead_rows(head: Head) -> bool:
    """Rows without a gradient can be left out of products without making the host wait."""
    return rows_backend(head.hidden) is row_cpu


def max_rows(head: Head) -> int:
    """Rows whose scores fit in the workspace; the same on every rank of a VocabParallel group."""
    size = CPU_WORKSPACE_BYTES if head.hidden.device.type == "cpu" else GPU_WORKSPACE_BYTES
    vocab = head.weight.shape[0]
    if head.vocab_parallel is not None:
        vocab = -(-head.vocab_parallel.vocab_size // head.vocab_parallel.group.size())
    return max(16, size // (vocab * head.scores_dtype.itemsize) // 16 * 16)


def even_chunks(start: int, stop: int, limit: int) -> list[slice]:
    """Split rows ``start:stop`` into the fewest chunks of at most ``limit`` rows, of about equal size."""
    if start == stop:
        return []
    step = -(-(stop - start) // -(-(stop - start) // limit))
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _padded(rows: int) -> int:
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def workspace(head: Head, chunks: list[slice]) -> Tensor:
    """Uninitialised [rows, V] scores for the largest chunk, with room for ``project`` to pad it."""
    rows = _padded(max((chunk.stop - chunk.start for chunk in chunks), default=0))
    return torch.empty(rows, head.weight.shape[0], dtype=head.scores_dtype, device=head.hidden.device)


def vocab_tiles(head: Head) -> list[slice]:
    """Rows of the weight, VOCAB_TILE at a time."""
    vocab = head.weight.shape[0]
    return [slice(start, min(start + VOCAB_TILE, vocab)) for start in range(0, vocab, VOCAB_TILE)]


def low_rank_input(head: Head) -> Tensor:
    """scale hidden a^T, [C, r] in the compute dtype."""
    assert head.lora is not None
    dtype = compute_dtype(head.hidden.dtype)
    return (head.hidden.to(dtype) @ head.lora.a.to(dtype).t()).mul_(head.lora.scale)


def project(head: Head, space: Tensor) -> Tensor:
    """Scores hidden @ weight.T, [C, V], in the first rows of ``space``.

    On a CPU rows of zeros fill up the last block of rows, so that the scores of a token do not depend on how many
    others there are (but for the thin products of LoRA).
    """
    rows, hidden, weight = head.hidden.shape[0], head.hidden, head.weight
    if not hidden.is_cuda and rows % _ROW_MULTIPLE:
        hidden = torch.cat([hidden, hidden.new_zeros(_padded(rows) - rows, hidden.shape[1])])
        head = head._replace(hidden=hidden)
    scores = space[: hidden.shape[0]]
    if hidden.dtype == scores.dtype:
        torch.mm(hidden, weight.t(), out=scores)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=scores.dtype, out=scores)
    else:
        hidden = hidden.to(scores.dtype)
        for tile in vocab_tiles(head):
            torch.mm(hidden, weight[tile].to(scores.dtype).t(), out=scores[:, tile])
    if head.lora is not None:
        scores.addmm_(low_rank_input(head).to(scores.dtype), head.lora.b.to(scores.dtype).t())
    return scores[:rows]


def row_stats(head: Head, scores: Tensor, overwrite: bool) -> Stats:
    """Statistics of whole rows from the scores of this rank's columns, [C, V]; see the backends' ``stats``."""
    if head.vocab_parallel is None:
        return rows_backend(scores).stats(scores, head.rows(), overwrite)
    known = rows_backend(scores).stats(scores, head.rows(), overwrite=False)
    return merge(known, head.labels >= 0, head.vocab_parallel)
