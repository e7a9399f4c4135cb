"""SFT, then RL, in one run: the two-stage recipe that single-stage methods are measured against. Or RL, then SFT.

In the phase of SFT a step samples nothing and learns the demonstrations of its prompts; in that of RL it is a step of
GRPO, whose options are here too, and shows none. The second phase begins at a step, or, with ``patience``, once the
loss of held-out demonstrations has stopped falling.

Recipes differ in rates more than in losses; ``train.sft_lr_scale`` and ``train.rl_lr_scale`` set one for each phase.

- As the SRFT paper (arXiv 2506.19767) trains its baseline: 3 epochs of SFT at 5e-6, then 500 steps of RL at 1e-6, both
  of 128 prompts: ``train.lr=5e-6 train.rl_lr_scale=0.2``. Its rate of SFT rises over a tenth of the steps
  (``train.lr_warmup_steps``) and falls linearly, here it stays. What its RL is beside GRPO is not said.
- As in arXiv 2604.23747, where the same two stages come out ahead of single-stage methods: SFT at 5e-5 in batches of
  64, with weight decay 0.01, 3 epochs along a cosine that here is flat; RL at 1e-6 in batches of 128 prompts and 8
  rollouts, two updates each, clipped at 0.2 and 0.28, token mean, no division by the standard deviation, no KL:
  ``train.lr=5e-5 train.rl_lr_scale=0.02 train.weight_decay=0.01 method.clip_high=0.28 method.advantage_std=false``.

Two stages are two runs in both, so that the second starts with a new optimizer: ``reset_optimizer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from srft.batch import Batch
from srft.methods import Aggregation, Curves, Figure, Kind, Line, Loss, StepInfo, UpdateInfo, judged, token_weights
from srft.methods.grpo import Method as Grpo
from srft.responses import Group, Response
from srft_kernels import linear_token_loss


class Method(Grpo):
    """SFT, then RL: steps of SFT alone, then steps of GRPO alone, in one run, or the other way round."""

    needs_demos: ClassVar[bool] = True
    terms: ClassVar[Mapping[str, Kind]] = {"sft": "sft", **Grpo.terms}
    curves: ClassVar[tuple[Curves, ...]] = (
        Curves(
            name="loss_components", title="Loss", caption="Of each phase.",
            lines=(Line(key="loss/sft", label="SFT", color="vermillion"),
                   Line(key="loss/policy", label="RL", color="blue")),
            ylabel="loss", signed=True,
        ),
    )  # fmt: skip

    order: Literal["sft-rl", "rl-sft"] = "sft-rl"
    """Which phase comes first."""
    switch_step: int | None = Field(None, ge=0)
    """Steps of the first phase; unset: by switch_share."""
    switch_share: float = Field(0.5, ge=0, le=1)
    """Share of train.steps that the first phase has, rounded down."""
    patience: int | None = Field(None, gt=0)
    """Of sft-rl: evaluations in a row without a lower eval/demo_loss, after which the first phase ends before its
    steps are over; unset: it has them all. Held-out problems must have demonstrations."""
    min_delta: float = Field(0.0, ge=0)
    """Nats per token by which eval/demo_loss must be lower than the lowest before."""
    reset_optimizer: bool = True
    """Begin the second phase with a new optimizer, as a run of its own would."""
    sft_aggregation: Aggregation = "token-mean"
    """Of demonstrations: mean over tokens, mean over sequences of token means, mean over sequences of token sums
    divided by rollout.max_new_tokens, or sum over tokens divided by it."""

    @model_validator(mode="after")
    def _options_fit_together(self) -> Method:
        if self.patience is not None and self.order == "rl-sft":
            raise ValueError("method.patience waits for a plateau of SFT; unset it, or set method.order=sft-rl")
        return self

    @property
    def takes_lag(self) -> bool:  # type: ignore[override]
        """Unless a plateau ends the first phase, in which the rollouts of the next step would have been asked for."""
        return self.patience is None

    @property
    def needs_demo_loss(self) -> bool:
        """Where the first phase waits for its plateau."""
        return self.patience is not None

    def steps_of_first(self, now: StepInfo) -> int:
        """Return after which step the first phase ends, as far as is known.

        Args:
            now: A step of the run.
        """
        most = math.floor(self.switch_share * now.steps) if self.switch_step is None else self.switch_step
        return min(most, now.memory.get("plateau", most))

    def asks(self, now: StepInfo) -> tuple[bool, bool]:
        """Rollouts or demonstrations, by the phase."""
        is_rl = (now.step <= self.steps_of_first(now)) == (self.order == "rl-sft")
        return is_rl, not is_rl

    def resets_optimizer(self, now: StepInfo) -> bool:
        """Before the second phase, where there was a first."""
        return self.reset_optimizer and 1 < now.step == self.steps_of_first(now) + 1

    def note(self, row: Mapping[str, float], now: StepInfo) -> None:
        """Watch for the plateau: ``best`` loss, ``stale`` evaluations since, and the step of the ``plateau``."""
        if self.patience is None or "eval/demo_loss" not in row or now.step > self.steps_of_first(now):
            return
        memory, loss = now.memory, row["eval/demo_loss"]
        if loss < memory.get("best", math.inf) - self.min_delta:
            memory.update(best=loss, stale=0)
            return
        memory["stale"] = memory.get("stale", 0) + 1
        if memory["stale"] >= self.patience:
            memory["plateau"] = now.step

    def learn_from(self, group: Group) -> list[Response]:
        """Compare the rollouts where there are any; else learn the demonstrations, whatever their reward."""
        return super().learn_from(group) if group.rollouts else judged(group.demos)

    def has_gradient(self, response: Response) -> bool:
        """As in GRPO, and of demonstrations always."""
        return response.is_demo or super().has_gradient(response)

    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """GRPO where the update has rollouts, else cross-entropy."""
        if update.totals.rollout_tokens:
            return super().loss(batch, update)
        weights = token_weights(batch, update, self.sft_aggregation) * update.scale("sft")
        return partial(linear_token_loss, sft_weights=weights / max(1, update.totals.demo_tokens))

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Those of GRPO, in its phase."""
        return super().figures(terms, update) if update.totals.rollout_tokens else {}
