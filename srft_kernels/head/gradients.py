"""Gradients of a head's inputs, added up over chunks of rows in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..rows import rounding
from ..types import Inputs, Wanted
from .chunks import HeadRows, Live, compute_dtype, low_rank_input, vocab_tiles

# Numbers that are rounded first, through a temporary.
_ROUNDED_FIRST = 2**24
# Columns of a 16-bit gradient of the scores that are upcast at a time for a thin product on CPU.
_THIN_TILE = 8192

# Rows that one product takes: a run of them, or positions, whose scores are then copied.
Block = slice | Tensor


class _Sums:
    """Gradients of the parameters: a sum over rows each, allocated when the first rows come."""

    def __init__(self, head: HeadRows, wanted: Wanted, weight_grad: Tensor | None):
        self._wanted, self._empty = wanted, True
        self._dtype = compute_dtype(head.hidden.dtype)
        self.dweight = weight_grad
        self._external = weight_grad is not None
        self.dbias: Tensor | None = None
        self.da: Tensor | None = None
        self.db: Tensor | None = None

    def add(
        self, part: HeadRows, dscores: Tensor, blocks: Sequence[Block], alpha: float, by: Tensor | None
    ) -> None:
        """Add the share of some rows, each times ``by`` [m] where it is given.

        Args:
            part: The rows.
            dscores: [m, V] gradient of their scores, divided by ``alpha``.
            blocks: Rows that one product takes.
            alpha: See ``dscores``.
            by: Moves a coefficient of each row from ``dscores`` onto the hidden states, which are fewer.
        """
        if by is not None and not by.is_cuda:
            blocks = [rows for block in blocks if (rows := _nonzero(by, block)) is not None]
        if not blocks or not any(self._wanted[1:]):
            return
        hidden = part.hidden
        if by is not None:
            hidden = hidden * by.to(hidden.dtype if hidden.is_cuda else self._dtype)[:, None]
        if self._wanted.weight:
            if self.dweight is None:
                self.dweight = torch.empty(part.weight.shape, dtype=self._dtype, device=hidden.device)
            _add_weight_products(
                self.dweight, part, dscores, hidden, blocks, alpha, self._empty and not self._external
            )
        self._add_small(part, dscores, blocks, alpha, by)
        self._empty = False

    def _add_small(
        self, part: HeadRows, dscores: Tensor, blocks: Sequence[Block], alpha: float, by: Tensor | None
    ) -> None:
        if self._wanted.bias:
            if by is None:
                dbias = _column_sums(dscores, blocks, self._dtype).mul_(alpha)
            else:
                dbias = torch.mv(dscores.t(), by.to(dscores.dtype)).to(self._dtype).mul_(alpha)
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)
        if part.lora is not None and (self._wanted.lora_a or self._wanted.lora_b):
            assert by is None
            if self._wanted.lora_b:
                db = _tiled_product(dscores.t(), low_rank_input(part).mul_(alpha), self._dtype)
                self.db = db if self.db is None else self.db.add_(db)
            if self._wanted.lora_a:
                low = _tiled_product(dscores, part.lora.b, self._dtype).mul_(alpha * part.lora.scale)
                da = low.t() @ part.hidden.to(self._dtype)
                self.da = da if self.da is None else self.da.add_(da)

    def take(self, other: _Sums, scalar: Tensor) -> None:
        """Add ``scalar`` [] times ``other``, which is empty afterwards and keeps its memory."""
        if other._empty:
            return
        assert self.da is None and self.db is None
        if other.dbias is not None:
            other.dbias *= scalar
            self.dbias = other.dbias if self.dbias is None else self.dbias.add_(other.dbias)
            other.dbias = None
        if other.dweight is not None:
            if self.dweight is None:
                self.dweight = torch.empty_like(other.dweight)
            if self._empty and not self._external:
                torch.mul(other.dweight, scalar, out=self.dweight)
            else:
                self.dweight.addcmul_(other.dweight, scalar)
        self._empty, other._empty = False, True


class Parts(NamedTuple):
    """Coefficients of C rows by logp that wait for scalars: fixed + sum_k scalar_k scaled_k."""

    fixed: Tensor | None
    """[C], or None for zeros."""
    scaled: list[Tensor]
    """K vectors [C], whose scalars ``Gradients.settle`` brings."""


class Gradients:
    """Gradients of hidden, weight, bias and LoRA; one not wanted costs nothing."""

    def __init__(self, head: HeadRows, inputs: Inputs, wanted: Wanted, weight_grad: Tensor | None):
        """Of the rows of ``head``; ``weight_grad`` [V, D] takes the gradient of the weight, if given."""
        self._wanted, self.external = wanted, weight_grad is not None
        self._returned = wanted._replace(weight=wanted.weight and not self.external)
        self._group = None if head.vocab_parallel is None else head.vocab_parallel.group
        # shapes and dtypes alone: a weight that was gathered or cast may then go before backward
        self._device = head.hidden.device
        self._like = [torch.empty(0) if x is None else torch.empty_like(x, device="meta") for x in inputs]
        self._sums: _Sums | None = _Sums(head, self._wanted, weight_grad)
        self._deferred: list[_Sums] = []
        self._dhidden: Tensor | None = None
        if self._wanted.hidden:
            dtype = compute_dtype(head.hidden.dtype)
            self._dhidden = torch.zeros(head.hidden.shape, dtype=dtype, device=head.hidden.device)

    def add(
        self,
        part: HeadRows,
        dscores: Tensor,
        rows: slice,
        live: Live,
        alpha: float = 1.0,
        parts: Parts | None = None,
    ) -> None:
        """Add what some rows send back.

        Args:
            part: The live rows of the chunk.
            dscores: [m, V] gradient of their scores, divided by ``alpha``; with ``parts`` for a coefficient of 1.
            rows: Where the chunk is among all rows.
            live: Where the live rows are in the chunk; with ``parts`` all are.
            alpha: A power of two.
            parts: Of the coefficients, where these are not known before ``settle``.
        """
        assert self._sums is not None
        if part.labels.numel() == 0:
            return
        self._add_hidden(part, dscores, rows, live.positions, alpha)
        if parts is None:
            self._sums.add(part, dscores, live.blocks, alpha, None)
            return
        assert live.positions is None
        if parts.fixed is not None:
            self._sums.add(part, dscores, live.blocks, alpha, parts.fixed)
        while len(self._deferred) < len(parts.scaled):
            self._deferred.append(_Sums(part, self._wanted, None))
        for sums, by in zip(self._deferred, parts.scaled, strict=True):
            sums.add(part, dscores, live.blocks, alpha, by)

    def settle(self, rows: slice, dlogp: Tensor, scalars: list[Tensor]) -> None:
        """Finish ``rows`` that were added in parts: [n] their coefficients by logp, and the K scalars [] of these."""
        assert self._sums is not None
        if self._dhidden is not None:
            self._dhidden[rows] *= dlogp[:, None]
        for sums, scalar in zip(self._deferred, scalars, strict=True):
            self._sums.take(sums, scalar)

    def _add_hidden(
        self, part: HeadRows, dscores: Tensor, rows: slice, positions: Tensor | None, alpha: float
    ) -> None:
        if self._dhidden is None:
            return
        out, weight = self._dhidden[rows], part.weight
        product = out if positions is None else out.new_empty(len(positions), out.shape[1])
        if dscores.dtype == out.dtype and weight.dtype == out.dtype:
            torch.mm(dscores, weight, out=product)
        elif dscores.is_cuda:
            torch.mm(dscores, weight, out_dtype=out.dtype, out=product)
        elif part.scores_dtype == weight.dtype:
            product.copy_(torch.mm(dscores, weight))
        else:
            product.zero_()
            for tile in vocab_tiles(part):
                product.addmm_(dscores[:, tile].to(out.dtype), weight[tile].to(out.dtype))
        if part.lora is not None:
            low = _tiled_product(dscores, part.lora.b, out.dtype)
            product.addmm_(low, part.lora.a.to(out.dtype), alpha=part.lora.scale)
        if alpha != 1.0:
            product *= alpha
        if positions is not None:
            out.index_copy_(0, positions, product)

    def reduce(self) -> None:
        """Add up, over the ranks that hold the other columns, the gradients of what every rank has."""
        if self._group is not None:
            assert self._sums is not None
            for total in (self._dhidden, self._sums.da):
                if total is not None:
                    dist.all_reduce(total, group=self._group)

    def directions(self) -> Tensor:
        """The gradient of hidden [n, D] as it stands, in the compute dtype."""
        assert self._dhidden is not None
        return self._dhidden

    def totals(self, put: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        """Gradients in the compute dtype, that of hidden through ``put``; may run once.

        With ``weight_grad`` the gradient of the weight is there already, and None here.
        """
        assert self._sums is not None
        sums, self._sums, self._deferred = self._sums, None, []
        dweight = None if self.external else sums.dweight
        dhidden = None if self._dhidden is None else put(self._dhidden)
        totals = [dhidden, dweight, sums.dbias, sums.da, sums.db]
        # the caller's reference must be the last one: autograd then takes the tensor instead of a copy
        self._dhidden = sums.dweight = sums.dbias = sums.da = sums.db = None
        for i, x in enumerate(self._like):
            # no row took part
            if self._returned[i] and totals[i] is None:
                totals[i] = torch.zeros_like(x, dtype=sums._dtype, device=self._device)
        return totals

    def finish(
        self, put: Callable[[Tensor], Tensor], scale: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """``totals`` times ``scale``, each in its dtype; may run once."""
        return tuple(
            None if total is None else _rounded(total, x.dtype, scale)
            for total, x in zip(self.totals(put), self._like, strict=True)
        )


def _rounded(total: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """``total`` times ``scale`` [] in ``dtype``, read once and written once.

    It lies in the front of its own memory: a weight has no room for two gradients.
    """
    if total.element_size() <= dtype.itemsize or not total.is_contiguous() or total.storage_offset():
        return (total if scale is None else total.mul_(scale)).to(dtype)
    wide = total.view(-1)
    narrow = wide.new_empty(0, dtype=dtype).set_(total.untyped_storage(), 0, wide.shape, (1,))
    # only the first part covers its own source, and none what is read later
    pairs = list(zip(_doubling(narrow), _doubling(wide), strict=True))
    for part, source in pairs:
        target = torch.empty_like(part) if part is pairs[0][0] else part
        if scale is None:
            target.copy_(source)
        elif total.is_cuda:
            rounding.scaled(source, scale, target)
        else:
            torch.mul(source, scale, out=target)
        if target is not part:
            part.copy_(target)
    return narrow.view(total.shape)


def _doubling(flat: Tensor) -> list[Tensor]:
    """``flat`` [n] in parts, each but the first as large as all before it."""
    ends = [0, _ROUNDED_FIRST]
    while ends[-1] < flat.numel():
        ends.append(2 * ends[-1])
    return [flat[start:end] for start, end in pairwise(ends)]


def _nonzero(by: Tensor, block: Block) -> Block | None:
    """The rows of ``block`` where ``by`` is not 0: all of them, some, or None."""
    rows = by[block].nonzero()[:, 0]
    if rows.numel() == by[block].numel():
        return block
    assert isinstance(block, slice)
    return rows + block.start if rows.numel() else None


def _column_sums(dscores: Tensor, blocks: Sequence[Block], dtype: torch.dtype) -> Tensor:
    """Sum over rows [V]; on CPU one row after another within a block, so that rows of zeros change no bit."""
    if dscores.is_cuda:
        return dscores.sum(0, dtype=dtype)
    total = torch.zeros(dscores.shape[1], dtype=dtype)
    for block in blocks:
        part = torch.zeros_like(total)
        for row in dscores[block]:
            part += row
        total += part
    return total


def _tiled_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in ``dtype``, for a thin ``right`` [n, r]."""
    if left.dtype == dtype:
        return left @ right.to(dtype)
    if left.is_cuda:
        return torch.mm(left, right.to(left.dtype), out_dtype=dtype)
    total = torch.zeros(left.shape[0], right.shape[1], dtype=dtype)
    for start in range(0, left.shape[1], _THIN_TILE):
        tile = slice(start, start + _THIN_TILE)
        total.addmm_(left[:, tile].to(dtype), right[tile].to(dtype))
    return total


def _add_weight_products(
    total: Tensor, part: HeadRows, dscores: Tensor, hidden: Tensor, blocks: Sequence[Block], alpha: float, first: bool
) -> None:
    """Add dscores.T @ hidden to ``total`` [V, D], block of rows by block; ``first`` overwrites it instead."""
    if part.weight.dtype == total.dtype or dscores.is_cuda:
        for block in blocks:
            _add_product(total, dscores[block].t(), hidden[block], alpha, first and block is blocks[0])
        return
    for tile in vocab_tiles(part):
        scores = dscores[:, tile]
        if part.scores_dtype == hidden.dtype:
            # rounded to 16 bits once a chunk, added up in fp32
            product = torch.mm(scores.t(), hidden)
            if first:
                torch.mul(product, alpha, out=total[tile])
            else:
                total[tile].add_(product, alpha=alpha)
            continue
        scores, wide = scores.to(total.dtype), hidden.to(total.dtype)
        for block in blocks:
            _add_product(total[tile], scores[block].t(), wide[block], alpha, first and block is blocks[0])


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float, first: bool) -> None:
    """Add alpha left @ right to ``total`` in its dtype; the first product overwrites it."""
    beta = 0.0 if first else 1.0
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)
