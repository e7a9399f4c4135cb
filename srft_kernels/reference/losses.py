"""Policy losses, from materialised logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_grpo, check_srft
from .._numbers import plain_numbers
from ..formulas import k3, srft_demo
from ..head.chunks import taking_part
from ..objectives import GRPO_FORMULAS, SRFT_FORMULAS
from ..presets import srft_switches
from ..types import HeadOptions, LoraDelta, PolicyLoss
from ._tokens import at_least_one, at_valid, log_ratio_of, result, sequence_mean, token_statistics

__all__ = ["linear_grpo_loss", "linear_policy_loss", "linear_srft_loss"]


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
    check_grpo(
        labels, advantages, old_logprobs, loss_type, clip_low, clip_high, dual_clip, max_log_ratio, ref_logprobs,
        kl_coef, rollout_weights, entropy_coef, cu_seqlens, token_weights, num_tokens,
    )  # fmt: skip
    valid = kept != ignore_index
    advantages = at_valid(advantages, valid, logp)
    w = at_valid(token_weights, valid, logp, fill=1.0) / at_least_one(num_tokens, labels != ignore_index)
    rho = at_valid(rollout_weights, valid, logp, fill=1.0)

    old = logp.detach() if old_logprobs is None else at_valid(old_logprobs, valid, logp)
    log_ratio = log_ratio_of(logp, old)
    in_policy = (advantages != 0) & (rho != 0)
    advantages, rho = (torch.where(in_policy, x, 0.0) for x in (advantages, rho))
    # what multiplies nothing, and is no usable ratio
    unheard = ~in_policy & ~(log_ratio.detach().abs() < max_log_ratio)
    if loss_type == "gspo":
        log_ratio = sequence_mean(log_ratio.clamp(-1e30, 1e30), valid & ~unheard, cu_seqlens)
    log_ratio = torch.where(unheard, 0.0, log_ratio)
    if loss_type == "cispo":
        log_ratio = log_ratio.detach()
    dual_clip = float("inf") if dual_clip is None else dual_clip
    policy, _, ratio, clipped = GRPO_FORMULAS[loss_type].chosen.eager(
        logp, log_ratio, advantages, clip_low, clip_high, dual_clip, max_log_ratio
    )

    terms = {"policy": torch.where(in_policy, w * rho * policy, 0.0).sum()}
    kl = torch.zeros_like(logp)
    if ref_logprobs is not None and kl_coef != 0:
        kl = k3.eager(logp, log_ratio_of(at_valid(ref_logprobs, valid, logp), logp), max_log_ratio)[0]
    terms["kl"] = kl_coef * (w * kl).sum()
    terms["entropy_bonus"] = -entropy_coef * (w * entropy).sum()
    loss = terms["policy"] + terms["kl"] + terms["entropy_bonus"]
    clipped = clipped & valid
    terms["clip_low_sum"] = (clipped & (ratio < 1)).sum().to(loss.dtype)
    terms["clip_high_sum"] = (clipped & (ratio > 1)).sum().to(loss.dtype)
    terms["sum_entropy"] = entropy.sum()
    return result(loss, logp, entropy, torch.where(valid & ~unheard, ratio, 1.0), clipped, terms)


@plain_numbers
def linear_srft_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
    is_demo: Tensor,
    is_correct: Tensor,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None = None,
    preset: str = "paper",
    sft_coef: float = 0.5,
    rl_coef: float = 0.1,
    max_log_ratio: float = 20.0,
    sft_entropy_sign: int | None = None,
    entropy_scope: str | None = None,
    batch_entropy: float | Tensor | None = None,
    self_rollout: str | None = None,
    demo_gamma: float | None = None,
    entropy_coef: float | None = None,
    token_weights: Tensor | None = None,
    sft_weights: Tensor | None = None,
    num_rollout_tokens: int | Tensor | None = None,
    num_demo_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """SRFT loss, from materialised logits.

    hidden_states, lm_head_weight, labels, advantages, is_demo, is_correct, cu_seqlens, old_logprobs,
    preset, sft_coef, rl_coef, max_log_ratio, sft_entropy_sign, entropy_scope, batch_entropy, self_rollout,
    demo_gamma, entropy_coef, token_weights, sft_weights, num_rollout_tokens, num_demo_tokens, bias, temperature,
    logit_softcap, logit_scale, ignore_index, lora, logits_dtype: as in ``srft_kernels.linear_srft_loss``.
    """
    kept = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logp, entropy = token_statistics(hidden_states, lm_head_weight, kept, options, entropy_grad=True)
    switches = srft_switches(preset, self_rollout, sft_entropy_sign, entropy_scope, demo_gamma, entropy_coef)
    check_srft(
        labels, advantages, is_demo, is_correct, cu_seqlens, old_logprobs, sft_coef, rl_coef, max_log_ratio,
        batch_entropy, token_weights, sft_weights, num_rollout_tokens, num_demo_tokens, switches,
    )  # fmt: skip
    valid, labelled = kept != ignore_index, labels != ignore_index
    demo, rollout = is_demo & valid, ~is_demo & valid
    if num_demo_tokens is None:
        num_demo_tokens = (is_demo & labelled).sum()
    if num_rollout_tokens is None:
        num_rollout_tokens = (~is_demo & labelled).sum()
    w = at_valid(token_weights, valid, logp, fill=1.0)
    w_sft = w if sft_weights is None else at_valid(sft_weights, demo, logp)
    w_sft = torch.where(demo, w_sft, 0.0) / at_least_one(num_demo_tokens, demo)
    w_demo = torch.where(demo, w, 0.0) / at_least_one(num_demo_tokens, demo)
    w_rollout = torch.where(rollout, w, 0.0) / at_least_one(num_rollout_tokens, rollout)

    # H of the weights s and c
    h = entropy.detach()
    if switches.entropy_scope == "sequence":
        h = sequence_mean(h, valid, cu_seqlens)
    elif switches.entropy_scope == "batch" and batch_entropy is None:
        h = (h.sum() / at_least_one(None, valid)).expand(h.shape)
    elif switches.entropy_scope == "batch":
        h = torch.as_tensor(batch_entropy, dtype=h.dtype, device=h.device).expand(h.shape)

    log_ratio = torch.zeros_like(logp)
    if old_logprobs is not None:
        log_ratio = torch.where(rollout, log_ratio_of(logp, at_valid(old_logprobs, rollout, logp)), 0.0)
    else:
        log_ratio = log_ratio_of(logp, logp.detach())
    gamma_p, gamma = (0.0, 1.0) if switches.demo_gamma == 0 else (1.0, switches.demo_gamma)
    sign = switches.sft_entropy_sign
    correct = is_correct.to(logp.dtype)
    demo_advantages, rollout_advantages = (at_valid(advantages, kind, logp) for kind in (demo, rollout))
    terms = {}
    for suffix, weight_h, s, c in (
        ("", h, sft_coef, rl_coef),
        ("_unweighted", torch.zeros_like(h), 1.0, 1.0),
    ):
        demo_sft, _, demo_rl, _ = srft_demo.eager(logp, demo_advantages, weight_h, s, sign, gamma_p, gamma)
        rollout_loss, _, ratio, positive = SRFT_FORMULAS[switches.self_rollout].chosen.eager(
            logp, log_ratio, rollout_advantages, correct, weight_h, c, max_log_ratio
        )
        terms["demo_sft" + suffix] = (w_sft * demo_sft)[demo & (w_sft != 0)].sum()
        terms["demo_rl" + suffix] = (w_demo * demo_rl)[demo].sum()
        terms["rollout_positive" + suffix] = (w_rollout * rollout_loss)[rollout & positive].sum()
        terms["rollout_negative" + suffix] = (w_rollout * rollout_loss)[rollout & ~positive].sum()
    mean_entropy = entropy.sum() / at_least_one(num_demo_tokens + num_rollout_tokens, valid)
    terms["entropy_bonus"] = -switches.entropy_coef * mean_entropy
    loss = (
        terms["demo_sft"]
        + terms["demo_rl"]
        + terms["rollout_positive"]
        + terms["rollout_negative"]
        + terms["entropy_bonus"]
    )
    terms["sum_weight_sft"] = (sft_coef * torch.exp(sign * h))[demo].sum()
    terms["sum_weight_rl"] = (rl_coef * torch.exp(h))[rollout].sum()
    terms["sum_entropy_demo"], terms["sum_entropy_rollout"] = entropy[demo].sum(), entropy[rollout].sum()
    return result(loss, logp, entropy, torch.where(rollout, ratio, 1.0), torch.zeros_like(valid), terms)


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
