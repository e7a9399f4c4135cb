"""Fused loss ops from hidden states and the lm_head weight, with no [tokens, vocab] tensor."""

from . import reference
from .linear_logprobs import linear_logprobs
from .lm_head import FusedLMHead
from .logprobs_from_logits import logprobs_from_logits
from .losses.cross_entropy import linear_cross_entropy
from .losses.grpo import linear_grpo_loss
from .losses.policy import linear_policy_loss
from .losses.srft import linear_srft_loss
from .losses.streams import linear_token_loss
from .types import LoraDelta, PolicyLoss, VocabParallel

__all__ = [
    "FusedLMHead",
    "LoraDelta",
    "PolicyLoss",
    "VocabParallel",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_srft_loss",
    "linear_token_loss",
    "logprobs_from_logits",
    "reference",
]
