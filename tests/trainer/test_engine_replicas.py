"""Several engines of one process: each is asked for its share, all have the same weights, and none is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srft.engine.base import Completion, Ended, EngineError, EngineLost, Sampling
from srft.engine.replicas import Replicas

SAMPLING = Sampling(1.0, 4, ())
WEIGHTS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}


class Scripted:
    """Says the prompt's first token, the seed and its weights, and fails where it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folders, self.version, self.weights, self.asked = [folder], 0, 0.0, 0
        self.fails: dict[str, Exception] = {}
        self.closed = self.asleep = False

    def _enter(self, where: str) -> None:
        if where in self.fails:
            raise self.fails[where]

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        self._enter("generate")
        self.asked += len(prompts)
        if ended is not None:
            for i, (prompt, row) in enumerate(zip(prompts, seeds, strict=True)):
                for k, seed in enumerate(row):
                    ended(i, k, [prompt[0], seed])
        return [
            [Completion([p[0], seed], [self.weights], "stop", self.version) for seed in row]
            for p, row in zip(prompts, seeds, strict=True)
        ]

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        self.asked += len(sequences)
        return [[self.weights * token for token in sequence[1:]] for sequence in sequences]

    def load_files(self, files: list[Path], version: int) -> None:
        self._enter("load")
        self.weights, self.version = sum(float(t.sum()) for file in files for t in load_file(file).values()), version

    def sleep(self) -> None:
        self.asleep = True

    def close(self) -> None:
        self.closed = True


def three(folder: Path) -> tuple[Replicas, list[Scripted]]:
    engines = [Scripted(folder) for _ in range(3)]
    return Replicas([lambda engine=engine: engine for engine in engines]), engines


def test_each_answers_its_share_in_order(tmp_path: Path) -> None:
    """Prompts and sequences go round, weights to all of them in one set of files, which is gone afterwards."""
    replicas, engines = three(tmp_path)
    replicas.update_weights(iter(WEIGHTS.items()), 7)
    assert [engine.weights for engine in engines] == [6.0] * 3 and not list(tmp_path.iterdir())
    told: list[tuple[int, int, list[int]]] = []
    said = replicas.generate(
        [[i] for i in range(7)], SAMPLING, [list(range(i)) for i in range(7)],
        lambda p, k, token_ids: told.append((p, k, token_ids)),
    )  # fmt: skip
    assert sorted(told) == [(i, seed, [i, seed]) for i in range(7) for seed in range(i)]
    assert [[c.token_ids for c in row] for row in said] == [[[i, seed] for seed in range(i)] for i in range(7)]
    assert {c.version for row in said for c in row} == {replicas.version} == {7}
    assert sorted(engine.asked for engine in engines) == [2, 2, 3]
    assert replicas.score([[0, i] for i in range(4)]) == [[6.0 * i] for i in range(4)]
    assert replicas.generate([], SAMPLING, []) == [] == replicas.score([])
    replicas.sleep()
    replicas.close()
    assert all(engine.asleep and engine.closed for engine in engines)


@pytest.mark.parametrize("first", [0, 1])
def test_a_lost_engine_is_said_before_other_errors(first: int, tmp_path: Path) -> None:
    """Whichever fails first: it can be started again, and the others may have failed of it."""
    replicas, engines = three(tmp_path)
    engines[first].fails["generate"] = EngineLost("it died")
    engines[1 - first].fails["generate"] = EngineError("no such file")
    with pytest.raises(EngineLost, match="it died"):
        replicas.generate([[i] for i in range(3)], SAMPLING, [[1]] * 3)
    assert sum(engine.asked for engine in engines) == 1
    replicas.close()


def test_an_update_that_fails_closes_all(tmp_path: Path) -> None:
    """Some have the new weights then, and some the old ones."""
    replicas, engines = three(tmp_path)
    engines[2].fails["load"] = EngineError("a weight is missing")
    with pytest.raises(EngineError, match="a weight is missing"):
        replicas.update_weights(WEIGHTS.items(), 1)
    assert all(engine.closed for engine in engines) and replicas.version == 0 and not list(tmp_path.iterdir())


def test_one_that_does_not_start_ends_the_others(tmp_path: Path) -> None:
    """Those that did are closed."""
    engine = Scripted(tmp_path)

    def fail() -> Scripted:
        raise EngineError("no memory")

    starts: list[Callable[[], Scripted]] = [lambda: engine, fail]
    with pytest.raises(EngineError, match="no memory"):
        Replicas(starts)
    assert engine.closed
