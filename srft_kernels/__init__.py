"""Fused loss ops from hidden states and the lm_head weight, with no [tokens, vocab] tensor."""

from . import reference
from ._chunked_head import LoraDelta
from ._one_pass import PolicyLoss
from .cross_entropy import linear_cross_entropy
from .linear_logprobs import linear_logprobs
from .lm_head import FusedLMHead
from .logprobs_from_logits import logprobs_from_logits
from .policy_loss import linear_grpo_loss, linear_policy_loss, linear_srft_loss
from .vocab_parallel import VocabParallel

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
    "logprobs_from_logits",
    "reference",
]
