"""Any loss of log-probabilities and entropies, from materialised logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._numbers import plain_numbers
from ..types import HeadOptions, LoraDelta, PolicyLoss
from ._tokens import result, token_statistics

__all__ = ["linear_policy_loss"]


@plain_numbers
def linear_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """Any loss of (logprobs, entropy), from materialised logits.

    hidden_states, lm_head_weight, labels, objective, bias, temperature, logit_softcap, logit_scale,
    ignore_index, lora, logits_dtype: as in ``srft_kernels.linear_policy_loss``.
    """
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logp, entropy = token_statistics(hidden_states, lm_head_weight, labels, options, entropy_grad=True)
    ones = torch.ones_like(logp)
    return result(objective(logp, entropy), logp, entropy, ones, ones == 0, {})
