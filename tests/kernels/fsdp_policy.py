"""A policy on tokens that differ between two ranks, and the losses that its FusedLMHead is tried with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srft_kernels import FusedLMHead, linear_grpo_loss, linear_logprobs

WORLD = 2
# no multiple of the number of ranks: their shards differ in size
VOCAB, WIDTH = 101, 16
SOFTCAP = 5.0
# no ratio is so close to a bound that bf16 would carry it over
CLIP = 0.45

Result = dict[str, Any]


class Policy(nn.Module):
    """Embedding, one layer and norm, and an lm_head beside its FusedLMHead or replaced by it."""

    def __init__(self, *, tied: bool = False, beside: bool = True, grad_reduction: str = "mean"):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH)
        )
        lm_head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            lm_head.weight = self.body[0].weight
        head = FusedLMHead.from_linear(lm_head, logit_softcap=SOFTCAP, grad_reduction=grad_reduction)
        if beside:
            self.lm_head = lm_head
        self.head = head
        self.double()

    def forward(self, ids: Tensor, op: Callable) -> Any:
        """What ``op`` makes of the hidden states of ``ids`` [N]."""
        return self.head(self.body(ids), op)


def batch(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Tokens of one rank; ranks hold different numbers of them."""
    generator = torch.Generator().manual_seed(100 + rank)
    count = 9 + 5 * rank
    labels = torch.randint(VOCAB, (count,), generator=generator)
    labels[rank] = -100
    return {
        "ids": torch.randint(VOCAB, (count,), generator=generator),
        "labels": labels,
        "advantages": torch.randn(count, generator=generator).to(dtype),
        "old_logprobs": (-4.6 + 0.3 * torch.randn(count, generator=generator)).to(dtype),
    }


def grpo(data: dict[str, Tensor], **options: Any) -> Callable:
    """The GRPO loss of ``data``, waiting for a head."""
    given = {name: x for name, x in data.items() if name != "ids"}
    return partial(linear_grpo_loss, **given, clip_low=CLIP, clip_high=CLIP, **options)


def weighted_logprobs(data: dict[str, Tensor]) -> Callable:
    """A loss made by autograd from ``linear_logprobs``, whose backward reads the weight again."""

    def loss(hidden_states: Tensor, lm_head_weight: Tensor, **options: Any) -> Tensor:
        logprobs, _ = linear_logprobs(hidden_states, lm_head_weight, data["labels"], **options)
        return (logprobs * data["advantages"]).mean()

    return loss


def whole(x: Tensor | None) -> Tensor | None:
    """A copy of ``x``, gathered where it is a DTensor."""
    return None if x is None else (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def gradients(module: nn.Module) -> Result:
    """Whole gradients by parameter name."""
    return {name: whole(p.grad) for name, p in module.named_parameters()}


class LoraPolicy(Policy):
    """A policy whose lm_head is a LoRA layer of peft, beside its head."""

    def __init__(self):
        super().__init__()
        import peft

        del self.head
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=6)
        peft.inject_adapter_in_model(config, self)
        nn.init.normal_(self.lm_head.lora_B["default"].weight, std=0.3)
        self.head = FusedLMHead.from_linear(self.lm_head, logit_softcap=SOFTCAP)
        self.double()


def global_count() -> int:
    """Counted tokens of all ranks."""
    return sum(int((batch(r)["labels"] != -100).sum()) for r in range(WORLD))


def train_steps(policy: nn.Module, batches: list[dict[str, Tensor]], rank: int) -> Result:
    """Two updates from the mean loss over ``batches``, after scoring them; weights and scores."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    scores = []
    for _ in range(2):
        with torch.no_grad():
            for i, data in enumerate(batches):
                logprobs, _ = policy(data["ids"], partial(linear_logprobs, labels=data["labels"]))
                scores.append((rank + i, logprobs.clone()))
        optimizer.zero_grad()
        for data in batches:
            (policy(data["ids"], grpo(data)).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
        optimizer.step()
    weights = {name: whole(p) for name, p in policy.named_parameters()}
    return {**weights, "scores": scores}
