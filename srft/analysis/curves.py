"""Curves of runs: what of a run the analyses look at, and several runs in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srft.analysis.pictures import WIDTH, Picture, axes
from srft.analysis.problems import shared
from srft.analysis.stories import Story
from srft.record.history import first_best_last, interval, percent, points
from srft.record.text import format_count
from srft.report.drawing import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    GRID,
    INK,
    MUTED,
    PURPLE,
    VERMILLION,
    count_steps,
    draw_curve,
    label_ends,
)
from srft.report.plots import panels

_OF_A_RUN = ("entropy", "weights", "demo_share", "grad_terms", "cosine", "logprobs")
_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, AMBER, GREY)
MOST = 2 * len(_COLORS)
"""Most runs that one figure can tell apart."""
# held-out accuracy and its entropy have a figure of their own
_TOGETHER = (
    ("reward/mean", "reward", "Training reward", "mean reward of rollouts"),
    ("entropy/demo", "entropy_demo", "Entropy on demonstrations", "nats per token"),
    ("length/mean", "length", "Completion length", "tokens"),
    ("grad/cosine", "cosine_runs", "SFT against RL", "cosine of gradients"),
    ("weight/sft", "weight_sft", "SFT weight", "mean weight of a token"),
    ("weight/rl", "weight_rl", "RL weight", "mean weight of a token"),
)


def draw_run(story: Story) -> list[Picture]:
    """Draw entropy by source, the weights of the losses, gradients by term and their cosine, of what was recorded.

    Args:
        story: One run.
    """
    pictures = []
    for panel in panels(story.last.curves):
        if panel.name in _OF_A_RUN and any(points(story.rows, key)[0].size for key in panel.keys):
            figure, ax = axes()
            panel.draw(ax, story.rows)
            pictures.append(Picture(panel.name, panel.title, panel.caption, figure))
    return sorted(pictures, key=lambda picture: _OF_A_RUN.index(picture.name))


def draw_together(stories: Sequence[Story]) -> list[Picture]:
    """Draw several runs into the same axes: accuracy above entropy, and whatever else two of them recorded.

    Args:
        stories: ``MOST`` at most; of a single one, runs that follow each other, all that was recorded is drawn.
    """
    # labels stand beside the axes
    more = 0.09 * max(0, max(len(story.label) for story in stories) - 12)
    figure = Figure(figsize=(7.0 + more, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for ax, key, title, ylabel in (
        (above, "eval/accuracy", "Held-out accuracy", "accuracy"),
        (below, "entropy/rollout", "Entropy of rollouts", "nats per token"),
    ):
        ax.set_title(title)
        _draw_each(ax, stories, key, ylabel)
    above.set_xlabel("")
    switches = "A dotted line is where a run goes on from the one before. " if any(s.begins for s in stories) else ""
    caption = f"{switches}Shaded: 95 % intervals of an accuracy over the problems of one evaluation."
    pictures = [Picture("together", "Accuracy and entropy", caption, figure)]
    for key, name, title, ylabel in _TOGETHER:
        if sum(bool(points(story.rows, key)[0].size) for story in stories) >= min(2, len(stories)):
            figure, ax = axes(WIDTH + more)
            _draw_each(ax, stories, key, ylabel)
            pictures.append(Picture(name, title, "", figure))
    return pictures


def look(place: int) -> tuple[str, bool]:
    """Return the colour of a run, and whether its curves are dashed.

    Args:
        place: Of the run among those shown, from 0 to ``MOST`` - 1.
    """
    return _COLORS[place % len(_COLORS)], place >= len(_COLORS)


def _draw_each(ax: Axes, stories: Sequence[Story], key: str, ylabel: str) -> None:
    """Draw a metric of every run, and name each at the right."""
    ends = []
    for place, story in enumerate(stories):
        color, dashed = look(place)
        if key == "eval/accuracy":
            end = _draw_accuracy(ax, story, color, dashed)
        else:
            # a mean over neighbouring steps must not look over from one run into the next
            drawn = [draw_curve(ax, rows, key, color, dashed=dashed) for rows in _parts(story)]
            end = next((height for height in reversed(drawn) if height is not None), None)
        if end is not None:
            ends.append((end, story.label, color))
            _mark(ax, story.begins, color)
    low, high = ax.get_ylim()
    if key == "eval/accuracy":
        ax.set_ylim(max(0.0, low), min(1.0, high))
    elif low < 0 < high:
        ax.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    elif low >= 0:
        ax.set_ylim(bottom=0)
    ax.set_ylabel(ylabel)
    count_steps(ax, min(s.rows[0]["step"] for s in stories), max(s.rows[-1]["step"] for s in stories))
    label_ends(ax, ends)


def _draw_accuracy(ax: Axes, story: Story, color: str, dashed: bool) -> float | None:
    steps, values = points(story.rows, "eval/accuracy")
    if not steps.size:
        return None
    ax.plot(steps, values, "o", color=color, markersize=3.5, linestyle=(0, (4, 1.5)) if dashed else "-")
    keys = ("step", "eval/ci_low", "eval/ci_high")
    bounds = [[row[k] for k in keys] for row in story.rows if all(row.get(k) is not None for k in keys)]
    if bounds:
        at, low, high = zip(*bounds, strict=True)
        ax.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
    return float(values[-1])


def _parts(story: Story) -> list[list[dict[str, Any]]]:
    """The rows of each of its runs."""
    bounds = [-1, *story.begins, story.rows[-1]["step"]]
    return [
        [row for row in story.rows if first < row["step"] <= last]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _mark(ax: Axes, begins: Sequence[int], color: str) -> None:
    for step in begins:
        ax.axvline(step, color=color, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)


def table(stories: Sequence[Story]) -> tuple[list[str], list[list[str]]]:
    """Return (heading, a row for each run): accuracies, entropies, and what it sampled and trained on.

    Args:
        stories: Any number.
    """
    heading = [
        "run", "steps", "first accuracy", "best", "last", "95 % interval", "entropy, first", "last", "tokens sampled",
        "trained on",
    ]  # fmt: skip
    return heading, [_row(story) for story in stories]


def _row(story: Story) -> list[str]:
    scored = first_best_last(story.rows)
    accuracy = ["", "", "", ""]
    if scored is not None:
        first, best, last = scored
        accuracy = [percent(first), f"{percent(best)} at {best['step']}", percent(last), interval(last)]
    entropies = points(story.rows, "entropy/rollout")[1]
    few = max(1, min(5, len(entropies) // 2))
    entropy = [f"{entropies[:few].mean():.3f}", f"{entropies[-few:].mean():.3f}"] if len(entropies) else ["", ""]
    spent = [format_count(points(story.rows, key)[1].sum()) for key in ("tokens/sampled", "tokens/trained")]
    return [story.label, str(story.rows[-1]["step"]), *accuracy, *entropy, *spent]


def draw_shared(stories: Sequence[Story]) -> Picture | None:
    """Draw which held-out problems the runs have right at their ends, each beside the first.

    Args:
        stories: Two at least.
    """
    pairs = [(other.label, names) for other in stories[1:] if (names := shared(stories[0], other))]
    if not pairs:
        return None
    first = stories[0].label
    figure, ax = axes(7.4, 1.6 + 0.45 * len(pairs))
    parts = (
        ("both", "both right", GREY), ("first", f"{first} alone", BLUE), ("other", "the other alone", VERMILLION),
        ("neither", "neither", GRID),
    )  # fmt: skip
    for row, (_, names) in enumerate(pairs):
        left = 0
        for kind, label, color in parts:
            width = len(names[kind])
            ax.barh(row, width, left=left, color=color, height=0.62, label=label if row == 0 else None)
            if width >= 0.03 * sum(map(len, names.values())):
                light = color in (GRID, GREY)
                ax.text(left + width / 2, row, str(width), ha="center", va="center", color=INK if light else "white")
            left += width
    ax.set_yticks(range(len(pairs)), [label for label, _ in pairs])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set_xlim(0, None)
    ax.set_xlabel("held-out problems")
    ax.grid(visible=False)
    figure.legend(loc="outside lower left", ncols=4, handlelength=0.9, labelcolor=INK, columnspacing=1.2)
    return Picture(
        "shared_problems", f"Who has which problem right, beside {first}",
        "By the last evaluation. What one run has right alone is what its method won, and what its luck did.", figure,
    )  # fmt: skip
