"""GSPO (arXiv 2507.18071): GRPO whose ratio is that of the sequence, s = exp(mean_t log r_t).

The loss is -min(s A, clip(s) A), a mean over sequences of token means; bounds of 3e-4 and 4e-4 are the paper's. While a
step has one update the ratio is 1, and the gradient GRPO's with that aggregation: ``train.updates_per_step`` makes the
difference.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from srft.methods import Aggregation, grpo


class Method(grpo.Method):
    """GSPO: GRPO with the ratio of whole sequences, clipped close to 1."""

    loss_type: Literal["gspo"] = "gspo"
    """The token term."""
    clip_low: float = Field(3e-4, gt=0)
    """The ratio of a sequence is clipped below 1 - clip_low."""
    clip_high: float = Field(4e-4, gt=0)
    """The ratio of a sequence is clipped above 1 + clip_high."""
    aggregation: Aggregation = "sequence-mean"
    """Mean over sequences of token means, mean over all tokens, mean over sequences of token sums divided by
    rollout.max_new_tokens, or sum over all tokens divided by rollout.max_new_tokens."""
