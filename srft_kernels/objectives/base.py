"""A loss that is a sum over tokens, as the sweep sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formulas import TokenFormula

__all__ = ["TokenObjective", "local_offsets", "scope_mean", "sequence_mean"]


def sequence_mean(values: Tensor, valid: Tensor, offsets: Tensor) -> Tensor:
    """Mean of ``values`` over the valid tokens of each token's own sequence, [n]; differentiable.

    Args:
        values: [n] floating point.
        valid: [n] bool, the tokens that count.
        offsets: [B+1] int64, on the device of ``values``; sequence b is ``offsets[b]:offsets[b+1]``.
    """
    if values.numel() == 0:
        return values
    # float64: segment_reduce adds one by one
    masked = torch.where(valid, values, 0.0).double()
    sums = torch.segment_reduce(masked, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    counts = torch.segment_reduce(valid.double(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    positions = torch.arange(values.numel(), device=values.device)
    own = torch.searchsorted(offsets, positions, right=True) - 1
    return (sums / counts.clamp(min=1))[own].to(values.dtype)


def scope_mean(entropy: Tensor, valid: Tensor, scope: str, offsets: Tensor | None, rows: slice) -> Tensor:
    """Mean of ``entropy`` [n] over the valid tokens of a "sequence" or of all ``rows``, at each token.

    Args:
        entropy: [n], of ``rows``.
        valid: [n] bool, the tokens that count.
        scope: "sequence" or "batch".
        offsets: [B+1] bounds of sequences among all rows, for the scope "sequence".
        rows: Whole sequences, or for the scope "batch" all rows.
    """
    if scope == "sequence":
        return sequence_mean(entropy, valid, local_offsets(offsets, rows))
    return (torch.where(valid, entropy, 0.0).sum() / valid.sum().clamp(min=1)).expand(entropy.shape)


def local_offsets(offsets: Tensor | None, rows: slice) -> Tensor:
    """Bounds ``offsets`` [B+1] as seen from ``rows``, which are part of what they divide."""
    assert offsets is not None
    return (offsets - rows.start).clamp(0, rows.stop - rows.start)


@dataclass(frozen=True)
class TokenObjective:
    """A loss that is a sum over tokens; its subclasses change what one token sees of the others.

    ``inputs`` [K, n] and ``params`` are the arguments of ``formula`` after logp and entropy; ``valid`` [n]
    marks the tokens that count. ``scope`` says what must be known before a gradient: "token" nothing,
    "sequence" the statistics of the sequence, whose bounds are ``offsets`` [B+1], "batch" those of every row.
    Without ``entropy_grad`` the derivative by the entropy is zero.
    """

    formula: TokenFormula
    inputs: Tensor
    params: tuple[float, ...]
    valid: Tensor
    scope: str = "token"
    offsets: Tensor | None = None
    entropy_grad: bool = False

    @property
    def deferred(self) -> int:
        """Scalars that the statistics of a scope decide, where coefficients are linear in them; else 0."""
        return 0

    @property
    def products(self) -> int:
        """Parts of the coefficients in ``parts``, the fixed one included."""
        return 0

    def parts(self, logp: Tensor, rows: slice) -> tuple[Tensor | None, list[Tensor]]:
        """Coefficients by ``logp`` of ``rows`` as fixed + sum_k scalar_k scaled_k: fixed (None for 0) and scaled."""
        raise AssertionError("only a scope of several tokens has parts")

    def scalars(self, logp: Tensor, entropy: Tensor, rows: slice) -> list[Tensor]:
        """The scalars [] of ``parts`` from logp and entropy of ``rows``, which are a whole scope."""
        raise AssertionError("only a scope of several tokens has scalars")

    def _inputs(self, entropy: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Inputs of the formula at ``rows``, with what their ``entropy`` [n] decides where they are a whole scope."""
        return tuple(self.inputs[:, rows])

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Derivatives of the loss by logp and entropy of ``rows``; None for no entropy gradient."""
        inputs = self._inputs(entropy, rows)
        _, dlogp, dentropy, _, _ = self.formula.eager(logp, entropy, *inputs, *self.params)
        return dlogp, dentropy if self.entropy_grad else None

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Loss [], ratio [n], clipped [n] and terms, from logp and entropy of all rows."""
        loss = self.formula.eager(logp, entropy, *self.inputs, *self.params)[0].sum()
        return loss, torch.ones_like(logp), torch.zeros_like(self.valid), {}
