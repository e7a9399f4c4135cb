"""The policy's side of a run: what an update changes, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.config import Config
from srft.methods import StepInfo
from srft.policy.frozen import NONE, Frozen
from srft.policy.parallel import ALONE, World


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
