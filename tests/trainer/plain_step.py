"""One update in plain float64, sequence by sequence, for any method: what a step of the trainer must come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from srft.config import Config
from srft.learning import update
from srft.methods import assign_advantages
from srft.record.metrics import combined
from srft.responses import Group, Response
from tests.numerics import assert_sum
from tests.trainer.tiny import flat_gradient, learner_of, policy


@dataclass(frozen=True)
class Scored:
    """A response as the policy sees it.

    Args:
        response: The response.
        advantage: From the definition of the method.
        logp: [n] log-probabilities of its tokens, with their graph.
        entropy: [n] entropies, nats, with their graph.
        old: [n] log-probabilities before the step, or None.
    """

    response: Response
    advantage: float
    logp: Tensor
    entropy: Tensor
    old: Tensor | None

    @property
    def ratio(self) -> Tensor:
        """[n] now over before, 1 in value where before is now."""
        return (self.logp - (self.logp.detach() if self.old is None else self.old)).exp()


Terms = Callable[[Scored, Sequence[Scored]], Tensor]
"""The loss terms of one response, all factors and denominators inside, given those of the whole update."""


@dataclass(frozen=True)
class Expected:
    """One update in float64; sizes are of what the sums add up.

    Args:
        loss: Of the whole update.
        loss_size: Sum of the absolute values of its token terms.
        gradient: Of every parameter.
        gradient_size: Sum of the norms of its sequences' gradients.
        entropies: Means by metric name, nats.
    """

    loss: float
    loss_size: float
    gradient: Tensor
    gradient_size: float
    entropies: dict[str, float]


def statistics_of(
    plain: transformers.PreTrainedModel, s: Response, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a response's own tokens from the logits of its sequence alone."""
    ids = torch.tensor([s.prompt_ids + s.response_ids])
    logits = plain(ids).logits[0, len(s.prompt_ids) - 1 : -1] / temperature
    every = logits.log_softmax(-1)
    own: list[bool] = []
    for turn, tokens in enumerate(s.spans or [len(logits)]):
        own += [turn % 2 == 0] * tokens
    mask = torch.tensor(own)
    return every[torch.arange(len(logits)), s.response_ids][mask], -(every.exp() * every).sum(-1)[mask]


def expected_step(
    plain: transformers.PreTrainedModel,
    temperature: float,
    taught: Sequence[tuple[Response, float]],
    terms: Terms,
    old: dict[int, Tensor] | None = None,
) -> Expected:
    """One unpadded forward and backward pass a sequence, of what is learned from and its advantages."""
    everyone = [
        Scored(s, advantage, *statistics_of(plain, s, temperature), None if old is None else old[id(s)])
        for s, advantage in taught
    ]
    loss, sizes, gradients = 0.0, [], []
    for one in everyone:
        vector = terms(one, everyone)
        plain.zero_grad()
        vector.sum().backward(retain_graph=True)
        loss += vector.sum().item()
        sizes.append(vector.abs().sum().item())
        gradients.append(flat_gradient(plain))
    entropies = {}
    for kind, name in ((False, "rollout"), (True, "demo")):
        kept = [one.entropy for one in everyone if one.response.is_demo is kind]
        if kept:
            entropies[f"entropy/{name}"] = torch.cat(kept).mean().item()
    norms = sum(gradient.norm().item() for gradient in gradients)
    return Expected(loss, sum(sizes), torch.stack(gradients).sum(0), norms, entropies)


def divisor(how: str, one: Scored, among: Sequence[Scored], max_new_tokens: int) -> float:
    """What a term of a token is divided by under an aggregation over the tokens of these responses."""
    return {
        "token-mean": sum(len(each.logp) for each in among),
        "sequence-mean": len(among) * len(one.logp),
        "constant": len(among) * max_new_tokens,
        "sum": max_new_tokens,
    }[how]


def of_its_kind(one: Scored, everyone: Sequence[Scored]) -> list[Scored]:
    """The rollouts for a rollout, the demonstrations for a demonstration."""
    return [each for each in everyone if each.response.is_demo is one.response.is_demo]


def assert_as_expected(metrics: dict[str, float], gradient: Tensor, expected: Expected) -> None:
    """Loss and gradient, whose terms may cancel, are right to fp32 noise of their terms."""
    assert_sum("loss", metrics["loss/total"], expected.loss, expected.loss_size)
    assert_sum("gradient", gradient, expected.gradient, expected.gradient_size)


def step(
    config: Config,
    model: transformers.PreTrainedModel,
    groups: list[Group],
    number: int = 1,
    memory: Mapping[str, Any] | None = None,
) -> tuple[dict[str, float], Tensor]:
    """The trainer's own update of this number on a fresh copy of ``model``: metrics and gradient."""
    trained = policy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
    taught = assign_advantages(groups, config.method)
    learner = learner_of(config, trained, optimizer)
    learner.memory.update(memory or {})
    metrics = combined([update(learner, taught, number)])
    return metrics, flat_gradient(trained)
