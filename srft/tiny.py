"""The options of the model that is built from scratch."""

from __future__ import annotations

from pydantic import Field

from srft.section import Section


class WarmStartConfig(Section):
    """A short supervised start for a model built from scratch; its result is cached."""

    max_steps: int = Field(400, ge=0)
    """Steps after which it ends in any case; 0 turns it off."""
    until_accuracy: float = Field(0.25, gt=0, le=1)
    """It ends once greedy accuracy on held-out problems reaches this."""
    batch_size: int = Field(128, gt=0)
    """Demonstrations per step."""
    lr: float = Field(2e-3, gt=0)
    """AdamW learning rate."""


class TinyConfig(Section):
    """Shape of the model built from scratch when model.name is "tiny" (Qwen2 architecture)."""

    hidden_size: int = Field(128, gt=0)
    """Width of the residual stream."""
    num_layers: int = Field(2, gt=0)
    """Transformer blocks."""
    num_heads: int = Field(4, gt=0)
    """Attention heads; must divide hidden_size."""
    intermediate_size: int = Field(512, gt=0)
    """Width of the gated MLP."""
    tie_embeddings: bool = True
    """Share the embedding with the head."""
