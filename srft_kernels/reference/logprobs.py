"""Log-probabilities and entropies, from materialised logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numbers import plain_numbers
from ..logprobs_from_logits import check_logits
from ..types import HeadOptions, LoraDelta
from ._tokens import statistics, token_statistics

__all__ = ["linear_logprobs", "logprobs_from_logits"]


@plain_numbers
def linear_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    logits_dtype: torch.dtype | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy, from materialised logits.

    hidden_states, lm_head_weight, labels, bias, temperature, logit_softcap, logit_scale, ignore_index,
    lora, logits_dtype, entropy_grad: as in ``srft_kernels.linear_logprobs``.
    """
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    return token_statistics(hidden_states, lm_head_weight, labels, options, entropy_grad)


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
    """Log-probability of each label and entropy, by autograd; ``inplace_backward`` changes nothing here.

    logits, labels, temperature, logit_softcap, ignore_index, entropy_grad: as in
    ``srft_kernels.logprobs_from_logits``.
    """
    check_logits(logits, labels, temperature, logit_softcap, ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = torch.where((labels != ignore_index)[..., None], logits, 0.0)
    return statistics(logits, labels, temperature, logit_softcap, ignore_index, entropy_grad)
