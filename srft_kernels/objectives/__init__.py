"""Losses on [N] vectors, a file each: record, formula, inputs, numbers, and what a token sees of the others."""

from .base import TokenObjective
from .callable import CallableObjective
from .cross_entropy import CROSS_ENTROPY
from .grpo import GRPO
from .srft import SRFT
from .streams import STREAMS

__all__ = ["CROSS_ENTROPY", "GRPO", "SRFT", "STREAMS", "CallableObjective", "TokenObjective"]
