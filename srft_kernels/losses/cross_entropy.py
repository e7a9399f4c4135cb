"""linear_cross_entropy: the loss of supervised training, smoothed and weighted as asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compile.ops import logprobs_op, loss_op
from ..head.arguments import make_head
from ..head.chunks import compute_dtype, taking_part
from ..head.loss import loss_with_gradients
from ..linear_logprobs import differentiable_logprobs
from ..objectives import TokenObjective
from ..objectives.cross_entropy import CROSS_ENTROPY, CrossEntropyArguments
from ..types import HeadOptions, LoraDelta, VocabParallel
from ._vectors import count_of, reciprocal

__all__ = ["linear_cross_entropy"]


@logprobs_op
def smoothed_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    options: HeadOptions,
    label_smoothing: float,
    z_loss_coef: float,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """The negative loss of each token, [N], in place of its log-probability; the second result means nothing.

    hidden_states, lm_head_weight, labels, label_smoothing, z_loss_coef: as in ``linear_cross_entropy``.
    options: Its last arguments.
    entropy_grad: False.
    """
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, labels, options, label_smoothing, z_loss_coef)
    return differentiable_logprobs(inputs, head, tokens, options.weight_grad, entropy_grad)


def token_cross_entropy(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, own: CrossEntropyArguments, options: HeadOptions
) -> Tensor:
    """``linear_cross_entropy`` with reduction "none", of arguments that fit together; traced under torch.compile.

    hidden_states, lm_head_weight, labels: as there.
    own: Its arguments that no other op has.
    options: Its last arguments.
    """
    kept = taking_part(labels, own.token_weights, options.ignore_index)
    negative, _ = smoothed_logprobs(
        hidden_states, lm_head_weight, kept, options, own.label_smoothing, own.z_loss_coef
    )
    if own.token_weights is None:
        return -negative
    weights = torch.where(labels == options.ignore_index, 0.0, own.token_weights.detach().to(negative.dtype))
    return -weights * negative


def _traced_token_cross_entropy(values: dict[str, Any]) -> Tensor:
    """The same of the arguments of ``linear_cross_entropy`` by name."""
    own = CrossEntropyArguments(*(values[name] for name in CrossEntropyArguments._fields))
    own.check(values["labels"])
    options = HeadOptions(*(values[name] for name in HeadOptions._fields))
    return token_cross_entropy(values["hidden_states"], values["lm_head_weight"], values["labels"], own, options)


@loss_op(CROSS_ENTROPY, unreduced=_traced_token_cross_entropy)
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
    vocab_parallel: VocabParallel | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean cross-entropy of the labels, without materialising the [N, V] logits.

    loss = (1 / num_tokens) sum_n w_n [ -(1 - label_smoothing) logp_n - label_smoothing mean_j(log p_nj)
    + z_loss_coef lse_n^2 ], with w = token_weights and lse the log-sum-exp of the logits, softcap and temperature
    included. Label smoothing is that of ``torch.nn.functional.cross_entropy``, but that its mean is over the words j
    whose logit is not -inf: a column that a bias of -inf takes out of a padded vocabulary is no word.

    Args:
        hidden_states: [N, D], see ``linear_logprobs``, as for every argument that is not described here.
        lm_head_weight: [V, D].
        labels: [N] int64, already shifted.
        num_tokens: Denominator, counted over micro-batches and ranks; int or 0-d tensor, 0 counts as 1. None:
            the valid tokens of this call, whatever their weights. For reduction "mean" alone.
        label_smoothing: In [0, 1], share of the loss that goes to all words alike.
        z_loss_coef: Weight of the squared log-sum-exp, >= 0.
        token_weights: [N] multiplies the loss of a token (1 / length gives a mean over sequences). 0 leaves the token
            out, whatever its hidden states are.
        reduction: "mean", "sum" or "none", as in ``torch.nn.functional.cross_entropy``. "none" gives the loss of each
            token, 0 where ignored, for any loss made of them, and costs 8NDV (4NDV with a frozen head).
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
        [] fp32 (fp64 for fp64 inputs) loss, whose backward may run once; [N] for reduction "none".

    Raises:
        ValueError: As ``linear_logprobs``, or for an argument out of the ranges above.

    Eager twin: ``reference.linear_cross_entropy``.
    """
    own = CrossEntropyArguments(num_tokens, label_smoothing, z_loss_coef, token_weights, reduction)
    own.check(labels)
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    if reduction == "none":
        return token_cross_entropy(hidden_states, lm_head_weight, labels, own, options)
    kept = taking_part(labels, token_weights, ignore_index)
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, kept, options, label_smoothing, z_loss_coef)
    dtype = compute_dtype(hidden_states.dtype)
    weight = tokens.valid.to(dtype) if token_weights is None else tokens.take(token_weights.detach().to(dtype))
    if reduction == "mean":
        weight = weight * reciprocal(count_of(num_tokens, labels != ignore_index, dtype))
    objective = TokenObjective(CROSS_ENTROPY.formulas[""], weight[None], (), tokens.valid)
    return loss_with_gradients(inputs, head, tokens, objective, None, weight_grad).loss
