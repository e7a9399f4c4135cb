"""The options of what answers a policy between its turns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from srft.section import Section


class EnvConfig(Section):
    """What answers the policy in conversations of several turns."""

    name: str | None = None
    """"calculator", or path/to/file.py:Class with `__init__(self, answer, row)` and `step(self, text)`, which returns
    what is said to a turn of the policy, or nothing when that was the last one; unset: a rollout is one turn. With it
    demonstrations that are conversations are learned from the assistant's first turn on, and rollout.max_new_tokens
    holds for all that comes after the prompt, what is said to the policy included. A rollout has the reward that the
    class's `reward(self)` returns, where it has that method; else its last turn is judged by the verifier."""
    max_turns: int = Field(8, gt=0)
    """Turns of the policy after which a conversation is cut."""
    role: Literal["user", "tool"] = "user"
    """Whose turn the chat template makes of what is said to the policy."""
    workers: int = Field(2, gt=0)
    """Processes that answer."""
    deadline_s: float = Field(5.0, gt=0)
    """Seconds one answer may take before its process is ended, and with it the conversation, as a timeout."""
