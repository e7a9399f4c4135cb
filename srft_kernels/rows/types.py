"""What a chunk of rows of scores needs besides them, and what it gives, on CPU and GPU alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# stands for log p of a logit of -inf where it meets p = 0, so that their product is 0
LOWEST_LOGPROB = -1e30


class Smoothing(NamedTuple):
    """What the log-probabilities of rows become: q = (1 - eps) logp + eps mean_j(log p_j) - z_loss_coef lse^2.

    The mean is over the words that are possible: whose logit is not -inf.
    """

    label_smoothing: float  # eps, in [0, 1]
    z_loss_coef: float  # >= 0


class RowArguments(NamedTuple):
    """What a chunk of C rows of scores needs besides the scores."""

    # [C] int64. ignore_index: statistics and gradient are 0. Any other negative label is not among the columns
    # of these scores (they are a part of the vocabulary): its logit counts as 0 in logprobs, whoever merges the
    # parts replaces that entry, and no column of the gradient gets the derivative by logprobs.
    labels: Tensor
    inv_temperature: Tensor | None  # [C], None is 1
    bias: Tensor | None  # [V]
    softcap: float | None
    ignore_index: int
    grad_dtype: torch.dtype  # of the gradient of the scores; the CPU path keeps that of the scores
    grad_scale: float = 1.0  # multiplies the gradient: what a 16-bit gradient could not hold, the caller adds later
    smoothing: Smoothing | None = None


class Stats(NamedTuple):
    """Statistics of C rows; log-sum-exp is two numbers, whose sum would lose digits for large logits.

    With smoothing, ``logprobs`` are its q and ``entropy`` is the number of possible words.
    """

    logprobs: Tensor  # [C]
    entropy: Tensor  # [C]
    top: Tensor  # [C] largest logit
    log_sum: Tensor  # [C] log sum exp(logit - top)

    def at(self, rows: slice | Tensor) -> Stats:
        """The same of some of the rows, a slice or indices."""
        return Stats(*(x[rows] for x in self))

    def put(self, rows: slice, known: Stats) -> None:
        """Write ``known`` of ``rows`` into these."""
        for total, x in zip(self, known, strict=True):
            total[rows] = x


class Coefficients(NamedTuple):
    """Derivatives of a loss by the statistics of C rows."""

    dlogp: Tensor  # [C] by logprobs
    dentropy: Tensor | None = None  # [C] by entropy, None for zeros

    def at(self, rows: slice | Tensor) -> Coefficients:
        """The same of some of the rows, a slice or indices."""
        return Coefficients(self.dlogp[rows], None if self.dentropy is None else self.dentropy[rows])
