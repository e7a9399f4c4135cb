"""Where checkpoints lie: the cross-entropy of each to the responses of several reference models (SRFT paper, Fig. 3).

The distance of a model M to a reference R is d_R(M) = -(1 / sum T) sum over R's responses and their tokens of
log p_M(token). Of R to its own responses it is an estimate of R's entropy, the least that a model can have on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from srft.analysis.curves import look
from srft.analysis.pictures import Picture
from srft.analysis.policies import Policy, Score, score
from srft.report.drawing import INK, count_steps, label_ends
from srft.responses import Response


@dataclass(frozen=True)
class Point:
    """A model on the map.

    Args:
        run: Label of the run that it is of.
        step: After which it stands; 0 for the start.
        distances: By label of the reference, nats per token.
    """

    run: str
    step: int
    distances: dict[str, float]


def distance(scores: Sequence[Score]) -> float:
    """Return the cross-entropy to the responses of a reference, nats per token.

    Args:
        scores: What the model makes of each of them; one token at least.
    """
    return -float(np.concatenate([each.logprobs for each in scores]).mean())


def locate(policy: Policy, run: str, step: int, references: Mapping[str, Sequence[Response]]) -> Point:
    """Find a model's place.

    Args:
        policy: The model.
        run: Label of its run.
        step: Its step.
        references: Responses by the reference's label.
    """
    return Point(run, step, {label: distance(score(policy, responses)) for label, responses in references.items()})


def draw_map(points: Sequence[Point]) -> list[Picture]:
    """Draw the way of each run between the references, and its distance to each over the steps.

    Args:
        points: Of each run in order of step; all have the same references, one at least.
    """
    labels = list(points[0].distances)
    runs = {run: [point for point in points if point.run == run] for run in dict.fromkeys(p.run for p in points)}
    pictures = []
    if len(labels) > 1:
        others = labels[1:]
        figure = Figure(figsize=(max(5.6, 4.6 * len(others)), 4.2), layout="constrained")
        panels = figure.subplots(1, len(others), sharex=True, squeeze=False)[0]
        for ax, other in zip(panels, others, strict=True):
            _draw_ways(ax, runs, labels[0], other)
        if len(runs) > 1:
            panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK, handlelength=1.2)
        caption = (
            "Cross-entropy to the responses of two references: a star is where a run starts, a dot where it ends, and "
            "nearer to a corner's reference is lower."
        )
        pictures.append(Picture("map", "Where the checkpoints lie", caption, figure))
    figure = Figure(figsize=(max(5.6, 4.2 * len(labels)), 3.2), layout="constrained")
    for ax, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        ends = []
        for place, (run, own) in enumerate(runs.items()):
            color, dashed = look(place)
            values = [point.distances[label] for point in own]
            ax.plot([p.step for p in own], values, "o", color=color, markersize=4, linestyle="--" if dashed else "-")
            ends.append((values[-1], run if len(runs) > 1 else "", color))
        ax.set_title(f"to {label}")
        count_steps(ax, 0, max(point.step for point in points))
        label_ends(ax, ends)
    figure.axes[0].set_ylabel("cross-entropy (nats per token)")
    pictures.append(Picture("distances", "Distance to each reference", "Over the steps of training.", figure))
    return pictures


def _draw_ways(ax: Axes, runs: Mapping[str, Sequence[Point]], across: str, up: str) -> None:
    for place, (run, own) in enumerate(runs.items()):
        color, dashed = look(place)
        x, y = ([point.distances[label] for point in own] for label in (across, up))
        ax.plot(x, y, color=color, linewidth=1.6, linestyle="--" if dashed else "-", label=run)
        ax.plot(x[1:-1], y[1:-1], "o", color=color, markersize=3.2)
        ax.plot(x[:1], y[:1], "*", color=color, markersize=12)
        ax.plot(x[-1:], y[-1:], "o", color=color, markersize=7)
        _write_steps(ax, own if len(runs) == 1 else own[-1:], x, y, color)
    ax.set(xlabel=f"to {across} (nats per token)", ylabel=f"to {up}")
    ax.grid(visible=True, axis="both")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    ax.margins(0.12)


def _write_steps(ax: Axes, own: Sequence[Point], x: Sequence[float], y: Sequence[float], color: str) -> None:
    """Write the step beside the first point, the last, and a handful between them; these are the last of the way."""
    every, before = max(1, (len(own) - 1) // 4), len(x) - len(own)
    for i, point in enumerate(own, before):
        if (i - before) % every == 0 or i == len(x) - 1:
            ax.annotate(str(point.step), (x[i], y[i]), xytext=(6, 5), textcoords="offset points", color=color,
                        fontsize=9)  # fmt: skip


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """Return evenly spread ones of some steps, the first and the last among them.

    Args:
        steps: Growing.
        most: Of them, >= 2.
    """
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, most)]
