"""Attention of one query a sequence on a CPU: two batched products over the cache as it lies in memory.

PyTorch's own attention multiplies matrices of one row sequence by sequence and head by head, each by a call of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# transformers takes a name with "sdpa" in it for one of its own
NAME = "srft_one_query"
AttentionInterface.register(NAME, lambda *args, **options: _attend(*args, **options))
AttentionMaskInterface.register(NAME, sdpa_mask)


def sampling_attention(attention: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return the attention, as transformers knows it, with which to sample from a model that has ``attention``.

    Args:
        attention: The model's own.
        dtype: Precision in which it samples.
        device: Where.
    """
    # in 16 bits scores would be rounded
    return NAME if (attention, dtype, device.type) == ("sdpa", torch.float32, "cpu") else attention


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' "sdpa", which computes all but single queries; [rows, tokens, heads, width]."""
    is_bool = attention_mask is None or attention_mask.dtype == torch.bool
    if query.shape[2] > 1 or not is_bool or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return one_query(query, key, value, attention_mask, options.get("scaling")).transpose(1, 2), None


def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return the attention of one query a row and head over all keys; [rows, heads, 1, width of values].

    Args:
        query: [rows, heads, 1, width].
        key: [rows, key heads, tokens, width], perhaps the beginning of memory for more tokens, of any content.
        value: [rows, key heads, tokens, its width], likewise, of finite content.
        mask: [rows, 1, 1, tokens] bool, True where a key is seen; None: everywhere.
        scaling: Factor of the scores; None: one over the root of the width.
    """
    tokens, keys, values = key.shape[2], _memory(key), _memory(value)
    if keys.shape[2] != values.shape[2]:
        keys, values = key, value
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [rows, key heads, queries of a key head, tokens]: products of whole memories are of matrices without gaps
    scores = (query * scaling).reshape(*key.shape[:2], -1, key.shape[-1]) @ keys.mT
    scores[..., tokens:] = -math.inf
    if mask is not None:
        scores[..., :tokens].masked_fill_(~mask, -math.inf)
    return (scores.softmax(-1) @ values).reshape(*query.shape[:3], -1)


def _memory(tensor: Tensor) -> Tensor:
    """What [rows, heads, tokens, width] is the beginning of, in tokens; itself where it is the beginning of nothing."""
    whole = tensor._base
    if whole is None or whole.data_ptr() != tensor.data_ptr() or whole.stride() != tensor.stride():
        return tensor
    return whole
