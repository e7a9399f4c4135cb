"""What became of each problem: which were won, by what, and which forgotten."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.figure import Figure

from srft.analysis.pictures import Picture, axes, draw_stack
from srft.analysis.stories import Counts, Story
from srft.report.drawing import AMBER, BLUE, GREEN, GREY, GRID, VERMILLION

Fate = Literal["kept", "won", "forgotten", "never"]
Lesson = Literal["known", "by demonstration", "otherwise", "forgotten", "never"]

_FATES: dict[str, tuple[str, str]] = {
    "kept": ("right all along", GREY), "won": ("won", BLUE), "forgotten": ("forgotten", VERMILLION),
    "never": ("never right", GRID),
}  # fmt: skip
_LESSONS: dict[str, tuple[str, str]] = {
    "known": ("right when first seen", GREY), "by demonstration": ("won after its demonstration", VERMILLION),
    "otherwise": ("won without one", GREEN), "forgotten": ("forgotten", AMBER), "never": ("never right", GRID),
}  # fmt: skip


def is_right(count: Sequence[int]) -> bool:
    """Return whether half of the judged answers to a problem were right.

    Args:
        count: Right answers, judged answers, and perhaps more.
    """
    return 2 * count[0] >= count[1] > 0


def fates(held_out: Mapping[int, Counts]) -> dict[int, dict[str, Fate]]:
    """Tell of each evaluation what had become of each held-out problem.

    Args:
        held_out: Counts by step, in order. A problem that was not judged at a step is taken as it was before.

    Returns:
        By step and id: "kept", right now and when first asked; "won", right now and wrong when first asked;
        "forgotten", wrong now and right at some evaluation before; "never", right at none so far.
    """
    first: dict[str, bool] = {}
    ever: dict[str, bool] = {}
    now: dict[str, bool] = {}
    told: dict[int, dict[str, Fate]] = {}
    for step, counts in held_out.items():
        for name, count in counts.items():
            if count[1]:
                now[name] = is_right(count)
                first.setdefault(name, now[name])
                ever[name] = ever.get(name, False) or now[name]
        told[step] = {
            name: ("kept" if first[name] else "won") if right else "forgotten" if ever[name] else "never"
            for name, right in now.items()
        }
    return told


@dataclass
class _Pupil:
    """A problem that is trained on, as its visits tell."""

    visits: int = 0
    first: bool = False
    ever: bool = False
    now: bool = False
    # before the first right rollout a right demonstration of it was learned from
    shown: bool = False

    def visit(self, count: Sequence[int]) -> None:
        """Note how its rollouts did before the step learned from them and from its demonstration."""
        self.now = count[0] > 0
        self.first = self.first or (self.now and not self.visits)
        self.ever = self.ever or self.now
        self.shown = self.shown or (not self.ever and len(count) > 2 and count[2] > 0)
        self.visits += 1

    @property
    def lesson(self) -> Lesson:
        """What became of it so far."""
        if not self.now:
            return "forgotten" if self.ever else "never"
        return "known" if self.first else "by demonstration" if self.shown else "otherwise"


def lessons(training: Mapping[int, Counts]) -> dict[int, dict[str, Lesson]]:
    """Tell of each step what had become of the problems that were trained on twice or more, by their last visit.

    A visit counts as right when any rollout was.

    Args:
        training: Counts by step, in order.

    Returns:
        By step and id: "known", right now and at the first visit; "by demonstration", right now, wrong until a right
        demonstration of it was learned from; "otherwise", right now, wrong at first, without such a demonstration;
        "forgotten", wrong now and right before; "never", wrong at every visit.
    """
    pupils: dict[str, _Pupil] = {}
    seen_again: set[str] = set()
    told: dict[int, dict[str, Lesson]] = {}
    for step, counts in training.items():
        for name, count in counts.items():
            if count[1]:
                pupil = pupils.setdefault(name, _Pupil())
                pupil.visit(count)
                if pupil.visits > 1:
                    seen_again.add(name)
        told[step] = {name: pupils[name].lesson for name in seen_again}
    return told


def draw_fates(story: Story) -> Picture | None:
    """Draw what became of held-out problems over the evaluations.

    Args:
        story: With the counts of two evaluations, else there is nothing to draw.
    """
    told = fates(story.held_out)
    if len(told) < 2:
        return None
    return Picture(
        "held_out_problems", "Held-out problems, won and forgotten",
        "Won: right now, wrong at the first evaluation. Forgotten: wrong now, right at one before.",
        _stacked(told, _FATES, "held-out problems"),
    )  # fmt: skip


def draw_lessons(story: Story) -> Picture | None:
    """Draw what became of the problems that were trained on more than once.

    Args:
        story: With the counts of such problems, else there is nothing to draw.
    """
    told = {step: names for step, names in lessons(story.training).items() if names}
    if len(told) < 2:
        return None
    return Picture(
        "training_problems", "Training problems, by what won them",
        "Problems visited at least twice, as their last visit found them before it taught. Won after its "
        "demonstration: no rollout was right until a right demonstration of the problem had been learned from. What "
        "other problems taught counts too; a run without demonstrations says how much that is.",
        _stacked(told, _LESSONS, "problems seen again"),
    )  # fmt: skip


def _stacked(
    told: Mapping[int, Mapping[str, str]], kinds: Mapping[str, tuple[str, str]], ylabel: str
) -> Figure:
    counts = {step: Counter(names.values()) for step, names in told.items()}
    figure, ax = axes()
    heights = {
        label: ([float(counts[step][kind]) for step in counts], color) for kind, (label, color) in kinds.items()
    }
    draw_stack(ax, list(counts), heights, ylabel)
    return figure


def history(held_out: Mapping[int, Counts], name: str) -> str:
    """Return a mark for each evaluation: a full circle where a problem was right, a hollow one where it was wrong.

    Args:
        held_out: Counts by step, in order.
        name: The problem's id; a dot stands where it was not judged.
    """
    found = [counts.get(name) for counts in held_out.values()]
    return "".join("·" if not count or not count[1] else "●" if is_right(count) else "○" for count in found)


def ends(story: Story) -> dict[str, bool]:
    """Return whether each held-out problem was right when it was last judged.

    Args:
        story: Empty where it has no counts.
    """
    now: dict[str, bool] = {}
    for counts in story.held_out.values():
        now |= {name: is_right(count) for name, count in counts.items() if count[1]}
    return now


def shared(first: Story, other: Story) -> dict[str, list[str]] | None:
    """Compare the last answers of two runs to the same held-out problems.

    Args:
        first: A run.
        other: Another.

    Returns:
        Ids by "both", "first", "other" and "neither", those that had them right; None where the runs were not asked
        the same problems, or did not record them.
    """
    one, two = ends(first), ends(other)
    if not one or one.keys() != two.keys() or _held_out_of(first) != _held_out_of(other):
        return None
    names: dict[str, list[str]] = {"both": [], "first": [], "other": [], "neither": []}
    for name, right in one.items():
        names["both" if right and two[name] else "first" if right else "other" if two[name] else "neither"].append(name)
    return names


def _held_out_of(story: Story) -> dict[str, object]:
    """Where the held-out problems come from, so that equal ids are equal problems."""
    data = tomllib.loads(story.last.config_text).get("data", {})
    return {key: data.get(key) for key in ("train", "eval", "eval_split", "task", "columns")}
