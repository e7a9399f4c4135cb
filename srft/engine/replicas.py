"""Several vLLM engines of one process: asked at once, each for a share, and given weights from the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from torch import Tensor

from srft.engine.base import Completion, Ended, EngineLost, Sampling
from srft.engine.vllm import VllmEngine, weight_files

_T = TypeVar("_T")


class Replicas:
    """Engines that are all alike: whichever answers, a completion depends on its prompt and seed alone.

    When one of them fails, what it was asked fails, once the others have answered; who starts it again starts all.

    Args:
        starts: Each starts an engine; they are started at once.

    Raises:
        EngineError: When one cannot be started; the others are closed.
    """

    def __init__(self, starts: Sequence[Callable[[], VllmEngine]]) -> None:
        self.version = self.restarts = 0
        self._engines: list[VllmEngine] = []
        self._pool = ThreadPoolExecutor(len(starts), "engines")
        try:
            self._all([partial(self._start, start) for start in starts])
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        """Draw completions, each prompt's by one engine, sample ``k`` of prompt ``p`` from ``seeds[p][k]`` alone.

        Args:
            prompts: Token ids, none empty.
            sampling: How to draw.
            seeds: One list per prompt.
            ended: As ``Engine.generate`` has it; from a thread of each engine.

        Raises:
            ValueError: As ``VllmEngine.generate``.
            EngineError: When an engine fails.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"seeds must have one list per prompt, got {len(seeds)} for {len(prompts)}")

        def ask(engine: VllmEngine, rows: list[tuple[int, list[int], list[int]]]) -> list[list[Completion]]:
            def own(place: int, sample: int, token_ids: list[int]) -> None:
                if ended is not None:
                    ended(rows[place][0], sample, token_ids)

            return engine.generate([row[1] for row in rows], sampling, [row[2] for row in rows], ended and own)

        return self._shared(list(zip(range(len(prompts)), prompts, seeds, strict=True)), ask)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights of every engine; a failure closes them all.

        Args:
            named_tensors: As for ``VllmEngine.update_weights``; walked through once, and written once.
            version: Goes into every ``Completion`` from here on.

        Raises:
            EngineError: When an engine fails.
        """
        try:
            with weight_files(named_tensors, self._engines[0].folders) as files:
                self._all([partial(engine.load_files, files, version) for engine in self._engines])
        except BaseException:
            self.close()
            raise
        self.version = version

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1 of each sequence, at temperature 1.

        The first is scored by the first engine, the next by the next, so that as many as there are engines reach all.

        Args:
            sequences: Token ids.

        Raises:
            ValueError: As ``VllmEngine.score``.
            EngineError: When an engine fails.
        """
        return self._shared(sequences, lambda engine, rows: engine.score(rows))

    def sleep(self) -> None:
        """Let every engine give its GPU's memory back until its next weights."""
        self._all([engine.sleep for engine in self._engines])

    def close(self) -> None:
        """End all engines; safe to call twice."""
        for engine in self._engines:
            engine.close()
        self._pool.shutdown(wait=False)

    def _start(self, start: Callable[[], VllmEngine]) -> None:
        self._engines.append(start())

    def _shared(self, rows: list[_T], ask: Callable[[VllmEngine, list[_T]], list]) -> list:
        """Ask each engine for every so-manieth row, and return the answers in order."""
        count = len(self._engines)
        parts = self._all([partial(ask, engine, rows[i::count]) for i, engine in enumerate(self._engines)])
        return [parts[i % count][i // count] for i in range(len(rows))]

    def _all(self, calls: Sequence[Callable[[], _T]]) -> list[_T]:
        """Make calls at once; raise, of what went wrong, first that an engine was lost, which can be mended."""
        made = [self._pool.submit(call) for call in calls]
        errors = [error for error in (future.exception() for future in made) if error is not None]
        if errors:
            raise next((error for error in errors if isinstance(error, EngineLost)), errors[0])
        return [future.result() for future in made]
