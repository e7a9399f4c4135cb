"""Accuracy and its interval, and the loss of demonstrations."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srft.data.prompts import Prompt
from srft.engine.base import Completion, Ended, Sampling
from srft.evaluation.held_out import demo_loss, evaluate, wilson_interval
from srft.rollout import Actor
from tests.trainer.plain_step import statistics_of
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import (
    FakeEngine,
    FakePool,
    example,
    learner_of,
    plain_model,
    policy,
    random_groups,
    sequence,
    tiny_config,
)


class Words:
    """A tokenizer of four words whose token 0 is special."""

    words = ["", "7", "8", "slow"]
    all_special_ids = [0]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.25527, 0.36621),
        (1, 29, 0.00612, 0.17176),
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    """The last two are examples of Newcombe (1998), Table I, to four places."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_holds_the_share_and_narrows() -> None:
    """More trials at the same share are a narrower interval around it."""
    widths = []
    for trials in (10, 100, 1000):
        low, high = wilson_interval(trials // 5, trials)
        assert low < 0.2 < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_evaluate_counts() -> None:
    """Two of five right, one cut, one timed out; greedy, one completion a problem."""
    answers = {
        (1,): Completion([1, 0], [0, 0], "stop", 0),
        (2,): Completion([2, 0], [0, 0], "stop", 0),
        (3,): Completion([1, 0], [0, 0], "stop", 0),
        (4,): Completion([3, 0], [0, 0], "stop", 0),
        (5,): Completion([2, 2], [0, 0], "length", 0),
    }
    engine = FakeEngine(answers)
    prompts = [Prompt(example(i), [i], []) for i in range(1, 6)]
    found = evaluate(Actor(engine, Sampling(0.9, 2, (0,)), Words(), FakePool()), prompts)
    low, high = wilson_interval(2, 5)
    assert found == {
        "eval/accuracy": 0.4,
        "eval/ci_low": low,
        "eval/ci_high": high,
        "eval/truncated": 0.2,
        "eval/timeouts": 0.2,
    }
    ((sampling, seeds),) = engine.asked
    assert sampling == Sampling(0.0, 2, (0,))
    assert [len(s) for s in seeds] == [1] * 5


class Seeded(FakeEngine):
    """Answers "7" or "8" as the seed decides, and everything to a prompt of 9 with "7"."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        self.asked.append((sampling, seeds))
        return [
            [Completion([1 if p == [9] or seed % 2 else 2, 0], [0, 0], "stop", 0) for seed in row]
            for p, row in zip(prompts, seeds, strict=True)
        ]


def test_several_answers_are_averaged() -> None:
    """avg@n and pass@n of samples at their temperature, from the seed alone, under the names that are asked for."""
    prompts = [Prompt(example(i), [i], []) for i in range(4, 10)]
    engine = Seeded({})
    actor = Actor(engine, Sampling(1.0, 2, (0,)), Words(), FakePool())
    found = evaluate(actor, prompts, samples=3, temperature=0.7, seed=5, prefix="eval/own")
    assert found == evaluate(actor, prompts, samples=3, temperature=0.7, seed=5, prefix="eval/own")
    sampling, seeds = engine.asked[0]
    assert sampling.temperature == 0.7 and {len(row) for row in seeds} == {3}
    right = [[p == prompts[-1] or seed % 2 for seed in row] for p, row in zip(prompts, seeds, strict=True)]
    assert found["eval/own/accuracy"] == pytest.approx(sum(map(sum, right)) / 18)
    assert found["eval/own/pass@3"] == pytest.approx(sum(map(any, right)) / 6)
    assert found["eval/own/ci_low"] < found["eval/own/accuracy"] < found["eval/own/ci_high"]
    assert evaluate(actor, prompts, samples=3, seed=6)["eval/truncated"] == 0.0
    assert engine.asked[-1][1] != seeds


def test_a_run_evaluates_further_sets(tmp_path: Path) -> None:
    """Several answers to its own problems, and to those of a file and of a task, each under its name."""
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 9)
    long = tmp_path / "long.jsonl"
    long.write_text(f'{{"prompt": "{"1" * 40}", "answer": "2"}}\n')
    changes = {"train__eval_samples": 2, "train__steps": 1, "train__page": False, "data__eval_limit": 6}
    run = train(tmp_path, data__eval_sets=f'["{file}", "sums"]', **changes)
    rows = read_lines(run / "metrics.jsonl")
    figures = {"accuracy", "ci_low", "ci_high", "pass@2", "truncated", "timeouts"}
    for row in rows:
        assert {f"eval/{name}{figure}" for name in ("", "own/", "sums/") for figure in figures} <= row.keys()
    for words, message in (
        ({"data__eval_sets": "math50"}, "did you mean 'math500'"),
        ({"data__eval_sets": f'["{file}", "{file}"]'}, "two sets of the name own"),
        ({"data__eval_sets": str(long)}, "longest prompt of long has 40 tokens; set data.max_prompt_tokens to that"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, **(changes | words))


@pytest.mark.parametrize("budget", [20, 1000])
def test_loss_of_demonstrations_is_a_mean_over_tokens(budget: int) -> None:
    """Of the first of each problem that has some, against plain float64, at the temperature of rollouts."""
    model, groups = plain_model(), random_groups(6, demos=2)
    prompts = [replace(g.prompt, demo_ids=[d.response_ids for d in g.demos]) for g in groups]
    prompts = [replace(p, example=replace(p.example, demos=["one", "two"])) for p in prompts]
    prompts[2] = replace(prompts[2], demo_ids=[])
    plain, shown = copy.deepcopy(model).double(), [p for p in prompts if p.demo_ids]
    with torch.no_grad():
        expected = [statistics_of(plain, sequence(p.prompt_ids, p.demo_ids[0]), 0.7)[0] for p in shown]
    trained = policy(model)
    config = tiny_config("rollout.temperature=0.7", f"train.tokens_per_microbatch={budget}")
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=1.0))
    assert demo_loss(learner, prompts) == {"eval/demo_loss": pytest.approx(-torch.cat(expected).mean().item())}
    assert demo_loss(learner, prompts[2:3]) == {}
    assert all(p.grad is None for p in trained.parameters())
