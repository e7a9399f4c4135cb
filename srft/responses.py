"""A prompt with everything that answers it, and the counts that loss terms are divided by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from srft.data.prompts import Prompt

SCORES = ("old_logprobs", "old_entropy", "ref_logprobs", "teacher_logprobs", "importance")
"""What a response may have of each of its tokens, found by models before the update."""
SAMPLED = (
    "response_ids", "is_demo", "truncated", "rollout_logprobs", "text", "reward", "status", "message",
    "teacher_prompt_ids", "prefix_tokens", "versions", "spans", "transcript",
)  # fmt: skip
"""What a response has before anything is learned from it, beside the tokens of its prompt."""


@dataclass
class Response:
    """One response to a prompt: a rollout of the policy or a demonstration.

    Args:
        prompt_ids: Tokens of the prompt, at least one.
        response_ids: Tokens of the response, its end token included when it ended; at least one. Of a conversation all
            tokens after the prompt, what was said to the policy among them, which is never learned from.
        is_demo: Whether it is a demonstration, from end to end.
        truncated: Whether the length limit cut it.
        rollout_logprobs: The engine's log-probabilities of ``own_ids``, 0 on tokens of a demonstration; empty for a
            demonstration.
        text: The response as text, of a conversation its last turn: what the verifier judges.
        reward: What the verifier gave it.
        status: How the verification ended: "ok", "unjudged", "timeout", "error" or "bad_gold".
        message: What the verifier said besides, where it has not ended in "ok".
        advantage: Filled in by the method.
        entropy: Mean entropy of the policy over the response, nats; known after the loss.
        old_logprobs: Log-probabilities before a step's first update; None when that is the current policy.
        old_entropy: Entropies before it, nats; None where ``old_logprobs`` is.
        ref_logprobs: Log-probabilities of the reference model; None where the method does not need them.
        teacher_logprobs: Those of the teacher, 0 on a demonstration; None where the method has no teacher.
        teacher_prompt_ids: What the teacher reads in place of ``prompt_ids``; None: the same.
        prefix_tokens: Tokens of a demonstration with which a rollout begins; fewer than it has.
        prefix_advantage: Filled in by the method: the advantage of these tokens.
        versions: Of a rollout, the weights that sampled it, in order: steps they were trained for, and how many of the
            tokens after its prefix are theirs.
        importance: How often each token counts where an older policy sampled it, 1 on those of a demonstration; None
            where rollouts are always of the current policy.
        logprobs: Log-probabilities of the policy as its update found it; known after the loss.
        entropies: Entropies of each token then, nats.
        spans: Of a conversation, how many tokens its turns have in order: one of the policy, or of the demonstration,
            then one that was said to it, and so on; empty: one turn of its own. Whatever is of each token, such as its
            log-probability, is of ``own_ids``.
        transcript: A conversation as text, with what was said to the policy; empty where it is none.
        is_rewarded: Whether it has its reward, of an environment or a verifier, so that no verifier is asked.
        seed: Of the tokens with which a rollout goes on; None once it has ended.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    is_demo: bool
    truncated: bool
    rollout_logprobs: list[float]
    text: str
    reward: float = 0.0
    status: str = "ok"
    message: str = ""
    advantage: float = 0.0
    entropy: float | None = None
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    teacher_prompt_ids: list[int] | None = None
    prefix_tokens: int = 0
    prefix_advantage: float = 0.0
    versions: list[tuple[int, int]] = field(default_factory=list)
    importance: Tensor | None = None
    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    spans: list[int] = field(default_factory=list)
    transcript: str = ""
    is_rewarded: bool = False
    seed: int | None = None

    @property
    def own_places(self) -> Sequence[int]:
        """Where in ``response_ids`` the tokens stand that were sampled or demonstrated: those that are learned from."""
        if not self.spans:
            return range(len(self.response_ids))
        ends = list(itertools.accumulate(self.spans))
        return [i for last, tokens in zip(ends[::2], self.spans[::2], strict=True) for i in range(last - tokens, last)]

    @property
    def own_ids(self) -> list[int]:
        """The tokens at ``own_places``."""
        return [self.response_ids[i] for i in self.own_places] if self.spans else self.response_ids

    @property
    def num_own(self) -> int:
        """How many tokens ``own_ids`` has."""
        return sum(self.spans[::2]) if self.spans else len(self.response_ids)

    @property
    def parts(self) -> list[tuple[bool, int]]:
        """What it consists of, in order: whether that is of a demonstration, and how many tokens of its own it has."""
        if not self.prefix_tokens:
            return [(self.is_demo, self.num_own)]
        return [(True, self.prefix_tokens), (False, len(self.response_ids) - self.prefix_tokens)]

    @property
    def version(self) -> int:
        """The oldest of ``versions``; 0 where nothing was sampled."""
        return min((version for version, _ in self.versions), default=0)

    @property
    def num_sampled(self) -> int:
        """How many of its tokens ``versions`` has."""
        return sum(tokens for _, tokens in self.versions)

    @property
    def is_open(self) -> bool:
        """Whether it goes on."""
        return self.seed is not None

    @property
    def is_correct(self) -> bool:
        """Whether the verifier accepted it; a custom reward counts as accepted from 0.5 up."""
        return self.reward >= 0.5

    @property
    def is_judged(self) -> bool:
        """Whether it has a reward at all; what the verifier did not judge takes no part in training or in means."""
        return self.status != "unjudged"

    @property
    def lacks_verdict(self) -> bool:
        """Whether a verifier is to judge it: it has ended, nobody has judged it, and no environment failed."""
        return self.status == "ok" and not self.is_rewarded and not self.is_open

    def extend(self, token_ids: list[int], logprobs: list[float], version: int) -> None:
        """Add tokens that were sampled; copies that share the lists keep what they have.

        Args:
            token_ids: The tokens.
            logprobs: The engine's, of each of them.
            version: Of the weights that sampled them.
        """
        self.response_ids, self.rollout_logprobs = self.response_ids + token_ids, self.rollout_logprobs + logprobs
        has_same = bool(self.versions) and self.versions[-1][0] == version
        before, same = (self.versions[:-1], self.versions[-1][1]) if has_same else (self.versions, 0)
        self.versions = [*before, (version, same + len(token_ids))]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Group:
    """A prompt with everything that answers it: its ``rollouts`` and its ``demos``, of at most ``max_new_tokens``.

    ``drawn`` is the step that it was drawn for and its place in that step's batch; (0, 0): nobody has noted it.
    """

    prompt: Prompt
    rollouts: list[Response] = field(default_factory=list)
    demos: list[Response] = field(default_factory=list)
    max_new_tokens: int = 0
    drawn: tuple[int, int] = (0, 0)

    @property
    def is_open(self) -> bool:
        """Whether some rollout has not ended."""
        return any(s.is_open for s in self.rollouts)

    def copy(self) -> Group:
        """Return the same with responses of its own, whose lists are shared."""
        return replace(self, rollouts=[replace(s) for s in self.rollouts], demos=[replace(s) for s in self.demos])


@dataclass(frozen=True)
class Totals:
    """Counts over one optimizer update, all micro-batches together: the denominators of its loss terms.

    A rollout that begins with tokens of a demonstration is one of each kind, each with its own tokens.

    Args:
        rollout_tokens: Response tokens of rollouts, without those said to them.
        demo_tokens: Response tokens of demonstrations, likewise.
        rollout_sequences: Rollouts.
        demo_sequences: Demonstrations.
    """

    rollout_tokens: int
    demo_tokens: int
    rollout_sequences: int
    demo_sequences: int

    @property
    def tokens(self) -> int:
        """Response tokens of both kinds."""
        return self.rollout_tokens + self.demo_tokens


def count(sequences: Sequence[Response]) -> Totals:
    """Count tokens and sequences of each kind.

    Args:
        sequences: Everything that one optimizer update learns from.
    """
    parts = [part for s in sequences for part in s.parts]
    rollouts, demos = ([tokens for of_demo, tokens in parts if of_demo is kind] for kind in (False, True))
    return Totals(
        rollout_tokens=sum(rollouts),
        demo_tokens=sum(demos),
        rollout_sequences=len(rollouts),
        demo_sequences=len(demos),
    )
