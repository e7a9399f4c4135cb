"""The general token loss, from materialised logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numbers import plain_numbers
from ..formulas import k3
from ..objectives.streams import STREAMS, StreamArguments
from ..types import HeadOptions, LoraDelta, PolicyLoss
from ._tokens import at_valid, clip_counts, log_ratio_of, policy_term, result, scope_entropy, token_statistics

__all__ = ["linear_token_loss"]


@plain_numbers
def linear_token_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    sft_weights: Tensor | None = None,
    shaped_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    policy: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    policy_entropy_coefs: Tensor | None = None,
    sft_entropy_coefs: Tensor | None = None,
    policy_prob_factor: str = "one",
    sft_prob_factor: str = "one",
    shaping_gamma: float | None = None,
    entropy_scope: str = "token",
    batch_entropy: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """The general token loss, from materialised logits.

    hidden_states, lm_head_weight, labels, advantages, old_logprobs, ref_logprobs, policy_weights, sft_weights,
    shaped_weights, kl_weights, entropy_weights, policy, clip_low, clip_high, dual_clip, max_log_ratio,
    policy_entropy_coefs, sft_entropy_coefs, policy_prob_factor, sft_prob_factor, shaping_gamma, entropy_scope,
    batch_entropy, cu_seqlens, bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype: as in
    ``srft_kernels.linear_token_loss``.
    """
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logp, entropy = token_statistics(hidden_states, lm_head_weight, labels, options, entropy_grad=True)
    StreamArguments(
        advantages, old_logprobs, ref_logprobs, policy_weights, sft_weights, shaped_weights, kl_weights,
        entropy_weights, policy, clip_low, clip_high, dual_clip, max_log_ratio, policy_entropy_coefs,
        sft_entropy_coefs, policy_prob_factor, sft_prob_factor, shaping_gamma, entropy_scope, batch_entropy, cu_seqlens,
    ).check(labels)  # fmt: skip
    valid = labels != ignore_index
    a, b, d, k, e = (
        at_valid(x, valid, logp) for x in (policy_weights, sft_weights, shaped_weights, kl_weights, entropy_weights)
    )
    advantages = at_valid(advantages, valid, logp)

    h = scope_entropy(entropy, valid, entropy_scope, batch_entropy, cu_seqlens)
    g_policy = _factor(policy_entropy_coefs, policy_prob_factor, h, logp, valid)
    g_sft = _factor(sft_entropy_coefs, sft_prob_factor, h, logp, valid)

    in_policy = (a != 0) & (advantages != 0)
    policy_loss, ratio, clipped = policy_term(
        STREAMS.formulas[policy].chosen, logp, old_logprobs, advantages, in_policy, valid,
        cu_seqlens if policy == "gspo" else None, (clip_low, clip_high, dual_clip, max_log_ratio),
        fixed_ratio=policy == "cispo",
    )  # fmt: skip
    p = logp.exp()
    shaped = p if shaping_gamma is None else p / (p + shaping_gamma)
    kl = torch.zeros_like(logp)
    if ref_logprobs is not None:
        kl = k3.eager(logp, log_ratio_of(at_valid(ref_logprobs, valid & (k != 0), logp), logp), max_log_ratio)[0]
    terms = {
        "policy": _weighted(a, in_policy, g_policy, policy_loss),
        "sft": _weighted(b, b != 0, g_sft, -logp),
        "shaped": _weighted(d, (d != 0) & (advantages != 0), advantages, -shaped),
        "kl": _weighted(k, k != 0, torch.ones_like(k), kl),
        "entropy_bonus": _weighted(e, e != 0, torch.ones_like(e), -entropy),
    }
    loss = sum(terms.values(), start=logp.new_zeros(()))
    terms |= clip_counts(clipped, ratio)
    terms["sum_entropy"] = entropy.sum()
    return result(loss, logp, entropy, ratio, clipped, terms)


def _factor(coefs: Tensor | None, name: str, h: Tensor, logp: Tensor, valid: Tensor) -> Tensor:
    """exp(u H) q(p), [N], without a gradient."""
    p = logp.detach().exp()
    q = {"one": torch.ones_like(p), "p": p, "p(1-p)": p * (1 - p)}[name]
    return torch.exp(at_valid(coefs, valid, logp) * h) * q


def _weighted(weight: Tensor, counts: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    """Sum of weight factor x over the tokens that count; nothing of the others, or beside a 0, reaches a gradient."""
    scale = (weight * factor).detach()
    counts = counts & (scale != 0)
    return scale[counts] @ x[counts]
