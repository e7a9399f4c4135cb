"""How every figure looks, and the parts that figures of one run and of several share.

Colours are Okabe and Ito's, which colour-blind readers tell apart; warm ones belong to demonstrations, cool
ones to rollouts.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from srft.curves import Color
from srft.record.history import Rows, points

INK, MUTED, GRID = "#1f2328", "#68717c", "#dfe3e8"
BLUE, GREEN, VERMILLION, PURPLE, AMBER, GREY = (
    "#0072b2",
    "#00916a",
    "#d55e00",
    "#b0578d",
    "#e69f00",
    "#98a1ab",
)
COLORS: dict[Color, str] = {
    "blue": BLUE, "green": GREEN, "vermillion": VERMILLION, "purple": PURPLE, "amber": AMBER, "grey": GREY
}  # fmt: skip
# hex colour in a figure -> name of the page's CSS variable, which has a light and a dark value
CSS_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {value: name for name, value in COLORS.items()}

# how every figure looks, for matplotlib.rc_context
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "srft",
}
_DASHES = (0, (4, 1.5))
_RAW_ONLY_BELOW = 20  # fewer points than this are drawn as they are, with markers


def smooth(steps: np.ndarray, values: np.ndarray, width: float) -> np.ndarray:
    """Return the mean under a Gaussian window, over the steps that exist.

    Args:
        steps: [n] whole numbers, growing.
        values: [n], one a step.
        width: Standard deviation of the window, in steps, > 0.
    """
    at = (steps - steps[0]).astype(int)
    sums, counts = np.zeros(at[-1] + 1), np.zeros(at[-1] + 1)
    sums[at], counts[at] = values, 1
    reach = math.ceil(4 * width)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    return np.convolve(sums, window)[reach + at] / np.convolve(counts, window)[reach + at]


def smoothing_width(rows: Rows) -> float:
    """Return the standard deviation of the smoothing window of a run, in steps: a fortieth of its length.

    Args:
        rows: Metric rows in order of step.
    """
    return max(1.0, (rows[-1]["step"] - rows[0]["step"]) / 40) if rows else 1.0


def draw_curve(ax: Axes, rows: Rows, key: str, color: str, *, dashed: bool = False) -> float | None:
    """Draw a metric over the steps, smoothed over faint raw values where there are many.

    Args:
        ax: Where to.
        rows: Metric rows in order of step.
        key: Name of the metric.
        color: Of the curve.
        dashed: Whether it is dashed.

    Returns:
        The height of its end; None where no row has the metric.
    """
    steps, values = points(rows, key)
    if not steps.size:
        return None
    dashes = _DASHES if dashed else "-"
    if steps.size < _RAW_ONLY_BELOW:
        ax.plot(steps, values, "o", color=color, linestyle=dashes, markersize=3.5, clip_on=False)
    else:
        ax.plot(steps, values, color=color, linewidth=0.9, alpha=0.35)
        values = smooth(steps, values, smoothing_width(rows))
        ax.plot(steps, values, color=color, linestyle=dashes)
    return float(values[-1])


def count_steps(ax: Axes, first: float, last: float) -> None:
    """Give axes steps from left to right, and ticks of round numbers.

    Args:
        ax: The axes.
        first: Step at the left end.
        last: Step at the right end.
    """
    ax.set_xlim(first, last if last > first else first + 1)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.095) -> None:
    """Write each curve's label beside its end, at the right of the axes.

    Args:
        ax: The axes, their limits as they stay.
        ends: (height, label, colour) of each.
        gap: Least distance of two labels, as a share of the height of the axes.
    """
    right = ax.get_xlim()[1]
    heights = [ax.transAxes.inverted().transform(ax.transData.transform((right, end[0])))[1] for end in ends]
    for height, (_, label, color) in zip(spread(heights, gap), ends, strict=True):
        ax.annotate(label, (1, height), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points",
                    va="center", color=color, annotation_clip=False)  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move numbers as little as needed to lie apart and within [0, 1], keeping their order.

    Args:
        heights: Any numbers.
        gap: Least distance of two.
    """
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=float)[order]
    # pool neighbours that are too close around their mean, as in isotonic regression
    offsets = gap * np.arange(len(placed))
    blocks: list[list[float]] = []
    for value in placed - offsets:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = np.array([np.mean(block) for block in blocks for _ in block])
    result = np.empty(len(placed))
    result[order] = np.clip(flat, 0, max(0, 1 - gap * (len(placed) - 1))) + offsets
    return result.tolist()


def inline_svg(figure: Figure) -> str:
    """Return the figure as SVG to put into a page: its colours and fonts are the page's.

    Args:
        figure: Drawn under ``STYLE``.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # the namespaces go with the tag's other attributes; HTML knows them
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    for color, name in CSS_NAMES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
