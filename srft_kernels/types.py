"""What several rooms of this package share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LoraDelta", "PolicyLoss"]


class LoraDelta(NamedTuple):
    """A low-rank change of an lm_head: its logits gain ``scale`` (hidden a^T) b^T."""

    a: Tensor
    """[r, D] floating point, may need a gradient."""
    b: Tensor
    """[V, r] floating point, may need a gradient; with VocabParallel this rank's rows."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""


class PolicyLoss(NamedTuple):
    """Result of a policy loss; only ``loss`` carries a gradient."""

    loss: Tensor
    """[] scalar; backward may run once."""
    logprobs: Tensor
    """[N] log-probability of each label in nats, 0 where ignored (a weight of 0 ignores, too)."""
    entropy: Tensor
    """[N] entropy in nats, 0 where ignored."""
    ratio: Tensor
    """[N] importance ratio (of the sequence for GSPO), 1 where ignored, on-policy or a demonstration, and where it is
    out of bounds and nothing is multiplied by it."""
    clipped: Tensor
    """[N] bool, the clip, or the bound of the log-ratio, changed the gradient of this token."""
    terms: dict[str, Tensor]
    """Named 0-d parts of the loss and sums for metrics; they add up over micro-batches."""


class Inputs(NamedTuple):
    """The differentiable inputs of an op, as autograd sees them, in the order of their gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D]
    lora_b: Tensor | None  # [V, r]

    def wanted(self) -> Wanted:
        """Which of them need a gradient."""
        grad = torch.is_grad_enabled()
        return Wanted(*(x is not None and grad and x.requires_grad for x in self))


class Wanted(NamedTuple):
    """Which of the ``Inputs`` need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool
