"""Engines of many ranks: each rank gets its own answers, and a lost engine is replaced without a trace in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from srft.engine.base import Completion, Ended, EngineError, EngineLost, Sampling
from srft.engine.shared import SharedEngine
from srft.policy.parallel import Elsewhere, World
from tests.ranks import results_of_two_ranks

SAMPLING = Sampling(1.0, 4, ())


class Scripted:
    """Says the prompt's first token, the seed and its weights; fails where its plan says so."""

    def __init__(self, plan: dict[str, Exception]) -> None:
        self.version, self.restarts, self.weights, self.asked, self.closed = 0, 0, 0.0, 0, False
        self.plan = plan

    def _fail(self, where: str) -> None:
        if error := self.plan.pop(where, None):
            raise error

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        self.asked += 1
        self._fail("generate")
        return [
            [Completion([p[0], seed], [self.weights] * 2, "stop", self.version) for seed in row]
            for p, row in zip(prompts, seeds, strict=True)
        ]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weights = 0.0
        for _, tensor in named_tensors:
            self._fail("update")
            self.weights += float(tensor)
        self.version = version

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        self._fail("score")
        return [[self.weights * token for token in sequence[1:]] for sequence in sequences]

    def close(self) -> None:
        self.closed = True


class Ranks:
    """A shared engine on this rank, with what it was made of."""

    def __init__(
        self,
        world: World,
        plans: list[dict[str, Exception]],
        per_engine: int = 1,
        most: int = 3,
        keeps: bool = False,
    ) -> None:
        self.world, self.plans, self.engines, self.value = world, list(plans), [], 1.0
        self.engine = SharedEngine(self.start, self.weights, world, per_engine, most, keeps_weights=keeps)

    def start(self) -> Scripted:
        plan = self.plans.pop(0) if self.plans else {}
        if error := plan.get("start"):
            raise error
        self.engines.append(Scripted(plan))
        return self.engines[-1]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each is a collective, as a sharded policy's are: a rank that leaves early hangs the others."""
        for name in ("a", "b", "c"):
            self.world.sum([1.0])
            yield name, torch.tensor(self.value)

    def update(self, value: float, version: int) -> None:
        self.value = value
        self.engine.update_weights(self.weights(), version)

    def said(self, *counts: int) -> list[Any]:
        """What it answers to prompts of this rank's own, with so many seeds each."""
        prompts = [[100 * self.world.rank + i] for i in range(len(counts))]
        answers = self.engine.generate(prompts, SAMPLING, [list(range(count)) for count in counts])
        return [[[c.token_ids, c.logprobs[0], c.version] for c in row] for row in answers]


def expected(rank: int, counts: tuple[int, ...], weights: float, version: int) -> list[Any]:
    return [[[[100 * rank + i, seed], weights, version] for seed in range(n)] for i, n in enumerate(counts)]


def sharing(world: World) -> list[Any]:
    """One engine for both ranks, asked with other numbers of prompts on each, once with none on one."""
    ranks = Ranks(world, [], per_engine=2)
    ranks.update(2.0, 7)
    counts: tuple[int, ...] = ((2, 1), (3,))[world.rank]
    said = ranks.said(*counts)
    none = ranks.said(*((1,), ())[world.rank])
    scores = ranks.engine.score([[1, 5 + world.rank]] * (1 + world.rank))
    ranks.engine.close()
    right = [
        said == expected(world.rank, counts, 6.0, 7),
        none == expected(world.rank, ((1,), ())[world.rank], 6.0, 7),
        scores == [[6.0 * (5 + world.rank)]] * (1 + world.rank),
        len(ranks.engines) == (1, 0)[world.rank],
        [engine.closed for engine in ranks.engines] == [True] * len(ranks.engines),
    ]
    return [*right, ranks.engine.restarts]


def lost(world: World, where: str, per_engine: int = 1) -> list[Any]:
    """An engine is lost in a call: the next one has the weights and answers as if nothing had been."""
    fails = world.rank == (1 if per_engine == 1 else 0)
    plans = [{where: EngineLost("it died")}, {"update": EngineLost("again")}] if fails else []
    ranks = Ranks(world, plans, per_engine)
    ranks.update(2.0, 1)
    ranks.update(3.0, 2)
    counts = ((2, 1), (3,))[world.rank]
    said, scores = ranks.said(*counts), ranks.engine.score([[0, 1]])
    asked = [engine.asked for engine in ranks.engines]
    return [said == expected(world.rank, counts, 9.0, 2), scores == [[9.0]], ranks.engine.restarts, asked]


def too_often(world: World) -> list[Any]:
    """The third loss of a run that may have two."""
    plans = [{"generate": EngineLost("dead")} for _ in range(3 * world.rank)]
    ranks = Ranks(world, plans, most=2)
    ranks.update(1.0, 1)
    return [raised(lambda: ranks.said(1)), ranks.engine.restarts]


def refused(world: World, per_engine: int) -> list[Any]:
    """What is no loss is raised on its own rank."""
    ranks = Ranks(world, [{"score": ValueError("bad tokens")}] if world.rank == 2 - per_engine else [], per_engine)
    ranks.update(1.0, 1)
    return [raised(lambda: ranks.engine.score([[0, 1]]))]


def kept(world: World) -> list[Any]:
    """A shared engine is lost in a rollout while the policy moves, with which nobody may meddle: both ask a thread."""
    ranks = Ranks(world.beside(), [{"generate": EngineLost("it died")}] if world.is_first else [], 2, keeps=True)
    ranks.update(2.0, 1)
    ranks.value = 5.0
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(ranks.said, 2)
        # training goes on: the ranks come to its collectives and to the engine's in another order
        sums = [world.sum([float(i)]) for i in range(50)]
        said = asked.result()
    return [said == expected(world.rank, (2,), 6.0, 1), sums == [[2.0 * i] for i in range(50)], ranks.engine.restarts]


def unstarted(world: World) -> list[Any]:
    """One engine cannot be started, or dies in its start."""
    errors = [EngineError("no memory"), EngineLost("killed")]
    return [raised(lambda: Ranks(world, [{"start": error}] if world.rank else [])) for error in errors]  # noqa: B023


def raised(call: Callable[[], object]) -> list[str]:
    try:
        call()
    except (EngineError, ValueError, Elsewhere) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def rank_main(rank: int, folder: Path) -> None:
    """All scenarios on one of two ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2)
    results = {
        "sharing": sharing(world),
        **{f"lost in {where}": lost(world, where) for where in ("generate", "update", "score")},
        "lost by both": lost(world, "generate", per_engine=2),
        "too often": too_often(world),
        "refused": refused(world, 1),
        "refused both": refused(world, 2),
        "kept": kept(world),
        "unstarted": unstarted(world),
    }
    torch.save(json.dumps(results), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [json.loads(text) for text in results_of_two_ranks(__name__, tmp_path_factory.mktemp("ranks"))]


def test_ranks_share_an_engine(results: list[dict[str, Any]]) -> None:
    """The first runs it, and every rank has the answers to its own prompts."""
    assert [rank["sharing"] for rank in results] == [[True] * 5 + [0]] * 2


@pytest.mark.parametrize("where", ["generate", "update", "score"])
def test_lost_engine_is_replaced(where: str, results: list[dict[str, Any]]) -> None:
    """Twice: the second one is lost while it takes the weights. The other rank's is asked once."""
    assert results[0][f"lost in {where}"] == [True, True, 2, [1]]
    # of three engines; one lost in generate had been asked
    asked = {"generate": [1, 0, 1], "update": [0, 0, 1], "score": [1, 0, 0]}[where]
    assert results[1][f"lost in {where}"] == [True, True, 2, asked]


def test_lost_shared_engine_is_replaced(results: list[dict[str, Any]]) -> None:
    """Both ranks have their answers from the third one."""
    assert [rank["lost by both"] for rank in results] == [[True, True, 2, [1, 0, 1]], [True, True, 2, []]]


def test_lost_engine_is_replaced_beside_training(results: list[dict[str, Any]]) -> None:
    """By the weights that the first rank keeps, and over a group of its own: no call takes the other's answer."""
    assert [rank["kept"] for rank in results] == [[True, True, 1]] * 2


def test_engines_are_not_started_for_ever(results: list[dict[str, Any]]) -> None:
    """The rank whose engine it is says why, the other leaves that to it."""
    why = "dead\nand it is not started again, since engine.restarts=2"
    assert results[1]["too often"] == [["EngineError", why], 2]
    assert results[0]["too often"] == [["Elsewhere", "the engine of another rank was lost"], 2]


@pytest.mark.parametrize("which", ["refused", "refused both"])
def test_other_errors_reach_every_rank(which: str, results: list[dict[str, Any]]) -> None:
    """Nobody waits for a rank that found something wrong."""
    raised_there = sorted(rank[which][0] for rank in results)
    assert raised_there == [["Elsewhere", "the engine of another rank failed"], ["ValueError", "bad tokens"]]


def test_engine_that_cannot_be_started(results: list[dict[str, Any]]) -> None:
    """Its rank says why; nothing is started again before anything was sampled."""
    assert results[1]["unstarted"] == [["EngineError", "no memory"], ["EngineError", "killed"]]
    assert [kind for kind, _ in results[0]["unstarted"]] == ["Elsewhere", "Elsewhere"]


def test_one_process_replaces_its_engine_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a process group; what is announced is one line."""
    ranks = Ranks(World(), [{"generate": EngineLost("it died\nlog")}, {"start": EngineLost("no")}, {}])
    ranks.update(2.0, 1)
    assert ranks.said(2) == expected(0, (2,), 6.0, 1)
    assert ranks.engine.restarts == 2
    assert capsys.readouterr().err.splitlines() == [
        "it died; it is started again (1 of 3)", "no; it is started again (2 of 3)",
    ]  # fmt: skip


@pytest.mark.parametrize("keeps", [False, True])
def test_engine_that_samples_while_the_policy_is_trained_keeps_its_weights(keeps: bool) -> None:
    """Lost in a rollout after the policy has moved, it is given those of the last update if they are kept."""
    ranks = Ranks(World(), [{"generate": EngineLost("it died")}], keeps=keeps)
    ranks.update(2.0, 1)
    ranks.value = 5.0
    assert ranks.said(2) == expected(0, (2,), 6.0 if keeps else 15.0, 1)
    ranks.update(3.0, 2)
    assert ranks.said(1) == expected(0, (1,), 9.0, 2)
