"""Answers that are judged while others are sampled: the same grades, sooner; whatever ends a batch, or the run."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srft.engine.base import Ended, EngineLost, Sampling
from srft.engine.hf import HfEngine
from srft.engine.shared import SharedEngine
from srft.policy.parallel import ALONE
from srft.rewards.pool import RewardPool
from srft.rollout import Actor
from tests.trainer.runs import assert_same_run, train
from tests.trainer.test_hf_engine import PROMPTS, STOPS, engine_of
from tests.trainer.test_replay import options, rows_of
from tests.trainer.tiny import plain_model

VERIFIERS = """
import os, time

def length(completion, answer, row):
    if row.get("mark"):
        open(row["mark"], "w").close()
    if completion == "sleep":
        time.sleep(60)
    if completion == "exit":
        os._exit(3)
    return float(len(completion)) + answer

def broken(completion, answer, row):
    raise TypeError("oh")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "verifiers.py"
    path.write_text(VERIFIERS)
    return path


def items(texts: list[str]) -> list[tuple[str, Any, dict[str, Any]]]:
    return [(text, number / 100, {"row": number}) for number, text in enumerate(texts)]


def test_grades_are_those_of_all_at_once(file: Path) -> None:
    """Begun from several threads in another order, twice, not at all or in vain; with items that hang and die."""
    every = items(["a", "bb", "sleep", "ccc", "exit", "dddd", "", "e"])
    twice = [*every, every[1], every[1]]
    with RewardPool(f"{file}:length", 2, 0.5) as pool:
        expected = pool.score(twice)
        counts = pool.counts.copy()
        for _ in range(2):
            threads = [
                threading.Thread(target=pool.begin, args=(item,))
                for item in [*every[5:0:-1], every[1], items(["z"])[0]]
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            pool.counts.clear()
            assert pool.score(twice) == expected
            assert pool.counts == counts
        assert pool.score(twice) == expected
    assert [result.status for result in expected].count("timeout") == 1


def test_answers_are_graded_before_the_others_are_there(file: Path, tmp_path: Path) -> None:
    """Each by a worker that is free, also one that comes while the workers are at others."""
    marks = [tmp_path / str(i) for i in range(3)]
    every = [("sleep", 0, {}), *[("a", 0, {"mark": str(mark)}) for mark in marks]]
    with RewardPool(f"{file}:length", 2, 10.0) as pool:
        pool.prewarm()
        for item in every:
            pool.begin(item)
            if item[2]:
                until = time.monotonic() + 30
                while not Path(item[2]["mark"]).exists() and time.monotonic() < until:
                    time.sleep(0.01)
        assert all(mark.exists() for mark in marks)
        start = time.monotonic()
    assert time.monotonic() - start < 5, "the pool waited for an item when it was closed"


def test_what_ends_a_batch_is_raised_where_the_grades_are_asked_for(file: Path, tmp_path: Path) -> None:
    """A verifier that cannot be loaded, or fails on all; the pool of the second goes on."""
    with RewardPool(f"{file}:length", 1, 5.0) as pool:
        file.write_text("def length(completion, answer, row):\n    return 1 +\n")
        pool.begin(items(["a"])[0])
        with pytest.raises(ValueError, match="cannot be loaded"):
            pool.score(items(["a"]))
    file.write_text(VERIFIERS)
    with RewardPool(f"{file}:broken", 1, 5.0) as pool:
        for _ in range(2):
            every = items(["a", "b"])
            pool.begin(every[0])
            with pytest.raises(ValueError, match="failed on all of the first 2 items.*TypeError: oh"):
                pool.score(every)
    pool.begin(every[0])
    with pytest.raises(ValueError, match="closed"):
        pool.score(every)


def noted(told: list[tuple[int, int, list[int]]]) -> Ended:
    return lambda p, k, ids: told.append((p, k, ids))


def test_hf_engine_tells_of_what_stops_before_the_last(seed: int) -> None:
    """Once each, by its place, with its tokens, in the order in which they end; across batches."""
    sampling, seeds = Sampling(1.0, 12, STOPS), [[10 * p + k for k in range(5)] for p in range(len(PROMPTS))]
    for most in (64, 7):
        told: list[tuple[int, int, list[int]]] = []
        engine = engine_of(plain_model(), max_batch=most)
        drawn = engine.generate(PROMPTS, sampling, seeds, noted(told))
        assert drawn == engine.generate(PROMPTS, sampling, seeds)
        stopped = {(p, k): c for p, row in enumerate(drawn) for k, c in enumerate(row) if c.finish == "stop"}
        assert len(told) == len(stopped) > 5
        assert all(stopped[p, k].token_ids == ids for p, k, ids in told)
        lengths = [len(ids) for _, _, ids in told]
        assert lengths == sorted(lengths) or most < 20


def test_an_engine_that_is_lost_tells_again(seed: int) -> None:
    """What is returned counts; the judge finds its grades by the text."""

    class Fragile(HfEngine):
        def generate(self, *args: Any) -> Any:
            drawn = super().generate(*args)
            if len(started) == 1:
                raise EngineLost("it died")
            return drawn

    started: list[HfEngine] = []

    def start() -> HfEngine:
        started.append(Fragile(plain_model(), dtype=torch.float32, pad_token_id=0, max_batch=64))
        return started[-1]

    told: list[tuple[int, int, list[int]]] = []
    shared = SharedEngine(start, lambda: plain_model().named_parameters(), ALONE, 1, 1)
    drawn = shared.generate(PROMPTS, Sampling(1.0, 12, STOPS), [[1], [2], [3], [4]], noted(told))
    stopped = [(p, 0, c.token_ids) for p, (c,) in enumerate(drawn) if c.finish == "stop"]
    assert len(started) == 2 and stopped and sorted(told) == sorted(stopped * 2)


@pytest.mark.parametrize("changes", [{"method__name": "dapo"}, {"rollout__max_lag": 1}], ids=["dapo", "lag"])
def test_a_run_has_the_same_rows(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that asks for all grades at once, where prompts give way and in a thread beside training, too."""
    begun: list[str] = []
    begin = RewardPool.begin

    def counting(self: RewardPool, item: Any) -> None:
        begun.append(item[0])
        begin(self, item)

    monkeypatch.setattr(RewardPool, "begin", counting)
    run = options(tmp_path / "run", train__record_rollouts=True) | changes
    early = train(tmp_path / "early", **run)
    assert len(begun) > 3
    monkeypatch.setattr("srft.prepare.Actor", lambda *fields: replace(Actor(*fields), begin=None))
    late = train(tmp_path / "late", **run)
    assert_same_run(early, late)
    assert rows_of(early) == rows_of(late)
