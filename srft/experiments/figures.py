"""The figures of a suite: each arm's curves beside the reference's, and the paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from srft.experiments.findings import Arm, Findings
from srft.experiments.results import Result
from srft.experiments.statistics import Estimate, estimate
from srft.report.drawing import BLUE, GREY, INK, MUTED, STYLE, VERMILLION, inline_svg

Curve = Callable[[Result], Mapping[int, tuple[float, float]]]
"""Of a run, by step: FLOPs so far and a value."""
_COLUMNS = 4
_INCHES_PER_PANEL = 2.1


def draw_figures(findings: Findings, folder: Path) -> dict[str, tuple[str, str, str]]:
    """Write every figure that has data as PNG.

    Args:
        findings: From ``findings.read_findings``.
        folder: Where the PNGs go; created when there is something to draw.

    Returns:
        (title, caption, inline SVG) by file name without ending.
    """
    band = "Mean over seeds with its 95 % t interval; grey: the reference."
    figures: dict[str, tuple[str, str, Figure]] = {}
    with matplotlib.rc_context(STYLE | {"font.size": 9, "axes.titlesize": 9.5, "axes.titlepad": 4}):
        if pairs := [arm for arm in findings.arms if arm.final_difference and arm.area_difference]:
            figures["differences"] = (
                f"Accuracy beside {findings.reference}",
                "Difference with the same seed, in points, of the last evaluation and of the mean over the run: dots "
                "are seeds, bars the mean with its 95 % t interval.",
                _forest(pairs, findings),
            )
        for name, title, ylabel, curve, is_share in (
            ("accuracy", "Held-out accuracy", "accuracy", _accuracy, True),
            ("entropy", "Entropy of rollouts", "nats per token", _metric("entropy/rollout"), False),
            ("reward", "Training reward", "mean reward", _metric("reward/mean"), True),
            ("length", "Completion length", "tokens", _metric("length/mean"), False),
        ):
            if any(curve(result) for arm in findings.arms for result in arm.results.values()):
                figures[name] = (title, band, _grid(findings, curve, ylabel, is_share))
        drawn = {}
        for name, (title, caption, figure) in figures.items():
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=120, facecolor="white")
            drawn[name] = title, caption, inline_svg(figure)
    return drawn


def _accuracy(result: Result) -> Mapping[int, tuple[float, float]]:
    return {step: (flops, accuracy) for step, accuracy, flops in result.evaluations}


def _metric(name: str) -> Curve:
    def curve(result: Result) -> Mapping[int, tuple[float, float]]:
        columns = [result.curves.get(key, []) for key in ("step", "flops", name)]
        points: Any = zip(*columns, strict=True) if all(columns) else ()
        return {step: (flops, value) for step, flops, value in points if value is not None}

    return curve


def _grid(findings: Findings, curve: Curve, ylabel: str, is_share: bool) -> Figure:
    """A panel for each arm that has the curve, all on the same axes: steps, or FLOPs where arms differ in steps."""
    reference = next(arm for arm in findings.arms if arm.name == findings.reference)
    shown = [arm for arm in findings.arms if any(curve(result) for result in arm.results.values())]
    by_flops = len({result.steps for arm in shown for result in arm.results.values()}) > 1
    columns = min(_COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = (max(5.6, 2.8 * columns), 0.4 + _INCHES_PER_PANEL * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for place, arm in enumerate(shown):
        ax = axes[place // columns][place % columns]
        if arm is not reference:
            _band(ax, [curve(result) for result in reference.results.values()], GREY, by_flops)
        _band(ax, [curve(result) for result in arm.results.values()], INK if arm is reference else BLUE, by_flops)
        ax.set_title(arm.name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=not by_flops, nbins=4, steps=[1, 2, 5, 10]))
        ax.tick_params(labelbottom=place + columns >= len(shown))  # the last of its column
    for ax in axes.ravel()[len(shown) :]:
        ax.remove()
    axes[0][0].set_xlim(left=0)
    axes[0][0].set_ylim(bottom=0)
    if is_share:
        axes[0][0].set_ylim(top=min(1.0, axes[0][0].get_ylim()[1]))
    figure.supxlabel("FLOPs" if by_flops else "step", fontsize=9, color=INK)
    figure.supylabel(ylabel, fontsize=9, color=INK)
    return figure


def _band(ax: Axes, curves: Sequence[Mapping[int, tuple[float, float]]], color: str, by_flops: bool) -> None:
    """Draw the mean at the steps that every seed has, with its interval; over their mean FLOPs or over the steps."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = [e for step in steps if (e := estimate([curve[step][1] for curve in curves]))]
    flops = [float(np.mean([curve[step][0] for curve in curves])) for step in steps]
    at = flops if by_flops else [float(step) for step in steps]
    few = "o" if len(steps) == 1 else ""
    ax.plot(at, [e.mean for e in points], color=color, linewidth=1.6, marker=few)
    low, high = np.array([e.low for e in points]), np.array([e.high for e in points])
    ax.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)


def _forest(arms: Sequence[Arm], findings: Findings) -> Figure:
    """A line for each arm: its paired differences, at the end and over the run."""
    reference = next(arm for arm in findings.arms if arm.name == findings.reference)
    figure = Figure(figsize=(9.5, 0.9 + 0.32 * len(arms)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(arms))[::-1]
    scores: Sequence[tuple[str, Callable[[Result], float], Callable[[Arm], Estimate | None]]] = (
        ("last evaluation", lambda r: r.final, lambda a: a.final_difference),
        ("mean over the run", lambda r: r.area, lambda a: a.area_difference),
    )
    for ax, (title, score, difference) in zip(panels, scores, strict=True):
        ax.axvline(0, color=MUTED, linewidth=0.9, zorder=1)
        for row, arm in zip(rows, arms, strict=True):
            both = arm.results.keys() & reference.results.keys()
            dots = [100 * (score(arm.results[s]) - score(reference.results[s])) for s in sorted(both)]
            e = difference(arm)
            assert e is not None
            ax.plot(dots, [row + 0.22] * len(dots), "o", color=GREY, markersize=3.2, zorder=2)
            apart = e.half is not None and not e.low <= 0 <= e.high
            color = INK if not apart else BLUE if e.mean > 0 else VERMILLION
            ax.plot([100 * e.low, 100 * e.high], [row, row], color=color, linewidth=2.2, zorder=3)
            ax.plot([100 * e.mean], [row], "s", color=color, markersize=5, zorder=4)
        ax.set_title(title)
        ax.set_xlabel("points of accuracy")
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
        ax.set_xlim(*_limits(arms, difference))
    panels[0].set_yticks(rows, [arm.name for arm in arms])
    panels[0].set_ylim(-0.6, len(arms) - 0.4)
    return figure


def _limits(arms: Sequence[Arm], difference: Callable[[Arm], Estimate | None]) -> tuple[float, float]:
    """Ends of the axis: all means, and of intervals as much as is not far wider than the rest."""
    found: list[Any] = [e for arm in arms if (e := difference(arm))]
    reach = max(abs(100 * e.mean) for e in found)
    halves = sorted(100 * (e.half or 0.0) for e in found)
    most = reach + min(halves[-1], 3 * halves[len(halves) // 2]) + 1.0
    return -1.05 * most, 1.05 * most
