"""The GRPO family, from materialised logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numbers import plain_numbers
from ..formulas import k3
from ..head.chunks import taking_part
from ..objectives.grpo import GRPO, GrpoArguments
from ..types import HeadOptions, LoraDelta, PolicyLoss
from ._tokens import at_least_one, at_valid, clip_counts, log_ratio_of, policy_term, result, token_statistics

__all__ = ["linear_grpo_loss"]


@plain_numbers
def linear_grpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    loss_type: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """Loss of the GRPO family, from materialised logits.

    hidden_states, lm_head_weight, labels, advantages, old_logprobs, loss_type, clip_low, clip_high,
    dual_clip, max_log_ratio, ref_logprobs, kl_coef, rollout_weights, entropy_coef, cu_seqlens,
    token_weights, num_tokens, bias, temperature, logit_softcap, logit_scale, ignore_index, lora,
    logits_dtype: as in ``srft_kernels.linear_grpo_loss``.
    """
    kept = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logp, entropy = token_statistics(hidden_states, lm_head_weight, kept, options, entropy_grad=True)
    GrpoArguments(
        advantages, old_logprobs, loss_type, clip_low, clip_high, dual_clip, max_log_ratio, ref_logprobs, kl_coef,
        rollout_weights, entropy_coef, cu_seqlens, token_weights, num_tokens,
    ).check(labels)  # fmt: skip
    valid = kept != ignore_index
    advantages = at_valid(advantages, valid, logp)
    w = at_valid(token_weights, valid, logp, fill=1.0) / at_least_one(num_tokens, labels != ignore_index)
    rho = at_valid(rollout_weights, valid, logp, fill=1.0)

    in_policy = (advantages != 0) & (rho != 0)
    rho = torch.where(in_policy, rho, 0.0)
    policy, ratio, clipped = policy_term(
        GRPO.formulas[loss_type].chosen, logp, old_logprobs, advantages, in_policy, valid,
        cu_seqlens if loss_type == "gspo" else None, (clip_low, clip_high, dual_clip, max_log_ratio),
        fixed_ratio=loss_type == "cispo",
    )  # fmt: skip
    terms = {"policy": torch.where(in_policy, w * rho * policy, 0.0).sum()}
    kl = torch.zeros_like(logp)
    if ref_logprobs is not None and kl_coef != 0:
        kl = k3.eager(logp, log_ratio_of(at_valid(ref_logprobs, valid, logp), logp), max_log_ratio)[0]
    terms["kl"] = kl_coef * (w * kl).sum()
    terms["entropy_bonus"] = -entropy_coef * (w * entropy).sum()
    loss = terms["policy"] + terms["kl"] + terms["entropy_bonus"]
    terms |= clip_counts(clipped, ratio)
    terms["sum_entropy"] = entropy.sum()
    return result(loss, logp, entropy, ratio, clipped, terms)
