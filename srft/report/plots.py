"""The figures of a run, each drawn from metric rows onto one axes, so that they also make up the overview.

Every panel skips what a run did not record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from srft.curves import Color, Curves, Line
from srft.record.history import PARTS, Rows, points, seconds_by_part
from srft.report.drawing import (
    AMBER,
    BLUE,
    COLORS,
    GREEN,
    GREY,
    INK,
    MUTED,
    PURPLE,
    STYLE,
    VERMILLION,
    count_steps,
    draw_curve,
    inline_svg,
    label_ends,
)

_MAX_MARKERS = 40
_MAX_BARS = 120
_SMALLEST_DIFFERENCE = 1e-8  # nats; below, the logarithmic axis goes linearly to 0
Scale = Literal["from 0", "signed", "log"]


ENTROPY = (
    Line(key="entropy/rollout", label="rollouts", color="blue"),
    Line(key="entropy/demo", label="demonstrations", color="vermillion"),
)
SHARES = (
    Line(key="groups/all_right", label="all right", color="blue"),
    Line(key="groups/all_wrong", label="all wrong", color="vermillion"),
    Line(key="groups/rescued_by_demo", label="solved by demo", color="green", dashed=True),
    Line(key="length/truncated", label="cut at limit", color="purple"),
    Line(key="tokens/dead", label="no gradient", color="grey"),
)
KINDS = (
    Line(key="grad/sft", label="SFT", color="vermillion"),
    Line(key="grad/rl", label="RL", color="blue"),
)
LOGPROBS = (
    Line(key="logprob/right", label="right", color="blue"),
    Line(key="logprob/wrong", label="wrong", color="green", dashed=True),
    Line(key="logprob/demo", label="demonstrations", color="vermillion"),
)
MISMATCH = (
    Line(key="mismatch/max", label="largest", color="vermillion"),
    Line(key="mismatch/mean", label="mean", color="blue"),
    Line(key="canary/max_abs_diff", label="after sync", color="green", dashed=True),
)
LAG = (
    Line(key="lag/is_ess", label="effective", color="blue"),
    Line(key="lag/is_off", label="off by a tenth", color="purple", dashed=True),
    Line(key="lag/is_capped", label="above the cap", color="green"),
)
PART_COLORS = {
    "rollout": BLUE, "reward": GREEN, "train": VERMILLION, "sync": PURPLE, "eval": AMBER, "other": GREY,
}  # fmt: skip


def _draw_accuracy(ax: Axes, rows: Rows) -> None:
    """Draw mean reward of the rollouts, and evaluation accuracy with its interval."""
    ends = _draw_lines(ax, rows, (Line(key="reward/mean", label="training reward", color="blue"),))
    steps, accuracy = points(rows, "eval/accuracy")
    if steps.size:
        keys = ("step", "eval/ci_low", "eval/ci_high")
        bounds = [
            [row[key] for key in keys]
            for row in rows
            if all(isinstance(row.get(k), int | float) for k in keys)
        ]
        few = steps.size <= _MAX_MARKERS
        if bounds and few:
            ax.vlines(*zip(*bounds, strict=True), color=INK, alpha=0.5, linewidth=1.6, clip_on=False)
        elif bounds:
            at, low, high = zip(*bounds, strict=True)
            ax.fill_between(at, low, high, color=INK, alpha=0.15, linewidth=0)
        ax.plot(
            steps, accuracy, marker="o" if few else "", color=INK, markersize=5, linewidth=1.6, clip_on=False
        )
        ends.append((accuracy[-1], "eval accuracy", INK))
    values = np.concatenate([points(rows, "reward/mean")[1], accuracy])
    if values.size and values.min() >= 0 and values.max() <= 1:
        ax.set_ylim(0, 1)
    _finish(ax, rows, ends, "reward, accuracy")


def _draw_curves(ax: Axes, rows: Rows, *, lines: Sequence[Line], ylabel: str, scale: Scale) -> None:
    """Draw curves over an axis that starts at 0, or has a line at 0 ("signed"), or counts decades ("log")."""
    ends = _draw_lines(ax, rows, lines)
    low, high = ax.get_ylim()
    if scale == "from 0":
        ax.set_ylim(bottom=0)
    elif scale == "log":
        # differences can be exactly 0, which a plain logarithmic axis has no place for
        ax.set_yscale("symlog", linthresh=_SMALLEST_DIFFERENCE)
        ax.set_ylim(0, 10 * max(high, _SMALLEST_DIFFERENCE))
    elif low < 0 < high:
        ax.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    _finish(ax, rows, ends, ylabel)


def _draw_terms(ax: Axes, rows: Rows) -> None:
    """Draw the gradient norms of both kinds of terms, and of the single terms where a kind has several."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("grad/"))
    known = {"grad/cosine", *(line.key for line in KINDS)}
    sums = [points(rows, line.key)[1].tolist() for line in KINDS]
    terms = [name for name in names if name not in known and points(rows, name)[1].tolist() not in sums]
    colors: tuple[Color, ...] = ("purple", "green", "amber", "grey")
    lines = [
        Line(key=name, label=name.removeprefix("grad/").replace("_", " "), color=colors[i % len(colors)], dashed=True)
        for i, name in enumerate(terms)
    ]
    _draw_curves(ax, rows, lines=[*KINDS, *lines], ylabel="gradient norm", scale="from 0")


def _draw_times(ax: Axes, rows: Rows) -> None:
    """Draw the seconds of a step by part, stacked; long runs are averaged into bars of several steps."""
    timed = [row for row in rows if any(f"time/{name}" in row for name in ("step", *(n for n in PARTS)))]
    per_bar = math.ceil(len(timed) / _MAX_BARS)
    bars = [timed[start : start + per_bar] for start in range(0, len(timed), per_bar)] if timed else []
    edges = np.array([edge for bar in bars for edge in (bar[0]["step"] - 0.5, bar[-1]["step"] + 0.5)])
    split = [[seconds_by_part(row) for row in bar] for bar in bars]
    bottom = np.zeros(len(bars))
    total = sum(sum(parts.values()) for bar in split for parts in bar)
    for name, color in PART_COLORS.items():
        heights = np.array([np.mean([parts[name] for parts in bar]) for bar in split])
        if not heights.any():
            continue
        share = sum(parts[name] for bar in split for parts in bar) / total
        low, high = np.repeat(bottom, 2), np.repeat(bottom + heights, 2)
        ax.fill_between(edges, low, high, color=color, linewidth=0, label=f"{name} {share:.0%}")
        bottom += heights
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=0.9,
              labelcolor=INK, borderaxespad=0.3)  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xmargin(0.01)
    ax.set(xlabel="step", ylabel="seconds per step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))


@dataclass(frozen=True)
class Panel:
    """One figure.

    Args:
        name: Its file name without ending.
        title: Its heading.
        caption: One sentence for the page.
        draw: Draws it onto axes.
        keys: Metrics of which one must exist.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, Rows], None]
    keys: tuple[str, ...]


def _curves(
    name: str, title: str, caption: str, lines: tuple[Line, ...], ylabel: str, scale: Scale = "from 0"
) -> Panel:
    draw = partial(_draw_curves, lines=lines, ylabel=ylabel, scale=scale)
    return Panel(name, title, caption, draw, tuple(line.key for line in lines))


_FIRST = (
    Panel("reward_accuracy", "Reward and accuracy",
          "Mean reward of rollouts; accuracy on held-out prompts with its 95% interval.",
          _draw_accuracy, ("reward/mean", "eval/accuracy")),
    _curves("entropy", "Entropy by source",
            "How undecided the policy is on the rollouts and the demonstrations that it is trained on.",
            ENTROPY, "entropy (nats per token)"),
)  # fmt: skip
_LAST = (
    Panel("time", "Where the time goes", "Seconds of a step by part; the shares are of the whole run.",
          _draw_times, ("time/step", *(f"time/{name}" for name in PARTS))),
    _curves("lengths", "Completion length", "Mean over the sampled completions.",
            (Line(key="length/mean", label="", color="blue"),), "completion length (tokens)"),
    _curves("shares", "Groups without contrast",
            "All rollouts right, all wrong, or wrong but for the demonstration; and completions cut short.",
            SHARES, "share of groups, completions"),
    _curves("loss", "Loss", "The sum that is differentiated.",
            (Line(key="loss/total", label="", color="blue"),), "loss (nats)", scale="signed"),
    _curves("grad_norm", "Gradient norm", "Before clipping.",
            (Line(key="grad_norm", label="", color="blue"),), "gradient norm"),
    Panel("grad_terms", "Gradient norm by term", "Each term alone, before clipping; SFT and RL are sums of terms.",
          _draw_terms, tuple(line.key for line in KINDS)),
    _curves("cosine", "SFT against RL", "Cosine of their gradients: below 0 they undo each other's work.",
            (Line(key="grad/cosine", label="", color="purple"),), "cosine", scale="signed"),
    _curves("logprobs", "Likelihood by source", "Mean log-probability of the tokens of rollouts and demonstrations.",
            LOGPROBS, "log p (nats per token)", scale="signed"),
    _curves("mismatch", "Trainer against engine",
            "How far log-probabilities of the same tokens lie apart; a jump means wrong weights.",
            MISMATCH, "difference (nats)", scale="log"),
    _curves("lag", "Rollouts of an older policy",
            "Shares of their tokens, by how likely these still are: of the sample as it counts, and of ratios.",
            LAG, "share of tokens"),
)  # fmt: skip
_OVERVIEW_FIRST, _OVERVIEW_LAST = ("reward_accuracy", "entropy"), ("loss", "shares", "grad_norm")


def panels(curves: Sequence[Curves] = ()) -> tuple[Panel, ...]:
    """Return the figures that a run may have, in the order of the page.

    Args:
        curves: Those of its method.
    """
    own = (
        _curves(c.name, c.title, c.caption, c.lines, c.ylabel, scale="signed" if c.signed else "from 0") for c in curves
    )
    return (*_FIRST, *own, *_LAST)


def draw_plots(rows: Rows, folder: Path, curves: Sequence[Curves] = ()) -> dict[str, str]:
    """Write every figure that has data as PNG, and ``overview.png`` with the four that tell most.

    Args:
        rows: Metric rows in order of step.
        folder: Where the PNGs go; created when there is something to draw.
        curves: Figures of the run's method.

    Returns:
        Inline SVG by figure name, in the order of ``panels``; the overview is not among them.
    """
    recorded = [panel for panel in panels(curves) if any(points(rows, key)[0].size for key in panel.keys)]
    if not recorded:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    svgs = {}
    # a figure built without pyplot always has the Agg canvas and leaves no global state behind
    with matplotlib.rc_context(STYLE):
        for panel in recorded:
            figure = Figure(figsize=(5.6, 3.2), layout="constrained")
            ax = figure.add_subplot()
            panel.draw(ax, rows)
            svgs[panel.name] = inline_svg(figure)
            ax.set_title(panel.title)
            figure.savefig(folder / f"{panel.name}.png", dpi=200, facecolor="white")
        drawn = {panel.name: panel for panel in recorded}
        # the first four that a run recorded
        order = (*_OVERVIEW_FIRST, *(c.name for c in curves), *_OVERVIEW_LAST)
        chosen = [drawn[name] for name in order if name in drawn][:4]
        if chosen:
            _draw_overview(chosen, rows).savefig(folder / "overview.png", dpi=130, facecolor="white")
    return svgs


def _draw_overview(panels: Sequence[Panel], rows: Rows) -> Figure:
    """Return up to four panels in one figure, 11 inches wide."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04)
    figure = Figure(figsize=(11, 3.7 * lines), layout=spacing)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, ax in zip(panels, axes, strict=False):
        panel.draw(ax, rows)
        ax.set_title(panel.title)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def _draw_lines(ax: Axes, rows: Rows, lines: Sequence[Line]) -> list[tuple[float, str, str]]:
    """Draw curves; return (height, label, colour) of their ends."""
    ends = []
    for line in lines:
        end = draw_curve(ax, rows, line.key, COLORS[line.color], dashed=line.dashed)
        if end is not None:
            ends.append((end, line.label, COLORS[line.color]))
    return ends


def _finish(ax: Axes, rows: Rows, ends: Sequence[tuple[float, str, str]], ylabel: str) -> None:
    """Label the axes, and each curve at its end."""
    count_steps(ax, rows[0]["step"], rows[-1]["step"])
    ax.set_ylabel(ylabel)
    label_ends(ax, ends)
