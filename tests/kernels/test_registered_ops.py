"""The ops as torch sees them: schema, shapes, aliases, derivative."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import srft_kernels
from srft_kernels.compile.schema import Schema
from tests.kernels.cases import (
    Case,
    make_case,
)


def op_arguments(name: str, case: Case, **options: Any) -> dict[str, Any]:
    """Arguments of the op ``name``, after its own."""
    # the decorator keeps the function
    function = inspect.unwrap(getattr(srft_kernels, name))
    given = {"hidden_states": case.hidden, "lm_head_weight": case.weight, "labels": case.labels, "bias": case.bias}
    given |= {n: getattr(case, n) for n in ("advantages", "is_demo", "is_correct", "cu_seqlens")}
    signature = inspect.signature(function)
    given |= {n: case.weights for n in ("policy_weights", "sft_weights")}
    given = {n: x for n, x in given.items() if n in signature.parameters} | options
    bound = signature.bind(**given)
    bound.apply_defaults()
    return Schema(function).split(bound.arguments)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_grpo_loss", "linear_srft_loss", "linear_token_loss"])
@pytest.mark.parametrize("wants", [(True, True, True), (True, False, False), (False, False, False)])
def test_loss_ops(name, wants):
    """Schema, shapes and aliases of the losses, and of their twins that write to weight_grad."""
    case = make_case()
    ops = torch.ops.srft_kernels
    wants = [*wants, False, False]
    torch.library.opcheck(getattr(ops, name).default, (wants, *op_arguments(name, case).values()))
    if wants[1]:
        arguments = op_arguments(name, case, weight_grad=torch.zeros(case.weight.shape))
        torch.library.opcheck(getattr(ops, name + "_into_weight_grad").default, (wants, *arguments.values()))


@pytest.mark.parametrize("frozen", [False, True])
def test_logprobs_op(frozen):
    """The same of linear_logprobs, with its derivative."""
    case = make_case()
    case.hidden.requires_grad_()
    case.weight.requires_grad_(not frozen)
    arguments = op_arguments("linear_logprobs", case, entropy_grad=not frozen, temperature=0.7)
    torch.library.opcheck(torch.ops.srft_kernels.linear_logprobs.default, (frozen, *arguments.values()))


def test_logprobs_backward_op():
    """The same of its backward."""
    case = make_case()
    known = torch.ops.srft_kernels.linear_logprobs(False, *op_arguments("linear_logprobs", case).values())
    first = ([True, True, True, False, False], case.advantages, None, known)
    ops = torch.ops.srft_kernels
    arguments = op_arguments("linear_logprobs", case)
    torch.library.opcheck(ops.linear_logprobs_backward.default, (*first, *arguments.values()))
    arguments = op_arguments("linear_logprobs", case, weight_grad=torch.zeros(case.weight.shape))
    torch.library.opcheck(ops.linear_logprobs_backward_into_weight_grad.default, (*first, *arguments.values()))


def test_attach_op():
    """The same of the node that attaches gradients, with its derivative."""
    inputs = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    totals = [torch.randn(3, 4), torch.randn(5)]
    torch.library.opcheck(torch.ops.srft_kernels.attach.default, (torch.tensor(2.0), totals, inputs, None))
