"""The arguments that every op shares: checked once, and reduced to the rows that are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_gpu_dtype, check_head, check_mechanism, check_rows
from ..rows.types import Smoothing
from ..types import HeadOptions, Inputs, LoraDelta
from ..vocab_parallel import IGNORED, local_labels
from .chunks import HeadRows, Tokens, compute_dtype, scalar


def make_head(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    options: HeadOptions,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> tuple[Inputs, HeadRows, Tokens]:
    """Check the arguments that every op shares and reduce them to the rows that are computed."""
    tensors = isinstance(hidden_states, Tensor) and isinstance(lm_head_weight, Tensor)
    if tensors and torch.is_autocast_enabled(hidden_states.device.type):
        # the body of a model leaves 16-bit states there, beside a weight in fp32
        lm_head_weight = lm_head_weight.to(hidden_states.dtype)
    check_head(hidden_states, lm_head_weight, labels, options)
    check_gpu_dtype("hidden_states", hidden_states)
    check_mechanism(hidden_states, lm_head_weight, options)
    bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, _, logits_dtype = options
    vocab = vocab_parallel.vocab_size if vocab_parallel else lm_head_weight.shape[0]
    check_rows(labels, ignore_index, vocab, temperature)
    tokens = Tokens(labels, ignore_index)
    dtype = compute_dtype(hidden_states.dtype)
    # c tanh(s x / c) / T = (c / s) tanh(x / (c / s)) / (T / s): the scale is part of cap and temperature
    softcap = None if logit_softcap is None else logit_softcap / logit_scale
    inv_temperature = None
    if isinstance(temperature, Tensor) or temperature != logit_scale:
        reciprocal = scalar(temperature, dtype, hidden_states.device).reciprocal() * logit_scale
        inv_temperature = tokens.select(reciprocal.expand(labels.shape))
    kept_labels = tokens.select(labels).contiguous()
    if vocab_parallel is not None:
        kept_labels = local_labels(kept_labels, vocab_parallel, lm_head_weight.shape[0], ignore_index)
        ignore_index = IGNORED
    head = HeadRows(
        tokens.select(hidden_states.detach()),
        lm_head_weight.detach(),
        kept_labels,
        None if bias is None else bias.detach().to(dtype),
        inv_temperature,
        softcap,
        ignore_index,
        None if lora is None else LoraDelta(lora.a.detach(), lora.b.detach(), lora.scale),
        vocab_parallel,
        dtype if logits_dtype is None else logits_dtype,
        Smoothing(label_smoothing, z_loss_coef) if label_smoothing or z_loss_coef else None,
    )
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    return Inputs(hidden_states, lm_head_weight, bias, a, b), head, tokens
