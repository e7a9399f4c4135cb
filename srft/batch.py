"""Responses packed into micro-batches under a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srft.responses import Response

IGNORE_INDEX = -100


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
