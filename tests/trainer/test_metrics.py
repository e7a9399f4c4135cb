"""Numbers of a step, by hand."""

from __future__ import annotations

import pytest

from srft.batch import Group
from srft.data import Prompt
from srft.metrics import Clock, group_metrics, mean_metrics, sample_rows
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
            "length/mean": 1.5,
            "length/truncated": 1 / 8,
            "reward/timeouts": 1,
            "reward/errors": 2,
            "reward/unjudged": 0,
            "tokens/step": 4 * (3 + 4 + 6),
        }
    )


def test_only_what_exists_is_described() -> None:
    """No rollout entries without rollouts, no demonstration entry without demonstrations."""
    demos_only = group_metrics([group([], 1)])
    counts = {"reward/timeouts", "reward/errors", "reward/unjudged", "tokens/step"}
    assert set(demos_only) == {"reward/demo", *counts}
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


def test_mean_metrics_are_over_the_updates_that_have_them() -> None:
    """An update without rollouts has no rollout metrics, and a step may have no update at all."""
    assert mean_metrics([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}
    assert mean_metrics([]) == {}


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
