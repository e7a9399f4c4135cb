"""The blocks of a policy through torch.compile: what is element by element in them takes a few passes over memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from srft.policy.parallel import blocks_of

BACKEND = "inductor"
"""What torch.compile hands its graphs to."""
# Versions of one function: every precision, with and without gradient, with adapters and without, of a policy and of
# the models beside it. Beyond its limit, 8 by default, torch.compile leaves what comes new as it is.
_MOST_VERSIONS = 64


def refuse_no_compiler(compiles: bool, device: torch.device) -> None:
    """Check that what torch.compile makes for a device can be built here.

    Args:
        compiles: Whether it is to be.
        device: Where the policy computes.

    Raises:
        ValueError: When a compiler is not installed.
    """
    if not compiles:
        return
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                "model.compile=true makes Triton kernels on a GPU, and triton is not installed; pip install triton in "
                "the version that this torch asks for, or set model.compile=false"
            )
        variable, usual = "CC", ["cc", "gcc", "clang"]
    else:
        variable, usual = "CXX", ["clang++"] if sys.platform == "darwin" else ["g++"]
    asked = os.environ.get(variable)
    wanted = [asked] if asked else usual
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"model.compile=true needs a compiler on {device.type}, and there is no {' or '.join(wanted)}; "
            f"install one, name it by {variable}, or set model.compile=false"
        )


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Let each block of a policy run compiled from its next call on, for any number of tokens.

    Names of parameters stay, and what a block is called through, hooks of sharding and recomputation, stays in place.
    Packed attention is called as it is, between the compiled parts.

    Args:
        model: A causal LM that is not sharded yet.
        device: Where it computes.

    Raises:
        ValueError: When a compiler is not installed.
    """
    refuse_no_compiler(True, device)
    settings = torch._dynamo.config
    most = max(settings.recompile_limit, _MOST_VERSIONS)
    for block in blocks_of(model):
        block.compile(dynamic=True, backend=BACKEND)
        # Graphs are made in a call, and what is set for it holds in the thread that calls: recomputation in a backward
        # pass on a GPU has another. dynamic=True is meant for numbers of tokens, and without specialize_float would
        # make an argument in fp64 of a norm's epsilon, too.
        under = settings.patch(recompile_limit=most, specialize_float=True)
        block._compiled_call_impl = under(block._compiled_call_impl)


@contextmanager
def as_written(model: nn.Module) -> Iterator[bool]:
    """Run the blocks of a policy as they are written, hooks inside them and all, for the length of the body.

    Args:
        model: With compiled blocks or without.

    Yields:
        Whether it has compiled blocks.
    """
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    calls = [m._compiled_call_impl for m in compiled]
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield bool(compiled)
    finally:
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call
