"""One engine for a group of ranks, which its first rank runs, and which is started again when its process is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srft.engine.base import Completion, Ended, Engine, EngineError, EngineLost, Sampling
from srft.policy.parallel import Elsewhere, World

_T = TypeVar("_T")


class SharedEngine:
    """Asks the engine of a group for all of its ranks; every method is a collective of all ranks of the run.

    When an engine's process dies or hangs in a call, another is started, given the weights of the last update again,
    and asked again; the ranks of other groups take part in gathering the weights. Whatever else an engine raises is
    raised on the rank that runs it, and the others end with ``Elsewhere``: none is left waiting.

    Args:
        start: Starts the engine of this rank's group; called on the group's first rank alone.
        weights: Yields the policy's weights as they are, each whole; every rank walks through all of them.
        world: The ranks; of those that make rollouts while others train, ``World.beside``.
        ranks_per_engine: Ranks of a group, neighbours; divides their number.
        most_restarts: How often engines may be started again in this run, all together, >= 0.
        sleeps: Let the engines sleep between ``sleep`` and the next update.
        keeps_weights: Give an engine that is started again those of the last update, kept in the CPU's memory of the
            rank that runs it, not ``weights``; for a policy that is trained while the engine samples.

    Raises:
        EngineError: When an engine cannot be started.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        world: World,
        ranks_per_engine: int,
        most_restarts: int,
        *,
        sleeps: bool = False,
        keeps_weights: bool = False,
    ) -> None:
        self._start, self._weights, self._world, self._most = start, weights, world, most_restarts
        self._sleeps, self._keeps = sleeps, keeps_weights
        self._first = world.rank - world.rank % ranks_per_engine
        self._runs_it = world.rank == self._first
        self._members = range(self._first, self._first + ranks_per_engine)
        self._group = _own_group(world, ranks_per_engine)
        self._engine: Engine | None = None
        self._why: list[str] = []
        """What became of each rank's engine in the last thing done together; empty where it is well."""
        self.version = 0
        self.restarts = 0
        """How often an engine of the run was started again, on whichever rank."""
        if self._together(self._start_own):
            raise self._lost_for_good("")

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        """Draw completions, ``len(seeds[p])`` of prompt ``p``, sample ``k`` from ``seeds[p][k]`` alone.

        Args:
            prompts: Token ids, at least one each; any number on each rank.
            sampling: How to draw; the same on every rank.
            seeds: In [0, 2**63).
            ended: As ``Engine.generate`` has it; on the group's first rank, of its own prompts.

        Raises:
            EngineError: When the engine of this rank fails, or was started again too often.
            Elsewhere: When that of another does.
        """

        def own(prompt: int, sample: int, token_ids: list[int]) -> None:
            # those of the rank that runs the engine come first
            if ended and prompt < len(prompts):
                ended(prompt, sample, token_ids)

        def answer(engine: Engine, asked: list[Any]) -> list[Any]:
            rows = [(prompt, row) for prompts, seeds in asked for prompt, row in zip(prompts, seeds, strict=True)]
            ids, of_rows = [row[0] for row in rows], [row[1] for row in rows]
            drawn = iter(engine.generate(ids, sampling, of_rows, ended and own) if rows else [])
            return [[next(drawn) for _ in prompts] for prompts, _ in asked]

        return self._ask((prompts, seeds), answer)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights of every engine and drop every cache made with the old ones.

        Args:
            named_tensors: Every weight, whole, named as in the checkpoint; every rank walks through all of them.
            version: Carried by every later completion.

        Raises:
            EngineError: As ``generate``.
            Elsewhere: As ``generate``.
        """
        self.version = version
        if self._sleeps:
            # what training's allocators keep on any rank would be missing to an engine that wakes
            self._together(torch.cuda.empty_cache)
        if self._keeps and self._runs_it:
            kept = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in named_tensors]
            self._weights, named_tensors = (lambda: kept), kept
        elif self._keeps:
            self._weights = lambda: ()
        self._until_served(self._together(partial(self._send, named_tensors, self._runs_it)))

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1, at temperature 1.

        Args:
            sequences: At least two tokens each; any number on each rank.

        Raises:
            EngineError: As ``generate``.
            Elsewhere: As ``generate``.
        """

        def answer(engine: Engine, asked: list[Any]) -> list[Any]:
            scores = iter(engine.score([sequence for sequences in asked for sequence in sequences]))
            return [[next(scores) for _ in sequences] for sequences in asked]

        return self._ask(sequences, answer)

    def sleep(self) -> None:
        """Let the engines give back their GPUs' memory until the next update, where they are to.

        Raises:
            EngineError: As ``generate``.
            Elsewhere: As ``generate``.
        """

        def work() -> None:
            if self._runs_it:
                assert self._engine is not None
                self._engine.sleep()

        if self._sleeps:
            self._until_served(self._together(work), work)

    def close(self) -> None:
        """Release the engine; no collective, and safe to call twice."""
        if self._engine is not None:
            self._engine.close()

    def _ask(self, request: Any, answer: Callable[[Engine, list[Any]], list[Any]]) -> Any:
        """Bring the requests of a group to its first rank, which answers them all, and the answers back."""
        requests = self._gathered(request)
        answers: list[Any] | None = None

        def work() -> None:
            nonlocal answers
            if self._runs_it and answers is None:
                assert self._engine is not None
                answers = answer(self._engine, requests)

        self._until_served(self._together(work), work)
        return self._scattered(answers)

    def _until_served(self, dead: set[int], work: Callable[[], None] | None = None) -> None:
        """Start the engines of these ranks again and give them the weights, until all have done their work."""
        stale: set[int] = set()
        while dead or stale:
            if dead:
                self._count(len(dead))
                lost = self._together(self._start_own if self._world.rank in dead else _nothing)
                stale, dead = stale | (dead - lost), lost
                continue
            dead, stale = self._together(partial(self._send, None, to_own=self._world.rank in stale)), set()
            if not dead and work is not None:
                dead = self._together(work)

    def _together(self, work: Callable[[], None]) -> set[int]:
        """Do something on every rank; return those whose engine was lost in it, and raise what else went wrong."""
        lost, failed = "", None
        try:
            work()
        except EngineLost as error:
            lost = str(error)
        except Exception as error:  # whatever it is: the others must hear of it, or they wait for this rank in vain
            failed = error
        outcomes = self._world.gather((lost, failed is not None))
        if failed is not None:
            raise failed
        if any(bad for _, bad in outcomes):
            raise Elsewhere("the engine of another rank failed")
        self._why = [text for text, _ in outcomes]
        return {rank for rank, text in enumerate(self._why) if text}

    def _count(self, lost: int) -> None:
        """Enter that so many engines are to be started again."""
        if self.restarts + lost > self._most:
            raise self._lost_for_good(f"\nand it is not started again, since engine.restarts={self._most}")
        self.restarts += lost
        if own := self._why[self._world.rank]:
            print(f"{own.splitlines()[0]}; it is started again ({self.restarts} of {self._most})", file=sys.stderr)

    def _lost_for_good(self, why: str) -> Exception:
        own = self._why[self._world.rank]
        return EngineError(own + why) if own else Elsewhere("the engine of another rank was lost")

    def _start_own(self) -> None:
        if self._runs_it:
            self.close()
            self._engine = self._start()

    def _send(self, named_tensors: Iterable[tuple[str, Tensor]] | None, to_own: bool) -> None:
        tensors = iter(self._weights() if named_tensors is None else named_tensors)
        try:
            if to_own:
                assert self._engine is not None
                self._engine.update_weights(tensors, self.version)
        finally:
            for _ in tensors:  # each is gathered from all ranks
                pass

    def _gathered(self, value: _T) -> list[_T]:
        """The group's values on its first rank; on the others nothing."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * len(self._members) if self._runs_it else None
        dist.gather_object(value, values, dst=self._first, group=self._group)
        return values or []

    def _scattered(self, values: list[_T] | None) -> _T:
        """The value that the group's first rank has for this one."""
        if self._group is None:
            assert values is not None
            return values[0]
        own: list[Any] = [None]
        dist.scatter_object_list(own, values, src=self._first, group=self._group)
        return own[0]


def _nothing() -> None:
    pass


def _own_group(world: World, size: int) -> dist.ProcessGroup | None:
    """The process group of this rank's engine; None where it is this rank's alone."""
    if size == 1:
        return None
    groups = [world.new_group(range(first, first + size)) for first in range(0, world.size, size)]
    return groups[world.rank // size]
