"""Losses that are known in advance: their values, with gradients that were computed along with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import CallableObjective, TokenObjective
from ..types import Inputs, PolicyLoss
from .chunks import HeadRows, Tokens, compute_dtype, drops_dead_rows
from .gradients import Gradients
from .last_gradient import last_gradient, links
from .sweep import When, sweep

# Weight gradients that wait for a scalar, where each saves a second projection. A fixed number, so that a result
# does not depend on what else is in memory.
CPU_DEFERRED_BYTES = 2 * 2**30
GPU_DEFERRED_BYTES = 4 * 2**30


class _AttachGradients(torch.autograd.Function):
    """Gives a computed loss the gradients that were computed with it, beside those that it has of its own."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, loss, gradients: Gradients, tokens: Tokens, inputs):
        ctx.gradients, ctx.tokens, ctx.links = gradients, tokens, inputs
        return loss.clone()

    @staticmethod
    @last_gradient
    def backward(ctx, dloss):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss was already differentiated: its gradients, computed in forward, were given "
                "away by the first backward; call the loss again, or use linear_logprobs to keep a graph"
            )
        # a comparison would make a GPU wait
        is_one = dloss.device.type == "cpu" and bool(dloss == 1)
        if gradients.external and dloss.device.type == "cpu" and not is_one:
            raise RuntimeError(
                f"the gradient of the weight is in weight_grad already, for a loss that enters backward with "
                f"factor 1, got {dloss.item()}; put the factor into the weights of the tokens, or drop weight_grad"
            )
        if gradients.external and dloss.is_cuda:
            torch._assert_async(dloss == 1)
        scale = None if is_one else dloss
        return *gradients.finish(ctx.tokens.put, scale), dloss, None, None, None


def _can_defer(objective: TokenObjective | CallableObjective, head: HeadRows, wants_weight: bool) -> bool:
    """Coefficients that are not known in time may wait: cheaper than a second projection, and in memory."""
    if not objective.deferred or objective.entropy_grad or head.lora is not None:
        return False
    # dead rows of a part stay in its product on a GPU, so that two parts cost as much as a second projection
    if not drops_dead_rows(head) and objective.products > 1:
        return False
    limit = GPU_DEFERRED_BYTES if head.hidden.is_cuda else CPU_DEFERRED_BYTES
    size = head.weight.numel() * compute_dtype(head.hidden.dtype).itemsize
    return not wants_weight or objective.deferred * size <= limit


def loss_with_gradients(
    inputs: Inputs,
    head: HeadRows,
    tokens: Tokens,
    objective: TokenObjective | CallableObjective,
    bounds: list[int] | None,
    weight_grad: Tensor | None,
) -> PolicyLoss:
    """The result of ``objective``, with a loss that has the gradients that are wanted.

    Args:
        inputs: As autograd sees them.
        head: The computed rows.
        tokens: Maps results to all rows.
        objective: The loss.
        bounds: Sequence bounds in computed rows, where they are known without a device sync.
        weight_grad: [V, D] fp32 to add the gradient of the weight to, or None.
    """
    wanted = inputs.wanted()
    grads = Gradients(head, inputs, wanted, weight_grad) if any(wanted) else None
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        if grads is None:
            known = sweep(head, When.NEVER)
        else:
            when = When.DEFERRED if _can_defer(objective, head, wanted.weight) else When.SEEN
            known = sweep(head, when, grads, objective, bounds)
        logp, entropy = known.logprobs, known.entropy
        loss, ratio, clipped, terms = objective.evaluate(logp, entropy)
    if grads is not None:
        loss = _AttachGradients.apply(*inputs, loss, grads, tokens, links(inputs))
    put = tokens.put
    return PolicyLoss(loss, put(logp), put(entropy), put(ratio, 1.0), put(clipped, False), terms)
