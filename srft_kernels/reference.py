"""The same names and signatures in plain PyTorch: logits are materialised and autograd differentiates.

Only the arguments that say where things are kept are absent: vocab_parallel and weight_grad.

The only things taken from ``formulas`` are loss values; every derivative here comes from autograd, and
every weight that must carry no gradient is detached where it is made. fp64 inputs are computed in fp64, all
others in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_cross_entropy, check_grpo, check_head, check_rows, check_srft
from ._numbers import plain_numbers
from .formulas import k3, srft_demo
from .head.chunks import taking_part
from .logprobs_from_logits import check_logits
from .objectives import GRPO_FORMULAS, SRFT_FORMULAS
from .presets import srft_switches
from .types import HeadOptions, LoraDelta, PolicyLoss


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
    return _logprobs(hidden_states, lm_head_weight, labels, options, entropy_grad)


def _logprobs(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy."""
    logits = _projected(hidden_states, lm_head_weight, labels, options)
    return _statistics(logits, labels, options.temperature, options.logit_softcap, options.ignore_index, entropy_grad)


def _projected(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions) -> Tensor:
    """[N, V] logits before softcap and temperature; raise ValueError unless the arguments of the head fit together."""
    bias, temperature, _, logit_scale, ignore_index, lora, *_, logits_dtype = options
    check_head(hidden_states, lm_head_weight, labels, options)
    check_rows(labels, ignore_index, lm_head_weight.shape[0], temperature)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    hidden_states = torch.where((labels != ignore_index)[:, None], hidden_states, 0.0)
    logits = hidden_states.to(dtype) @ lm_head_weight.to(dtype).t()
    if lora is not None:
        logits = logits + lora.scale * (hidden_states.to(dtype) @ lora.a.to(dtype).t()) @ lora.b.to(dtype).t()
    if logits_dtype is not None:
        logits = logits.to(logits_dtype).to(dtype)
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logit_scale * logits


def _transformed(
    logits: Tensor, valid: Tensor, temperature: float | Tensor, logit_softcap: float | None
) -> Tensor:
    """``logits`` after softcap and temperature."""
    if logit_softcap is not None:
        # a word that -inf removes stays removed
        removed = logits == -torch.inf
        capped = logit_softcap * torch.tanh(logits.masked_fill(removed, 0.0) / logit_softcap)
        logits = capped.masked_fill(removed, -torch.inf)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(logits.device, logits.dtype).expand(valid.shape)
        temperature = torch.where(valid, temperature, 1.0)[..., None]
    return logits / temperature


def _statistics(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    logit_softcap: float | None,
    ignore_index: int,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy, from logits before softcap and temperature."""
    valid = labels != ignore_index
    all_logprobs = _transformed(logits, valid, temperature, logit_softcap).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    # a logit of -inf has probability 0 and adds nothing to the entropy
    entropy = -(all_logprobs.exp() * all_logprobs.masked_fill(all_logprobs == -torch.inf, 0.0)).sum(-1)
    logprobs, entropy = logprobs.masked_fill(~valid, 0.0), entropy.masked_fill(~valid, 0.0)
    return logprobs, entropy if entropy_grad else entropy.detach()


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
    return _statistics(logits, labels, temperature, logit_softcap, ignore_index, entropy_grad)


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
    check_cross_entropy(labels, token_weights, label_smoothing, z_loss_coef, reduction, num_tokens)
    labelled = labels != ignore_index
    labels = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logits = _projected(hidden_states, lm_head_weight, labels, options)
    valid = labels != ignore_index
    logits = _transformed(logits, valid, temperature, logit_softcap)
    all_logprobs = logits.log_softmax(-1)
    losses = z_loss_coef * logits.logsumexp(-1).square()
    if label_smoothing < 1:
        own = all_logprobs.gather(-1, torch.where(valid, labels, 0)[:, None])[:, 0]
        losses = losses - (1 - label_smoothing) * own
    if label_smoothing > 0:
        possible = logits != -torch.inf
        losses = losses - label_smoothing * all_logprobs.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)
    losses = _valid(token_weights, valid, losses, fill=1.0) * losses.masked_fill(~valid, 0.0)
    if reduction == "mean":
        return losses.sum() / _at_least_one(num_tokens, labelled)
    return losses if reduction == "none" else losses.sum()


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
    logp, entropy = _logprobs(hidden_states, lm_head_weight, kept, options, entropy_grad=True)
    check_grpo(
        labels, advantages, old_logprobs, loss_type, clip_low, clip_high, dual_clip, max_log_ratio, ref_logprobs,
        kl_coef, rollout_weights, entropy_coef, cu_seqlens, token_weights, num_tokens,
    )  # fmt: skip
    valid = kept != ignore_index
    advantages = _valid(advantages, valid, logp)
    w = _valid(token_weights, valid, logp, fill=1.0) / _at_least_one(num_tokens, labels != ignore_index)
    rho = _valid(rollout_weights, valid, logp, fill=1.0)

    old = logp.detach() if old_logprobs is None else _valid(old_logprobs, valid, logp)
    log_ratio = _log_ratio(logp, old)
    in_policy = (advantages != 0) & (rho != 0)
    advantages, rho = (torch.where(in_policy, x, 0.0) for x in (advantages, rho))
    # what multiplies nothing, and is no usable ratio
    unheard = ~in_policy & ~(log_ratio.detach().abs() < max_log_ratio)
    if loss_type == "gspo":
        log_ratio = _sequence_mean(log_ratio.clamp(-1e30, 1e30), valid & ~unheard, cu_seqlens)
    log_ratio = torch.where(unheard, 0.0, log_ratio)
    if loss_type == "cispo":
        log_ratio = log_ratio.detach()
    dual_clip = float("inf") if dual_clip is None else dual_clip
    _, formula = GRPO_FORMULAS[loss_type]
    policy, _, ratio, clipped = formula.eager(
        logp, log_ratio, advantages, clip_low, clip_high, dual_clip, max_log_ratio
    )

    terms = {"policy": torch.where(in_policy, w * rho * policy, 0.0).sum()}
    kl = torch.zeros_like(logp)
    if ref_logprobs is not None and kl_coef != 0:
        kl = k3.eager(logp, _log_ratio(_valid(ref_logprobs, valid, logp), logp), max_log_ratio)[0]
    terms["kl"] = kl_coef * (w * kl).sum()
    terms["entropy_bonus"] = -entropy_coef * (w * entropy).sum()
    loss = terms["policy"] + terms["kl"] + terms["entropy_bonus"]
    clipped = clipped & valid
    terms["clip_low_sum"] = (clipped & (ratio < 1)).sum().to(loss.dtype)
    terms["clip_high_sum"] = (clipped & (ratio > 1)).sum().to(loss.dtype)
    terms["sum_entropy"] = entropy.sum()
    return _result(loss, logp, entropy, torch.where(valid & ~unheard, ratio, 1.0), clipped, terms)


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
    demo_gamma: float | str | None = "preset",
    entropy_coef: float | None = None,
    token_weights: Tensor | None = None,
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
    demo_gamma, entropy_coef, token_weights, num_rollout_tokens, num_demo_tokens, bias, temperature, logit_softcap,
    logit_scale, ignore_index, lora, logits_dtype: as in ``srft_kernels.linear_srft_loss``.
    """
    kept = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(bias, temperature, logit_softcap, logit_scale, ignore_index, lora, logits_dtype=logits_dtype)
    logp, entropy = _logprobs(hidden_states, lm_head_weight, kept, options, entropy_grad=True)
    switches = srft_switches(preset, self_rollout, sft_entropy_sign, entropy_scope, demo_gamma, entropy_coef)
    check_srft(
        labels, advantages, is_demo, is_correct, cu_seqlens, old_logprobs, sft_coef, rl_coef, max_log_ratio,
        batch_entropy, token_weights, num_rollout_tokens, num_demo_tokens, switches,
    )  # fmt: skip
    valid, labelled = kept != ignore_index, labels != ignore_index
    demo, rollout = is_demo & valid, ~is_demo & valid
    if num_demo_tokens is None:
        num_demo_tokens = (is_demo & labelled).sum()
    if num_rollout_tokens is None:
        num_rollout_tokens = (~is_demo & labelled).sum()
    w = _valid(token_weights, valid, logp, fill=1.0)
    w_demo = torch.where(demo, w, 0.0) / _at_least_one(num_demo_tokens, demo)
    w_rollout = torch.where(rollout, w, 0.0) / _at_least_one(num_rollout_tokens, rollout)

    # H of the weights s and c
    h = entropy.detach()
    if switches.entropy_scope == "sequence":
        h = _sequence_mean(h, valid, cu_seqlens)
    elif switches.entropy_scope == "batch" and batch_entropy is None:
        h = (h.sum() / _at_least_one(None, valid)).expand(h.shape)
    elif switches.entropy_scope == "batch":
        h = torch.as_tensor(batch_entropy, dtype=h.dtype, device=h.device).expand(h.shape)

    log_ratio = torch.zeros_like(logp)
    if old_logprobs is not None:
        log_ratio = torch.where(rollout, _log_ratio(logp, _valid(old_logprobs, rollout, logp)), 0.0)
    else:
        log_ratio = _log_ratio(logp, logp.detach())
    _, formula = SRFT_FORMULAS[switches.self_rollout]
    gamma_p, gamma = (0.0, 1.0) if switches.demo_gamma is None else (1.0, switches.demo_gamma)
    sign = switches.sft_entropy_sign
    correct = is_correct.to(logp.dtype)
    demo_advantages, rollout_advantages = (_valid(advantages, kind, logp) for kind in (demo, rollout))
    terms = {}
    for suffix, weight_h, s, c in (
        ("", h, sft_coef, rl_coef),
        ("_unweighted", torch.zeros_like(h), 1.0, 1.0),
    ):
        demo_sft, _, demo_rl, _ = srft_demo.eager(logp, demo_advantages, weight_h, s, sign, gamma_p, gamma)
        rollout_loss, _, ratio, positive = formula.eager(
            logp, log_ratio, rollout_advantages, correct, weight_h, c, max_log_ratio
        )
        terms["demo_sft" + suffix] = (w_demo * demo_sft)[demo].sum()
        terms["demo_rl" + suffix] = (w_demo * demo_rl)[demo].sum()
        terms["rollout_positive" + suffix] = (w_rollout * rollout_loss)[rollout & positive].sum()
        terms["rollout_negative" + suffix] = (w_rollout * rollout_loss)[rollout & ~positive].sum()
    mean_entropy = entropy.sum() / _at_least_one(num_demo_tokens + num_rollout_tokens, valid)
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
    return _result(loss, logp, entropy, torch.where(rollout, ratio, 1.0), torch.zeros_like(valid), terms)


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
    logp, entropy = _logprobs(hidden_states, lm_head_weight, labels, options, entropy_grad=True)
    ones = torch.ones_like(logp)
    return _result(objective(logp, entropy), logp, entropy, ones, ones == 0, {})


def _result(loss, logp, entropy, ratio, clipped, terms) -> PolicyLoss:
    terms = {name: x.detach() for name, x in terms.items()}
    return PolicyLoss(loss, logp.detach(), entropy.detach(), ratio.detach(), clipped, terms)


def _valid(x: Tensor | None, valid: Tensor, like: Tensor, fill: float = 0.0) -> Tensor:
    """``x`` in the dtype of ``like``, ``fill`` where it is None, and 0 at rows that are not valid."""
    x = torch.full_like(like, fill) if x is None else x.detach().to(like.dtype)
    return torch.where(valid, x, 0.0)


def _log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """logp - other, and 0 between two of -inf."""
    return torch.where((logp == other) & (logp == -torch.inf), 0.0, logp - other)


def _at_least_one(given: int | Tensor | None, counted: Tensor) -> Tensor:
    count = counted.sum() if given is None else torch.as_tensor(given, device=counted.device)
    return torch.where(count > 0, count, 1)


def _sequence_mean(values: Tensor, valid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean over the valid tokens of each sequence, at each of its tokens."""
    assert cu_seqlens is not None
    means = []
    for start, end in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        inside = valid[start:end]
        mean = torch.where(inside, values[start:end], 0.0).sum() / inside.sum().clamp(min=1)
        means.append(mean.expand(end - start))
    return torch.cat(means) if means else values
