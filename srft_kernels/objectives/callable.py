"""A user's loss of log-probabilities and entropies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CallableObjective"]


class CallableObjective:
    """A user's loss of the vectors logprobs [N] and entropy [N], differentiated by autograd.

    The loss keeps its graph, for the gradients of other tensors that it reads. Backward runs through all of it, so that
    those of logprobs and entropy, which are taken at once, come a second time and end in two leaves that nobody has.
    """

    scope = "batch"
    entropy_grad = True
    deferred = products = 0

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], put: Callable, take: Callable):
        """Wrap ``objective``; ``put`` maps computed rows to [N], ``take`` maps [N] back."""
        self._objective, self._put, self._take = objective, put, take
        self._grad_enabled = torch.is_grad_enabled()
        self._loss: Tensor | None = None

    def coefficients(self, logp: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See TokenObjective; ``rows`` are all rows."""
        leaves = [self._put(x).detach().requires_grad_() for x in (logp, entropy)]
        self._loss = loss = self._call(*leaves)
        grads: tuple[Tensor | None, ...] = (None, None)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        dlogp, dentropy = (
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        )
        return self._take(dlogp), self._take(dentropy)

    def evaluate(self, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """See TokenObjective; logp and entropy of all rows."""
        loss = self._loss
        if loss is None:
            loss = self._call(self._put(logp), self._put(entropy))
        return loss, torch.ones_like(logp), torch.zeros_like(logp, dtype=torch.bool), {}

    def _call(self, logp: Tensor, entropy: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._grad_enabled):
            loss = self._objective(logp, entropy)
            # a loss that is itself a parameter is not handed out
            loss = loss.clone() if isinstance(loss, Tensor) and loss.is_leaf else loss
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"objective must return a 0-d tensor, got {got}; reduce it with .sum() or .mean()"
            )
        return loss
