"""verl's loss heads by their own names and signatures (those of 0.9.1), served by the ops of this package.

Change the import and nothing else::

    from srft_kernels.integrations.verl import FusedLinearForPPO, linear_cross_entropy

verl itself need not be installed. What differs: any hidden size, CPU tensors, a temperature per token, labels of -100
(log-probability and entropy 0, no gradient), gradients added up in fp32, and log-probabilities and entropy in fp32
always.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_choice
from ..linear_logprobs import linear_logprobs
from ..types import VocabParallel

__all__ = ["FusedLinearForPPO", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy, as ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``.

    Args:
        hidden: [N, D], or [..., D], which is flattened.
        weight: [V, D], dtype of hidden; with a group of R ranks this rank's V / R rows, in the order of the ranks.
        labels: N integers in [0, V) of any shape, already shifted; rows of -100 are skipped.
        temperature: Divides the logits, > 0; a float, or one value per token.
        reduction: "none", "sum" or "mean" (over all N rows) of the log-probabilities.
        dist_process_group: Tensor-parallel group whose ranks share the vocabulary. As in verl, the gradient of hidden
            is then each rank's part, to be summed over the group outside, as sequence parallelism does.

    Returns:
        (logprobs, entropy): fp32 (fp64 for fp64 inputs), nats, both with gradients; logprobs [N] or reduced to [],
        entropy [N].

    Raises:
        ValueError: For an unknown reduction, or what ``linear_logprobs`` raises.
    """
    check_choice("reduction", reduction.lower(), ("none", "sum", "mean"))
    shard = None
    ranks = 1 if dist_process_group is None else dist.get_world_size(dist_process_group)
    if ranks > 1:
        assert dist_process_group is not None
        rows = weight.shape[0]
        shard = VocabParallel(dist_process_group, dist.get_rank(dist_process_group) * rows, ranks * rows)
        if hidden.requires_grad:
            # the op has summed the gradient over the group: equal parts of it sum to the same
            hidden = hidden.view_as(hidden)
            hidden.register_hook(lambda gradient: gradient / ranks)
    logprobs, entropy = _flat_logprobs(hidden, weight, labels, temperature, shard)
    if reduction.lower() == "none":
        return logprobs, entropy
    return logprobs.sum() if reduction.lower() == "sum" else logprobs.mean(), entropy


def _flat_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    shard: VocabParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy [N] of the tokens in their order, whatever the leading shapes."""
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature.reshape(-1)
    return linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        temperature=temperature,
        vocab_parallel=shard,
        entropy_grad=True,
    )


class FusedLinearForPPO(torch.nn.Module):
    """Log-probabilities and entropy of a linear head, as ``verl.utils.experimental.torch_functional`` has it."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        """Keep the settings, neither of which changes a result.

        Args:
            chunk_size: Without effect: chunks of rows are chosen by the size of their logits.
            impl_backend: "torch" or "liger", without effect.

        Raises:
            ValueError: For any other impl_backend.
        """
        super().__init__()
        check_choice("impl_backend", impl_backend, ("torch", "liger"))
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return (log_probs, entropy) in the shape of input_ids, fp32 (fp64 for fp64 inputs), nats, with gradients.

        Args:
            hidden_states: [N, D] or [B, T, D].
            vocab_weights: [V, D], dtype of hidden_states.
            input_ids: [N] or [B, T] integers in [0, V), already shifted; -100 is skipped.
            temperature: Divides the logits, > 0; a float, or one value per token in the shape of input_ids.

        Raises:
            ValueError: As ``linear_logprobs``.
        """
        if hidden_states.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"input_ids must be {list(hidden_states.shape[:-1])}, as hidden_states {list(hidden_states.shape)}, "
                f"got {list(input_ids.shape)}"
            )
        log_probs, entropy = _flat_logprobs(hidden_states, vocab_weights, input_ids, temperature)
        return log_probs.view(input_ids.shape), entropy.view(input_ids.shape)
