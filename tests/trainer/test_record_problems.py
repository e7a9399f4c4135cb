"""Which problems were right, as a run records it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from srft.record.problems import Verdicts, trained_on
from srft.responses import Group
from srft.rewards.pool import RewardResult
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import FakePool, example, random_groups


class TwoRanks:
    """A world whose other rank has the same to tell."""

    def gather(self, value: object) -> list[object]:
        return [value, value]


def test_a_run_records_what_its_rates_are_made_of(tmp_path: Path) -> None:
    """By step and kind, the problems' counts are those behind accuracy and mean reward."""
    run = train(tmp_path, train__steps=3, train__eval_every=2)
    rows = {row["step"]: row for row in read_lines(run / "metrics.jsonl")}
    lines = read_lines(run / "problems.jsonl")
    assert [(x["step"], x["of"]) for x in lines] == [
        (0, "held-out"), (1, "training"), (2, "training"), (2, "held-out"), (3, "training"), (3, "held-out"),
    ]  # fmt: skip
    for line in lines:
        counts, row = list(line["problems"].values()), rows[line["step"]]
        right, judged = (sum(count[i] for count in counts) for i in (0, 1))
        if line["of"] == "held-out":
            assert len(counts) == 8 and right / judged == row["eval/accuracy"]
            continue
        assert len(counts) == 4 and judged == 12 and right / judged == pytest.approx(row["reward/mean"])
        assert sum(c[2] for c in counts) == 4 * row["reward/demo"] and all(c[3] == 1 for c in counts)


def test_problems_are_told_apart_by_their_rows() -> None:
    """Equal rows, several answers to a problem, an answer nobody judged, and a stranger."""
    examples = [replace(example(i), row={"x": 1}) for i in range(3)]

    class Pool(FakePool):
        def score(self, items: list) -> list[RewardResult]:
            graded = zip(items, super().score(items), strict=True)
            return [replace(r, status="unjudged") if text == "?" else r for (text, _, _), r in graded]

    verdicts = Verdicts(Pool(), examples)
    answers = [(examples[0], "7"), (examples[0], "8"), (examples[1], "?"), (examples[2], "slow"), (example(3), "7")]
    results = verdicts.score([(text, e.answer, e.row) for e, text in answers])
    assert [r.value for r in results] == [1.0, 0.0, 0.0, 0.0, 1.0] and results[3].status == "timeout"
    assert verdicts.counts() == {"t:0": [1, 2], "t:2": [0, 1]}
    assert verdicts.counts(TwoRanks()) == {"t:0": [2, 4], "t:2": [0, 2]}


def test_a_problem_that_a_step_has_twice_counts_together() -> None:
    """Groups without rollouts are none; of two ranks both count."""
    first, second = random_groups(2, rollouts=2)
    first.rollouts[0].reward = 1.0
    second.rollouts[0].status = "unjudged"
    right = sum(s.is_correct for s in second.rollouts[1:])
    alone = Group(second.prompt, demos=second.demos)
    assert trained_on([first, first, second, alone]) == {"t:0": [2, 4, 2, 2], "t:1": [right, 1, 1, 1]}
    assert trained_on([first], TwoRanks()) == {"t:0": [2, 4, 2, 2]}
