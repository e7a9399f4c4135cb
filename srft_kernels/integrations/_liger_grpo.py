"""Liger's GRPO family on padded [B, T] batches: its policy terms, normalisers and metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..formulas import clip_policy, k3
from ..losses.grpo import linear_grpo_loss
from ..losses.policy import linear_policy_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")


class Options(NamedTuple):
    """The settings of a loss; ``LigerFusedLinearGRPOLoss`` says what each means."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


class Batch(NamedTuple):
    """Inputs of the tokens in the compute dtype, [B, T] where nothing else is said."""

    mask: Tensor
    advantages: Tensor  # [B, 1]
    old: Tensor | None
    ref: Tensor | None
    is_ratio: Tensor | None  # [B, T] or [B, 1]

    @staticmethod
    def of(
        mask: Tensor,
        advantages: Tensor,
        old: Tensor | None,
        ref: Tensor | None,
        is_ratio: Tensor | None,
        options: Options,
    ) -> Batch:
        """Bring what the caller gave into shape, with 0 for whatever stands at padding.

        Args:
            mask: [B, T] in the compute dtype.
            advantages: [B].
            old: [B, T] or None.
            ref: [B, T], [B T] or None.
            is_ratio: [B, T], [B, 1], [B] or None.
            options: Settings of the loss.
        """
        if is_ratio is not None:
            if is_ratio.dim() == 1:
                is_ratio = is_ratio[:, None]
            if is_ratio.shape not in (mask.shape, (mask.shape[0], 1)):
                raise ValueError(
                    f"vllm_is_ratio must be [B, T]={list(mask.shape)}, [B, 1] or [B], got {list(is_ratio.shape)}"
                )
            is_ratio = is_ratio.detach().to(mask.dtype)

        def at_tokens(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.detach().to(mask.dtype).view(mask.shape)
            return x if options.loss_type == "luspo" else torch.where(mask != 0, x, 0.0)

        return Batch(mask, advantages.detach().to(mask.dtype)[:, None], at_tokens(old), at_tokens(ref), is_ratio)


def grpo_loss(
    head: tuple[Tensor, Tensor, Tensor, Tensor | None, float],
    batch: Batch,
    options: Options,
    num_items: int | Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and metrics, by ``linear_grpo_loss`` where it has the objective, else by a formula of log-probabilities.

    Args:
        head: hidden [B T, H], weight, labels [B T], bias and temperature.
        batch: Inputs of the tokens.
        options: Settings of the loss.
        num_items: Tokens of the whole batch, or None.
    """
    hidden, weight, labels, bias, temperature = head
    mask = batch.mask
    token_weights = _weights(batch, options, num_items)
    clip = _fused_clip(options)
    if clip is not None:
        loss_type, clip_low, clip_high, dual_clip = clip
        with_kl = options.beta != 0 and batch.ref is not None

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.expand(mask.shape).reshape(-1)

        out = linear_grpo_loss(
            hidden,
            weight,
            labels,
            batch.advantages.expand(mask.shape).reshape(-1),
            flat(batch.old),
            loss_type=loss_type,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            # Liger has no such bound
            max_log_ratio=math.inf,
            ref_logprobs=flat(batch.ref) if with_kl else None,
            kl_coef=options.beta if with_kl else 0.0,
            rollout_weights=flat(batch.is_ratio),
            # on the host, where their values can be read without waiting
            cu_seqlens=torch.arange(mask.shape[0] + 1, dtype=torch.int32) * mask.shape[1],
            token_weights=flat(token_weights),
            num_tokens=1,
            bias=bias,
            temperature=temperature,
        )
    else:

        def objective(logprobs: Tensor, _entropy: Tensor) -> Tensor:
            terms = _terms(logprobs.view(mask.shape), batch, options)
            if options.loss_type == "luspo":
                return (terms * mask.sum(1, keepdim=True)).mean()
            return (terms * token_weights).sum()

        out = linear_policy_loss(hidden, weight, labels, objective, bias=bias, temperature=temperature)
    return out.loss, _metrics(out.logprobs.view(mask.shape), batch, options)


def _fused_clip(options: Options) -> tuple[str, float, float, float | None] | None:
    """(loss_type, clip_low, clip_high, dual_clip) of the same objective in ``linear_grpo_loss``, if it has it."""
    if options.use_bias_correction_kl and options.beta != 0:
        return None
    if options.loss_type == "cispo":
        # no lower bound, and an upper bound that is not an offset from 1
        return ("cispo", math.inf, options.epsilon_high - 1, None) if options.epsilon_high > 1 else None
    if options.loss_type in ("sapo", "luspo", "vespo"):
        return None
    clip_high, dual_clip = _upper_bounds(options)
    if not (options.epsilon_low > 0 and clip_high > 0 and dual_clip > 1):
        return None
    return (
        "gspo" if options.level == "sequence" else "grpo",
        options.epsilon_low,
        clip_high,
        None if dual_clip == math.inf else dual_clip,
    )


def _upper_bounds(options: Options) -> tuple[float, float]:
    """(clip_high, dual_clip) of -min(min(r, delta) A, clip(r) A).

    For A > 0 the ratio stops at the smaller of delta and 1 + epsilon_high, for A < 0 at the larger.
    """
    if options.delta is None:
        return options.epsilon_high, math.inf
    return min(options.delta - 1, options.epsilon_high), max(options.delta, 1 + options.epsilon_high)


def _weights(batch: Batch, options: Options, num_items: int | Tensor | None) -> Tensor:
    """Share of each token in the loss, [B, T]; 0 at padding."""
    mask = batch.mask
    if options.loss_type in ("grpo", "sapo"):
        return mask / (mask.sum(-1, keepdim=True).clamp(min=1.0) * mask.shape[0])
    if options.loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1.0)
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length is not None
        return mask / (mask.shape[0] * options.max_completion_length)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is None:
        total = mask.sum()
        if ranks > 1:
            dist.all_reduce(total)
    else:
        total = torch.as_tensor(num_items).to(mask.device, mask.dtype)
    return mask / (total / ranks).clamp(min=1.0)


def _log_weights(logp: Tensor, batch: Batch, options: Options) -> Tensor:
    """Log of the importance ratio, [B, T], or [B, 1] for level "sequence"."""
    log_ratio = logp - (logp.detach() if batch.old is None else batch.old)
    if options.level == "token":
        return log_ratio
    lengths = batch.mask.sum(-1, keepdim=True).clamp(min=1.0)
    return (log_ratio * batch.mask).sum(-1, keepdim=True) / lengths


def _kl(logp: Tensor, log_weights: Tensor, batch: Batch, options: Options) -> Tensor:
    ref = logp.detach() if batch.ref is None else batch.ref
    kl = k3.eager(logp, ref - logp, math.inf)[0]
    return kl * log_weights.exp() if options.use_bias_correction_kl else kl


def _terms(logp: Tensor, batch: Batch, options: Options) -> Tensor:
    """Loss of each token, [B, T], or [B, 1] where it is the same for all tokens of a sequence."""
    log_weights = _log_weights(logp, batch, options)
    ratio, advantages = log_weights.exp(), batch.advantages
    if options.loss_type == "cispo":
        policy = -ratio.detach().clamp(max=options.epsilon_high) * advantages * logp
    elif options.loss_type == "sapo":
        tau = _by_sign(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg, logp)
        policy = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    elif options.loss_type == "vespo":
        policy = -_vespo_weight(log_weights.detach(), batch, options) * advantages * logp
    else:
        clip_high, dual_clip = _upper_bounds(options)
        policy = clip_policy.eager(
            logp, log_weights, advantages, options.epsilon_low, clip_high, dual_clip, math.inf
        )[0]
    if batch.is_ratio is not None and options.loss_type != "vespo":
        policy = policy * batch.is_ratio
    return policy + options.beta * _kl(logp, log_weights, batch, options) if options.beta != 0 else policy


def _by_sign(positive: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """``yes`` where ``positive`` and ``no`` elsewhere, in the dtype of ``like``."""
    return torch.where(positive, like.new_full((), yes), like.new_full((), no))


def _vespo_weight(log_ratio: Tensor, batch: Batch, options: Options) -> Tensor:
    """phi(w) = w^k exp(lambda (1 - w)) [B, 1] of the sequence's ratio w, sampler correction included."""
    smallest, largest = math.log(1e-8), 20.0
    log_w = (log_ratio.clamp(-largest, largest) * batch.mask).sum(-1, keepdim=True)
    if batch.is_ratio is not None:
        log_w = log_w + batch.is_ratio.log().clamp(smallest, largest).sum(-1, keepdim=True)
    log_w = log_w.clamp(smallest, largest)
    rising = batch.advantages >= 0
    k = _by_sign(rising, options.vespo_k_pos, options.vespo_k_neg, log_w)
    rate = _by_sign(rising, options.vespo_lambda_pos, options.vespo_lambda_neg, log_w).clamp(min=1e-4)
    return torch.nan_to_num((rate + k * log_w - rate * log_w.exp()).exp(), nan=0.0, posinf=0.0, neginf=0.0)


def _metrics(logp: Tensor, batch: Batch, options: Options) -> tuple[Tensor, ...]:
    """Mean over the valid tokens of the KL estimate, where there is one, and of whether the clip changed the token."""
    mask, advantages = batch.mask, batch.advantages
    total = mask.sum().clamp(min=1.0)
    log_weights = _log_weights(logp, batch, options)
    ratio = log_weights.exp()
    if options.loss_type in ("sapo", "vespo"):
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
    elif options.loss_type == "cispo":
        clipped = (ratio > options.epsilon_high) & (advantages > 0)
    else:
        clipped = ((ratio < 1 - options.epsilon_low) & (advantages < 0)) | (
            (ratio > 1 + options.epsilon_high) & (advantages > 0)
        )
    shares = [clipped]
    if options.beta != 0:
        shares.insert(0, _kl(logp, log_weights, batch, options))
    return tuple((x * mask).sum() / total for x in shares)
