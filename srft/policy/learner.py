"""The policy's side of a run: what an update changes, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.config import Config


@dataclass(frozen=True)
class Learner:
    """A policy in training.

    Args:
        config: The whole configuration: the method, its rates, the precision, the tokens of a forward pass.
        model: The policy, from ``model.prepare_policy``.
        tokenizer: Saved beside it.
        optimizer: Holds its parameters.
    """

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
