"""How a run goes wrong: signs of it in the rows of its record, each with what to do about it.

Every check is a function of the rows so far. A mean over ``window`` rows stands for "now", since single steps are
noisy; "the start" is the mean over the first ``window``. A number that a run does not record raises no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from srft.section import Section

AlarmName = Literal[
    "entropy-collapse", "entropy-blow-up", "reward-plateau", "sudden-drop", "length-explosion", "likelihood-blow-up",
    "ratio-tail", "engine-mismatch", "stale-rollouts",
]  # fmt: skip
ALARMS: tuple[AlarmName, ...] = get_args(AlarmName)


def _named(value: object) -> object:
    every = {"true": list(ALARMS), "false": []}
    return every.get(str(value).lower(), value.split(",") if isinstance(value, str) else value)


AlarmNames = Annotated[list[AlarmName], BeforeValidator(_named)]
"""Alarms to choose; read from a list, from their names between commas, or from true for any and false for none."""
# standard errors that a fall must have: the best of many means is high by chance already
_BEYOND_CHANCE = 8.0
_RECENT_EVALS = 10
_WATCHED = (
    "entropy/rollout", "reward/mean", "reward/std", "eval/accuracy", "eval/ci_low", "eval/ci_high", "length/mean",
    "length/truncated", "logprob/wrong", "ratio/tail", "mismatch/mean", "lag/is_ess", "grad/cosine",
)  # fmt: skip
# nats that entropy must gain, so that a policy which was sure of everything may hesitate a little
_LEAST_GROWTH = 0.5
# by how much the share of cut completions must have grown since the start: some policies never end theirs
_MORE_CUT = 0.2


class AlarmConfig(Section):
    """When an alarm is raised. A step is a row of metrics.jsonl that has the number in question."""

    window: int = Field(20, gt=0)
    """Steps that a mean is over. At 64 prompts a step the reward's has a standard error of about 0.01."""
    plateau_steps: int = Field(60, gt=0)
    """Steps over which a reward that is to rise must have risen."""
    least_rise: float = Field(0.01, ge=0)
    """Gain of the mean reward over plateau_steps from which on it counts as rising."""
    settled_reward: float = Field(0.9, ge=0)
    """Mean reward from which on a run has learned its task, so that no entropy and no rise is what one expects."""
    entropy_floor: float = Field(0.03, ge=0)
    """Nats per token below which rollouts are all alike: a prompt's differ in less than one token of thirty."""
    entropy_share: float = Field(0.05, ge=0, lt=1)
    """The same as a share of the start's entropy; the larger of the two counts."""
    entropy_growth: float = Field(2.0, gt=1)
    """Multiple of the start's entropy, and half a nat more than it, from which on it has blown up."""
    reward_scatter: float = Field(1.5, gt=0)
    """Standard deviation of the steps' mean rewards, by what the choice of prompts explains at most, from which on a
    plateau is a tug of war."""
    drop: float = Field(0.25, gt=0, lt=1)
    """Share of the recent best reward, or accuracy, whose loss is a sudden drop, where chance does not explain it."""
    length_growth: float = Field(2.0, gt=1)
    """Multiple of the start's completion length, without a rising reward, from which on lengths explode."""
    truncated: float = Field(0.3, gt=0, le=1)
    """Share of completions cut at the limit from which on they do, where it was smaller by 0.2 at the start."""
    wrong_logprob_fall: float = Field(1.0, gt=0)
    """Nats per token that wrong rollouts have lost since the start, and as much again as they had, from which on their
    likelihood falls without bound."""
    ratio_tail: float = Field(0.01, ge=0, lt=1)
    """Share of rollout tokens that have become more than twice, or less than half, as likely within a step."""
    mismatch: float = Field(0.1, gt=0)
    """Mean |log p| difference between trainer and engine, nats. Engines in 16 bit show about 0.01."""
    least_ess: float = Field(0.5, ge=0, lt=1)
    """Effective share of the tokens of an older policy's rollouts below which these are stale."""


@dataclass(frozen=True)
class Alarm:
    """An alarm when it was raised.

    Args:
        step: The step whose row raised it.
        alarm: Its name.
        seen: What was seen, in words.
        limit: What was expected instead.
        remedy: What to do.
    """

    step: int
    alarm: AlarmName
    seen: str
    limit: str
    remedy: str

    def sentence(self) -> str:
        """Return it as one line."""
        return f"Alarm at step {self.step}, {self.alarm}: {self.seen} ({self.limit}). {self.remedy}"

    def as_row(self) -> dict[str, Any]:
        """Return it as a line of ``alarms.jsonl``."""
        return asdict(self)


class Alarmed(Exception):
    """An alarm among ``train.stop_on_alarm`` ended the run, whose last step is saved.

    Args:
        alarm: The alarm.
    """

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(f"stopped by an alarm. {alarm.sentence().rstrip('.')}")


class Watch:
    """Looks at a run's rows as they come and says when something begins to go wrong.

    Args:
        config: The thresholds.
        prompts_per_step: Prompts whose rollouts a row's mean reward is over.
    """

    def __init__(self, config: AlarmConfig, prompts_per_step: int) -> None:
        self._past = _Past(config, prompts_per_step)
        self._raised_at: dict[AlarmName, int] = {}

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms that begin with a row, not those that stay or are back within ``plateau_steps`` rows.

        Args:
            row: The next row of ``metrics.jsonl``; numbers that are not finite, or None, are left out.
        """
        past = self._past
        past.add(row)
        begun = []
        for name in ALARMS:
            if (found := _CHECKS[name](past)) is None:
                continue
            if past.rows - self._raised_at.get(name, -math.inf) > past.config.plateau_steps:
                begun.append(Alarm(row["step"], name, *found, _REMEDIES[name]))
            self._raised_at[name] = past.rows
        return begun


class _Past:
    """The rows so far, as one list of finite values a metric."""

    def __init__(self, config: AlarmConfig, prompts_per_step: int) -> None:
        self.config, self.prompts, self.rows = config, prompts_per_step, 0
        self.values: dict[str, list[float]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        for key in _WATCHED:
            if isinstance(value := row.get(key), int | float) and math.isfinite(value):
                self.values.setdefault(key, []).append(value)

    def of(self, key: str) -> list[float]:
        return self.values.get(key, [])

    def start(self, key: str) -> float | None:
        return _mean(self.of(key)[: self.config.window], self.config.window)

    def now(self, key: str, ago: int = 0) -> float | None:
        """The mean over the window that ended so many values ago; None where it is not full."""
        values, window = self.of(key), self.config.window
        end = max(0, len(values) - ago)
        return _mean(values[max(0, end - window) : end], window)

    def since_start(self, key: str) -> tuple[float, float] | None:
        """Of the start and of now, once there are so many values that the two have none in common."""
        start, now = self.start(key), self.now(key)
        return None if start is None or now is None or len(self.of(key)) < 2 * self.config.window else (start, now)

    def rise(self, over: int) -> float | None:
        now, before = self.now("reward/mean"), self.now("reward/mean", over)
        return None if now is None or before is None else now - before

    def stalls(self) -> bool:
        """Whether the reward could still rise and has not."""
        now, rise, config = self.now("reward/mean"), self.rise(self.config.plateau_steps), self.config
        return now is not None and now < config.settled_reward and rise is not None and rise < config.least_rise

    def rises(self) -> bool:
        """Whether the reward is known to rise; of a short run, since its start."""
        over = min(self.config.plateau_steps, len(self.of("reward/mean")) - self.config.window)
        rise = self.rise(over) if over >= self.config.window else None
        return rise is not None and rise >= self.config.least_rise

    def chance(self, steps: int) -> float:
        """Standard error of a step's mean reward that the choice of prompts explains at most, over the last steps.

        Rewards of one prompt may all be equal: the number of prompts counts, not that of rollouts.
        """
        spread = self.of("reward/std")[-steps:]
        return math.sqrt(sum(x * x for x in spread) / max(1, len(spread)) / self.prompts)


def _mean(values: Sequence[float], count: int) -> float | None:
    return sum(values) / count if len(values) == count else None


_Found = tuple[str, str] | None
"""What was seen and what was expected, in words."""


def _entropy_collapse(past: _Past) -> _Found:
    start, now, config = past.start("entropy/rollout"), past.now("entropy/rollout"), past.config
    if start is None or now is None or not past.stalls():
        return None
    floor = max(config.entropy_floor, config.entropy_share * start)
    seen = f"entropy of rollouts {now:.3g} nats, {start:.3g} at the start, and the reward stays at {_reward(past)}"
    return (seen, f"at least {floor:.3g} before the reward is {config.settled_reward:g}") if now < floor else None


def _entropy_blow_up(past: _Past) -> _Found:
    both, config = past.since_start("entropy/rollout"), past.config
    if both is None or past.rises():
        return None
    start, now = both
    ceiling = max(config.entropy_growth * start, start + _LEAST_GROWTH)
    seen = f"entropy of rollouts {now:.3g} nats, {start:.3g} at the start, and the reward does not rise"
    return (seen, f"at most {ceiling:.3g}") if now > ceiling else None


def _reward_plateau(past: _Past) -> _Found:
    config = past.config
    rewards = past.of("reward/mean")[-config.plateau_steps :]
    if not past.stalls() or not past.of("reward/std"):
        return None
    middle = sum(rewards) / len(rewards)
    # from one step to the next, so that neither a trend nor a single drop is a swing
    scatter = math.sqrt(sum((x - y) ** 2 for x, y in pairwise(rewards)) / 2 / max(1, len(rewards) - 1))
    most = config.reward_scatter * past.chance(config.plateau_steps)
    cosine = past.of("grad/cosine")
    apart = f"; SFT and RL gradients have a cosine of {cosine[-1]:.2f}" if cosine else ""
    seen = f"the reward has been at {middle:.3f} for {len(rewards)} steps and swings by {scatter:.3f}{apart}"
    return (seen, f"a rise of {config.least_rise:g}, or swings of at most {most:.3f}") if scatter > most else None


def _sudden_drop(past: _Past) -> _Found:
    return _drop_of_reward(past) or _drop_of_accuracy(past)


def _drop_of_reward(past: _Past) -> _Found:
    config, now = past.config, past.now("reward/mean")
    before = [past.now("reward/mean", ago) for ago in range(config.window, config.window + config.plateau_steps)]
    known = [mean for mean in before if mean is not None]
    if now is None or not known:
        return None
    best = max(known)
    least = min((1 - config.drop) * best, best - _BEYOND_CHANCE * past.chance(config.window) / math.sqrt(config.window))
    seen = f"the reward fell to {now:.3f} from {best:.3f} within {config.window + config.plateau_steps} steps"
    return (seen, f"at least {least:.3f}") if now < least else None


def _drop_of_accuracy(past: _Past) -> _Found:
    names = ("eval/accuracy", "eval/ci_low", "eval/ci_high")
    recent = list(zip(*(past.of(name)[-_RECENT_EVALS:] for name in names), strict=False))
    if not recent:
        return None
    (now, _, highest), (best, lowest, _) = recent[-1], max(recent)
    least = (1 - past.config.drop) * best
    seen = f"held-out accuracy fell to {now:.3f} from {best:.3f} within {len(recent)} evaluations"
    return (seen, f"at least {least:.3f}") if now < least and highest < lowest else None


def _length_explosion(past: _Past) -> _Found:
    config, length, cut = past.config, past.since_start("length/mean"), past.since_start("length/truncated")
    if cut is not None and cut[1] > max(config.truncated, cut[0] + _MORE_CUT):
        most = max(config.truncated, cut[0] + _MORE_CUT)
        return f"{cut[1]:.0%} of completions are cut at the limit, {cut[0]:.0%} at the start", f"at most {most:.0%}"
    if length is not None and length[1] > config.length_growth * length[0] and not past.rises():
        seen = f"completions have {length[1]:.0f} tokens, {length[0]:.0f} at the start, and the reward does not rise"
        return seen, f"at most {config.length_growth * length[0]:.0f}"
    return None


def _likelihood_blow_up(past: _Past) -> _Found:
    both = past.since_start("logprob/wrong")
    if both is None:
        return None
    start, now = both
    least = min(start - past.config.wrong_logprob_fall, 2 * start)
    seen = f"tokens of wrong rollouts have a mean log p of {now:.2f} nats, {start:.2f} at the start"
    return (seen, f"at least {least:.2f}") if now < least else None


def _ratio_tail(past: _Past) -> _Found:
    now, most = past.now("ratio/tail"), past.config.ratio_tail
    seen = f"{now:.1%} of rollout tokens have a ratio outside of [1/2, 2]" if now is not None else ""
    return (seen, f"at most {most:.1%}") if now is not None and now > most else None


def _engine_mismatch(past: _Past) -> _Found:
    now, most = past.now("mismatch/mean"), past.config.mismatch
    seen = f"trainer and engine differ by {now:.3g} nats a token" if now is not None else ""
    return (seen, f"at most {most:g}") if now is not None and now > most else None


def _stale_rollouts(past: _Past) -> _Found:
    now, least = past.now("lag/is_ess"), past.config.least_ess
    seen = f"of the rollouts' tokens {now:.0%} count, by their importance weights" if now is not None else ""
    return (seen, f"at least {least:.0%}") if now is not None and now < least else None


def _reward(past: _Past) -> str:
    return f"{past.now('reward/mean') or 0.0:.3f}"


_CHECKS: dict[AlarmName, Callable[[_Past], _Found]] = {
    "entropy-collapse": _entropy_collapse,
    "entropy-blow-up": _entropy_blow_up,
    "reward-plateau": _reward_plateau,
    "sudden-drop": _sudden_drop,
    "length-explosion": _length_explosion,
    "likelihood-blow-up": _likelihood_blow_up,
    "ratio-tail": _ratio_tail,
    "engine-mismatch": _engine_mismatch,
    "stale-rollouts": _stale_rollouts,
}
_REMEDIES: dict[AlarmName, str] = {
    "entropy-collapse": "Give rollouts more weight (train.rl_lr_scale, method.rl_coef of srft), show fewer "
    "demonstrations, or add an entropy bonus (method.entropy_coef).",
    "entropy-blow-up": "Lower train.lr, the entropy bonus, or the terms that push wrong rollouts away "
    "(train.term_scales).",
    "reward-plateau": "SFT and RL may pull apart: lower train.sft_lr_scale, check the demonstrations against their "
    "verifier, and the reward.",
    "sudden-drop": "Start again from a checkpoint before it with a lower train.lr; where the demonstrations lie far "
    "from the policy (logprob/demo), lower train.sft_lr_scale.",
    "length-explosion": "Lower rollout.max_new_tokens, let the reward or the method count length, and see in the "
    "samples what completions repeat.",
    "likelihood-blow-up": "Lower the term on wrong rollouts (train.term_scales.rollout_negative of srft), or take the "
    "form with a ratio (method.self_rollout=ratio).",
    "ratio-tail": "Make fewer updates of a step (train.updates_per_step), or lower train.lr.",
    "engine-mismatch": "Let both compute in one precision (engine.dtype, model.compute_dtype); until then rollouts are "
    "another policy's.",
    "stale-rollouts": "Lower train.lr, train.updates_per_step or rollout.max_lag, or let the engine compute in the "
    "trainer's precision (engine.dtype).",
}
