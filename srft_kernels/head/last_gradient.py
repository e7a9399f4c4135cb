"""A gradient in closed form has no graph behind it, and says so where it is differentiated in its turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    "a gradient of a fused op of srft_kernels cannot be differentiated again, as create_graph=True would have it: it "
    "is computed in closed form, without a graph; for second derivatives take the op of the same name in "
    "srft_kernels.reference"
)


class _Link(torch.autograd.Function):
    """An empty tensor with the graph behind ``x``, and without its memory."""

    @staticmethod
    def forward(ctx, x):
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _grad):
        raise AssertionError("whoever has this link raises first")


def links(inputs: Iterable[Tensor | None]) -> list[Tensor]:
    """What ``without_graph`` needs to know of ``inputs`` that an op does not save; made outside of its forward."""
    return [_Link.apply(x) for x in inputs if x is not None and x.requires_grad]


def without_graph(gradients: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``gradients``, which raise RuntimeError where somebody differentiates them.

    torch's once_differentiable does so only where the gradient that came in needs one itself, and cuts the graph
    without a word where it is the 1 that backward starts with, or where only some inputs are asked for.

    Args:
        gradients: In the order in which backward returns them.
        inputs: What they depend on, or ``links`` to it.
    """
    # outside create_graph=True there is no grad mode in backward
    if not torch.is_grad_enabled():
        return tuple(gradients)
    depends = [x for x in inputs if x is not None and x.requires_grad]
    return tuple(None if x is None else _refused(x.detach(), depends) for x in gradients)


def _refused(gradient: Tensor, depends: list[Tensor]) -> Tensor:
    return torch._C._functions.DelayedError(_MESSAGE, 1 + len(depends))(gradient.requires_grad_(), *depends)[0]


def last_gradient(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``backward`` of an autograd function, its results ``without_graph``.

    The function saves its inputs, or keeps their ``links`` as ``ctx.links``.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        depends = [*getattr(ctx, "links", ()), *ctx.saved_tensors] if torch.is_grad_enabled() else []
        with torch.no_grad():
            results = backward(ctx, *gradients)
        return without_graph(results, depends)

    return once
