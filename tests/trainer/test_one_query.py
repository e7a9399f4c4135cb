"""Attention of one query over a cache: exact, whatever memory holds beyond its tokens, and for whom it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srft.engine.cache import make_cache
from srft.engine.hf import HfEngine
from srft.engine.one_query import NAME, one_query, sampling_attention
from tests.trainer.tiny import plain_model, policy


def in_float64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Scores, softmax and sum, head by head."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhqd,bhtd->bhqt", q, k) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqt,bhtd->bhqd", scores.softmax(-1), v)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 16), (6, 2, 16), (3, 1, 24)])
@pytest.mark.parametrize("room", [0, 7])
def test_it_is_as_exact_as_pytorchs(room: int, heads: int, key_heads: int, width: int, masked: bool) -> None:
    """Against float64, with values wider than keys, large scores, and keys of infinities beyond the tokens."""
    rows, tokens = 5, 19
    q = 3 * torch.randn(rows, 1, heads, 16).transpose(1, 2)
    keys, values = torch.randn(rows, key_heads, tokens + room, 16), torch.randn(rows, key_heads, tokens + room, width)
    keys[:, :, tokens:] = torch.inf
    k, v = keys[:, :, :tokens], values[:, :, :tokens]
    mask = torch.arange(tokens) >= torch.arange(rows)[:, None, None, None] if masked else None
    gold = in_float64(q, k, v, mask, 0.7)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7, enable_gqa=heads != key_heads)
    error = (one_query(q, k, v, mask, 0.7) - gold).abs().max()
    assert error <= 2 * (plain - gold).abs().max() + 1e-6
    default = in_float64(q, k, v, mask, 0.25)
    torch.testing.assert_close(one_query(q, k, v, mask, None).double(), default, rtol=0, atol=3e-6)


def test_tokens_behind_a_slice_are_not_seen() -> None:
    """A window that is no beginning of what it was cut from, and memories of keys and values that differ in length."""
    q, keys, values = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 31, 8)
    for k, v in ((keys[:, :, 4:15], keys[:, :, 5:16]), (keys[:, :, :11], values[:, :, :11])):
        torch.testing.assert_close(
            one_query(q, k, v, None, None).double(), in_float64(q, k, v, None, 8**-0.5), rtol=0, atol=3e-6
        )


def test_memory_without_tokens_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that no query weighs is multiplied by 0, which leaves it out only where it is a number."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        cache = make_cache(plain_model().config)
        k, v = cache.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), 0)
        assert one_query(torch.randn(2, 4, 1, 8), k, v, None, None).isfinite().all()
        assert v._base is not None and v._base.isfinite().all() and v._base.shape[2] > 5
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("attention", "dtype", "device", "taken"),
    [("sdpa", torch.float32, "cpu", NAME), ("eager", torch.float32, "cpu", "eager"),
     ("sdpa", torch.bfloat16, "cpu", "sdpa"), ("sdpa", torch.float32, "cuda", "sdpa")],
)  # fmt: skip
def test_for_whom_it_is_taken(attention: str, dtype: torch.dtype, device: str, taken: str) -> None:
    """Models with PyTorch's attention, in fp32 on a CPU."""
    assert sampling_attention(attention, dtype, torch.device(device)) == taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_engine_takes_it(dtype: torch.dtype) -> None:
    """And leaves the policy its own."""
    model = policy(plain_model())
    own = model.config._attn_implementation
    engine = HfEngine(model, dtype=dtype, pad_token_id=0, max_batch=4)
    assert engine._model.config._attn_implementation == (NAME if dtype == torch.float32 else "sdpa")
    assert model.config._attn_implementation == own
