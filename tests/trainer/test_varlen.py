"""What the packed attention asks of flash attention is right for the varlen_attn of every torch from 2.11 on."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from srft.policy import attention

BOUNDS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """Attention of [T, H, d] within each sequence, as varlen_attn documents it for a window (w, 0)."""
    assert q.shape == k.shape == v.shape and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    left, right = window
    assert right == 0
    place = torch.arange(len(q))
    back = place[:, None] - place
    sequence = torch.bucketize(place, bounds, right=True)
    seen = (sequence[:, None] == sequence) & (back >= 0)
    if left >= 0:
        seen &= back <= left
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """In torch 2.11: as many key heads as query heads."""
    assert return_aux is None and cu_seq_q.equal(cu_seq_k) and max_q == max_k == 11
    return attend(query, key, value, cu_seq_q, scale, window_size)


def from_2_12(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """From torch 2.12 on: fewer key heads where asked for."""
    assert seqused_k is block_table is num_splits is None
    if key.shape[1] != query.shape[1]:
        assert enable_gqa, "varlen_attn refuses heads that are not as many"
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    return of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale, window_size=window_size
    )


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("value_width", [8, 6])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("varlen_attn", [of_2_11, from_2_12], ids=["2.11", "2.12"])
def test_flash_attention_is_the_padded_one(
    varlen_attn: Callable[..., Tensor], kv_heads: int, value_width: int, window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Values and the three gradients, for shared heads, narrow values and windows, by either signature."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    shapes = (4, 8), (kv_heads, 8), (kv_heads, value_width)
    inputs = [torch.randn(1, heads, 17, width, requires_grad=True) for heads, width in shapes]
    direction = torch.randn(17, 4, value_width)
    flash = attention._on_gpu(*inputs, 0.3, window, BOUNDS, 11)
    padded = attention._by_length(*inputs, 0.3, window, BOUNDS)
    torch.testing.assert_close(flash, padded, rtol=0, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((flash * direction).sum(), inputs),
        torch.autograd.grad((padded * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_installed_one_takes_what_the_stand_ins_take() -> None:
    """Seven arguments by place, two by name; what decides between the signatures is there or not."""
    installed = list(inspect.signature(varlen.varlen_attn).parameters)
    stand_in = list(inspect.signature(from_2_12 if "enable_gqa" in installed else of_2_11).parameters)
    assert installed[: len(stand_in)] == stand_in
