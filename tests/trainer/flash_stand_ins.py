"""Functions with the signatures of flash-attn 2.8.3, of its hopper folder (3) and of flash-attn-4 4.0.0b36.

Each computes what the package documents in plain PyTorch, and refuses arguments that it would take for something else.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

SEEN: dict[str, Any] = {}
"""What the last call was given."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float | None, left: int | None, softcap: float,
    sinks: Tensor | None = None, bounds_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[T, H, d_v] causal attention within each sequence, which sees ``left`` tokens before its own, or all.

    Where a sequence has more keys than queries, the last query stands with the last key.
    """
    bounds_k = bounds if bounds_k is None else bounds_k
    place, of_key = torch.arange(len(q)), torch.arange(len(k))
    sequence, sequence_k = (torch.bucketize(p, b, right=True) for p, b in ((place, bounds), (of_key, bounds_k)))
    back = (bounds[sequence] - place)[:, None] * -1 + (bounds_k[sequence_k] - of_key)
    seen = (sequence[:, None] == sequence_k) & (back >= 0)
    if left is not None:
        seen &= back <= left
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.logsumexp(-1, keepdim=True)
    share = 1.0 if sinks is None else torch.sigmoid(top - sinks[:, None, None])
    return torch.einsum("hqk,khd->qhd", (scores - top).exp() * share, v)


def checked(given: dict[str, Any], unlimited: int | None) -> int | None:
    """Note the arguments; return how many tokens before its own a token sees, None for all."""
    SEEN.clear()
    SEEN.update(given)
    assert given["causal"] is True and len(given["k"]) == len(given["v"]) == given["cu_seqlens_k"][-1]
    assert len(given["q"]) == given["cu_seqlens_q"][-1]
    assert given["max_seqlen_q"] == given["max_seqlen_k"]
    left, right = given["window_size"]
    if left == unlimited:
        assert right == unlimited
        return None
    assert isinstance(left, int) and left >= 0 and right == 0
    return left


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """Values as wide as queries."""
    left = checked(locals(), -1)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and not return_attn_probs and dropout_p == 0
    assert alibi_slopes is block_table is None
    return attend(q, k, v, cu_seqlens_q, softmax_scale, left, softcap, None, cu_seqlens_k)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """Older builds return the log-sum-exp too, as this one does."""
    left = checked(locals(), -1)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and not return_attn_probs
    assert seqused_q is seqused_k is qv is q_descale is k_descale is v_descale is pack_gqa is None
    assert attention_chunk == sm_margin == 0 and num_splits == 1
    return attend(q, k, v, cu_seqlens_q, softmax_scale, left, softcap, None, cu_seqlens_k), torch.zeros(1)


def flash_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    """Returns the log-sum-exp as well, asked or not; takes sinks, and values of any width."""
    left = checked(locals(), None)
    assert qv is min_seqlen_k is seqused_q is seqused_k is gather_kv_indices is page_table is None
    assert score_mod is score_mod_bwd is mask_mod is block_sparse_tensors is aux_tensors is None
    assert learnable_sink is None or learnable_sink.dtype == q.dtype
    return attend(q, k, v, cu_seqlens_q, softmax_scale, left, softcap, learnable_sink, cu_seqlens_k), None


def module_of(function: Any) -> types.ModuleType:
    """A module that has ``flash_attn_varlen_func``."""
    module = types.ModuleType("stand_in")
    module.flash_attn_varlen_func = function
    return module


MODULES = {
    "flash_attention_2": ("flash_attn", module_of(flash_2)),
    "flash_attention_3": ("flash_attn_interface", module_of(flash_3)),
    "flash_attention_4": ("flash_attn.cute", module_of(flash_4)),
}
"""Of each kernel, where its package is looked for and what stands there."""
