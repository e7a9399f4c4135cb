"""Every implementation of every loss, as one function from inputs to loss and gradients, or why it is left out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import srft_kernels
from benchmarks import losses, peers
from benchmarks.heads import HeadShape, Inputs
from srft_kernels import reference

Run = Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]


class Variant(NamedTuple):
    run: Run | None  # None: left out
    reason: str = ""
    bound: str = "others"  # which largest error against float64 it must keep
    full_logits: bool = False
    compiled: bool = False

    def bytes(self, head: HeadShape, dtype: torch.dtype, tokens: int) -> int:
        """About what a call takes, the gradients included."""
        weight = 3 * head.vocab * head.width * 4
        # logits, their log-softmax and its gradient in fp32, and for 16 bit also logits and gradient
        logits = tokens * head.vocab * (12 if dtype.itemsize == 4 else 16)
        return weight + (logits if self.full_logits else min(logits, 3 * 10**9))


def _backward(loss: Callable[[Inputs], Tensor]) -> Run:
    def run(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        x.hidden_states.grad = x.lm_head_weight.grad = None
        value = loss(x)
        value.backward()
        return value.detach(), x.hidden_states.grad, x.lm_head_weight.grad

    return run


def _fused(module, case: str, **options) -> Run:
    """The op of ``case`` in ``srft_kernels`` or in its reference."""
    if case == "grpo":
        return _backward(lambda x: module.linear_grpo_loss(*x[:5], **options).loss)
    if case == "cross_entropy":
        return _backward(lambda x: module.linear_cross_entropy(*x[:3], **options))
    return _backward(
        lambda x: module.linear_srft_loss(
            *x[:4], is_demo=x.is_demo, is_correct=x.is_correct, cu_seqlens=x.cu_seqlens, preset="paper", **options
        ).loss
    )


def _composed(logprobs: peers.LogProbs, case: str) -> Callable[[Inputs], Tensor]:
    return lambda x: losses.CASES[case](*logprobs(x, case == "srft"), x)


def _peer(name: str, case: str, device: torch.device, say: Callable[[str], None]) -> Variant:
    peer = peers.PEERS[name]
    function, reason = peers.load(name, device, say)
    if function is None:
        return Variant(None, reason)
    loss = function if peer.gives == case else _composed(function, case)
    return Variant(_backward(loss), full_logits=peer.full_logits, compiled=peer.compiled)


def gold(case: str) -> Run:
    """The float64 twin, for inputs that are float64."""
    return _fused(reference, case)


def variants(
    case: str,
    dtype: torch.dtype,
    device: torch.device,
    only: frozenset[str] = frozenset(),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Variant]:
    """Implementations of ``case`` by name, ours first; all, or those in ``only``, which saves the other imports.

    ``say`` is told of each import of a peer before it starts.
    """
    found = {"ours": Variant(_fused(srft_kernels, case), bound="ours")}
    if dtype.itemsize == 2:
        name = "ours-16bit-logits"
        if "logits_dtype" in inspect.signature(srft_kernels.linear_grpo_loss).parameters:
            found[name] = Variant(_fused(srft_kernels, case, logits_dtype=dtype), bound="16-bit logits")
        else:
            found[name] = Variant(None, "this version has no logits_dtype")
    own = _composed(lambda x, want_entropy: srft_kernels.linear_logprobs(*x[:3]), case)
    found["ours-logprobs"] = Variant(_backward(own), bound="ours")
    naive = _composed(losses.naive, case)
    found["naive"] = Variant(_backward(naive), full_logits=True)
    compiled = _backward(torch.compile(naive, dynamic=False))
    found["naive-compiled"] = Variant(compiled, full_logits=True, compiled=True)
    for name, peer in peers.PEERS.items():
        fits = peer.gives in ("logprobs", case) or (peer.gives == "logprobs without entropy" and case != "srft")
        if fits and (not only or name in only):
            found[name] = _peer(name, case, device, say)
    return {name: variant for name, variant in found.items() if not only or name in only}


def floor(head: HeadShape, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Inputs], None]]:
    """The bare products, whose faster form is what every variant is compared with."""
    rows = losses.chunk_rows(head, dtype, device)
    return {
        "chunked": functools.partial(losses.products, rows=rows),
        "unchunked": functools.partial(losses.products, rows=2**62),
    }
