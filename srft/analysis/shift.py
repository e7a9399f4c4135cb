"""How fine-tuning moved the probability of each token of a fine-tuned model's own responses (SRFT paper, Fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from srft.analysis.page import Token, legend, response, table
from srft.analysis.pictures import Picture
from srft.analysis.policies import mean_by_token
from srft.report.drawing import BLUE, GREY, INK, VERMILLION
from srft.responses import Response

_BINS = 41  # odd, so that one is around 0
_SHOWN = 12
_LEAST_TIMES = 5  # a token must occur for its mean to be told
_MOVED = (0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Shift:
    """A response of a fine-tuned model under it and under its base.

    Args:
        prompt: Its text.
        tokens: n texts.
        before: [n] probabilities of the base, at the temperature of the rollouts.
        after: [n] those of the fine-tuned model.
    """

    prompt: str
    tokens: list[str]
    before: np.ndarray
    after: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """[n] in [-1, 1], what fine-tuning added to each probability."""
        return self.after - self.before


def make_shifts(
    prompts: Sequence[str],
    responses: Sequence[Response],
    tokens: Sequence[list[str]],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
) -> list[Shift]:
    """Join what two models make of the same responses.

    Args:
        prompts: Texts.
        responses: Of the fine-tuned model.
        tokens: Their tokens' texts.
        before: Log-probabilities under the base, nats.
        after: Those under the fine-tuned model.
    """
    assert all(len(r.response_ids) == len(t) for r, t in zip(responses, tokens, strict=True))
    return [
        Shift(prompt, words, np.exp(base), np.exp(tuned))
        for prompt, words, base, tuned in zip(prompts, tokens, before, after, strict=True)
    ]


def summarise(shifts: Sequence[Shift]) -> dict[str, float]:
    """Return what the shifts are in numbers.

    Args:
        shifts: One at least.

    Returns:
        "responses" and "tokens"; "mean" and "mean_abs" of the differences of probabilities; "raised" and "lowered",
        shares of tokens that gained or lost more than 0.01; "over_0.01", "over_0.1" and "over_0.5", shares whose
        difference is larger than that; "before" and "after", means of both probabilities.
    """
    moved = np.concatenate([shift.moved for shift in shifts])
    return {
        "responses": len(shifts), "tokens": len(moved), "mean": float(moved.mean()),
        "mean_abs": float(np.abs(moved).mean()),
        "raised": float((moved > _MOVED[0]).mean()), "lowered": float((moved < -_MOVED[0]).mean()),
        **{f"over_{limit:g}": float((np.abs(moved) > limit).mean()) for limit in _MOVED},
        "before": float(np.concatenate([shift.before for shift in shifts]).mean()),
        "after": float(np.concatenate([shift.after for shift in shifts]).mean()),
    }  # fmt: skip


def histogram(shifts: Sequence[Shift]) -> tuple[np.ndarray, np.ndarray]:
    """Return (edges [b+1], shares [b]) of the differences of probabilities, one bin around 0.

    Args:
        shifts: One at least.
    """
    moved = np.concatenate([shift.moved for shift in shifts])
    counts, edges = np.histogram(moved, bins=_BINS, range=(-1.0, 1.0))
    return edges, counts / len(moved)


def draw_histograms(by_model: dict[str, list[Shift]], base: str) -> Picture:
    """Draw the histogram of each fine-tuned model, on the same axes.

    Args:
        by_model: Shifts by the model's label.
        base: Label of the base.
    """
    columns = min(3, len(by_model))
    lines = math.ceil(len(by_model) / columns)
    figure = Figure(figsize=(max(5.6, 3.4 * columns), 0.4 + 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, (label, shifts) in zip(panels, by_model.items(), strict=False):
        edges, shares = histogram(shifts)
        centres = (edges[1:] + edges[:-1]) / 2
        colors = [GREY if abs(x) < 1e-9 else BLUE if x > 0 else VERMILLION for x in centres]
        ax.bar(centres, shares, width=0.9 * (edges[1] - edges[0]), color=colors)
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(-1, 1)
        ax.set_title(label)
        found = summarise(shifts)
        ax.text(0.03, 0.96, f"|Δp| > 0.1: {found['over_0.1']:.1%}\n{found['tokens']:,.0f} tokens", va="top",
                transform=ax.transAxes, fontsize=9, color=INK)  # fmt: skip
    for ax in panels[len(by_model) :]:
        ax.remove()
    least = min(1 / summarise(shifts)["tokens"] for shifts in by_model.values())
    panels[0].set_ylim(0.6 * least, 1.6)
    figure.supxlabel(f"p − p of {base}", fontsize=11, color=INK)
    figure.supylabel("share of tokens", fontsize=11, color=INK)
    return Picture(
        "probability_shift", "Shift of token probabilities",
        f"Each model on its own responses, scored token by token by it and by {base}. Blue: more likely than before; "
        "the scale is logarithmic.", figure,
    )  # fmt: skip


def by_token(shifts: Sequence[Shift]) -> list[tuple[str, int, float, float, float]]:
    """Return (token, times, mean difference, mean before, mean after) of each frequent token, most raised first.

    Args:
        shifts: One at least.
    """
    means = mean_by_token(((shift.tokens, shift.before, shift.after) for shift in shifts), _LEAST_TIMES)
    rows = [(token, times, after - before, before, after) for token, times, before, after in means]
    return sorted(rows, key=lambda row: -row[2])


def show(shifts: Sequence[Shift], base: str) -> str:
    """Return the page's part of one model: numbers, the tokens that moved most, and coloured responses.

    Args:
        shifts: Of one fine-tuned model.
        base: Label of the base.
    """
    found = summarise(shifts)
    sentence = (
        f"{found['tokens']:,.0f} tokens of {found['responses']:.0f} responses: {found['raised']:.1%} gained more than "
        f"0.01, {found['lowered']:.1%} lost more; |Δp| is above 0.1 for {found['over_0.1']:.1%} and above 0.5 for "
        f"{found['over_0.5']:.1%}, {found['mean_abs']:.3f} on average. The mean probability went from "
        f"{found['before']:.3f} to {found['after']:.3f}."
    )
    rows = by_token(shifts)
    chosen = rows if len(rows) <= 16 else [*rows[:8], *rows[-8:]]
    cells = [
        [repr(token)[1:-1], f"{times:,}", f"{moved:+.3f}", f"{before:.3f}", f"{after:.3f}"]
        for token, times, moved, before, after in chosen
    ]
    heading = ["token", "times", "mean Δp", f"p of {base}", "p now"]
    parts = [f"<p>{sentence}</p>", table(heading, cells) if cells else ""]
    parts.append(legend("less likely than before", "more likely", "The deeper the colour, the larger |Δp|."))
    parts += [
        response(
            shift.prompt,
            [
                Token(text, float(moved), f"p {before:.3f} → {after:.3f}")
                for text, moved, before, after in zip(
                    shift.tokens, shift.moved, shift.before, shift.after, strict=True
                )
            ],
        )
        for shift in shifts[:_SHOWN]
    ]
    return "".join(parts)
