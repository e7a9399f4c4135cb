"""Responses to the ranks that learn from them: one all-to-all, after which every rank has about as many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from srft.batch import Response
from srft.policy.parallel import World

# of a response as numbers: its kind, cut or not, reward, advantage, that of its prefix, its policy, tokens of prefix,
# prompt, response, teacher's prompt and turns, log-probabilities
_HEADER = 12


class Exchange:
    """An update's responses spread over the ranks by their tokens; a world of one keeps them as they are.

    Args:
        world: The ranks.
        sequences: Those that this rank's prompts gave.
    """

    def __init__(self, world: World, sequences: Sequence[Response]) -> None:
        self._world, self._own = world, list(sequences)
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
        sizes = self._world.gather([(len(s), len(e)) for s, e in zip(self._own, encoded, strict=True)])
        goes_to = assignment([[tokens for tokens, _ in of_rank] for of_rank in sizes])
        # of this rank's responses, those for each rank; of each rank's, how many and how many numbers come here
        self._sent = [[i for i, to in enumerate(goes_to[rank]) if to == other] for other in range(size)]
        self._received = [goes_to[other].count(rank) for other in range(size)]
        numbers_here = [
            sum(numbers for (_, numbers), to in zip(sizes[other], goes_to[other], strict=True) if to == rank)
            for other in range(size)
        ]
        parts = [[x for i in each for x in encoded[i]] for each in self._sent]
        flat = torch.tensor([x for part in parts for x in part], dtype=torch.float64)
        self.held = _decoded(_all_to_all(self._world, flat, [len(part) for part in parts], numbers_here).tolist())


def assignment(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Choose a rank for every response: the longest first, each to the rank that has the fewest tokens so far.

    Args:
        lengths: Tokens of each rank's responses.

    Returns:
        Ranks, in the shape of ``lengths``; the same wherever it is called.
    """
    loads = [0] * len(lengths)
    chosen = [[0] * len(of_rank) for of_rank in lengths]
    every = [(-tokens, rank, i) for rank, of_rank in enumerate(lengths) for i, tokens in enumerate(of_rank)]
    for tokens, rank, i in sorted(every):
        # where it is already, if no other rank has less
        to = min(range(len(loads)), key=lambda other: (loads[other], other != rank, other))
        chosen[rank][i] = to
        loads[to] -= tokens
    return chosen


def _encoded(s: Response) -> list[float]:
    shown = s.teacher_prompt_ids or []
    lengths = [len(s.prompt_ids), len(s.response_ids), len(shown), len(s.spans), len(s.rollout_logprobs)]
    header = [s.is_demo, s.truncated, s.reward, s.advantage, s.prefix_advantage, s.version, s.prefix_tokens, *lengths]
    return [*header, *s.prompt_ids, *s.response_ids, *shown, *s.spans, *s.rollout_logprobs]


def _decoded(numbers: list[float]) -> list[Response]:
    found, at = [], 0
    while at < len(numbers):
        is_demo, truncated, reward, advantage, of_prefix, *counts = numbers[at : at + _HEADER]
        version, prefix, prompt, response, shown, spans, logprobs = map(int, counts)
        own, with_shown = prompt + response, prompt + response + shown
        ids = [int(x) for x in numbers[at + _HEADER : at + _HEADER + with_shown + spans]]
        end = at + _HEADER + with_shown + spans + logprobs
        found.append(
            Response(
                ids[:prompt], ids[prompt:own], bool(is_demo), bool(truncated), numbers[end - logprobs : end], "",
                reward=reward, advantage=advantage, teacher_prompt_ids=ids[own:with_shown] or None,
                prefix_tokens=prefix, prefix_advantage=of_prefix, spans=ids[with_shown:], version=version,
            )
        )  # fmt: skip
        at = end
    return found


def _all_to_all(world: World, flat: Tensor, here: list[int], there: list[int]) -> Tensor:
    """What every rank has for this one, on the CPU; ``here`` numbers go to each rank, ``there`` come from each."""
    received = torch.empty(sum(there), dtype=flat.dtype, device=world.device)
    dist.all_to_all_single(received, flat.to(world.device), there, here)
    return received.cpu()
