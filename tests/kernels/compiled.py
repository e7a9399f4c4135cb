"""An op inside a small model, compiled and not, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import srft_kernels
from tests.kernels.cases import (
    Case,
    policy,
)


def body(op: Callable, case: Case, options: dict[str, Any]) -> Callable:
    """A small model around an op: a linear map before it, and a total that scales the loss and adds a term."""

    def model(mixing: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        states = hidden @ mixing
        result = op(srft_kernels, replace(case, hidden=states, weight=weight, bias=bias), **options)
        loss = result if isinstance(result, Tensor) else result.loss
        return -1.7 * loss + states.float().square().mean(), result

    return model


def leaves_of(case: Case) -> list[Tensor | None]:
    """Mixing, hidden, weight and bias, which need gradients."""
    size = case.hidden.shape[1]
    mixing = (torch.eye(size) + 0.1).to(case.hidden.dtype)
    inputs = [mixing, case.hidden, case.weight, case.bias]
    return [None if x is None else x.detach().clone().requires_grad_() for x in inputs]


def outcome(model: Callable, case: Case) -> dict[str, Tensor]:
    """Every value of the op and every gradient by name."""
    leaves = leaves_of(case)
    total, result = model(*leaves)
    total.backward()
    out = {"total": total.detach()}
    if not isinstance(result, Tensor):
        out |= {name: getattr(result, name) for name in ("logprobs", "entropy", "ratio", "clipped")}
        out |= result.terms
        assert not any(x.requires_grad for name, x in out.items())
    names = ("mixing", "hidden", "weight", "bias")
    return out | {f"d{n}": x.grad for n, x in zip(names, leaves, strict=True) if x is not None}


def named(name: str) -> Callable[[str], str]:
    """What a comparison says where it fails."""
    return lambda message: f"{name}: {message}"


def assert_as_eager(op: Callable, case: Case, *, backend: str = "aot_eager", **options: Any) -> None:
    """Compile in one graph, and compare bit by bit; a loss that is itself compiled, by a tight tolerance."""
    eager = outcome(body(op, case, options), case)
    compiled = outcome(torch.compile(body(op, case, options), fullgraph=True, backend=backend), case)
    assert eager.keys() == compiled.keys()
    for name, x in eager.items():
        if op is policy or backend != "aot_eager":
            tolerance = 2e-5 if x.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(compiled[name], x, rtol=tolerance, atol=tolerance, msg=named(name))
        else:
            assert torch.equal(compiled[name], x), f"{name} differs"
