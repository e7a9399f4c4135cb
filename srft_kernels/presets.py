"""The switches of the SRFT loss and their presets; ``linear_srft_loss`` says what each means."""

from __future__ import annotations

from typing import NamedTuple


class SrftSwitches(NamedTuple):
    """What a preset of ``linear_srft_loss`` decides; the arguments of the same names describe each."""

    self_rollout: str
    sft_entropy_sign: int
    entropy_scope: str
    demo_gamma: float
    entropy_coef: float


SRFT_PRESETS = {
    "paper": SrftSwitches("likelihood", -1, "sequence", 0.0, 0.0),
    "official": SrftSwitches("ratio", 1, "token", 0.1, 0.001),
    "upt": SrftSwitches("likelihood", -1, "sequence", 0.1, 0.001),
}
