"""Accuracy and its interval."""

from __future__ import annotations

import pytest

from srft.data.prompts import Prompt
from srft.engine.base import Completion, Sampling
from srft.evaluate import evaluate, wilson_interval
from srft.rollout import Actor
from tests.trainer.tiny import FakeEngine, FakePool, example


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
