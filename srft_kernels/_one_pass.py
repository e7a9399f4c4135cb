"""One sweep over chunks of logits gives loss and gradients; some losses need a pass for statistics first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import row_kernels
from ._chunked_head import (
    Gradients,
    Head,
    Tokens,
    even_chunks,
    max_rows,
    project,
    rows_backend,
    sequence_chunks,
    workspace,
)
from .linear_logprobs import gradient_sweep, stats_sweep
from .objectives import TokenObjective


class PolicyLoss(NamedTuple):
    """Result of a policy loss; only ``loss`` carries a gradient."""

    loss: Tensor
    """[] scalar; backward may run once."""
    logprobs: Tensor
    """[N] log-probability of each label in nats, 0 where ignored."""
    entropy: Tensor
    """[N] entropy in nats, 0 where ignored."""
    ratio: Tensor
    """[N] importance ratio (of the sequence for GSPO), 1 where ignored, on-policy or a demonstration."""
    clipped: Tensor
    """[N] bool, the clip changed the gradient of this token."""
    terms: dict[str, Tensor]
    """Named 0-d parts of the loss and sums for metrics; they add up over micro-batches."""


class _AttachGradients(torch.autograd.Function):
    """Gives a computed loss the gradients that were computed with it."""

    @staticmethod
    def forward(ctx, hidden_states, lm_head_weight, bias, loss, gradients: Gradients, tokens: Tokens):
        ctx.gradients, ctx.tokens = gradients, tokens
        ctx.bias_dtype = None if bias is None else bias.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss was already differentiated: its gradients, computed in forward, were given "
                "away by the first backward; call the loss again, or use linear_logprobs to keep a graph"
            )
        # a comparison would make a GPU wait
        scale = None if dloss.device.type == "cpu" and dloss == 1 else dloss
        return *gradients.finish(ctx.tokens.put, ctx.bias_dtype, scale), None, None, None


class CallableObjective:
    """A user's loss of the vectors logprobs [N] and entropy [N], differentiated by autograd."""

    scope = "batch"
    entropy_grad = True

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], put: Callable, take: Callable):
        """Wrap ``objective``; ``put`` maps computed rows to [N], ``take`` maps [N] back."""
        self._objective, self._put, self._take = objective, put, take
        self._loss: Tensor | None = None

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See TokenObjective; ``rows`` are all rows."""
        leaves = [self._put(x).detach().requires_grad_() for x in (logp, entropy)]
        with torch.enable_grad():
            loss = self._call(*leaves)
            grads: tuple[Tensor | None, ...] = (None, None)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        self._loss = loss.detach()
        dlogp, dentropy = (
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        )
        return self._take(dlogp), self._take(dentropy)

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; logp and entropy of all rows."""
        loss = self._loss
        if loss is None:
            loss = self._call(self._put(logp), self._put(entropy)).detach()
        return loss, torch.ones_like(logp), torch.zeros_like(logp, dtype=torch.bool), {}

    def _call(self, logp: Tensor, entropy: Tensor) -> Tensor:
        loss = self._objective(logp, entropy)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"objective must return a 0-d tensor, got {got}; reduce it with .sum() or .mean()"
            )
        return loss


def _fused_sweep(
    head: Head,
    objective: TokenObjective | CallableObjective,
    chunks: list[slice],
    wants: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Gradients]:
    """Statistics and gradients from one pass; a chunk must hold all that its gradient depends on."""
    space = workspace(head, chunks)
    logp, entropy = space.new_empty(head.labels.numel()), space.new_empty(head.labels.numel())
    grads = Gradients(head, wants)
    backend = rows_backend(head)
    overwrite = not objective.entropy_grad and head.softcap is None
    for rows in chunks:
        scores, settings = project(head, rows, space), head.rows(rows)
        if backend is row_kernels and isinstance(objective, TokenObjective) and objective.scope == "token":
            known, dscores = row_kernels.objective_gradient(
                scores,
                settings,
                objective.formula,
                objective.inputs[:, rows],
                objective.params,
                objective.entropy_grad,
            )
        else:
            known = backend.stats(scores, settings, overwrite)
            dlogp, dentropy = objective.coefficients(known.logprobs, known.entropy, rows)
            dscores = backend.gradient(scores, settings, known, dlogp, dentropy, overwrite)
        logp[rows], entropy[rows] = known.logprobs, known.entropy
        grads.add(head, dscores, rows)
    return logp, entropy, grads


def policy_loss(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    head: Head,
    tokens: Tokens,
    objective: TokenObjective | CallableObjective,
    bounds: list[int] | None = None,
) -> PolicyLoss:
    """Run ``objective``, choosing the cheapest sweep that knows each scope in time.

    Args:
        inputs: hidden_states, lm_head_weight and bias as the caller gave them.
        head: The computed rows.
        tokens: Maps results to all rows.
        objective: The loss.
        bounds: Sequence bounds in computed rows, where they are known without a device sync.
    """
    wants = tuple(x is not None and torch.is_grad_enabled() and x.requires_grad for x in inputs)
    count, limit = head.labels.numel(), max_rows(head)
    chunks: list[slice] | None = even_chunks(count, limit)
    if count > limit and objective.scope == "sequence":
        chunks = None if bounds is None else sequence_chunks(bounds, limit)
    elif count > limit and objective.scope == "batch":
        chunks = None
    grads = None
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        if any(wants) and chunks is not None:
            logp, entropy, grads = _fused_sweep(head, objective, chunks, wants)
        else:
            known = stats_sweep(head)
            logp, entropy = known.logprobs, known.entropy
            if any(wants):
                dlogp, dentropy = objective.coefficients(logp, entropy, slice(0, count))
                grads = gradient_sweep(head, known, dlogp, dentropy, wants)
        loss, ratio, clipped, terms = objective.evaluate(logp, entropy)
    if grads is not None:
        loss = _AttachGradients.apply(*inputs, loss, grads, tokens)
    put = tokens.put
    return PolicyLoss(loss, put(logp), put(entropy), put(ratio, 1.0), put(clipped, False), terms)
