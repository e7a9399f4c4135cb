"""Attention over packed sequences, as transformers' models call it, without a [T, T] mask."""

from __future__ import annotations

import inspect
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from srft.policy.flash import PACKAGES, flash_attention
from srft.policy.prefixes import Prefixes, prefixes_of

# What transformers knows each kernel as. A name with "flash" or "sdpa" in it it takes for one of its own, and fetches a
# kernel from the Hub, or refuses the model.
PACKED_NAMES = {
    "varlen": "srft_varlen",
    "sdpa": "srft_by_length",
    "flash_attention_2": "srft_fa2",
    "flash_attention_3": "srft_fa3",
    "flash_attention_4": "srft_fa4",
}


class UnsupportedAttention(NotImplementedError):
    """A model asks its attention for what the packed one does not do; the message completes "it has …"."""


def register_packed_attention() -> None:
    """Teach transformers the attentions over packed sequences, which build no [T, T] mask."""
    for kernel, name in PACKED_NAMES.items():
        AttentionInterface.register(name, partial(_packed_attention, kernel))
        AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    return None


# its lists of lengths are of each batch anew; compiled blocks call it as it is
@torch.compiler.disable
def _packed_attention(
    kernel: str,
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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; query [1, H, T, d], key and value [1, H_kv, T, d].

    Bounds of keys that are wider than those of queries say that a sequence reads the first tokens of an earlier one.
    ``dropout`` is among what is not used: the trainer turns it off everywhere. Where the kernel has no fp32, or no CPU,
    sequences of like length are computed together, as by "sdpa".
    """
    if attention_mask is not None:
        raise UnsupportedAttention("an attention mask or position bias of its own")
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, cu_seq_lens_k, max_length_q = _bounds_of(position_ids)
    prefixes = prefixes_of(cu_seq_lens_q, cu_seq_lens_k)
    if torch.is_autocast_enabled(query.device.type):
        # rotary embeddings leave queries and keys in fp32, and no kernel here has an autocast rule of its own
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if kernel == "sdpa" or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return _by_length(query, key, value, scaling, window, cu_seq_lens_q, softcap, s_aux, prefixes)[None], None
    places = scaling, window, cu_seq_lens_q, max_length_q
    if kernel in PACKAGES:
        return _by_package(kernel, query, key, value, *places, softcap, s_aux, prefixes)[None], None
    if softcap is not None or s_aux is not None:
        raise UnsupportedAttention(
            "a cap on scores or sinks in its attention, which varlen_attn does not apply; set model.attention=sdpa"
        )
    return _on_gpu(query, key, value, *places, prefixes)[None], None


def _bounds_of(position_ids: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Bounds of the sequences and of what each reads, on the CPU, and the longest, for layers that hand on positions.

    A sequence whose positions do not begin at 0 goes on from a prompt that an earlier one has.
    """
    if position_ids is None:
        raise UnsupportedAttention("layers that tell their attention neither the bounds of the sequences nor positions")
    positions = position_ids[0].cpu()
    starts = (positions.diff(prepend=positions[:1]) != 1).nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_tensor([len(positions)])])
    reads = bounds.diff() + positions[starts]
    return bounds.int(), torch.cat([starts[:1], reads.cumsum(0)]).int(), int(reads.max())


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """Flash attention over the bounds; [T, H, d]."""
    from torch.nn.attention import varlen

    bounds, bounds_k = _on_device(cu_seqlens, prefixes, query.device)
    width = value.shape[-1]
    if width != query.shape[-1]:  # latent attention: flash attention wants values as wide as queries
        value = F.pad(value, (0, query.shape[-1] - width))
    q, k, v = _rows(query, key, value, prefixes)
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
        bounds_k,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        # a window of w tokens is the token itself and w - 1 before it; queries are the last of what they read
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(out, Tensor)  # it returns more only when asked for auxiliary outputs
    return out[..., :width]


def _by_package(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softcap: float | None,
    sinks: Tensor | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """Attention of a flash-attn package over the bounds; [T, H, d]."""
    bounds = _on_device(cu_seqlens, prefixes, query.device)
    q, k, v = _rows(query, key, value, prefixes)
    return flash_attention(kernel, q, k, v, scaling, window, bounds, max_seqlen, softcap, sinks)


def _on_device(cu_seqlens: Tensor, prefixes: Prefixes | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bounds of queries and of keys, the same tensor where nothing is shared."""
    bounds = cu_seqlens.to(device, torch.int32, non_blocking=True)
    return bounds, bounds if prefixes is None else prefixes.cu_seqlens_k.to(device, torch.int32, non_blocking=True)


def _rows(
    query: Tensor, key: Tensor, value: Tensor, prefixes: Prefixes | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, d] queries, and keys and values of all that the sequences read."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if prefixes is not None:
        k, v = prefixes.joined(k, v)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    cu_seqlens: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """Padded attention over groups of sequences of similar length; [T, H, d]."""
    pieces, places = [], []
    for members, rows_cpu, real_cpu in _padded_groups(cu_seqlens, prefixes):
        rows, real = rows_cpu.to(query.device), real_cpu.to(query.device)
        q, k, v = (x[0].transpose(0, 1)[rows].transpose(1, 2) for x in (query, key, value))
        longest, visible = rows.shape[1], None
        if window is not None and window < longest:
            visible = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        if prefixes is not None and prefixes.lengths[members[0]]:
            before = prefixes.padded(members, query.device)
            k, v = (
                torch.cat([before.of(x[0].transpose(0, 1)).transpose(1, 2), own], 2)
                for x, own in ((key, k), (value, v))
            )
            visible = before.visible(longest, window)
        # padding is on the right, so the causal mask alone keeps it from every real query
        if softcap is not None or sinks is not None:
            y = _with_scores(q, k, v, scaling, visible, softcap, sinks)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None, scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )  # fmt: skip
        pieces.append(y.transpose(1, 2)[real])
        places.append(rows[real])
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat(places)))


def _with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    visible: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of [b, H, t, d] that holds its scores, which a cap on them and sinks ask for; None is causal."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[2:]
    if visible is None:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:  # a key of every query that has a score and no value
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(-1)[..., :keys].to(v.dtype) @ v


def _padded_groups(cu_seqlens: Tensor, prefixes: Prefixes | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Group sequences of similar length; give each group's numbers, token indices [b, t] and the mask of real ones.

    In a group the shortest sequence has at least four fifths of the longest one's tokens, which bounds the padding, and
    the shortest of the prompts that they share with others half of the longest one's tokens.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    every = [torch.arange(len(lengths))]
    groups = []
    for part in every if prefixes is None else _alike(prefixes.lengths, every[0], 0.5):
        for members in _alike(lengths, part, 0.8):
            steps = torch.arange(int(lengths[members[-1]]))
            real = steps < lengths[members, None]
            # padded slots point at the sequence's own first token: any index inside the batch serves
            groups.append((members, starts[members, None] + steps * real, real))
    return groups


def _alike(sizes: Tensor, members: Tensor, share: float) -> list[Tensor]:
    """Divide numbers of sequences, by size, so that the least of a part has this share of its greatest, the last."""
    order = members[torch.argsort(sizes[members], stable=True)]
    by_size = sizes[order].tolist()
    parts, first = [], 0
    for last in range(1, len(by_size) + 1):
        if last == len(by_size) or by_size[first] < share * by_size[last]:
            parts.append(order[first:last])
            first = last
    return parts
