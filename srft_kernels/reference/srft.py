"""SRFT, from materialised logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numbers import plain_numbers
from ..formulas import shaping, srft_demo
from ..head.chunks import taking_part
from ..objectives.srft import SRFT, SrftArguments
from ..types import HeadOptions, LoraDelta, PolicyLoss
from ._tokens import at_least_one, at_valid, log_ratio_of, result, scope_entropy, token_statistics

__all__ = ["linear_srft_loss"]


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
    negative_coef: float = 1.0,
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
    preset, sft_coef, rl_coef, negative_coef, max_log_ratio, sft_entropy_sign, entropy_scope, batch_entropy,
    self_rollout, demo_gamma, entropy_coef, token_weights, sft_weights, num_rollout_tokens, num_demo_tokens, bias,
    temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype: as in ``srft_kernels.linear_srft_loss``.
    """
    kept = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logp, entropy = token_statistics(hidden_states, lm_head_weight, kept, options, entropy_grad=True)
    switches = SrftArguments(
        advantages, is_demo, is_correct, cu_seqlens, old_logprobs, preset, sft_coef, rl_coef, negative_coef,
        max_log_ratio, sft_entropy_sign, entropy_scope, batch_entropy, self_rollout, demo_gamma, entropy_coef,
        token_weights, sft_weights, num_rollout_tokens, num_demo_tokens,
    ).check(labels)  # fmt: skip
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
    h = scope_entropy(entropy, valid, switches.entropy_scope, batch_entropy, cu_seqlens)
    log_ratio = torch.zeros_like(logp)
    if old_logprobs is not None:
        log_ratio = torch.where(rollout, log_ratio_of(logp, at_valid(old_logprobs, rollout, logp)), 0.0)
    else:
        log_ratio = log_ratio_of(logp, logp.detach())
    gamma_p, gamma = shaping(switches.demo_gamma)
    sign = switches.sft_entropy_sign
    correct = is_correct.to(logp.dtype)
    demo_advantages, rollout_advantages = (at_valid(advantages, kind, logp) for kind in (demo, rollout))
    terms = {}
    for suffix, weight_h, s, c, m in (
        ("", h, sft_coef, rl_coef, negative_coef),
        ("_unweighted", torch.zeros_like(h), 1.0, 1.0, 1.0),
    ):
        demo_sft, _, demo_rl, _ = srft_demo.eager(logp, demo_advantages, weight_h, s, sign, gamma_p, gamma)
        rollout_loss, _, ratio, positive = SRFT.formulas[switches.self_rollout].chosen.eager(
            logp, log_ratio, rollout_advantages, correct, weight_h, c, m, max_log_ratio
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
