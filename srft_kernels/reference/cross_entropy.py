"""Cross-entropy, from materialised logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numbers import plain_numbers
from ..head.chunks import taking_part
from ..objectives.cross_entropy import CrossEntropyArguments
from ..types import HeadOptions, LoraDelta
from ._tokens import at_least_one, at_valid, projected, transformed

__all__ = ["linear_cross_entropy"]


@plain_numbers
def linear_cross_entropy(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    num_tokens: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy, from materialised logits.

    hidden_states, lm_head_weight, labels, num_tokens, label_smoothing, z_loss_coef, token_weights, reduction,
    bias, temperature, logit_softcap, logit_scale, ignore_index, lora,
    logits_dtype: as in ``srft_kernels.linear_cross_entropy``.
    """
    CrossEntropyArguments(num_tokens, label_smoothing, z_loss_coef, token_weights, reduction).check(labels)
    labelled = labels != ignore_index
    labels = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logits = projected(hidden_states, lm_head_weight, labels, options)
    valid = labels != ignore_index
    logits = transformed(logits, valid, temperature, logit_softcap)
    all_logprobs = logits.log_softmax(-1)
    losses = z_loss_coef * logits.logsumexp(-1).square()
    if label_smoothing < 1:
        own = all_logprobs.gather(-1, torch.where(valid, labels, 0)[:, None])[:, 0]
        losses = losses - (1 - label_smoothing) * own
    if label_smoothing > 0:
        possible = logits != -torch.inf
        losses = losses - label_smoothing * all_logprobs.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)
    losses = at_valid(token_weights, valid, losses, fill=1.0) * losses.masked_fill(~valid, 0.0)
    if reduction == "mean":
        return losses.sum() / at_least_one(num_tokens, labelled)
    return losses if reduction == "none" else losses.sum()
