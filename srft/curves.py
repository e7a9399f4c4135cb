"""What a figure shows, without the means to draw it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from srft.section import Section

# names of the figures that every run has, which report/plots.py draws
TAKEN = frozenset(
    (
        "cosine", "entropy", "grad_norm", "grad_terms", "lag", "lengths", "logprobs", "loss", "mismatch", "overview",
        "reward_accuracy", "shares", "time",
    )
)  # fmt: skip
Color = Literal["blue", "green", "vermillion", "purple", "amber", "grey"]


class Line(Section):
    """One curve of a figure."""

    key: str
    """Metric it shows."""
    label: str
    """Text at its right end."""
    color: Color
    """Warm colours belong to demonstrations, cool ones to rollouts."""
    dashed: bool = False
    """Whether it is dashed."""


class Curves(Section):
    """A figure that the report of a run draws beside those that every run has."""

    name: str = Field(pattern="^[a-z0-9_]+$")
    """Its file name without ending."""
    title: str
    """Its heading."""
    caption: str
    """One sentence below it."""
    lines: tuple[Line, ...]
    """What it shows."""
    ylabel: str
    """Name of the axis, with its unit."""
    signed: bool = False
    """Whether the axis has a line at 0 rather than an end there."""


RL_AND_SFT = Curves(
    name="loss_components", title="Loss components", caption="RL and SFT as they are added up.",
    lines=(Line(key="loss/policy", label="RL", color="blue"), Line(key="loss/sft", label="SFT", color="vermillion")),
    ylabel="contribution to the loss", signed=True,
)  # fmt: skip
DEMO_SHARE = Curves(
    name="demo_share", title="Prompts that teach by demonstrations",
    caption="The others teach by the policy's own rollouts.",
    lines=(Line(key="weight/demo_share", label="", color="vermillion"),), ylabel="share of prompts",
)  # fmt: skip
