"""The Triton row kernel: online softmax, entropy, objective and gradient of a chunk of logits at once.

One program owns one row, so results do not depend on the other rows of the chunk, and there are no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formulas import TokenFormula
from .types import LOWEST_LOGPROB, RowArguments, Stats

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

# CPU tensors then run the kernels below, for tests
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# 16 logits per thread: 46 registers on sm_90 for fp32 scores without bias, softcap and entropy gradient, so that five
# programs share a multiprocessor; at most 80 with all three, 112 where an odd vocabulary allows no vector loads
_MAX_BLOCK_V = 4096
_NUM_WARPS = 8
_LOWEST_LOGPROB = LOWEST_LOGPROB if triton is None else tl.constexpr(LOWEST_LOGPROB)


# No vector load depends on these: their alignment, and 0 or 1 for a stride, shall not compile another variant.
_VECTORS = [
    "labels_ptr", "inv_temperature_ptr", "logprobs_ptr", "entropy_ptr", "top_ptr", "log_sum_ptr", "dlogp_ptr",
    "dentropy_ptr", "inputs_ptr",
]  # fmt: skip
_NUMBERS = ["stride_t", "stride_inputs", "ignore_index"]


def _jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


def _jit_row_kernel(function: Callable) -> Any:
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_VECTORS)


@_jit
def _logits(
    z_row, cols, mask, bias_ptr, softcap, inv_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    z = tl.load(z_row + cols, mask=mask, other=0.0)
    if z.dtype.primitive_bitwidth < 32:
        z = z.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=mask, other=0.0)
    if HAS_SOFTCAP:
        # tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|), which cannot overflow
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        capped = softcap * (1.0 - e) / (1.0 + e)
        # a word that -inf removes stays removed; any other gains 0
        z = tl.where(z < 0, -capped, capped) + tl.minimum(z + 3e38, 0.0)
    return z * inv_temperature


@_jit
def _rescale(m, m_new):
    # while every logit is -inf, shift by 0: -inf - -inf is NaN
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    return shift, tl.exp(m - shift), tl.where(m == -float("inf"), 0.0, m - shift)


# Pass 1 keeps, over the columns so far, m = max z, l = sum exp(z - m) and s = sum exp(z - m) (z - m); a new
# maximum m' rescales l by exp(m - m') and makes s exp(m - m') (s + l (m - m')). LANES columns do so side by side,
# each in one thread, and meet once, after the row. Then
#   logp = z_y - m - log l,   H = log l - s / l.
# Pass 2 reads the row again, from its end, which a cache may still hold: dz_j = a (1[j = y] - p_j) - e p_j (log p_j +
# H), with a and e the derivatives of the loss by logp and H, from OBJECTIVE or given and times grad_scale, then the
# chain rule of softcap and temperature. In place, a barrier holds the first write until every thread has the score of
# its label.
# SMOOTHED, logp becomes q = (1 - eps) logp + eps mean_j(log p_j) - z_loss_coef lse^2, over the words j with z_j > -inf,
# and the entropy their number: dq/dz_j = (1 - eps) 1[j = y] + eps / number - (1 + 2 z_loss_coef lse) p_j.
@_jit_row_kernel
def _row_kernel(
    z_ptr,
    stride_z,
    dz_ptr,
    stride_dz,
    labels_ptr,
    bias_ptr,
    inv_temperature_ptr,
    stride_t,
    logprobs_ptr,
    entropy_ptr,
    top_ptr,
    log_sum_ptr,
    dlogp_ptr,
    dentropy_ptr,
    inputs_ptr,
    stride_inputs,
    scalars,
    vocab,
    ignore_index,
    softcap,
    grad_scale,
    label_smoothing,
    z_loss_coef,
    OBJECTIVE: tl.constexpr,
    TERM: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    STATS_KNOWN: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    dz_row = dz_ptr + row * stride_dz
    label = tl.load(labels_ptr + row)
    offs_v = tl.arange(0, BLOCK_V)

    if label == ignore_index:
        if not STATS_KNOWN:
            tl.store(logprobs_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(top_ptr + row, 0.0)
            tl.store(log_sum_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK_V):
                zeros = tl.zeros([BLOCK_V], dz_ptr.dtype.element_ty)
                tl.store(dz_row + start + offs_v, zeros, mask=start + offs_v < vocab)
        return

    inv_temperature = 1.0
    if HAS_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + row * stride_t)

    if STATS_KNOWN:
        m_i = tl.load(top_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        logp = tl.load(logprobs_ptr + row)
    else:
        m_lane = tl.full([LANES], -float("inf"), tl.float32)
        l_lane = tl.zeros([LANES], tl.float32)
        s_lane = tl.zeros([LANES], tl.float32)
        if SMOOTHED:
            sum_lane = tl.zeros([LANES], tl.float32)
            number_lane = tl.zeros([LANES], tl.float32)
        # [BLOCK_V / LANES, LANES]
        offs_lane = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        for start in range(0, vocab, BLOCK_V):
            cols = start + offs_lane
            mask = cols < vocab
            z = _logits(z_row, cols, mask, bias_ptr, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
            z = tl.where(mask, z, -float("inf"))
            m_new = tl.maximum(m_lane, tl.max(z, 0))
            shift, rescale, dropped = _rescale(m_lane, m_new)
            exp = tl.exp(z - shift[None, :])
            s_block = tl.sum(tl.where(exp > 0, exp * (z - shift[None, :]), 0.0), 0)
            s_lane = rescale * (s_lane + l_lane * dropped) + s_block
            l_lane = rescale * l_lane + tl.sum(exp, 0)
            m_lane = m_new
            if SMOOTHED:
                sum_lane += tl.sum(tl.where(z > -float("inf"), z, 0.0), 0)
                number_lane += tl.sum(tl.where(z > -float("inf"), 1.0, 0.0), 0)
        m_i = tl.max(m_lane, 0)
        _, rescale, dropped = _rescale(m_lane, m_i)
        s_i = tl.sum(rescale * (s_lane + l_lane * dropped), 0)
        l_i = tl.sum(rescale * l_lane, 0)
        z_label = _logits(z_row, label, label >= 0, bias_ptr, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        log_sum = tl.log(l_i)
        logp = z_label - m_i - log_sum
        entropy = log_sum - s_i / l_i
        if SMOOTHED:
            entropy = tl.sum(number_lane, 0)
            lse = m_i + log_sum
            # a label that is not possible does not count where nothing is asked of labels
            kept = tl.where(label_smoothing < 1.0, (1.0 - label_smoothing) * logp, 0.0)
            logp = kept - label_smoothing * (lse - tl.sum(sum_lane, 0) / entropy) - z_loss_coef * lse * lse
        tl.store(logprobs_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)
        tl.store(top_ptr + row, m_i)
        tl.store(log_sum_ptr + row, log_sum)

    if GRADIENT:
        if OBJECTIVE is None:
            a = tl.load(dlogp_ptr + row)
            e = tl.load(dentropy_ptr + row) if ENTROPY_GRAD else 0.0
        else:
            inputs = ()
            for k in tl.static_range(NUM_INPUTS):
                inputs = inputs + (tl.load(inputs_ptr + k * stride_inputs + row),)  # type: ignore[assignment]
            if TERM is None:
                _, a, e, _, _ = OBJECTIVE(logp, entropy, *inputs, *scalars)
            else:
                _, a, e, _, _ = OBJECTIVE(logp, entropy, *inputs, *scalars, TERM)
        a *= grad_scale
        e *= grad_scale
        a_label = a
        if SMOOTHED:
            a_label = a * (1.0 - label_smoothing)
            a_each = a * label_smoothing / entropy
            a *= 1.0 + 2.0 * z_loss_coef * (m_i + log_sum)
        if not STATS_KNOWN:
            tl.debug_barrier()
        for block in range((vocab - 1) // BLOCK_V, -1, -1):
            cols = block * BLOCK_V + offs_v
            mask = cols < vocab
            z = _logits(z_row, cols, mask, bias_ptr, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
            logp_v = z - m_i - log_sum
            dz = -a * tl.exp(logp_v)
            if ENTROPY_GRAD:
                # p log p is 0 where p is
                dz -= e * tl.exp(logp_v) * (tl.maximum(logp_v, _LOWEST_LOGPROB) + entropy)
            if SMOOTHED:
                dz += tl.where(z > -float("inf"), a_each, 0.0)
            dz = tl.where(cols == label, dz + a_label, dz)
            if HAS_SOFTCAP:
                # at -inf, which removes a word, the slope is 0
                tanh = tl.maximum(z / (softcap * inv_temperature), -1.0)
                dz *= 1.0 - tanh * tanh
            dz *= inv_temperature
            tl.store(dz_row + cols, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _lanes(z: Tensor) -> int:
    """Columns of ``z`` that the threads of a program load at once, 16 bytes each."""
    return _NUM_WARPS * 32 * 16 // z.element_size()


def _launch(
    z: Tensor,
    rows: RowArguments,
    known: Stats | None,
    *,
    gradient: bool,
    entropy_grad: bool = False,
    dlogp: Tensor | None = None,
    dentropy: Tensor | None = None,
    formula: TokenFormula | None = None,
    inputs: Tensor | None = None,
    params: tuple[float, ...] = (),
    out: Tensor | None = None,
) -> tuple[Stats, Tensor]:
    """Run the row kernel on scores ``z`` [C, V]; the second result is the gradient, ``out`` or without it ``z``."""
    if triton is None:
        raise RuntimeError("GPU tensors need triton; install it, or move the tensors to the CPU")
    count, vocab = z.shape
    assert z.stride(1) == 1 and rows.labels.is_contiguous()
    dtype = torch.promote_types(z.dtype, torch.float32)
    stats = Stats(*(z.new_empty(count, dtype=dtype) for _ in range(4))) if known is None else known
    dz = z if out is None else out
    assert dz.shape == z.shape and dz.stride(1) == 1
    assert not gradient or dz.dtype in (z.dtype, rows.grad_dtype)
    bias, inv_temperature = rows.bias, rows.inv_temperature
    block_v = min(_MAX_BLOCK_V, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(z):
        _row_kernel[(count,)](
            z,
            z.stride(0),
            dz,
            dz.stride(0),
            rows.labels,
            z if bias is None else bias,
            z if inv_temperature is None else inv_temperature,
            0 if inv_temperature is None else inv_temperature.stride(0),
            *stats,
            z if dlogp is None else dlogp,
            z if dentropy is None else dentropy,
            z if inputs is None else inputs,
            0 if inputs is None else inputs.stride(0),
            tuple(params),
            vocab,
            rows.ignore_index,
            1.0 if rows.softcap is None else float(rows.softcap),
            rows.grad_scale,
            0.0 if rows.smoothing is None else float(rows.smoothing.label_smoothing),
            0.0 if rows.smoothing is None else float(rows.smoothing.z_loss_coef),
            OBJECTIVE=None if formula is None else formula.token,
            TERM=None if formula is None else formula.term,
            NUM_INPUTS=0 if inputs is None else inputs.shape[0],
            STATS_KNOWN=known is not None,
            GRADIENT=gradient,
            ENTROPY_GRAD=entropy_grad,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=rows.softcap is not None,
            HAS_TEMPERATURE=inv_temperature is not None,
            SMOOTHED=rows.smoothing is not None,
            BLOCK_V=block_v,
            LANES=min(block_v, _lanes(z)),
            num_warps=_NUM_WARPS,
            # what Triton does by default changes with 3.10
            enable_fp_fusion=True,
        )
    return stats, dz


def stats(z: Tensor, rows: RowArguments, overwrite: bool) -> Stats:
    """Statistics of each row of scores, which are kept.

    Args:
        z: [C, V] fp32, bf16 or fp16, scores before bias, softcap and temperature.
        rows: Labels and logit transforms.
        overwrite: Permission to overwrite ``z``, of which only the CPU twin makes use.
    """
    return _launch(z, rows, None, gradient=False)[0]


def gradient(
    z: Tensor,
    rows: RowArguments,
    known: Stats,
    dlogp: Tensor,
    dentropy: Tensor | None,
    overwritten: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the scores, in the memory of ``z`` or in ``out``.

    Args:
        z: [C, V] fp32, bf16 or fp16 scores.
        rows: Labels and logit transforms.
        known: Statistics of these rows.
        dlogp: [C] derivative of the loss by the log-probability.
        dentropy: [C] the same by the entropy, or None for zero.
        overwritten: As passed to ``stats``.
        out: [C, V] in the dtype of ``z`` or ``rows.grad_dtype``, apart from ``z``, which is then kept. None:
            over ``z``.
    """
    dlogp = dlogp.contiguous()
    dentropy = None if dentropy is None else dentropy.contiguous()
    return _launch(
        z,
        rows,
        known,
        gradient=True,
        entropy_grad=dentropy is not None,
        dlogp=dlogp,
        dentropy=dentropy,
        out=out,
    )[1]


def objective_gradient(
    z: Tensor,
    rows: RowArguments,
    formula: TokenFormula,
    inputs: Tensor,
    params: tuple[float, ...],
    entropy_grad: bool,
    out: Tensor | None = None,
) -> tuple[Stats, Tensor]:
    """Statistics and gradient of a token objective, in one launch.

    Args:
        z: [C, V] fp32, bf16 or fp16 scores.
        rows: Labels and logit transforms.
        formula: Of a loss in ``objectives``.
        inputs: [K, C] fp32, per-token arguments of ``formula``.
        params: Its scalar arguments.
        entropy_grad: The formula has a derivative by the entropy that is not zero.
        out: As for ``gradient``.
    """
    return _launch(
        z, rows, None, gradient=True, entropy_grad=entropy_grad, formula=formula, inputs=inputs, params=params, out=out
    )
