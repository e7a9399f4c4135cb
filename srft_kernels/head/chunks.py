"""The lm_head on a chunk of rows: which rows are computed, how many at a time, and their scores."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .._checks import check_vectors
from ..rows import cpu as row_cpu
from ..rows import gpu as row_kernels
from ..rows.types import Coefficients, RowArguments, Smoothing, Stats
from ..types import LoraDelta, VocabParallel
from ..vocab_parallel import merge, merge_smoothed

# Scores of one chunk and, on a GPU, gradients of scores that wait for their product. More rows make the weight
# gradient, which is read and written once a product, cheaper.
CPU_WORKSPACE_BYTES = 256 * 2**20
GPU_WORKSPACE_BYTES = 2 * 2**30
# On a GPU: rows of a product of the backward pass at most, and how many times as many they are as those whose fp32
# scores are held. Traffic of the fp32 weight gradient is 24 % of an H100's time for a product of 4,096 rows, and 61 %
# for one of 1,639, by its rates for products (728 TFLOP/s) and memory (3 TB/s).
_PRODUCT_ROWS = 4096
_CHUNKS_OF_A_PRODUCT = 4
# On a GPU: rows are a multiple of this, so that all chunks are aligned alike and fill the tiles of the products
_ROW_TILE = 128
# A product [rows, V] [V, D] is computed in tiles of 128 rows and 256 columns, of which an H100 or H200 takes 132 at
# once. Fixed numbers, so that results do not depend on the card.
_COLUMN_TILE = 256
_MULTIPROCESSORS = 132
# Rows of a 16-bit weight that are upcast at a time on CPU, where a 16-bit product accumulates in no more than
# its inputs.
VOCAB_TILE = 8192


class HeadRows(NamedTuple):
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
    smoothing: Smoothing | None = None

    @property
    def may_overwrite(self) -> bool:
        """Nothing but exp(logit - top) is needed of the scores once they were read."""
        return self.softcap is None and self.vocab_parallel is None and self.smoothing is None

    def at(self, rows: slice | Tensor) -> HeadRows:
        """The same for some of the rows, a slice or indices; on a GPU ignored rows get hidden states of 0.

        They stay in the products there, where 0 times their NaN or inf would be NaN.
        """
        hidden, labels = self.hidden[rows], self.labels[rows]
        if rows_backend(hidden) is row_kernels:
            hidden = hidden.masked_fill((labels == self.ignore_index)[:, None], 0.0)
        inv_temperature = None if self.inv_temperature is None else self.inv_temperature[rows]
        return self._replace(hidden=hidden, labels=labels, inv_temperature=inv_temperature)

    def row_arguments(self, grad_scale: float = 1.0) -> RowArguments:
        """The part of the arguments that the row kernel needs."""
        return RowArguments(
            self.labels, self.inv_temperature, self.bias, self.softcap, self.ignore_index,
            self.hidden.dtype, grad_scale, self.smoothing,
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


_Rows = TypeVar("_Rows", HeadRows, Stats, Coefficients)


class Live(NamedTuple):
    """Rows of a chunk that take part in its gradient products; the others' coefficients are 0."""

    positions: Tensor | None
    """[m] their positions, in order, or None for every row."""
    blocks: list[slice]
    """Of the m rows, those in each block of rows of the chunk."""

    def of(self, rows: _Rows) -> _Rows:
        """What ``rows``, the rows of the chunk, have of these."""
        return rows if self.positions is None else rows.at(self.positions)

    def scores(self, scores: Tensor) -> Tensor:
        """These rows of ``scores`` [C, V], moved to its front; row by row, for memory."""
        if self.positions is None:
            return scores
        for target, source in enumerate(self.positions.tolist()):
            if target != source:
                scores[target] = scores[source]
        return scores[: len(self.positions)]


# Rows that one product adds to the weight gradient on CPU. The library sums a block of 2 to 192 fp32 rows one by one,
# so that rows of zeros can be left out without a change of any bit; measured, it costs no time. A row alone has other
# bits on an Intel CPU. Logits in 16 bits and LoRA have other products, where the last bits may change.
_BLOCK_ROWS = 128
# A CPU's product of a multiple of 16 rows gives each row the same bits, whatever the number of rows: found so for
# fp32, fp64 and bf16 and one or several threads. For some D that are no multiple of 4 the place of a row counts too.
_ROW_MULTIPLE = 16


def live_rows(count: int, coefficients: Coefficients | None, drop: bool) -> Live:
    """Which of ``count`` rows have a coefficient that is not 0.

    Gradients of the others are exactly 0. On a GPU, to leave them out would make the host wait for their
    number, so they stay.

    Args:
        count: Rows of the chunk.
        coefficients: Of these rows; None where they are not known, so that all are live.
        drop: Leave dead rows out; needs the rows on CPU.
    """
    if not drop:
        return Live(None, [slice(0, count)])
    if coefficients is None:
        return Live(None, _blocks(count))
    dlogp, dentropy = coefficients
    live = dlogp != 0
    if dentropy is not None:
        live |= dentropy != 0
    for block in live.split(_BLOCK_ROWS):
        if int(block.sum()) == 1:
            block[(~block).nonzero()[:1, 0]] = True
    number = int(live.sum())
    padded = min(count, _padded(number))
    if padded == count:
        return Live(None, _blocks(count))
    live[(~live).nonzero()[: padded - number, 0]] = True
    positions = live.nonzero()[:, 0]
    edges = torch.searchsorted(positions, torch.arange(0, count + _BLOCK_ROWS, _BLOCK_ROWS)).tolist()
    return Live(positions, [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]])


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


def drops_dead_rows(head: HeadRows) -> bool:
    """Rows without a gradient can be left out of products without making the host wait."""
    return rows_backend(head.hidden) is row_cpu


class Chunking(NamedTuple):
    """How many rows are computed at a time: the same for any number of tokens, and on every rank of a VocabParallel."""

    scores: int
    """Rows of a chunk, whose scores are in memory at once."""
    products: int
    """Rows of a product of the backward pass, at most."""
    gathered: bool
    """Gradients of the scores get memory of their own, where those of several chunks wait for one product."""
    even: bool
    """Rows are split into chunks of about equal size instead of full ones and a rest."""

    def split(self, start: int, stop: int) -> list[slice]:
        """Rows ``start:stop`` as chunks, which do not cross the bounds of products."""
        if start == stop:
            return []
        if self.even:
            step = -(-(stop - start) // -(-(stop - start) // self.scores))
            return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
        return [
            slice(first, min(first + self.scores, product + self.products, stop))
            for product in range(start, stop, self.products)
            for first in range(product, min(product + self.products, stop), self.scores)
        ]


def chunking(head: HeadRows, together: bool = False) -> Chunking:
    """Rows that fit in the workspace.

    Args:
        head: Gives sizes and dtypes; how many rows it has does not matter.
        together: Chunks are to hold as many rows as possible, since coefficients depend on several rows.
    """
    vocab, width = head.weight.shape
    if head.vocab_parallel is not None:
        vocab = -(-head.vocab_parallel.vocab_size // head.vocab_parallel.group.size())
    return chunk_sizes(
        vocab, width, head.scores_dtype, head.hidden.dtype, together=together, in_gpu_memory=head.hidden.is_cuda,
        on_cpu=rows_backend(head.hidden) is row_cpu,
    )  # fmt: skip


def chunk_sizes(
    vocab: int,
    width: int,
    scores: torch.dtype,
    hidden: torch.dtype,
    *,
    together: bool,
    in_gpu_memory: bool,
    on_cpu: bool,
) -> Chunking:
    """As ``chunking``, from sizes and dtypes alone.

    Args:
        vocab: Columns of the scores.
        width: Of the hidden states.
        scores: Dtype of the scores.
        hidden: Dtype of the hidden states.
        together: As for ``chunking``.
        in_gpu_memory: The workspace is a GPU's.
        on_cpu: Rows are computed by the CPU's functions, in place.
    """
    budget = GPU_WORKSPACE_BYTES if in_gpu_memory else CPU_WORKSPACE_BYTES
    score_bytes, gradient_bytes = vocab * scores.itemsize, vocab * hidden.itemsize
    if on_cpu:
        rows = max(_ROW_MULTIPLE, budget // score_bytes // _ROW_MULTIPLE * _ROW_MULTIPLE)
        return Chunking(rows, rows, gathered=False, even=True)
    if scores == hidden:
        rows = _fast_rows(min(_PRODUCT_ROWS, _fitting_rows(budget, score_bytes)), width)
        return Chunking(rows, rows, gathered=False, even=False)
    if together:
        rows = _fitting_rows(budget, score_bytes + gradient_bytes)
        return Chunking(rows, rows, gathered=True, even=False)
    rows = _fitting_rows(budget, score_bytes + _CHUNKS_OF_A_PRODUCT * gradient_bytes)
    rows = min(rows, _PRODUCT_ROWS // _CHUNKS_OF_A_PRODUCT)
    return Chunking(rows, _fast_rows(_CHUNKS_OF_A_PRODUCT * rows, width), gathered=True, even=False)


def _fitting_rows(budget: int, row_bytes: int) -> int:
    """Rows that fit in ``budget`` bytes: a multiple of 128, or where not even those fit, of 16."""
    rows = budget // row_bytes
    return rows // _ROW_TILE * _ROW_TILE or max(_ROW_MULTIPLE, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def _fast_rows(limit: int, width: int) -> int:
    """Rows from half of ``limit`` to all, of which a product [rows, V] [V, ``width``] wastes the least of a GPU."""

    def share(rows: int) -> float:
        tiles = rows // _ROW_TILE * -(-width // _COLUMN_TILE)
        return tiles / (-(-tiles // _MULTIPROCESSORS) * _MULTIPROCESSORS)

    choices = range(limit // 2 // _ROW_TILE * _ROW_TILE + _ROW_TILE, limit + 1, _ROW_TILE)
    return max(choices, key=lambda rows: (share(rows), rows), default=limit)


def _padded(rows: int) -> int:
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def workspace(head: HeadRows, chunks: list[slice]) -> Tensor:
    """Uninitialised [rows, V] scores for the largest chunk, with room for ``project`` to pad it."""
    rows = _padded(max((chunk.stop - chunk.start for chunk in chunks), default=0))
    return scores_memory(head, rows, head.scores_dtype)


def scores_memory(head: HeadRows, rows: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [rows, V]; on a GPU, rows begin at multiples of 16 numbers, for vector loads and fast products."""
    vocab = head.weight.shape[0]
    stride = vocab if rows_backend(head.hidden) is row_cpu else -(-vocab // 16) * 16
    return torch.empty(rows, stride, dtype=dtype, device=head.hidden.device)[:, :vocab]


def vocab_tiles(head: HeadRows) -> list[slice]:
    """Rows of the weight, VOCAB_TILE at a time."""
    vocab = head.weight.shape[0]
    return [slice(start, min(start + VOCAB_TILE, vocab)) for start in range(0, vocab, VOCAB_TILE)]


def low_rank_input(head: HeadRows) -> Tensor:
    """scale hidden a^T, [C, r] in the compute dtype."""
    assert head.lora is not None
    dtype = compute_dtype(head.hidden.dtype)
    return (head.hidden.to(dtype) @ head.lora.a.to(dtype).t()).mul_(head.lora.scale)


def project(head: HeadRows, space: Tensor) -> Tensor:
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


def row_stats(head: HeadRows, scores: Tensor, overwrite: bool) -> Stats:
    """Statistics of whole rows from the scores of this rank's columns, [C, V]; see the backends' ``stats``."""
    if head.vocab_parallel is None:
        return rows_backend(scores).stats(scores, head.row_arguments(), overwrite)
    rows, stats = head.row_arguments()._replace(smoothing=None), rows_backend(scores).stats
    known = merge(stats(scores, rows, overwrite=False), head.labels >= 0, head.vocab_parallel)
    if head.smoothing is None:
        return known
    # eps = 1 asks for nothing but the mean
    own = stats(scores, rows._replace(smoothing=Smoothing(1.0, 0.0)), overwrite=False)
    return merge_smoothed(known, own, head.smoothing, head.vocab_parallel)
