"""Attention over packed sequences, as transformers' models call it, without a [T, T] mask."""

from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED_ATTENTION = "srft_varlen"


class UnsupportedAttention(NotImplementedError):
    """A model asks its attention for what the packed one does not do; the message completes "it has …"."""


def register_packed_attention() -> None:
    """Teach transformers an attention over packed sequences that builds no [T, T] mask."""
    AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    return None


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; query [1, H, T, d], key and value [1, H_kv, T, d].

    ``dropout`` is among what is not used: the trainer turns it off everywhere.
    """
    if softcap is not None or s_aux is not None:
        what = f"a softcap of {softcap:g}" if softcap is not None else "sinks"
        raise UnsupportedAttention(f"{what} in its attention, which the packed attention does not apply")
    if attention_mask is not None:
        raise UnsupportedAttention("an attention mask or position bias of its own")
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = _bounds_of(position_ids)
    if torch.is_autocast_enabled(query.device.type):
        # rotary embeddings leave queries and keys in fp32, and varlen_attn has no autocast rule of its own
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query.is_cuda and query.dtype != torch.float32:  # flash attention has no fp32
        return _on_gpu(query, key, value, scaling, window, cu_seq_lens_q, max_length_q)[None], None
    return _by_length(query, key, value, scaling, window, cu_seq_lens_q)[None], None


def _bounds_of(position_ids: Tensor | None) -> tuple[Tensor, int]:
    """Bounds of the sequences on the CPU and the longest one, for layers that hand on positions alone."""
    if position_ids is None:
        raise UnsupportedAttention("layers that tell their attention neither the bounds of the sequences nor positions")
    starts = (position_ids[0] == 0).nonzero()[:, 0].cpu()
    bounds = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
    return bounds, int(bounds.diff().max())


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:
    """Flash attention over the bounds; [T, H, d]."""
    from torch.nn.attention import varlen

    bounds = cu_seqlens.to(query.device, non_blocking=True)
    width = value.shape[-1]
    if width != query.shape[-1]:  # latent attention: flash attention wants values as wide as queries
        value = F.pad(value, (0, query.shape[-1] - width))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    attend = varlen.varlen_attn
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(attend).parameters:
            attend = partial(attend, enable_gqa=True)
        else:  # torch 2.11 has varlen_attn for as many key heads as query heads alone
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = attend(
        q,
        k,
        v,
        bounds,
        bounds,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        # a window of w tokens is the token itself and w - 1 before it
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(out, Tensor)  # it returns more only when asked for auxiliary outputs
    return out[..., :width]


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, cu_seqlens: Tensor
) -> Tensor:
    """Padded attention over groups of sequences of similar length; [T, H, d]."""
    pieces, places = [], []
    for rows_cpu, real_cpu in _padded_groups(cu_seqlens):
        rows, real = rows_cpu.to(query.device), real_cpu.to(query.device)
        q, k, v = (x[0].transpose(0, 1)[rows].transpose(1, 2) for x in (query, key, value))
        longest, band = rows.shape[1], None
        if window is not None and window < longest:
            band = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
            band = band.triu(1 - window)
        # padding is on the right, so the causal mask alone keeps it from every real query
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
        pieces.append(y.transpose(1, 2)[real])
        places.append(rows[real])
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat(places)))


def _padded_groups(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group sequences of similar length; give each group's token indices [b, t] and the mask of real ones.

    In a group the shortest sequence has at least four fifths of the longest one's tokens, which bounds the padding.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    groups, first = [], 0
    order = torch.argsort(lengths, stable=True)
    by_length = lengths[order].tolist()
    for last in range(1, len(by_length) + 1):
        if last == len(by_length) or by_length[first] < 0.8 * by_length[last]:
            members, longest = order[first:last], by_length[last - 1]
            steps = torch.arange(longest)
            real = steps < lengths[members, None]
            # padded slots point at the sequence's own first token: any index inside the batch serves
            groups.append((starts[members, None] + steps * real, real))
            first = last
    return groups
