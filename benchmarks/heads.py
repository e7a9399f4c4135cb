"""What is measured: the heads of real models, and inputs for them that behave like a policy in training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HeadShape(NamedTuple):
    width: int  # D
    vocab: int  # V


HEADS = {
    "smollm2-135m": HeadShape(576, 49_152),
    "qwen2.5-0.5b": HeadShape(896, 151_936),
    "qwen2.5-1.5b": HeadShape(1536, 151_936),
    "qwen2.5-3b": HeadShape(2048, 151_936),
    "qwen2.5-7b": HeadShape(3584, 152_064),
    "qwen3-8b": HeadShape(4096, 151_936),
    "llama-3.1-8b": HeadShape(4096, 128_256),
    # no model: shows within seconds that everything runs
    "tiny": HeadShape(64, 1000),
}


class Inputs(NamedTuple):
    hidden_states: Tensor  # [N, D]
    lm_head_weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    advantages: Tensor  # [N], one value per sequence
    old_logprobs: Tensor  # [N]
    is_demo: Tensor  # [N] bool, one sequence in four
    is_correct: Tensor  # [N] bool, one rollout in three of the rest, with a positive advantage
    cu_seqlens: Tensor  # [B+1] int32, on CPU
    sequence: int  # tokens of each of the B sequences


def make_inputs(head: HeadShape, dtype: torch.dtype, tokens: int, sequence: int, device: torch.device) -> Inputs:
    """Random states that lean towards their label, so that probabilities reach from 0 to almost 1.

    ``tokens`` is a multiple of four sequences.
    """
    generator = torch.Generator(device).manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(tokens, device=device).uniform_(low, high, generator=generator)

    weight = torch.empty(head.vocab, head.width, dtype=dtype, device=device)
    # by parts: the fp32 copy of a large weight would need twice its memory
    for part in weight.split(8192):
        part.copy_(torch.randn(part.shape, generator=generator, device=device).mul_(head.width**-0.5))
    labels = torch.randint(head.vocab, (tokens,), generator=generator, device=device)
    noise = torch.randn(tokens, head.width, generator=generator, device=device)
    hidden = (noise + uniform(8, 16)[:, None] * weight[labels].float()).to(dtype)
    # close to the truth at no cost: V logits of this variance, and the label's own
    own = (hidden * weight[labels]).float().sum(1)
    others = head.vocab * torch.exp(hidden.float().square().sum(1) / (2 * head.width))
    logprobs = own - torch.log(others + own.exp())
    # log-ratios on either side of the clip bounds log 0.8 and log 1.2, but never within 0.1 of them: there, a
    # rounding of the logits decides whether a token has a gradient, and errors would say nothing
    third = torch.randint(3, (tokens,), generator=generator, device=device)
    log_ratio = torch.where(third == 0, uniform(-0.6, -0.35), uniform(-0.08, 0.05))
    log_ratio = torch.where(third == 2, uniform(0.32, 0.6), log_ratio)
    number = torch.arange(tokens, device=device) // sequence
    is_correct = number % 4 == 1
    advantages = torch.full((tokens,), -0.7, device=device)
    advantages[is_correct] = 1.5
    advantages[number % 4 == 0] = 0.9
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        advantages,
        logprobs - log_ratio,
        number % 4 == 0,
        is_correct,
        torch.arange(0, tokens + 1, sequence, dtype=torch.int32),
        sequence,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is available on ``device`` now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def gradient_bytes(head: HeadShape, dtype: torch.dtype, tokens: int) -> int:
    """The two gradients that every implementation must return."""
    return (tokens + head.vocab) * head.width * dtype.itemsize


def lacking(need: int, device: torch.device) -> str | None:
    """Why something that needs ``need`` bytes is skipped, or None where it fits."""
    free = free_bytes(device)
    return None if need <= free else f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
