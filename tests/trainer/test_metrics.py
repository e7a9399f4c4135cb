"""Numbers of a step, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from srft import learning
from srft.data.prompts import Prompt
from srft.methods import Figure
from srft.record.metrics import Clock, combined, group_metrics, sample_rows
from srft.responses import Group
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import example, random_groups, sequence


def group(rewards: list[float], demo: float | None = None) -> Group:
    """Rollouts of 1, 2, 3 … tokens after a prompt of two, and a demonstration of four."""
    made = Group(Prompt(example(0), [1, 2], []))
    made.rollouts = [sequence([1, 2], [3] * (i + 1), reward=r) for i, r in enumerate(rewards)]
    if demo is not None:
        made.demos = [sequence([1, 2], [3] * 4, is_demo=True, reward=demo)]
    return made


def test_group_metrics() -> None:
    """All right, all wrong and rescued, all wrong and not, mixed."""
    groups = [group([1, 1], 1), group([0, 0], 1), group([0, 0], 0), group([0, 1], 1)]
    groups[0].rollouts[0].truncated = True
    groups[1].rollouts[0].status = "timeout"
    groups[2].rollouts[1].status = "error"
    groups[2].demos[0].status = "bad_gold"
    assert group_metrics(groups) == pytest.approx(
        {
            "reward/demo": 0.75,
            "reward/mean": 3 / 8,
            "reward/std": (3 / 8 * 5 / 8) ** 0.5,
            "groups/all_right": 0.25,
            "groups/all_wrong": 0.5,
            "groups/rescued_by_demo": 0.25,
            "groups/alike": 0.75,
            "groups/resampled": 0,
            "length/mean": 1.5,
            "length/truncated": 1 / 8,
            "reward/timeouts": 1,
            "reward/errors": 2,
            "reward/unjudged": 0,
            "tokens/step": 4 * (3 + 4 + 6),
            "tokens/sampled": 4 * (1 + 2),
            "tokens/counted": 4 * (1 + 2 + 4),
            "tokens/squared": 4 * (9 + 16 + 36),
        }
    )


def test_what_gave_way_was_sampled_and_not_passed_on() -> None:
    """Rewards, shares and lengths are over everything that was asked; of tokens, those that were sampled."""
    kept, gave_way = [group([1, 0]), group([0.5, 0.25])], [group([1, 1]), group([0, 0])]
    alone, found = group_metrics(kept), group_metrics(kept, gave_way=gave_way)
    assert found["groups/resampled"] == 2 and found["groups/alike"] == 0.5
    assert found["reward/mean"] == pytest.approx(3.75 / 8) and alone["reward/mean"] == pytest.approx(1.75 / 4)
    assert found["tokens/sampled"] == 2 * alone["tokens/sampled"] == 12
    for name in ("tokens/step", "tokens/counted", "tokens/squared"):
        assert found[name] == alone[name]


def test_only_what_exists_is_described() -> None:
    """No rollout entries without rollouts, no demonstration entry without demonstrations."""
    demos_only = group_metrics([group([], 1)])
    counts = {"timeouts", "errors", "unjudged"}
    tokens = {"step", "sampled", "counted", "squared"}
    assert set(demos_only) == {"reward/demo", *(f"reward/{x}" for x in counts), *(f"tokens/{x}" for x in tokens)}
    assert "reward/demo" not in group_metrics([group([1, 0])])


def test_what_was_not_judged_takes_no_part() -> None:
    """It is counted, and no mean, share or group is other than without it."""
    groups = [group([1, 0, 0], 1), group([1], 1), group([0, 0, 1], 1)]
    plain = group_metrics(groups)
    groups[0].rollouts.append(sequence([1, 2], [3] * 2, reward=0.0))
    groups[2].demos.append(sequence([1, 2], [3] * 4, is_demo=True, reward=0.0))
    groups.append(group([0, 0]))
    for unjudged in (groups[0].rollouts[-1], groups[2].demos[-1], *groups[-1].rollouts):
        unjudged.status = "unjudged"
    found = group_metrics(groups)
    assert found["reward/unjudged"] == 4
    for name in plain:
        if name.startswith(("reward/", "groups/")) and name != "reward/unjudged":
            assert found[name] == plain[name], name
    assert "reward/mean" not in group_metrics(groups[-1:])


def test_clock_adds_up_and_survives_errors() -> None:
    """A part that is entered twice is one entry, and a part that fails is still counted."""
    clock = Clock()
    with clock("a"):
        pass
    first = clock.seconds()["time/a"]
    with pytest.raises(RuntimeError), clock("a"):
        raise RuntimeError
    seconds = clock.seconds()
    assert set(seconds) == {"time/a", "time/step"}
    assert seconds["time/step"] >= seconds["time/a"] > first >= 0


def test_sample_rows() -> None:
    """The first groups, three rollouts and every demonstration of each."""
    groups = random_groups(6, rollouts=5, demos=2)
    groups[0].rollouts[0].advantage, groups[0].rollouts[0].entropy = 0.5, 1.25
    groups[0].rollouts[1].status, groups[0].rollouts[1].message = "error", "KeyError: 'value'"
    rows = sample_rows(groups, most=2)
    assert [r["demo"] for r in rows] == [False, False, False, True, True] * 2
    assert {r["id"] for r in rows} == {"t:0", "t:1"}
    first = rows[0]
    assert first["completion"] == groups[0].rollouts[0].text
    assert (first["advantage"], first["entropy"], first["answer"]) == (0.5, 1.25, "7")
    assert [(r["status"], r["message"]) for r in rows[:2]] == [("ok", ""), ("error", "KeyError: 'value'")]


def test_updates_of_a_step_become_one_row() -> None:
    """Means count each token once, a maximum is one, the last learning rate is that of the step."""
    first = {
        "lr": Figure(0.1, "last"), "loss/total": Figure(1.0), "entropy/rollout": Figure(1.0, weight=30),
        "mismatch/max": Figure(0.5, "max"), "weight/sft": Figure(0.0, weight=0),
    }  # fmt: skip
    second = {
        "lr": Figure(0.2, "last"), "loss/total": Figure(2.0), "entropy/rollout": Figure(2.0, weight=10),
        "mismatch/max": Figure(0.125, "max"), "weight/sft": Figure(3.0, weight=7),
        "entropy/demo": Figure(4.0, weight=7),
    }  # fmt: skip
    assert combined([first, second]) == {
        "lr": 0.2, "loss/total": 1.5, "entropy/rollout": 1.25, "mismatch/max": 0.5, "weight/sft": 3.0,
        "entropy/demo": 4.0,
    }  # fmt: skip
    assert combined([second, first])["mismatch/max"] == 0.5
    assert combined([{"weight/rl": Figure(0.0, weight=0)}] * 2) == {"weight/rl": 0.0}
    assert combined([]) == {}


@pytest.mark.parametrize("by", ["max", "mean"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_number_that_is_not_finite_stays_visible(place: int, by: Any) -> None:
    """NaN in one of two updates is NaN in the row, in whatever order they come."""
    figures = [{"x": Figure(1.0, by)}, {"x": Figure(1.0, by)}]
    figures[place] = {"x": Figure(math.nan, by)}
    assert math.isnan(combined(figures)["x"])


def test_a_run_combines_its_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several updates a step, the row has the largest mismatch and the mean entropy of all tokens."""
    made: list[dict[str, Figure]] = []

    def noting(*args: Any) -> dict[str, Figure]:
        made.append(update(*args))
        return made[-1]

    update = learning.update
    monkeypatch.setattr(learning, "update", noting)
    run = train(tmp_path, train__steps=1, train__updates_per_step=4)
    row = read_lines(run / "metrics.jsonl")[1]
    gaps = [figures["mismatch/max"].value for figures in made]
    assert len(set(gaps)) > 1
    assert row["mismatch/max"] == max(gaps)
    tokens = [figures["entropy/rollout"].weight for figures in made]
    assert len(set(tokens)) > 1 and sum(tokens) == row["length/mean"] * 12
    mean = sum(figures["entropy/rollout"].value * n for figures, n in zip(made, tokens, strict=True)) / sum(tokens)
    assert row["entropy/rollout"] == pytest.approx(mean, rel=1e-12)
