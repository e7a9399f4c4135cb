"""The options of sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from srft.section import Section, one_or_more


class RolloutConfig(Section):
    """How completions are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the loss divides the logits by the same number."""
    max_new_tokens: int = Field(64, gt=0)
    """Longest completion, in tokens; also the longest demonstration. With env.name, longest conversation."""
    min_new_tokens: int = Field(0, ge=0)
    """Tokens that a completion has before it may end: until then end tokens are not drawn and texts of rollout.stop end
    nothing. Not in evaluations."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(one_or_more)] = []
    """Texts that end a completion, such as "</answer>"; it is kept up to the end of the text. Beside them, the end
    tokens of the tokenizer, of the model's generation_config and of the chat template end it."""
    max_lag: int = Field(0, ge=0)
    """Steps by which the policy that samples may be behind the one that learns. 0: each step's rollouts are its own.
    1: they are made while the step before is trained. More: they wait, which is no faster; it shows what staleness
    does. Rollouts are then weighted by how likely they still are. With train.replay: by which those
    of the record may be behind."""
    is_cap: float = Field(2.0, ge=1)
    """With max_lag > 0: largest such weight of a token, p / p of the engine."""
    is_mode: Literal["truncate", "mask"] = "truncate"
    """With max_lag > 0: a token above is_cap counts is_cap times ("truncate"), or not at all ("mask")."""
