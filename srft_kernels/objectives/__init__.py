"""A loss on [N] vectors: its formula, inputs and numbers, and what one token sees of the others."""

from .base import TokenObjective
from .callable import CallableObjective
from .grpo import GRPO_FORMULAS, GRPO_TERMS, GrpoInputs, GrpoNumbers, GrpoObjective
from .srft import SRFT_FORMULAS, SRFT_TERMS, SrftInputs, SrftNumbers, SrftObjective
from .streams import STREAM_FORMULAS, STREAM_TERMS, StreamInputs, StreamNumbers, StreamObjective

__all__ = [
    "GRPO_FORMULAS",
    "GRPO_TERMS",
    "SRFT_FORMULAS",
    "SRFT_TERMS",
    "STREAM_FORMULAS",
    "STREAM_TERMS",
    "CallableObjective",
    "GrpoInputs",
    "GrpoNumbers",
    "GrpoObjective",
    "SrftInputs",
    "SrftNumbers",
    "SrftObjective",
    "StreamInputs",
    "StreamNumbers",
    "StreamObjective",
    "TokenObjective",
]
