"""The optimizer of a policy."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from srft.config import Config
from srft.policy.parallel import let_go


def make_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the policy, with weight decay on matrices alone.

    Args:
        model: The policy, fp32, sharded or not.
        config: The whole configuration.
    """
    let_go(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas)
