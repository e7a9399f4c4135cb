"""CPU twin of the row kernel: statistics and gradient of one chunk of logits, in place, a few rows at a time.

A block of rows stays in cache between the steps. Where neither an entropy gradient nor a softcap is wanted,
the statistics of fp32 and fp64 scores leave exp(z - max) in place of the logits, and the gradient is then one
row scale and one scatter. 16-bit scores are converted block by block, and kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import LOWEST_LOGPROB, RowArguments, Smoothing, Stats

# one block and its temporaries share the last-level cache with the operands of the next step
BLOCK_BYTES = 4 * 2**20
# torch.exp2 is twice as fast as torch.exp where the latter is MKL's on a CPU of another make. It rounds the
# elements left over at the end of a thread's share otherwise than the rest, so a row is given to it alone, to
# keep its bits whatever rows stand beside it; that pays from rows of this length.
EXP2_VOCAB = 2**15
LOG2_E = 1 / math.log(2)


def _blocks(z: Tensor, rows: RowArguments) -> list[slice]:
    """Slices that cover the rows with a label, each small enough for the cache."""
    count, vocab = z.shape
    step = max(1, BLOCK_BYTES // (vocab * torch.promote_types(z.dtype, torch.float32).itemsize))
    kept = rows.labels != rows.ignore_index
    runs = [[0, count]]
    if not kept.all():
        outside = kept.new_zeros(1)
        runs = torch.cat([outside, kept, outside]).int().diff().nonzero().view(-1, 2).tolist()
    return [slice(first, min(first + step, end)) for start, end in runs for first in range(start, end, step)]


def _logits(z: Tensor, rows: RowArguments, block: slice, out: Tensor) -> Tensor:
    """Logits of a block of scores, in ``out``; the scores themselves where nothing is to be done."""
    source = z[block]
    if source.dtype != out.dtype:
        source = out.copy_(source)
    if rows.bias is not None:
        source = torch.add(source, rows.bias, out=out)
    if rows.softcap is not None:
        removed = source == -math.inf
        source = torch.div(source, rows.softcap, out=out).tanh_().mul_(rows.softcap)
        if bool(removed.any()):
            source.masked_fill_(removed, -math.inf)
    if rows.inv_temperature is not None:
        source = torch.mul(source, rows.inv_temperature[block, None], out=out)
    return source


def _exp(x: Tensor, out: Tensor) -> Tensor:
    """Exponential of rows that are at most 0, in ``out``."""
    if x.shape[1] < EXP2_VOCAB:
        return torch.exp(x, out=out)
    for row in torch.mul(x, LOG2_E, out=out):
        row.exp2_()
    return out


def _row_sums(x: Tensor) -> Tensor:
    """Sum of each row; that of a row alone would be split among threads, and round otherwise than in company."""
    return x.sum(1) if x.shape[0] > 1 else x.expand(2, -1).sum(1)[:1]


def _overwrites(z: Tensor, allowed: bool) -> bool:
    """Whether exp(logit - top) takes the place of the scores: 16 bits would not hold it."""
    return allowed and z.element_size() >= 4


def smoothed(logp: Tensor, lse: Tensor, mean: Tensor, smoothing: Smoothing) -> Tensor:
    """q of ``Smoothing``, [C], from log-probabilities, log-sum-exp and the mean of the possible logits."""
    eps, z_loss_coef = smoothing
    # a label that is not possible does not count where nothing is asked of labels
    label = (1.0 - eps) * logp if eps < 1 else 0.0
    return label - eps * (lse - mean) - z_loss_coef * lse * lse


def _means(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the mean of the logits that are not -inf, and their number."""
    possible = logits != -math.inf
    count = _row_sums(possible.to(logits.dtype))
    return _row_sums(torch.where(possible, logits, 0.0)) / count, count


def stats(z: Tensor, rows: RowArguments, overwrite: bool) -> Stats:
    """Statistics of each row of scores.

    Args:
        z: [C, V] bf16, fp16, fp32 or fp64, scores before bias, softcap and temperature. Kept unless
            ``overwrite``.
        rows: Labels and logit transforms.
        overwrite: Leave exp(logit - top) in ``z``, unless it has 16 bits.
    """
    count, vocab = z.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    out = Stats(*(z.new_zeros(count, dtype=dtype) for _ in range(4)))
    blocks = _blocks(z, rows)
    overwrite = _overwrites(z, overwrite)
    height = max((block.stop - block.start for block in blocks), default=0)
    scratch = z.new_empty(1 if overwrite else 2, height, vocab, dtype=dtype)
    for block in blocks:
        shifted = scratch[0, : block.stop - block.start]
        exp = z[block] if overwrite else scratch[1, : block.stop - block.start]
        logits = _logits(z, rows, block, out=shifted)
        top = logits.amax(1, keepdim=True)
        mean, number = _means(logits) if rows.smoothing is not None else (None, None)
        torch.sub(logits, top, out=shifted)
        labels = rows.labels[block, None]
        label_logit = torch.where(labels < 0, -top, shifted.gather(1, labels.clamp(min=0)))[:, 0]
        _exp(shifted, out=exp)
        total = _row_sums(exp)
        weighted = _row_sums(shifted.mul_(exp))
        if not torch.isfinite(weighted).all():
            # a logit of -inf has probability 0 and adds nothing to the entropy
            weighted = _row_sums(torch.where(exp > 0, shifted, 0.0))
        log_sum, top = total.log(), top[:, 0]
        out.logprobs[block] = label_logit - log_sum
        out.entropy[block] = log_sum - weighted / total
        if rows.smoothing is not None:
            assert mean is not None and number is not None
            out.entropy[block] = number
            out.logprobs[block] = smoothed(label_logit - log_sum, top + log_sum, mean, rows.smoothing)
        out.top[block] = top
        out.log_sum[block] = log_sum
    return out


def gradient(
    z: Tensor,
    rows: RowArguments,
    known: Stats,
    dlogp: Tensor,
    dentropy: Tensor | None,
    overwritten: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the scores, in place of ``z`` or in ``out``.

    Args:
        z: [C, V] scores, or what ``stats(..., overwrite=True)`` left.
        rows: Labels and logit transforms.
        known: Statistics of these rows.
        dlogp: [C] derivative of the loss with respect to the log-probability.
        dentropy: [C] the same for the entropy, or None for zero.
        overwritten: As passed to ``stats``; not with a softcap, ``dentropy`` or smoothing.
        out: [C, V] in the dtype of ``z`` or ``rows.grad_dtype``, apart from ``z``, which is then kept.
    """
    assert not (overwritten and (dentropy is not None or rows.softcap is not None or rows.smoothing is not None))
    assert dentropy is None or rows.smoothing is None
    dz = z if out is None else out
    blocks = _blocks(z, rows)
    height = max((block.stop - block.start for block in blocks), default=0)
    scratch = [z.new_empty(height, z.shape[1], dtype=known.top.dtype) for _ in range(4)]
    # dz = exp(shifted) (base + slope shifted), but for the label and the softcap
    scale = known.log_sum.new_full((), rows.grad_scale)
    if rows.inv_temperature is not None:
        scale = scale * rows.inv_temperature
    label_column = rows.labels.clamp(min=0)[:, None]
    share = dlogp * scale
    label_grad = torch.where(rows.labels < 0, 0.0, share)[:, None]
    scale = scale * torch.exp(-known.log_sum)
    base, slope, uniform = -dlogp * scale, None, None
    if rows.smoothing is not None:
        # dq/dz_j = (1 - eps) 1[j = y] + eps / count - (1 + 2 z_loss_coef lse) p_j, and 0 for j that is not possible
        base = base * (1.0 + 2.0 * rows.smoothing.z_loss_coef * (known.top + known.log_sum))
        uniform = (share * rows.smoothing.label_smoothing / known.entropy)[:, None]
        label_grad = label_grad * (1.0 - rows.smoothing.label_smoothing)
    if dentropy is not None:
        base -= dentropy * (known.entropy - known.log_sum) * scale
        slope = (-dentropy * scale)[:, None]
    base = base[:, None]
    for block in blocks:
        shifted, exp, spare, tanh = (x[: block.stop - block.start] for x in scratch)
        grad = dz[block] if dz.dtype == known.top.dtype else spare
        if _overwrites(z, overwritten):
            torch.mul(z[block], base[block], out=grad)
        else:
            logits = _logits(z, rows, block, out=shifted)
            if rows.softcap is not None:
                inv_temperature = 1.0 if rows.inv_temperature is None else rows.inv_temperature[block, None]
                # -inf, which removes a word, has the slope 0 of tanh there
                torch.div(logits, rows.softcap * inv_temperature, out=tanh).clamp_(min=-1.0)
            torch.sub(logits, known.top[block, None], out=shifted)
            if slope is None:
                _exp(shifted, out=grad).mul_(base[block])
                if uniform is not None:
                    grad.add_(torch.where(shifted == -math.inf, 0.0, uniform[block]))
            else:
                _exp(shifted, out=exp)
                torch.mul(shifted.clamp_(min=LOWEST_LOGPROB), slope[block], out=grad)
                grad.add_(base[block]).mul_(exp)
        grad.scatter_add_(1, label_column[block], label_grad[block])
        if rows.softcap is not None:
            grad.mul_(tanh.square_().neg_().add_(1.0))
        if grad is spare:
            dz[block] = grad
    ignored = rows.labels == rows.ignore_index
    if ignored.any():
        dz.index_fill_(0, ignored.nonzero()[:, 0], 0)
    return dz
