"""linear_policy_loss: any loss of log-probabilities and entropies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..compile.ops import user_loss_op
from ..head.arguments import make_head
from ..head.loss import loss_with_gradients
from ..linear_logprobs import linear_logprobs
from ..objectives import CallableObjective
from ..types import HeadOptions, LoraDelta, PolicyLoss, VocabParallel

__all__ = ["linear_policy_loss"]


@user_loss_op(linear_logprobs)
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
    vocab_parallel: VocabParallel | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """Any loss of (logprobs, entropy), without materialising the [N, V] logits.

    ``objective`` is differentiated by autograd on two [N] vectors, once the logits of all rows have been seen. It
    costs 6NDV where they fit in one workspace, and up to 8NDV otherwise: all but the last chunk of logits are
    computed twice. Under torch.compile it is traced into the graph, at 8NDV, and backward fills
    ``weight_grad``.

    Args:
        hidden_states: [N, D], see ``linear_logprobs``, as for every argument that is not described here.
        lm_head_weight: [V, D].
        labels: [N] int64, already shifted.
        objective: Takes logprobs [N] and entropy [N], fp32 in nats and 0 where ignored, and returns a 0-d
            loss. Called once; other tensors that it reads, such as a learned log Z or the parameters of a module that
            it calls, get their gradient too.
        bias: [V].
        temperature: Divides the logits, > 0; a float or [N].
        logit_softcap: Cap of the logits, > 0, or None.
        logit_scale: Multiplies the logits, > 0.
        ignore_index: Label of rows to skip.
        lora: Low-rank change of the weight.
        vocab_parallel: Where this rank's rows of the weight are.
        weight_grad: [V, D] buffer for the gradient of the weight. It is filled in forward, so the loss must
            enter backward with factor 1.
        logits_dtype: 16-bit dtype to round the logits to, or None.

    Returns:
        PolicyLoss, with a ratio of 1, nothing clipped and no terms.

    Raises:
        ValueError: As ``linear_logprobs``, or where ``objective`` does not return a 0-d tensor.

    Eager twin: ``reference.linear_policy_loss``.
    """
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, labels, options)
    if not callable(objective):
        raise ValueError(
            f"objective must be callable as objective(logprobs, entropy), got {type(objective).__name__}"
        )
    user = CallableObjective(objective, tokens.put, tokens.take)
    return loss_with_gradients(inputs, head, tokens, user, None, weight_grad)
