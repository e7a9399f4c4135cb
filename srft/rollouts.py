"""The judged groups of each step: made when it asks for them, or while the steps before it are trained."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from srft.config import Config
from srft.data.prompts import Prompt
from srft.data.sampler import StepSampler
from srft.dataset import Prompts
from srft.method import StepInfo
from srft.policy.learner import Learner
from srft.policy.lora import adapters
from srft.record.metrics import Clock
from srft.record.waiting import Waiting
from srft.responses import Group
from srft.rollout import Actor, judge, resample, roll_out
from srft.sampled import Sampled


class Rollouts:
    """Draws prompts and has them answered and judged, ``rollout.steps_ahead`` steps before they are learned from.

    With n >= 1 of these a thread makes one batch at a time: that of step s by the policy after max(0, s - 1 - n) steps,
    so that a run has the same rows every time. ``take(k)`` gives the engine step k + n, and ``wait`` takes it back when
    step k is trained and the weights are to move: they do so between batches alone. So n = 1 already overlaps all that
    there is to overlap, and what is made is behind by n.

    With ``rollout.partial_tokens`` a batch is of the groups that end with it. Those that do not go on with the next, by
    its weights, and end within ``rollout.segments`` of them, so that no token is older than ``rollout.max_lag``.

    Args:
        learner: What it learns from is asked for.
        prompts: Those to draw from.
        sampler: Draws them; its state is that of all batches made.
        actor: Answers them, and judges the answers; between ``take`` and ``wait`` nobody else may use it.
        waiting: Batches made, and groups that go on; of a resumed run, those of its checkpoint.
        threads: Of the engine, where it computes in this process beside training; None: as many as training.
    """

    def __init__(
        self,
        learner: Learner,
        prompts: Prompts,
        sampler: StepSampler,
        actor: Actor,
        waiting: Waiting,
        threads: int | None = None,
    ) -> None:
        self._learner, self._prompts, self._sampler, self._actor = learner, prompts, sampler, actor
        self._ahead, self._waiting = learner.config.rollout.steps_ahead, waiting
        its = (threads or torch.get_num_threads(), learner.world.device)
        self._maker = ThreadPoolExecutor(1, "rollouts", _settle, its)
        self._made: Future[tuple[Sampled, list[Group]]] | None = None

    def take(self, step: int, clock: Clock) -> Sampled:
        """Return a step's judged groups, and with a lag begin those of a later step.

        Args:
            step: Its number; each is taken once, in order.
            clock: Has the seconds that training waits, as "rollout" and "reward".
        """
        if not self._ahead:
            made, self._waiting.going = self._make(self._learner.now(step), clock)
            with clock("rollout"):
                self._actor.engine.sleep()
            return made
        with clock("rollout"):
            # before the first step nothing is trained that could be waited for
            for early in range(step, step + self._ahead):
                if early not in self._waiting.batches:
                    self._begin(early)
                    self.wait()
            self._begin(step + self._ahead)
        return self._waiting.batches.pop(step).copy()

    def wait(self) -> None:
        """Wait until the batch that was begun is made; what went wrong with it is raised.

        Raises:
            EngineError: As ``Engine.generate``.
            ValueError: What a verifier or the method raises.
        """
        if self._made is not None:
            made, self._waiting.going = self._made.result()
            self._made, self._waiting.batches[made.step] = None, made

    def close(self) -> None:
        """Wait until nobody uses the engine any more; what is being made then is made again by a run that goes on."""
        self._maker.shutdown()

    def _begin(self, step: int) -> None:
        assert self._made is None
        now = self._learner.now(step)
        # what the step before notes must not depend on how far this one is
        now = replace(now, memory=copy.deepcopy(now.memory))
        self._made = self._maker.submit(self._make_beside, now)

    def _make_beside(self, now: StepInfo) -> tuple[Sampled, list[Group]]:
        clock = Clock(self._actor.world, now.step)
        made, going = self._make(now, clock)
        self._actor.world.at("")
        return replace(made, seconds=clock.seconds()["time/step"]), going

    def _make(self, now: StepInfo, clock: Clock) -> tuple[Sampled, list[Group]]:
        """A step's groups and those that go on after it, in the order in which their prompts were drawn."""
        config, actor = self._learner.config, self._actor
        with clock("rollout"):
            prompts, shown = self._draw(now)
            every = roll_out(config, actor, prompts, now, shown, self._waiting.going)
        with clock("reward"):
            judge(every, actor.pool)
        groups, going = ([group for group in every if group.is_open is kind] for kind in (False, True))
        with clock("rollout"):
            gave_way = resample(config, actor, groups, self._draw_more, now)
        behind = now.step - 1 if config.train.rollouts_only else config.rollout.max_lag
        oldest = max(0, now.step - 1 - behind)
        assert all(oldest <= s.version <= actor.engine.version for group in groups + gave_way for s in group.rollouts)
        ended = None
        if config.rollout.segments > 1:
            those, others = map(int, actor.world.sum([sum(bool(g.rollouts) for g in groups), len(going)]))
            ended = those, others
        return Sampled(now.step, groups, gave_way, ended=ended), going

    def _draw(self, now: StepInfo) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts of the next step and, where they are a set of their own, its demonstrations."""
        config = self._learner.config
        _, wants_demos = config.method.asks(now)
        count = config.train.prompts_per_step
        asked, shown = self._sampler.next(count, count * config.train.demos_per_prompt * wants_demos)
        return [self._prompts.train[i] for i in asked], [self._prompts.demos[i] for i in shown]

    def _draw_more(self, number: int) -> list[Prompt]:
        """Further prompts, the same on every rank."""
        return [self._prompts.train[i] for i in self._sampler.next(number, 0)[0]]


def _settle(threads: int, device: torch.device) -> None:
    """Give the thread that makes rollouts its cores, and the rank's GPU, which each thread has to choose."""
    torch.set_num_threads(threads)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def describe_lag(config: Config, threads: int | None, ranks: int) -> str:
    """Say in one sentence what is done at once.

    Args:
        config: The whole configuration, with a ``rollout.steps_ahead`` above 0.
        threads: The engine's, from ``cores_divided``.
        ranks: Those of the run, each with as many.
    """
    lag = config.rollout.steps_ahead
    said = f"While a step is trained, the engine makes the rollouts of the step {lag} ahead"
    if threads is not None:
        ours = torch.get_num_threads()
        said += f", with {threads} thread{'s' if threads > 1 else ''} beside training's {ours}"
        said += " on each rank" if ranks > 1 else ""
    return f"{said}; its weights are {lag} step{'s' if lag > 1 else ''} old then."


def describe_parts(config: Config) -> str:
    """Say in one sentence how completions go on over steps.

    Args:
        config: The whole configuration, with more than one of ``rollout.segments``.
    """
    parts = config.rollout.segments
    return (
        f"A completion gets {config.rollout.partial_tokens} tokens a step and goes on in the next, by its weights, for "
        f"{parts} steps at most; a group is learned from in the step in which the last of its completions ends."
    )


def describe_step(learner: Learner, data_note: str) -> str:
    """Say in one sentence what a step consists of.

    Args:
        learner: Its configuration says.
        data_note: From ``make_prompts``.
    """
    config, train = learner.config, learner.config.train
    parts = []
    if config.method.needs_rollouts:
        parts.append(f"{train.rollouts_per_prompt} rollouts of at most {config.rollout.max_new_tokens} tokens")
    if config.method.trains_demos:
        own = " of data.demos" if config.data.demos else ""
        parts.append(f"{train.demos_per_prompt} demonstration{'s' if train.demos_per_prompt > 1 else ''}{own}")
    size = f"{sum(p.numel() for p in learner.model.parameters()) / 1e6:.1f}M-parameter policy"
    each = f"Each of {train.steps} steps: {train.prompts_per_step} prompts x ({' + '.join(parts)})"
    if train.rollouts_only:
        return f"{each}, judged and recorded; the {size} is not trained; {data_note}."
    if config.model.lora.rank:
        adapted = sum(p.numel() for _, p in adapters(learner.model)) / 1e6
        size = f"{size}, of which {adapted:.3g}M in adapters are trained,"
    updates = f"{train.updates_per_step} update{'s' if train.updates_per_step > 1 else ''}"
    return (
        f"{each} -> {updates} of a {size} by {config.method.label}, at most {config.microbatch_tokens} tokens per "
        f"forward pass; {data_note}."
    )
