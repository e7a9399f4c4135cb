"""What is timed: inputs at the head of Qwen2.5-0.5B, and each implementation of a loss and its backward.

As a command, prints the peak memory that one variant adds, in MiB: python -m benchmarks.variants srft ours fp32 2048
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import srft_kernels
from srft_kernels import reference
from srft_kernels._chunked_head import CPU_WORKSPACE_BYTES, even_chunks

V, D, SEQUENCE = 151_936, 896, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Inputs(NamedTuple):
    hidden_states: Tensor  # [N, D]
    lm_head_weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    advantages: Tensor  # [N]
    old_logprobs: Tensor  # [N]
    is_demo: Tensor  # [N] bool, one sequence in four
    is_correct: Tensor  # [N] bool, one rollout in three of the rest, with a positive advantage
    cu_seqlens: Tensor  # [B+1] int32


def make_inputs(dtype: torch.dtype, tokens: int, vocab: int = V) -> Inputs:
    """Random states that lean towards their label, so that probabilities reach from 0 to almost 1."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weight = randn(vocab, D).mul_(D**-0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    lean = torch.empty(tokens, 1).uniform_(8, 16, generator=generator)
    hidden = (randn(tokens, D) + lean * weight[labels].float()).to(dtype)
    # close to the truth at no cost: V logits of this variance, and the label's own
    own = (hidden * weight[labels]).float().sum(1)
    others = vocab * torch.exp(hidden.float().square().sum(1) / (2 * D))
    logprobs = own - torch.log(others + own.exp())
    sequence = torch.arange(tokens) // SEQUENCE
    is_correct = sequence % 4 == 1
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        torch.where(is_correct, 1.5, -0.7).where(sequence % 4 != 0, torch.tensor(0.9)),
        # wide enough that the clip bounds of 0.8 and 1.2 act on many tokens
        logprobs + 0.2 * randn(tokens),
        sequence % 4 == 0,
        is_correct,
        torch.arange(0, tokens + 1, SEQUENCE, dtype=torch.int32),
    )


def _srft(module) -> Callable[[Inputs], Tensor]:
    return lambda x: module.linear_srft_loss(
        *x[:4], is_demo=x.is_demo, is_correct=x.is_correct, cu_seqlens=x.cu_seqlens, preset="paper"
    ).loss


def _grpo(module) -> Callable[[Inputs], Tensor]:
    return lambda x: module.linear_grpo_loss(*x[:5]).loss


def _cross_entropy(module) -> Callable[[Inputs], Tensor]:
    return lambda x: module.linear_cross_entropy(*x[:3])


def _all_logprobs(x: Inputs) -> Tensor:
    return (x.hidden_states @ x.lm_head_weight.t()).float().log_softmax(-1)


def _of_labels(all_logprobs: Tensor, x: Inputs) -> Tensor:
    return all_logprobs.gather(-1, x.labels[:, None])[:, 0]


def _naive_srft(x: Inputs) -> Tensor:
    # Fu et al. eq. 8 to 13, for sequences of equal length and no ignored token
    all_logprobs = _all_logprobs(x)
    logp = _of_labels(all_logprobs, x)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        entropy = entropy.view(-1, SEQUENCE).mean(1).repeat_interleave(SEQUENCE)
    demo = -0.5 * torch.exp(-entropy) * logp - x.advantages * logp.exp()
    rollout = torch.where(x.is_correct, -0.1 * torch.exp(entropy) * logp, logp)
    return demo[x.is_demo].mean() + rollout[~x.is_demo].mean()


def _naive_grpo(x: Inputs) -> Tensor:
    ratio = torch.exp(_of_labels(_all_logprobs(x), x) - x.old_logprobs)
    return -torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages).mean()


def _naive_cross_entropy(x: Inputs) -> Tensor:
    return -_of_labels(_all_logprobs(x), x).mean()


def _torch_cross_entropy(x: Inputs) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(x.hidden_states, x.lm_head_weight, x.labels)


def _backward(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]:
    def run(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        x.hidden_states.grad = x.lm_head_weight.grad = None
        value = loss(x)
        value.backward()
        return value.detach(), x.hidden_states.grad, x.lm_head_weight.grad

    return run


@torch.no_grad()
def _products(x: Inputs, limit: int | None = None) -> None:
    """The three products of a head and nothing else, in chunks of at most ``limit`` rows."""
    hidden, weight = x.hidden_states, x.lm_head_weight
    chunks = even_chunks(len(hidden), limit or len(hidden))
    space = torch.empty(chunks[0].stop, V, dtype=hidden.dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    for rows in chunks:
        scores = torch.mm(hidden[rows], weight.t(), out=space[: rows.stop - rows.start])
        torch.mm(scores, weight, out=dhidden[rows])
        if rows.start == 0:
            torch.mm(scores.t(), hidden[rows], out=dweight)
        else:
            dweight.addmm_(scores.t(), hidden[rows])


PRODUCTS = {
    "unchunked": _products,
    "chunked": lambda x: _products(x, CPU_WORKSPACE_BYTES // (4 * V)),
}
GOLD = {
    "srft": _backward(_srft(reference)),
    "grpo": _backward(_grpo(reference)),
    "cross_entropy": _backward(_cross_entropy(reference)),
}
CASES = {
    "srft": {"ours": _backward(_srft(srft_kernels)), "naive": _backward(_naive_srft)},
    "grpo": {"ours": _backward(_grpo(srft_kernels)), "naive": _backward(_naive_grpo)},
    "cross_entropy": {
        "ours": _backward(_cross_entropy(srft_kernels)),
        "torch": _backward(_torch_cross_entropy),
        "naive": _backward(_naive_cross_entropy),
    },
}

def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def main(case: str, name: str, dtype: str, tokens: str) -> None:
    """Print the peak memory that a first call adds to a fresh process, in MiB, gradients included."""
    run = CASES[case][name]
    # loads code and starts threads, which would be there without the loss
    run(make_inputs(DTYPES[dtype], SEQUENCE * 4, vocab=1000))
    inputs = make_inputs(DTYPES[dtype], int(tokens))
    before = _status_mib("VmRSS")
    # resets VmHWM, which the making of the inputs has raised
    Path("/proc/self/clear_refs").write_text("5")
    run(inputs)
    print(_status_mib("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
