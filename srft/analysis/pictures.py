"""Figures of analyses: axes, stacks over steps, and how they become files and a part of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srft.report.drawing import INK, count_steps, inline_svg
from srft.report.page import captioned

WIDTH, HEIGHT = 5.6, 3.2


class Picture(NamedTuple):
    """A ``figure`` with its ``title`` and ``caption``; ``name`` is that of its file, without ending."""

    name: str
    title: str
    caption: str
    figure: Figure


def axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a new figure with one pair of axes; to be called under ``STYLE``.

    Args:
        width: In inches.
        height: In inches.
    """
    # built without pyplot, it leaves no global state behind
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def draw_stack(
    ax: Axes, steps: Sequence[float], heights: Mapping[str, tuple[Sequence[float], str]], ylabel: str
) -> None:
    """Draw numbers that add up to something, one upon another, over the steps.

    Args:
        ax: Where to.
        steps: At which they are known, two at least.
        heights: (a number for each step, colour) by label, from bottom to top; what is nowhere above 0 is left out.
        ylabel: Name of the axis.
    """
    bottom = np.zeros(len(steps))
    for label, (values, color) in heights.items():
        if any(values):
            top = bottom + np.asarray(values, dtype=float)
            ax.fill_between(steps, bottom, top, color=color, linewidth=0, label=label)
            bottom = top
    ax.set_ylim(bottom=0, top=max(1.0, float(bottom.max())))
    ax.set_ylabel(ylabel)
    count_steps(ax, steps[0], steps[-1])
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=0.9,
              labelcolor=INK, borderaxespad=0.3)  # fmt: skip


def save(pictures: Sequence[Picture], folder: Path) -> str:
    """Write each figure as PNG and return them as HTML.

    Args:
        pictures: Drawn under ``STYLE``, which still holds.
        folder: Exists.
    """
    shown = []
    for picture in pictures:
        svg = inline_svg(picture.figure)
        axes = picture.figure.axes
        if len(axes) == 1 and not axes[0].get_title(loc="left"):
            axes[0].set_title(picture.title)
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=160, facecolor="white")
        is_wide = picture.figure.get_figwidth() > WIDTH + 1.2
        shown.append(
            f'<div class="wide">{captioned(picture.title, picture.caption, svg)}</div>' if is_wide
            else captioned(picture.title, picture.caption, svg)
        )  # fmt: skip
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""
