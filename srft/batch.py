"""From prompt groups to packed batches: token-budget packing and the global counts every loss term is divided by."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from srft.data.prompts import Prompt

IGNORE_INDEX = -100
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


@dataclass
class Batch:
    """Packed sequences of T tokens, N of which (the responses' own) are counted in the loss.

    Args:
        input_ids: [T] int64. A sequence may lack its prompt, which the nearest one before that has a prompt has too.
        position_ids: [T] int64, starting at 0 in each sequence, or at the length of a prompt that it lacks.
        cu_seqlens: [B+1] int32 on the CPU, bounds of the sequences in T.
        max_seqlen: Longest sequence, in tokens, its prompt among them.
        loss_rows: [N] int64, index in T of the position that predicts each counted token.
        labels: [N] int64, the counted tokens.
        loss_cu_seqlens: [B+1] int32 on the CPU, bounds of the responses in N.
        advantages: [N] fp32.
        is_demo: [N] bool, whether a token is of a demonstration, those with which rollouts begin among them.
        is_correct: [N] bool.
        rollout_logprobs: [N] fp32, the engine's; 0 on demonstrations.
        old_logprobs: [N] fp32, or None when the current policy is the one that sampled.
        old_entropy: [N] fp32, nats, or None as ``old_logprobs``.
        sequences: The B sequences, in order.
        cu_seqlens_k: [B+1] int32 on the CPU, bounds of the sequences with every prompt that one lacks counted as its
            own; the very ``cu_seqlens`` where none does.
        is_empty: It has one sequence that counts for nothing, with which a rank keeps step with the others.
        ref_logprobs: [N] fp32 of the reference model, or None where the method does not need them.
        teacher_logprobs: [N] fp32 of the teacher, 0 on demonstrations, or None where the method has none.
        importance: [N] fp32, how often a token counts that an older policy sampled, 1 on demonstrations; None where
            all rollouts are of the policy before the step.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    loss_rows: Tensor
    labels: Tensor
    loss_cu_seqlens: Tensor
    advantages: Tensor
    is_demo: Tensor
    is_correct: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    sequences: list[Response]
    cu_seqlens_k: Tensor
    is_empty: bool = False
    old_entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    importance: Tensor | None = None

    def responses(self) -> Iterator[tuple[Response, slice]]:
        """Give each sequence with the place of its counted tokens in the [N] vectors."""
        bounds = self.loss_cu_seqlens.tolist()
        for sequence, first, last in zip(self.sequences, bounds[:-1], bounds[1:], strict=True):
            yield sequence, slice(first, last)


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


def pack(
    sequences: Sequence[Response],
    tokens_per_microbatch: int,
    device: torch.device,
    *,
    share_prompts: bool = False,
) -> list[Batch]:
    """Pack sequences into micro-batches of bounded size, the longest first.

    Args:
        sequences: What to pack; a sequence is never split.
        tokens_per_microbatch: Most tokens in one micro-batch; a longer single sequence still gets one to itself.
        device: Where the batch is used; bounds stay on the CPU.
        share_prompts: Keep sequences of the same prompt together, as far as a micro-batch holds them, and the prompt
            there once, in the longest of them. To each of the others it counts as ``shared_cost`` of its tokens.

    Returns:
        Micro-batches that together hold every sequence once.
    """
    together: dict[object, list[Response]] = {}
    for number, sequence in enumerate(sorted(sequences, key=len, reverse=True)):
        together.setdefault(tuple(sequence.prompt_ids) if share_prompts else number, []).append(sequence)
    bins: list[list[Response]] = []
    room: list[int] = []
    for group in together.values():
        have_prompt: set[int] = set()
        for sequence in group:
            saved = len(sequence.prompt_ids) - shared_cost(len(sequence.prompt_ids))
            costs = [(len(sequence) - saved * (i in have_prompt), i) for i in range(len(bins))]
            cost, place = min((each for each in costs if each[0] <= room[each[1]]), default=(len(sequence), len(bins)))
            if place == len(bins):
                bins.append([])
                room.append(tokens_per_microbatch)
            bins[place].append(sequence)
            room[place] -= cost
            have_prompt.add(place)
    return [_to_batch(members, device, share_prompts) for members in bins]


def shared_cost(prompt_tokens: int) -> int:
    """Return how many tokens' memory a prompt takes for a sequence that shares it.

    Its keys and values are held again for each: 4 bytes a feature in 16 bit, of some 34 that a layer holds of a token.

    Args:
        prompt_tokens: Of the prompt.
    """
    return -(-prompt_tokens // 8)


def empty_batch(*, is_demo: bool, scores: Iterable[str], device: torch.device) -> Batch:
    """Return a micro-batch whose every loss and gradient is zero.

    Args:
        is_demo: Which kind its one token is of; of a kind that the update has.
        scores: Those of ``SCORES`` that the other micro-batches of the update have.
        device: Where it is used.
    """
    token = Response([0], [0], is_demo, truncated=False, rollout_logprobs=[], text="")
    for name in scores:
        setattr(token, name, torch.zeros(1))
    batch = _to_batch([token], device)
    return replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), is_empty=True)


def _to_batch(sequences: list[Response], device: torch.device, share_prompts: bool = False) -> Batch:
    held: list[int] = []
    own, loss_rows, prompt, prompt_end = [], [], None, 0
    for sequence in sequences:
        first = len(held)
        # sequences of one prompt are neighbours, the first of which has it
        if not share_prompts or sequence.prompt_ids != prompt:
            prompt = sequence.prompt_ids
            held += prompt
            prompt_end = len(held)
        places = torch.tensor(sequence.own_places)
        # the position before a token predicts it: of a response's first one the last of the prompt
        loss_rows.append((places + len(held) - 1).where(places > 0, prompt_end - 1))
        held += sequence.response_ids
        own.append(len(held) - first)
    lengths, reads = torch.tensor(own), torch.tensor(list(map(len, sequences)))
    cu_seqlens = _bounds(lengths)

    parts = [(*part, s) for s in sequences for part in s.parts]

    def per_part(values: list[float] | list[bool], dtype: torch.dtype) -> Tensor:
        tokens = torch.tensor([tokens for _, tokens, _ in parts])
        return torch.tensor(values, dtype=dtype).repeat_interleave(tokens).to(device)

    flat_logprobs = [x for s in sequences for x in (s.rollout_logprobs or [0.0] * s.num_own)]

    def known(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in sequences]
        return None if values[0] is None else torch.cat(values).to(device)

    return Batch(
        input_ids=torch.tensor(held, device=device),
        position_ids=(torch.arange(len(held)) - (cu_seqlens[1:] - reads).repeat_interleave(lengths)).to(device),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(reads.max()),
        loss_rows=torch.cat(loss_rows).to(device),
        labels=torch.tensor([t for s in sequences for t in s.own_ids], device=device),
        loss_cu_seqlens=_bounds(torch.tensor([s.num_own for s in sequences])),
        advantages=per_part(
            [s.prefix_advantage if of_demo and not s.is_demo else s.advantage for of_demo, _, s in parts], torch.float32
        ),
        is_demo=per_part([of_demo for of_demo, _, _ in parts], torch.bool),
        is_correct=per_part([s.is_correct for *_, s in parts], torch.bool),
        rollout_logprobs=torch.tensor(flat_logprobs, dtype=torch.float32, device=device),
        old_logprobs=known("old_logprobs"),
        sequences=sequences,
        cu_seqlens_k=cu_seqlens if torch.equal(reads, lengths) else _bounds(reads),
        old_entropy=known("old_entropy"),
        ref_logprobs=known("ref_logprobs"),
        teacher_logprobs=known("teacher_logprobs"),
        importance=known("importance"),
    )


def _bounds(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
