"""The policy's side of a run: what an update changes, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.config import Config
from srft.methods import Kind, StepInfo
from srft.policy.frozen import NONE, Frozen
from srft.policy.parallel import ALONE, World
from srft.policy.router import router_of
from srft.responses import Response, Totals


@dataclass
class Skipped:
    """Updates in a row that were left out because a loss or a gradient was not finite.

    Args:
        count: How many.
    """

    count: int = 0


@dataclass(frozen=True)
class Learner:
    """A policy in training.

    Args:
        config: The whole configuration: the method, its rates, the precision, the tokens of a forward pass.
        model: The policy, from ``model.prepare_policy``.
        tokenizer: Saved beside it.
        optimizer: Holds its parameters.
        world: The ranks that it is trained on.
        skipped: How many updates in a row were left out.
        memory: What the method has noted for later steps; see ``StepInfo``.
        frozen: Models beside the policy that are not trained.
    """

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    world: World = ALONE
    skipped: Skipped = field(default_factory=Skipped)
    memory: dict[str, Any] = field(default_factory=dict)
    frozen: Frozen = NONE

    def now(self, step: int) -> StepInfo:
        """Return what the method is told of a step.

        Args:
            step: Its number, from 1.
        """
        return StepInfo(step, self.config.train.steps, self.config.rollout.max_new_tokens, self.memory)


def with_gradient(learner: Learner, sequences: list[Response]) -> list[Response]:
    """Return those that need a forward pass: without the ones that the method's loss gives no gradient.

    Args:
        learner: A mean entropy of the update, or a loss of its routers, is over all tokens, and then all are needed.
        sequences: With advantages.
    """
    method = learner.config.method
    if method.needs_entropy or router_of(learner.config, learner.model) is not None:
        return sequences
    return [s for s in sequences if method.has_gradient(s)]


def kind_scales(learner: Learner, totals: Totals) -> dict[Kind, float]:
    """Return ``train.sft_lr_scale`` and ``train.rl_lr_scale``, of the kinds of terms that an update has.

    Args:
        learner: Its configuration has them.
        totals: Of the update, all ranks together.
    """
    method, train = learner.config.method, learner.config.train
    scales: dict[Kind, float] = {"sft": train.sft_lr_scale, "rl": train.rl_lr_scale}
    if set(scales.values()) == {1.0}:
        return scales
    return {kind: scales[kind] for kind in method.kinds_in(totals)}


def term_scales(learner: Learner, totals: Totals) -> dict[str, float]:
    """Return the factor of each term of the method's loss, in an update with these counts.

    The learning rate of the update is multiplied by the larger of ``train.sft_lr_scale`` and ``train.rl_lr_scale``
    among the kinds that it has, and terms of the other kind by what is between them: AdamW does not see the scale of a
    gradient, so that a factor of all terms would change nothing.

    Args:
        learner: Its configuration has the scales.
        totals: Of the update, all ranks together.
    """
    method, kinds = learner.config.method, kind_scales(learner, totals)
    most = max(kinds.values())
    return {
        term: learner.config.train.term_scales.get(term, 1.0) * (kinds[kind] / most if kind in kinds else 1.0)
        for term, kind in method.terms.items()
    }
