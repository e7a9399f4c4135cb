"""What several rooms of this package share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LoraDelta", "PolicyLoss", "VocabParallel"]


class LoraDelta(NamedTuple):
    """A low-rank change of an lm_head: its logits gain ``scale`` (hidden a^T) b^T."""

    a: Tensor
    """[r, D] floating point, may need a gradient."""
    b: Tensor
    """[V, r] floating point, may need a gradient; with VocabParallel this rank's rows."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""


class VocabParallel(NamedTuple):
    """Says that ``lm_head_weight`` and ``bias`` are this rank's rows of a head that a group shares.

    Every rank of the group passes the same hidden states, labels and per-token inputs, and gets the same
    results; the gradient of the hidden states is that of the whole head on every rank, summed over the group
    inside the op, and must not be summed again.
    """

    group: dist.ProcessGroup
    """The ranks that hold the other rows."""
    vocab_start: int
    """Row of the whole weight at which this rank's rows begin."""
    vocab_size: int
    """V of the whole weight; labels are in [0, V). Ranks may hold different numbers of rows."""


class HeadOptions(NamedTuple):
    """What every op lets its caller choose about the head: its last arguments, with their names, order and defaults.

    ``linear_logprobs`` says what each means.
    """

    bias: Tensor | None = None
    """[V] floating point, may need a gradient; with VocabParallel this rank's rows, as everything that has V rows."""
    temperature: float | Tensor = 1.0
    """> 0, or a 0-d tensor, or [N] with one value per token."""
    logit_softcap: float | None = None
    """Cap of the logits, > 0 and finite, before the temperature."""
    logit_scale: float = 1.0
    """Factor of the logits, > 0 and finite, before the softcap."""
    ignore_index: int = -100
    """Label of rows to skip."""
    lora: LoraDelta | None = None
    """Low-rank change of the weight."""
    vocab_parallel: VocabParallel | None = None
    """Where this rank's rows of the weight are."""
    weight_grad: Tensor | None = None
    """[V, D] in fp32 (fp64 for fp64 inputs), to which the gradient of the weight is added; autograd then gets none."""
    logits_dtype: torch.dtype | None = None
    """That of the hidden states, to round the logits to it; None: fp32, or fp64 for fp64 inputs."""


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
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, D]
    lora_b: Tensor | None = None  # [V, r]

    def wanted(self) -> Wanted:
        """Which of them need a gradient."""
        grad = torch.is_grad_enabled()
        return Wanted(*(x is not None and grad and x.requires_grad for x in self))


class Wanted(NamedTuple):
    """Which of the ``Inputs`` need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False
