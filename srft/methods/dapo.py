"""DAPO (arXiv 2503.14476): GRPO with four changes that keep long reasoning alive.

- Clip-higher: the ratio may rise to 1.28 and fall to 0.8, so that unlikely tokens can become likely.
- Dynamic sampling: a group whose rewards are all alike gives way to one of a new prompt, until every group has a
  contrast or ``max_resamples`` rounds are over; what is alike then stays and teaches nothing. The paper sets no bound;
  10 is that of its authors' recipe, which ends the run beyond it. Logged rewards are of all that was sampled.
- Token mean: every token of the batch counts alike.
- Soft overlong punishment: within the last ``overlong_buffer`` tokens before the limit a completion loses reward in
  proportion to its length, all of ``overlong_penalty`` at the limit. A fifth of the limit is the paper's 4,096 of
  20,480. What is lost enters the advantages alone: rewards are logged as judged, and the contrast of a group is theirs.

Advantages are divided by the standard deviation; there is no KL.
"""

from __future__ import annotations

from pydantic import Field

from srft.methods import group_advantages, grpo, judged
from srft.responses import Group, Response


class Method(grpo.Method):
    """DAPO: GRPO with a higher upper clip, groups that have a contrast, and a price on running out of room."""

    clip_high: float = Field(0.28, gt=0)
    """The ratio is clipped above 1 + clip_high."""
    max_resamples: int = Field(10, ge=0)
    """Rounds in which groups whose rewards are all alike give way to others, sampled from new prompts; 0: none."""
    overlong_buffer: int | None = Field(None, ge=0)
    """Last tokens before rollout.max_new_tokens over which a completion loses reward; unset: a fifth of them; 0: it
    loses none."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Reward lost at rollout.max_new_tokens."""

    @property
    def counts_prompts(self) -> bool:
        """Where groups may give way."""
        return self.max_resamples > 0

    def wants_another(self, group: Group, tried: int) -> bool:
        """Where no reward of the rollouts differs from another."""
        return tried < self.max_resamples and len({s.reward for s in judged(group.rollouts)}) < 2

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts with each other, those that are too long at a lower reward."""
        members = judged(group.rollouts)
        rewards = [s.reward - self.lost_to_length(len(s.response_ids), group.max_new_tokens) for s in members]
        for member, advantage in zip(members, group_advantages(rewards, self.advantage_std), strict=True):
            member.advantage = advantage
        return members

    def lost_to_length(self, tokens: int, most: int) -> float:
        """Return how much reward a completion loses.

        Args:
            tokens: Its length.
            most: Longest completion, in tokens.
        """
        buffer = most // 5 if self.overlong_buffer is None else self.overlong_buffer
        return self.overlong_penalty * max(0.0, tokens - (most - buffer)) / buffer if buffer else 0.0
