"""CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is a clipped weight, and no token loses its gradient.

The loss is -sg[clip(r, 1 - clip_low, 1 + clip_high)] A log p, a mean over tokens. A clip_low of 1 is no lower bound, as
in the paper, which does not say what it found for the upper one: 0.28 is that of Trinity-RFT. The form is the paper's;
Trinity-RFT also leaves out tokens with A > 0 and a ratio above the upper bound, or A < 0 and one below the lower, which
is not done here. While a step has one update the ratio is 1 and the loss REINFORCE's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from srft.methods import grpo


class Method(grpo.Method):
    """CISPO: REINFORCE weighted by a clipped ratio without a gradient."""

    loss_type: Literal["cispo"] = "cispo"
    """The token term."""
    clip_low: float = Field(1.0, gt=0)
    """The weight of a token is at least 1 - clip_low."""
    clip_high: float = Field(0.28, gt=0)
    """The weight of a token is at most 1 + clip_high."""
