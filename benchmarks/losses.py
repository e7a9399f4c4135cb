"""The losses on [N] vectors, the naive heads, and the three bare matrix products that are the floor."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.heads import HeadShape, Inputs

# scores of one chunk of the bare products: bytes on a CPU, whose caches matter; rows on a GPU
CPU_CHUNK_BYTES = 256 * 2**20
GPU_CHUNK_ROWS = 4096


def grpo(logprobs: Tensor, entropy: Tensor | None, x: Inputs) -> Tensor:
    """Clipped policy gradient, mean over tokens."""
    ratio = torch.exp(logprobs - x.old_logprobs)
    return -torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages).mean()


def srft(logprobs: Tensor, entropy: Tensor | None, x: Inputs) -> Tensor:
    """Fu et al. eq. 8 to 13, for sequences of equal length and no ignored token."""
    assert entropy is not None
    entropy = entropy.detach().to(logprobs.dtype).view(-1, x.sequence).mean(1).repeat_interleave(x.sequence)
    demo = -0.5 * torch.exp(-entropy) * logprobs - x.advantages * logprobs.exp()
    rollout = torch.where(x.is_correct, -0.1 * torch.exp(entropy) * logprobs, logprobs)
    demos = x.is_demo.to(logprobs.dtype)
    return (demo * demos).sum() / demos.sum() + (rollout * (1 - demos)).sum() / (1 - demos).sum()


def cross_entropy(logprobs: Tensor, entropy: Tensor | None, x: Inputs) -> Tensor:
    """Mean negative log-likelihood."""
    return -logprobs.mean()


CASES = {"grpo": grpo, "srft": srft, "cross_entropy": cross_entropy}


def naive(x: Inputs, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropy by materialised logits, as one would write them by hand."""
    all_logprobs = (x.hidden_states @ x.lm_head_weight.t()).float().log_softmax(-1)
    entropy = None
    if want_entropy:
        with torch.no_grad():
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(-1, x.labels[:, None])[:, 0], entropy


def chunk_rows(head: HeadShape, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk of the bare products."""
    return GPU_CHUNK_ROWS if device.type == "cuda" else CPU_CHUNK_BYTES // (dtype.itemsize * head.vocab)


@torch.no_grad()
def products(x: Inputs, rows: int) -> None:
    """X W', G W and G' X in the dtype of the inputs, ``rows`` rows at a time, with their results allocated."""
    hidden, weight = x.hidden_states, x.lm_head_weight
    space = torch.empty(min(rows, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows]
        scores = torch.mm(part, weight.t(), out=space[: len(part)])
        torch.mm(scores, weight, out=dhidden[start : start + rows])
        if start == 0:
            torch.mm(scores.t(), part, out=dweight)
        else:
            dweight.addmm_(scores.t(), part)
