"""Responses to the ranks that learn from them: one all-to-all, after which every rank has about as many tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from srft.batch import shared_cost
from srft.policy.parallel import World
from srft.responses import Response

# of a response as numbers: its kind, cut or not, reward, advantage, that of its prefix, tokens of prefix, prompt,
# response, teacher's prompt and turns, policies that sampled it, log-probabilities
_HEADER = 12


class Exchange:
    """An update's responses spread over the ranks by their tokens; a world of one keeps them as they are.

    Args:
        world: The ranks.
        sequences: Those that this rank's prompts gave.
        share_prompts: Whether sequences of a prompt cost less on one rank than on several.
    """

    def __init__(self, world: World, sequences: Sequence[Response], *, share_prompts: bool = False) -> None:
        self._world, self._own, self._share_prompts = world, list(sequences), share_prompts
        self.held = self._own
        """Those that this rank learns from: what the update reads of each, and no text."""
        if world.size > 1:
            self._spread()

    def return_entropies(self) -> None:
        """Note on every rank's own responses the entropies that other ranks have found."""
        if self._world.size == 1:
            return
        found = torch.tensor([s.entropy for s in self.held], dtype=torch.float64)
        back = _all_to_all(self._world, found, self._received, [len(each) for each in self._sent])
        for place, entropy in zip((i for each in self._sent for i in each), back.tolist(), strict=True):
            self._own[place].entropy = entropy

    def _spread(self) -> None:
        rank, size = self._world.rank, self._world.size
        encoded = [_encoded(s) for s in self._own]
        prompts = numbered_prompts(self._own, share=self._share_prompts)
        sizes = self._world.gather([(len(e), len(s), p) for e, s, p in zip(encoded, self._own, prompts, strict=True)])
        goes_to = assignment([[tokens for _, tokens, _ in r] for r in sizes], [[p for *_, p in r] for r in sizes])
        # of this rank's responses, those for each rank; of each rank's, how many and how many numbers come here
        self._sent = [[i for i, to in enumerate(goes_to[rank]) if to == other] for other in range(size)]
        self._received = [goes_to[other].count(rank) for other in range(size)]
        numbers_here = [
            sum(numbers for (numbers, *_), to in zip(sizes[other], goes_to[other], strict=True) if to == rank)
            for other in range(size)
        ]
        parts = [[x for i in each for x in encoded[i]] for each in self._sent]
        flat = torch.tensor([x for part in parts for x in part], dtype=torch.float64)
        self.held = _decoded(_all_to_all(self._world, flat, [len(part) for part in parts], numbers_here).tolist())


def numbered_prompts(sequences: Sequence[Response], *, share: bool) -> list[tuple[int, int]]:
    """Give each response the number of its prompt among these, and how many of its tokens it may share.

    Args:
        sequences: A rank's.
        share: Whether those of one prompt share it; else each is by itself.
    """
    numbers: dict[object, int] = {}
    return [
        (numbers.setdefault(tuple(s.prompt_ids) if share else i, len(numbers)), share * len(s.prompt_ids))
        for i, s in enumerate(sequences)
    ]


def assignment(
    lengths: Sequence[Sequence[int]], prompts: Sequence[Sequence[tuple[int, int]]] | None = None
) -> list[list[int]]:
    """Choose a rank for every response: the longest first, each to the rank that has the fewest tokens with it.

    Those of a prompt go to one rank until it has its share of all tokens.

    Args:
        lengths: Tokens of each rank's responses, their prompts among them.
        prompts: The number of each one's prompt on its rank, and the tokens that it shares where another one of that
            prompt is; None: nothing is shared. Those of a prompt follow each other.

    Returns:
        Ranks, in the shape of ``lengths``; the same wherever it is called.
    """
    loads = [0] * len(lengths)
    chosen = [[0] * len(of_rank) for of_rank in lengths]
    prompts = prompts or [[(i, 0) for i in range(len(of_rank))] for of_rank in lengths]
    together: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    every = [(-tokens, rank, i) for rank, of_rank in enumerate(lengths) for i, tokens in enumerate(of_rank)]
    for less, rank, i in sorted(every):
        number, shared = prompts[rank][i]
        together.setdefault((rank, number), []).append((-less, shared - shared_cost(shared), i))
    groups = together.values()
    even = sum(tokens - saved * (n > 0) for group in groups for n, (tokens, saved, _) in enumerate(group)) / len(loads)
    for (rank, _), group in together.items():
        has_prompt = [False] * len(loads)
        for tokens, saved, i in group:
            after = [load + tokens - saved * there for load, there in zip(loads, has_prompt, strict=True)]
            # beside its prompt while that rank has no more than its share; where it is already, if no other has less
            order = [(not (has_prompt[to] and n <= even), n, to != rank, to) for to, n in enumerate(after)]
            to = chosen[rank][i] = min(order)[-1]
            loads[to], has_prompt[to] = after[to], True
    return chosen


def _encoded(s: Response) -> list[float]:
    shown = s.teacher_prompt_ids or []
    policies = [number for version in s.versions for number in version]
    parts: list[list[int] | list[float]]
    parts = [s.prompt_ids, s.response_ids, shown, s.spans, policies, s.rollout_logprobs]
    header = [s.is_demo, s.truncated, s.reward, s.advantage, s.prefix_advantage, s.prefix_tokens]
    return [*header, *[len(part) for part in parts], *itertools.chain(*parts)]


def _decoded(numbers: list[float]) -> list[Response]:
    found, at = [], 0
    while at < len(numbers):
        is_demo, truncated, reward, advantage, of_prefix, *counts = numbers[at : at + _HEADER]
        prefix, *lengths = map(int, counts)
        *bounds, end = itertools.accumulate(lengths, initial=at + _HEADER)
        parts = [list(map(int, numbers[first:last])) for first, last in itertools.pairwise(bounds)]
        prompt, response, shown, spans, policies = parts
        found.append(
            Response(
                prompt, response, bool(is_demo), bool(truncated), numbers[bounds[-1] : end], "",
                reward=reward, advantage=advantage, teacher_prompt_ids=shown or None,
                prefix_tokens=prefix, prefix_advantage=of_prefix, spans=spans,
                versions=list(zip(policies[::2], policies[1::2], strict=True)),
            )
        )  # fmt: skip
        at = end
    return found


def _all_to_all(world: World, flat: Tensor, here: list[int], there: list[int]) -> Tensor:
    """What every rank has for this one, on the CPU; ``here`` numbers go to each rank, ``there`` come from each."""
    received = torch.empty(sum(there), dtype=flat.dtype, device=world.device)
    dist.all_to_all_single(received, flat.to(world.device), there, here)
    return received.cpu()
