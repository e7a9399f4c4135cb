"""The switches of the SRFT loss and their presets; ``linear_srft_loss`` says what each means."""

from __future__ import annotations

from typing import NamedTuple

from ._checks import check_choice


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


def srft_switches(
    preset: str,
    self_rollout: str | None,
    sft_entropy_sign: int | None,
    entropy_scope: str | None,
    demo_gamma: float | None,
    entropy_coef: float | None,
) -> SrftSwitches:
    """The preset, with what the caller gave in its place."""
    check_choice("preset", preset, SRFT_PRESETS)
    base = SRFT_PRESETS[preset]
    return SrftSwitches(
        base.self_rollout if self_rollout is None else self_rollout,
        base.sft_entropy_sign if sft_entropy_sign is None else sft_entropy_sign,
        base.entropy_scope if entropy_scope is None else entropy_scope,
        base.demo_gamma if demo_gamma is None else demo_gamma,
        base.entropy_coef if entropy_coef is None else entropy_coef,
    )
