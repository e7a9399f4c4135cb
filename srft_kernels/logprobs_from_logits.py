"""logprobs_from_logits: the row kernel for a trainer that holds the logits already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, check_gpu_dtype, check_positive, check_rows
from ._numbers import is_number, plain_numbers
from .head.chunks import compute_dtype, rows_backend
from .head.last_gradient import last_gradient
from .rows.types import RowArguments, Stats

__all__ = ["logprobs_from_logits"]


def check_logits(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, logit_softcap: float | None, ignore_index: int
) -> None:
    """Raise ValueError unless the arguments of ``logprobs_from_logits`` that its twin has too fit together."""
    for name, x in (("logits", logits), ("labels", labels)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if hasattr(x, "full_tensor"):
            raise ValueError(f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor()")
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be bf16, fp16, fp32 or fp64, got {logits.dtype}; cast them")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {list(logits.shape)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without V, {list(logits.shape[:-1])}, "
            f"got {list(labels.shape)}; give one label per row, shifted by the caller"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the device of logits, {logits.device}, got {labels.device}")
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), labels.shape):
            raise ValueError(
                f"temperature must be a float or have the shape of labels, {list(labels.shape)}, "
                f"got {list(temperature.shape)}"
            )
        if temperature.dim() > 0 and temperature.device != logits.device:
            raise ValueError(f"temperature must be on {logits.device}, got {temperature.device}; move it")
    for name, value in (("temperature", temperature), ("logit_softcap", logit_softcap)):
        if value is not None and not isinstance(value, Tensor):
            check_positive(name, value)
            if math.isinf(value):
                raise ValueError(f"{name} must be finite, got {value}")
    if not is_number(ignore_index) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}")
    check_rows(labels, ignore_index, logits.shape[-1], temperature)


def _check_layout(logits: Tensor, inplace_backward: bool) -> None:
    """Raise ValueError where a kernel cannot read the rows, or the gradient cannot take their memory."""
    if logits.stride(-1) != 1:
        raise ValueError(
            f"logits must have stride 1 along the vocabulary, got strides {logits.stride()}; "
            "pass logits.contiguous()"
        )
    if not (inplace_backward and logits.requires_grad and torch.is_grad_enabled()):
        return
    owner = logits._base if logits._is_view() and logits._base is not None else logits
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace_backward=True would overwrite a leaf that requires a gradient; pass the output of an "
            "operation, or inplace_backward=False"
        )
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"inplace_backward=True needs logits whose rows do not share memory, got shape "
                f"{list(logits.shape)} with strides {logits.stride()}; pass logits.contiguous()"
            )
        extent += stride * (size - 1)


def _matrices(logits: Tensor) -> list[Tensor]:
    """Views [n, V] with one row stride that cover ``logits`` [..., V] in order."""
    try:
        return [logits.view(-1, logits.shape[-1])]
    except RuntimeError:
        # no one stride leads from row to row, as in logits[:, :-1]
        return [matrix for part in logits for matrix in _matrices(part)]


def _pieces(logits: Tensor, rows: RowArguments) -> list[tuple[Tensor, slice, RowArguments]]:
    """The matrices of ``logits``, which of the N rows each holds, and their arguments."""
    pieces, start = [], 0
    for z in _matrices(logits) if logits.numel() else []:
        part = slice(start, start + z.shape[0])
        inv_temperature = None if rows.inv_temperature is None else rows.inv_temperature[part]
        pieces.append((z, part, rows._replace(labels=rows.labels[part], inv_temperature=inv_temperature)))
        start = part.stop
    return pieces


class _LogprobsFromLogits(torch.autograd.Function):
    """Saves the logits and, of each row, the largest logit, log-sum-exp, entropy and label."""

    @staticmethod
    def forward(ctx, logits, rows: RowArguments, entropy_grad: bool, inplace_backward: bool):
        logits_only = logits.detach()
        stats = rows_backend(logits).stats
        with torch.autocast(logits.device.type, enabled=False):
            parts = [stats(z, part_rows, False) for z, _, part_rows in _pieces(logits_only, rows)]
        dtype = compute_dtype(logits.dtype)
        empty = Stats(*(logits.new_empty(0, dtype=dtype) for _ in range(4)))
        known = parts[0] if len(parts) == 1 else Stats(*map(torch.cat, zip(empty, *parts, strict=True)))
        # the caller may write to what it gets
        ctx.save_for_backward(logits, known.entropy.clone(), known.top, known.log_sum)
        ctx.rows, ctx.inplace, ctx.spent = rows, inplace_backward, False
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(known.entropy)
        return known.logprobs, known.entropy

    @staticmethod
    @last_gradient
    def backward(ctx, dlogprobs, dentropy):
        if ctx.spent:
            raise RuntimeError(
                "these log-probabilities were already differentiated: inplace_backward=True gave the memory "
                "of the logits to their gradient; compute the logits again, or pass inplace_backward=False"
            )
        logits, entropy, top, log_sum = ctx.saved_tensors
        # backward reads no logprobs
        known = Stats(top, entropy, top, log_sum)
        dlogp = torch.zeros_like(top) if dlogprobs is None else dlogprobs
        dlogits = logits.detach()
        if not ctx.inplace:
            dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            targets = dlogits.view(-1, logits.shape[-1]) if not ctx.inplace else None
            for z, part, rows in _pieces(logits.detach(), ctx.rows):
                rows_backend(z).gradient(
                    z,
                    rows,
                    Stats(*(x[part] for x in known)),
                    dlogp[part],
                    None if dentropy is None else dentropy[part],
                    overwritten=False,
                    out=None if targets is None else targets[part],
                )
        if ctx.inplace:
            ctx.spent = True
            # autograd then refuses, elsewhere, to differentiate through logits that are gone
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None


@plain_numbers
def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution, from logits that exist already.

    Equivalent, without any other tensor of their size but the gradient, to::

        logits = logit_softcap * tanh(logits.float() / logit_softcap) / temperature
        logprobs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        entropy = Categorical(logits=logits).entropy()

    Forward reads the logits once and keeps four numbers a row; backward reads them once and writes the
    gradient once. ``linear_logprobs`` does without the logits themselves.

    Args:
        logits: [..., V] bf16, fp16 or fp32 (fp64 on CPU), with stride 1 along V and any other strides; they
            need not be contiguous, as in ``logits[:, :-1]``. -inf removes a word.
        labels: [...] int64 in [0, V), already shifted. Values on a GPU, such as these, are checked by an assertion on
            the device, for which the host does not wait, and after which the process cannot use it.
        temperature: Divides the logits, > 0; a float, or [...] with one value per token, not looked at on rows to
            skip. No gradient flows to it.
        logit_softcap: c > 0 in z = c tanh(z / c), applied before the temperature; a removed word stays removed. None:
            no cap.
        ignore_index: Label of rows to skip: log-probability 0, entropy 0, gradient 0.
        entropy_grad: Let the entropy carry a gradient.
        inplace_backward: Write the gradient over ``logits``, whose values are then gone: nobody else may read
            them after backward, nor backward run twice. Autograd raises where it would need them; other readers
            see the gradient. For a leaf or a view of one this is an error.

    Returns:
        (logprobs, entropy), each [...] fp32 (fp64 for fp64 logits), in nats. ``entropy`` carries a gradient
        only with ``entropy_grad``.

    Raises:
        ValueError: On a wrong shape, dtype, device or stride, a DTensor, a label that is no column, a temperature or
        softcap that is not positive, or ``inplace_backward`` with a leaf or with rows that share memory.
        RuntimeError: On a second backward with ``inplace_backward``, or where a gradient, taken with
        ``create_graph=True``, is differentiated again.

    Numerics: all arithmetic and the statistics in fp32; the gradient is rounded once, to the dtype of the
    logits. In fp16 it underflows below 6e-8: scale the loss. Deterministic: yes; a row does not depend on the
    others. Peak extra memory: the gradient, or O(N) with ``inplace_backward``.
    Eager twin: ``reference.logprobs_from_logits``.
    """
    check_logits(logits, labels, temperature, logit_softcap, ignore_index)
    check_gpu_dtype("logits", logits)
    _check_layout(logits, inplace_backward)
    dtype = compute_dtype(logits.dtype)
    inv_temperature = None
    if isinstance(temperature, Tensor):
        # one value for all may come from the CPU
        temperature = temperature.detach().to(logits.device, dtype, non_blocking=True)
        inv_temperature = temperature.reciprocal().expand(labels.shape).reshape(-1)
    elif temperature != 1.0:
        inv_temperature = torch.full((), 1.0 / temperature, dtype=dtype, device=logits.device).expand(
            labels.numel()
        )
    rows = RowArguments(
        labels.detach().reshape(-1).contiguous(),
        inv_temperature,
        None,
        logit_softcap,
        ignore_index,
        logits.dtype,
    )
    logprobs, entropy = _LogprobsFromLogits.apply(logits, rows, entropy_grad, inplace_backward)
    return logprobs.view(labels.shape), entropy.view(labels.shape)
