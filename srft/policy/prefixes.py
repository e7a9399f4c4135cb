"""Prompts that several sequences of a packed row share: whose tokens each sequence reads before its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefixes:
    """What each of B sequences reads before its own tokens, without having it in the row.

    Args:
        lengths: [B] int64 on the CPU, tokens; 0 where a sequence has its prompt itself.
        starts: [B] int64 on the CPU, where these tokens begin: at the nearest sequence before that has its prompt.
        cu_seqlens: [B+1] int32 on the CPU, bounds of the sequences' own tokens.
        cu_seqlens_k: [B+1] int32 on the CPU, bounds of what each reads, its own tokens among it.
    """

    lengths: Tensor
    starts: Tensor
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor

    def joined(self, *tensors: Tensor) -> list[Tensor]:
        """Put before each sequence's own tokens those that it reads of another.

        Args:
            tensors: [T, ...] of every token of the row, on one device.

        Returns:
            Of each [T_k, ...] within ``cu_seqlens_k``.
        """
        device = tensors[0].device
        own = self.cu_seqlens[:-1].long() - self.lengths
        reads = self.cu_seqlens_k.diff().long().to(device)
        total = int(self.cu_seqlens_k[-1])
        first, start, own, length = (
            each.to(device).long().repeat_interleave(reads, output_size=total)
            for each in (self.cu_seqlens_k[:-1], self.starts, own, self.lengths)
        )
        place = torch.arange(total, device=device) - first
        index = place + torch.where(place < length, start, own)
        return [select_repeated(x, index) for x in tensors]

    def readers(self) -> Tensor:
        """Return how many sequences read each token of the row, [T] int64 on the CPU."""
        shared = self.lengths > 0
        ends = torch.zeros(int(self.cu_seqlens[-1]) + 1, dtype=torch.int64)
        starts = self.starts[shared]
        ends.index_add_(0, starts, torch.ones_like(starts))
        ends.index_add_(0, starts + self.lengths[shared], -torch.ones_like(starts))
        return 1 + ends.cumsum(0)[:-1]

    def padded(self, members: Tensor, device: torch.device) -> PaddedPrefixes:
        """Return what some sequences read before their own tokens, each filled up on the right to the longest.

        Args:
            members: Numbers of these sequences, each of which reads something.
            device: Where it is used.
        """
        lengths = self.lengths[members]
        starts, which = self.starts[members].unique(return_inverse=True)
        held = torch.zeros_like(starts).scatter_(0, which, lengths)
        steps = torch.arange(int(lengths.max()))
        rows = starts[:, None] + steps * (steps < held[:, None])
        same = lengths[:1] if bool((lengths == lengths[0]).all()) else lengths
        return PaddedPrefixes(rows.to(device), which.to(device), same.to(device))


@dataclass(frozen=True)
class PaddedPrefixes:
    """Prompts of b sequences of like length, on a device.

    Args:
        rows: [g, p] int64, the tokens of each prompt; filled up with its first one.
        which: [b] int64, the prompt of each sequence.
        lengths: [b] tokens of it, or [1] where all have as many.
    """

    rows: Tensor
    which: Tensor
    lengths: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Return [b, p, ...] of the prompts' tokens.

        Args:
            x: [T, ...] of every token of the row.
        """
        return select_repeated(x[self.rows], self.which)

    def visible(self, tokens: int, window: int | None) -> Tensor:
        """Return which of the prompt's and the own tokens each own token sees: [b or 1, 1, tokens, p + tokens] bool.

        Args:
            tokens: Own ones, padding among them.
            window: Tokens that one sees, itself among them; None: all before it.
        """
        device, p = self.rows.device, self.rows.shape[1]
        own, before = torch.arange(tokens, device=device), torch.arange(p, device=device)
        lengths = self.lengths[:, None, None]
        # positions of the keys and, beside them, of the queries
        keys = torch.cat([before.expand(len(lengths), 1, p), lengths + own], 2)
        real = torch.cat([before < lengths, torch.ones_like(own, dtype=torch.bool).expand(len(lengths), 1, tokens)], 2)
        back = (lengths + own[:, None]) - keys
        seen = real & (back >= 0)
        return (seen if window is None else seen & (back < window))[:, None]


def prefixes_of(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> Prefixes | None:
    """Read from the bounds what is shared; None where nothing is.

    Args:
        cu_seqlens: [B+1] bounds of the sequences' own tokens, on the CPU.
        cu_seqlens_k: [B+1] bounds of what each reads; None: its own tokens alone.
    """
    if cu_seqlens_k is None or cu_seqlens_k is cu_seqlens or torch.equal(cu_seqlens_k, cu_seqlens):
        return None
    lengths = (cu_seqlens_k.diff() - cu_seqlens.diff()).long()
    whole = torch.where(lengths == 0, torch.arange(len(lengths)), 0).cummax(0).values
    return Prefixes(lengths, cu_seqlens[:-1].long()[whole], cu_seqlens, cu_seqlens_k)


def select_repeated(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, where the gradients of a row that is taken several times are added up in fp32 or better.

    On a CPU they are added in the order of ``index``, so that two runs give the same bits; indexing would not.

    Args:
        x: [T, ...].
        index: [N] int64.
    """
    return _SelectRepeated.apply(x, index)


class _SelectRepeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dtype = torch.promote_types(dy.dtype, torch.float32)
        dx = torch.zeros(ctx.rows, *dy.shape[1:], dtype=dtype, device=dy.device)
        return dx.index_add_(0, index, dy.to(dtype)).to(dy.dtype), None
