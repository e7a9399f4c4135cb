"""What several references share: logits, statistics of tokens, and vectors of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_head, check_rows
from ..formulas import Formula
from ..types import HeadOptions, PolicyLoss


def token_statistics(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy."""
    logits = projected(hidden_states, lm_head_weight, labels, options)
    return statistics(logits, labels, options.temperature, options.logit_softcap, options.ignore_index, entropy_grad)


def projected(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions) -> Tensor:
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


def transformed(
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


def statistics(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    logit_softcap: float | None,
    ignore_index: int,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy, from logits before softcap and temperature."""
    valid = labels != ignore_index
    all_logprobs = transformed(logits, valid, temperature, logit_softcap).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    # a logit of -inf has probability 0 and adds nothing to the entropy
    entropy = -(all_logprobs.exp() * all_logprobs.masked_fill(all_logprobs == -torch.inf, 0.0)).sum(-1)
    logprobs, entropy = logprobs.masked_fill(~valid, 0.0), entropy.masked_fill(~valid, 0.0)
    return logprobs, entropy if entropy_grad else entropy.detach()


def result(loss, logp, entropy, ratio, clipped, terms) -> PolicyLoss:
    terms = {name: x.detach() for name, x in terms.items()}
    return PolicyLoss(loss, logp.detach(), entropy.detach(), ratio.detach(), clipped, terms)


def at_valid(x: Tensor | None, valid: Tensor, like: Tensor, fill: float = 0.0) -> Tensor:
    """``x`` in the dtype of ``like``, ``fill`` where it is None, and 0 at rows that are not valid."""
    x = torch.full_like(like, fill) if x is None else x.detach().to(like.dtype)
    return torch.where(valid, x, 0.0)


def log_ratio_of(logp: Tensor, other: Tensor) -> Tensor:
    """logp - other, and 0 between two of -inf."""
    return torch.where((logp == other) & (logp == -torch.inf), 0.0, logp - other)


def at_least_one(given: int | Tensor | None, counted: Tensor) -> Tensor:
    count = counted.sum() if given is None else torch.as_tensor(given, device=counted.device)
    return torch.where(count > 0, count, 1)


def policy_term(
    formula: Formula,
    logp: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    in_policy: Tensor,
    valid: Tensor,
    cu_seqlens: Tensor | None,
    bounds: tuple[float, float, float | None, float],
    *,
    fixed_ratio: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A policy term without its weight, the ratio and whether it was clipped, [N] each.

    Args:
        formula: The term.
        logp: [N].
        old_logprobs: [N]; None for on-policy.
        advantages: [N].
        in_policy: [N] bool, something multiplies the term.
        valid: [N] bool.
        cu_seqlens: [B+1] bounds of sequences that share a ratio; None where a token has its own.
        bounds: clip_low, clip_high, dual_clip and max_log_ratio.
        fixed_ratio: No gradient goes through the ratio.
    """
    clip_low, clip_high, dual_clip, max_log_ratio = bounds
    log_ratio = log_ratio_of(logp, logp.detach() if old_logprobs is None else at_valid(old_logprobs, valid, logp))
    # what multiplies nothing, and is no usable ratio
    unheard = ~in_policy & ~(log_ratio.detach().abs() < max_log_ratio)
    if cu_seqlens is not None:
        log_ratio = sequence_mean(log_ratio.clamp(-1e30, 1e30), valid & ~unheard, cu_seqlens)
    log_ratio = torch.where(unheard, 0.0, log_ratio)
    term, _, ratio, clipped = formula.eager(
        logp, log_ratio.detach() if fixed_ratio else log_ratio, torch.where(in_policy, advantages, 0.0), clip_low,
        clip_high, torch.inf if dual_clip is None else dual_clip, max_log_ratio,
    )  # fmt: skip
    return term, torch.where(valid & ~unheard, ratio, 1.0), clipped & valid


def clip_counts(clipped: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    """The terms that count ``clipped`` tokens."""
    return {
        "clip_low_sum": (clipped & (ratio < 1)).sum().to(ratio.dtype),
        "clip_high_sum": (clipped & (ratio > 1)).sum().to(ratio.dtype),
    }


def scope_entropy(
    entropy: Tensor, valid: Tensor, scope: str, batch_entropy: float | Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """H of ``scope`` at each token, [N], without a gradient."""
    h = entropy.detach()
    if scope == "sequence":
        return sequence_mean(h, valid, cu_seqlens)
    if scope == "token":
        return h
    if batch_entropy is None:
        batch_entropy = h.sum() / at_least_one(None, valid)
    return torch.as_tensor(batch_entropy, dtype=h.dtype, device=h.device).expand(h.shape)


def sequence_mean(values: Tensor, valid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean over the valid tokens of each sequence, at each of its tokens."""
    assert cu_seqlens is not None
    means = []
    for start, end in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        inside = valid[start:end]
        mean = torch.where(inside, values[start:end], 0.0).sum() / inside.sum().clamp(min=1)
        means.append(mean.expand(end - start))
    return torch.cat(means) if means else values
