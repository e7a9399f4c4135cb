"""CPU twin of the row kernel: statistics and gradient of one chunk of logits, in place, a few rows at a time.

A block of rows stays in cache between the steps. Where neither an entropy gradient nor a softcap is wanted,
the statistics leave exp(z - max) in place of the logits, and the gradient is then one row scale and one
scatter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# one block and its temporaries share the last-level cache with the operands of the next step
BLOCK_BYTES = 4 * 2**20
# stands for log p of a logit of -inf where it meets p = 0, so that their product is 0
LOWEST_LOGPROB = -1e30


class Rows(NamedTuple):
    """What a chunk of C rows of scores needs besides the scores."""

    labels: Tensor  # [C] int64, or ignore_index (Triton only: the CPU path drops ignored rows)
    inv_temperature: Tensor | None  # [C], None is 1
    bias: Tensor | None  # [V]
    softcap: float | None
    ignore_index: int
    grad_dtype: torch.dtype  # of the gradient of the scores; the CPU path keeps that of the scores


class Stats(NamedTuple):
    """Statistics of C rows; log-sum-exp is two numbers, whose sum would lose digits for large logits."""

    logprobs: Tensor  # [C]
    entropy: Tensor  # [C]
    top: Tensor  # [C] largest logit
    log_sum: Tensor  # [C] log sum exp(logit - top)


def _blocks(z: Tensor) -> list[slice]:
    step = max(1, BLOCK_BYTES // (z.shape[1] * z.element_size()))
    return [slice(start, min(start + step, z.shape[0])) for start in range(0, z.shape[0], step)]


def _logits(z: Tensor, rows: Rows, block: slice, out: Tensor) -> Tensor:
    """Logits of a block of scores, in ``out``; the scores themselves where nothing is to be done."""
    source = z[block]
    if rows.bias is not None:
        source = torch.add(source, rows.bias, out=out)
    if rows.softcap is not None:
        source = torch.div(source, rows.softcap, out=out).tanh_().mul_(rows.softcap)
    if rows.inv_temperature is not None:
        source = torch.mul(source, rows.inv_temperature[block, None], out=out)
    return source


def stats(z: Tensor, rows: Rows, overwrite: bool) -> Stats:
    """Statistics of each row of scores.

    Args:
        z: [C, V] fp32 or fp64, scores before bias, softcap and temperature. Kept unless ``overwrite``.
        rows: Labels and logit transforms.
        overwrite: Leave exp(logit - top) in ``z``.
    """
    count, vocab = z.shape
    out = Stats(*(z.new_empty(count) for _ in range(4)))
    scratch = z.new_empty(2, min(count, _blocks(z)[0].stop), vocab)
    for block in _blocks(z):
        shifted = scratch[0, : block.stop - block.start]
        exp = z[block] if overwrite else scratch[1, : block.stop - block.start]
        logits = _logits(z, rows, block, out=shifted)
        top = logits.amax(1, keepdim=True)
        torch.sub(logits, top, out=shifted)
        torch.exp(shifted, out=exp)
        total = exp.sum(1)
        weighted = torch.linalg.vecdot(exp, shifted)
        if not torch.isfinite(weighted).all():
            # a logit of -inf has probability 0 and adds nothing to the entropy
            weighted = torch.where(exp > 0, exp * shifted, 0.0).sum(1)
        log_sum = total.log()
        out.logprobs[block] = shifted.gather(1, rows.labels[block, None])[:, 0] - log_sum
        out.entropy[block] = log_sum - weighted / total
        out.top[block] = top[:, 0]
        out.log_sum[block] = log_sum
    return out


def gradient(
    z: Tensor, rows: Rows, known: Stats, dlogp: Tensor, dentropy: Tensor | None, overwritten: bool
) -> Tensor:
    """Gradient with respect to the scores, in place of ``z``.

    Args:
        z: [C, V] scores, or what ``stats(..., overwrite=True)`` left.
        rows: Labels and logit transforms.
        known: Statistics of these rows.
        dlogp: [C] derivative of the loss with respect to the log-probability.
        dentropy: [C] the same for the entropy, or None for zero.
        overwritten: ``z`` holds exp(logit - top); not with a softcap or ``dentropy``.
    """
    assert not (overwritten and (dentropy is not None or rows.softcap is not None))
    if overwritten:
        if rows.inv_temperature is not None:
            dlogp = dlogp * rows.inv_temperature
        z.mul_((-dlogp * torch.exp(-known.log_sum))[:, None])
        return z.scatter_add_(1, rows.labels[:, None], dlogp[:, None])
    scratch = z.new_empty(2, min(z.shape[0], _blocks(z)[0].stop), z.shape[1])
    for block in _blocks(z):
        logp, capped = scratch[:, : block.stop - block.start]
        logits = _logits(z, rows, block, out=logp)
        if rows.softcap is not None:
            capped.copy_(logits)
        torch.sub(logits, known.top[block, None], out=logp).sub_(known.log_sum[block, None])
        grad = torch.exp(logp, out=z[block])
        if dentropy is None:
            grad.mul_(-dlogp[block, None])
        else:
            # -p (dlogp + dentropy (log p + H))
            logp.clamp_(min=LOWEST_LOGPROB).add_(known.entropy[block, None])
            grad.mul_(logp.mul_(dentropy[block, None]).add_(dlogp[block, None])).neg_()
        grad.scatter_add_(1, rows.labels[block, None], dlogp[block, None])
        if rows.softcap is not None:
            slope = (
                rows.softcap
                if rows.inv_temperature is None
                else rows.softcap * rows.inv_temperature[block, None]
            )
            grad.mul_(capped.div_(slope).square_().neg_().add_(1.0))
        if rows.inv_temperature is not None:
            grad.mul_(rows.inv_temperature[block, None])
    return z
