"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases, of length and of difficulty.

The advantage is R - mean, and tokens are summed over a response and divided by a constant, the longest response, rather
than by the length of each: sum_t -min(r A, clip(r) A) / max_new_tokens, a mean over responses.
"""

from __future__ import annotations

from srft.methods import Aggregation, grpo


class Method(grpo.Method):
    """Dr. GRPO: advantages without the standard deviation, token sums divided by a constant."""

    advantage_std: bool = False
    """Divide advantages by the group's standard deviation."""
    aggregation: Aggregation = "constant"
    """Mean over sequences of token sums divided by rollout.max_new_tokens, mean over all tokens, mean over sequences of
    token means, or sum over all tokens divided by rollout.max_new_tokens."""
