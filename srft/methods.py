"""What each method learns from a group: advantages, token weights, and which fused loss it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srft.batch import Batch, Group, Response, Totals
from srft.config import Config, MethodConfig
from srft_kernels import FusedLMHead, PolicyLoss, linear_grpo_loss, linear_srft_loss

# what the paper's text and the two public codes do where the paper's equations leave it open
_SRFT_ADVANTAGE_STD = {"paper": True, "official": False, "upt": False}


def needs_rollouts(method: MethodConfig) -> bool:
    """Whether the method learns from completions of its own policy.

    Args:
        method: The method section of the configuration.
    """
    return method.name != "sft"


def needs_demos(method: MethodConfig) -> bool:
    """Whether the method learns from demonstrations.

    Args:
        method: The method section of the configuration.
    """
    return method.name != "grpo"


def group_advantages(rewards: Sequence[float], divide_by_std: bool) -> list[float]:
    """Compare each reward of a group with the group: (r - mean) / std.

    Args:
        rewards: Rewards of every member, rollouts and demonstrations alike, in [0, 1].
        divide_by_std: Divide by the unbiased standard deviation (paper, Eq. 7), or only subtract the mean.

    Returns:
        One advantage a member; all exactly 0 when every reward is the same, decided on the rewards themselves
        since a floating-point spread of equal numbers need not be 0.
    """
    if all(r == rewards[0] for r in rewards):
        return [0.0] * len(rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    centred = values - values.mean()
    return (centred / (values.std() + 1e-6) if divide_by_std else centred).tolist()


def assign_advantages(groups: Sequence[Group], method: MethodConfig) -> list[Response]:
    """Fill in every sequence's advantage and return those the method learns from.

    Args:
        groups: Prompt groups with rewards; modified in place.
        method: The method section of the configuration.

    Returns:
        Rollouts and demonstrations for SRFT, rollouts for GRPO, demonstrations for SFT; those that were judged.
    """
    divide = method.advantage_std
    if divide is None:
        divide = _SRFT_ADVANTAGE_STD[method.preset] if method.name == "srft" else True
    chosen: list[Response] = []
    for group in groups:
        members = (group.rollouts if needs_rollouts(method) else []) + (
            group.demos if needs_demos(method) else []
        )
        members = [member for member in members if member.is_judged]
        if needs_rollouts(method) and members:
            for member, advantage in zip(
                members, group_advantages([m.reward for m in members], divide), strict=True
            ):
                member.advantage = advantage
        chosen += members
    return chosen


def token_weight(config: Config, totals: Totals) -> Callable[[Response], float]:
    """Turn the aggregation option into the weight of each token of a sequence.

    Every term is divided by its global token count, so a weight of 1 gives the mean over tokens. The other aggregations
    divide by the number of sequences instead, which their weights make up for; no split of the batch changes the loss.

    Args:
        config: The whole configuration.
        totals: Counts over the optimizer update.
    """
    how = config.method.aggregation
    per_sequence = {
        False: totals.rollout_tokens / max(1, totals.rollout_sequences),
        True: totals.demo_tokens / max(1, totals.demo_sequences),
    }

    def weight(sequence: Response) -> float:
        if how == "token-mean":
            return 1.0
        length = len(sequence.response_ids) if how == "sequence-mean" else config.rollout.max_new_tokens
        return per_sequence[sequence.is_demo] / length

    return weight


def method_loss(
    config: Config,
    hidden_states: Tensor,
    head: FusedLMHead,
    batch: Batch,
    totals: Totals,
    batch_entropy: Tensor | None,
) -> PolicyLoss:
    """Call the fused loss of the configured method on one micro-batch.

    Args:
        config: The whole configuration.
        hidden_states: [N, D] from ``model.final_hidden_states``.
        head: The policy's.
        batch: The micro-batch.
        totals: Counts over the whole update, the divisors.
        batch_entropy: 0-d fp32 mean entropy of the whole update; needed by SRFT with the "batch" scope.

    Returns:
        The loss with its gradient, and detached per-token and summed diagnostics.
    """
    method = config.method
    common: dict[str, Any] = {"temperature": config.rollout.temperature, "token_weights": batch.token_weights}
    if method.name == "grpo":
        return head(hidden_states, partial(
            linear_grpo_loss, labels=batch.labels, advantages=batch.advantages, old_logprobs=batch.old_logprobs,
            loss_type=method.loss_type, clip_low=method.clip_low, clip_high=method.clip_high,
            entropy_coef=method.entropy_coef or 0.0, cu_seqlens=batch.loss_cu_seqlens,
            num_tokens=totals.rollout_tokens, **common,
        ))  # fmt: skip
    if method.name == "sft":
        # cross-entropy is REINFORCE with advantage 1; this form also returns log-probabilities and entropy
        return head(hidden_states, partial(
            linear_grpo_loss, labels=batch.labels, advantages=torch.ones_like(batch.advantages),
            loss_type="reinforce", entropy_coef=method.entropy_coef or 0.0, num_tokens=totals.demo_tokens, **common,
        ))  # fmt: skip
    gamma = None if method.demo_gamma == "preset" else 0.0 if method.demo_gamma == "none" else method.demo_gamma
    return head(hidden_states, partial(
        linear_srft_loss, labels=batch.labels, advantages=batch.advantages, is_demo=batch.is_demo,
        is_correct=batch.is_correct, cu_seqlens=batch.loss_cu_seqlens, old_logprobs=batch.old_logprobs,
        preset=method.preset, sft_coef=method.sft_coef, rl_coef=method.rl_coef,
        sft_entropy_sign=method.sft_entropy_sign, entropy_scope=method.entropy_scope, batch_entropy=batch_entropy,
        self_rollout=method.self_rollout, demo_gamma=gamma,
        entropy_coef=method.entropy_coef, num_rollout_tokens=totals.rollout_tokens,
        num_demo_tokens=totals.demo_tokens, **common,
    ))  # fmt: skip
