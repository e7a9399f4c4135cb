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
    partial_tokens: int | None = Field(None, gt=0)
    """Tokens that a completion gets in a step; one that has not ended goes on in the next, by its weights, and a group
    is learned from in the step in which the last of its completions ends. Unset: all of max_new_tokens in one step. A
    completion of S steps has tokens that are S - 1 steps old, and max_lag must allow as many."""
    max_lag: int = Field(0, ge=0)
    """Steps by which the policy that samples may be behind the one that learns. 0: each step's rollouts are its own.
    1: they are made while the step before is trained. More: they wait, which is no faster; it shows what staleness
    does. With partial_tokens what is left beyond the S - 1 steps of a completion is for that. Rollouts are then
    weighted, token by token, by how likely they still are. With train.replay: by which those of the record may be
    behind."""
    is_cap: float = Field(2.0, ge=1)
    """With max_lag > 0: largest such weight of a token, p / p of the engine."""
    is_mode: Literal["truncate", "mask"] = "truncate"
    """With max_lag > 0: a token above is_cap counts is_cap times ("truncate"), or not at all ("mask")."""

    def refuse_unfit(self) -> None:
        """Check that its options fit together.

        Raises:
            ValueError: When completions must be longer than they may be, or take more steps than ``max_lag`` allows.
        """
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens={self.min_new_tokens} is more than rollout.max_new_tokens="
                f"{self.max_new_tokens}, which cuts a completion; lower the one or raise the other"
            )
        if self.steps_ahead < 0:
            raise ValueError(
                f"with rollout.partial_tokens={self.partial_tokens} a completion of rollout.max_new_tokens="
                f"{self.max_new_tokens} takes {self.segments} steps, so that its first tokens are {self.segments - 1} "
                f"steps old, and rollout.max_lag={self.max_lag}; set rollout.max_lag to at least {self.segments - 1}, "
                f"or rollout.partial_tokens to at least {-(-self.max_new_tokens // (self.max_lag + 1))}"
            )

    @property
    def segments(self) -> int:
        """Most steps in which a completion is sampled, a part in each."""
        return 1 if self.partial_tokens is None else -(-self.max_new_tokens // self.partial_tokens)

    @property
    def steps_ahead(self) -> int:
        """Steps by which rollouts are made ahead, beside training."""
        return self.max_lag - self.segments + 1
