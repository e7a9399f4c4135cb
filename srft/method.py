"""What the trainer asks of a method, and what it tells one of a step and of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from torch import Tensor

from srft.batch import Batch
from srft.curves import Curves
from srft.responses import Group, Response, Totals
from srft.section import Section
from srft_kernels import PolicyLoss

Loss = Callable[..., PolicyLoss]
"""Called as loss(hidden_states, lm_head_weight, labels=…, temperature=…, …) with whatever else the head has."""
Kind = Literal["sft", "rl"]


@dataclass(frozen=True)
class Figure:
    """A number of one update, and how those of a step's updates become one.

    Args:
        value: The number.
        by: "mean": their average, each counted ``weight`` times; "max": the largest; "last": that of the last update.
        weight: Tokens that the mean is over, or 1 for a number of the update as such. >= 0.
    """

    value: float
    by: Literal["mean", "max", "last"] = "mean"
    weight: float = 1.0


@dataclass(frozen=True)
class StepInfo:
    """Where in the run a step is.

    Args:
        step: Its number, from 1.
        steps: Steps of the whole run.
        max_new_tokens: Longest completion, in tokens.
        memory: What the method has noted for later, by name: JSON, part of every checkpoint, the same on every rank.
    """

    step: int
    steps: int
    max_new_tokens: int
    memory: dict[str, Any]


@dataclass(frozen=True)
class UpdateInfo:
    """One optimizer update as a whole, known before its first micro-batch.

    Args:
        totals: Counts over all its micro-batches: what loss terms are divided by.
        step: The step it belongs to, from 1.
        max_new_tokens: Longest completion, in tokens.
        entropy: 0-d fp32 mean entropy over all its tokens, nats, where the method has ``needs_entropy``, else None.
        entropies: The same of its tokens of a kind, by "rollout" and "demo"; without a kind that it has no tokens of.
        memory: As in ``StepInfo``.
        scales: Factors of the method's terms, by name; 1 where one is absent.
        rollouts_per_prompt: As many as the options of train say.
        demos_per_prompt: Likewise.
    """

    totals: Totals
    step: int
    max_new_tokens: int
    entropy: Tensor | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    entropies: Mapping[str, float] = field(default_factory=dict)
    rollouts_per_prompt: int = 1
    demos_per_prompt: int = 1

    def scale(self, term: str) -> float:
        """Return the factor of a term: the method multiplies the weights of the term's tokens by it.

        Args:
            term: One of the method's ``terms``.
        """
        return self.scales.get(term, 1.0)


class BaseMethod(Section, ABC):
    """What the trainer asks of a method. Its options are fields, with their help in the text below each."""

    needs_rollouts: ClassVar[bool] = True
    """Whether it learns from completions of its own policy."""
    needs_demos: ClassVar[bool] = True
    """Whether it learns from demonstrations."""
    needs_paired_demos: ClassVar[bool] = False
    """Whether its demonstrations must answer the prompts of its rollouts, so that they cannot be a set of their own."""
    shows_demos: ClassVar[bool] = False
    """Whether its teacher reads a demonstration with the prompt of a rollout, as ``show`` words it."""
    terms: ClassVar[Mapping[str, Kind]] = {}
    """Terms of its loss that have a scale of their own, and what each learns from: likelihood or rewards."""
    takes_lag: ClassVar[bool] = False
    """Whether its loss multiplies what rollouts count by ``Batch.importance``, as ``token_weights`` does on request, so
    that they may be of an older policy (``rollout.max_lag``); and no step of it goes by what the one before noted."""
    fewest_rollouts: ClassVar[int] = 1
    """Fewest rollouts of a prompt that it can learn from, where it needs any."""
    curves: ClassVar[tuple[Curves, ...]] = ()
    """Figures of its own in the report."""
    file_text: ClassVar[str] = ""
    """The text of the file it was read from, which a run keeps; empty where it is built-in."""

    name: str
    """The objective that is trained; --help method.name=… shows the options of another. Your own is a Python file with
    a class Method."""

    @property
    def label(self) -> str:
        """A word for titles."""
        return Path(self.name).stem

    @property
    def trains_demos(self) -> bool:
        """Whether demonstrations are responses of its updates, not just what rollouts begin with or a teacher reads."""
        return self.needs_demos

    @property
    def counts_prompts(self) -> bool:
        """Whether it goes by how many groups a step has, or changes that, so that all begin and end in it: one whose
        groups give way to others, or that makes an update of what it keeps of theirs.
        """
        own = type(self)
        return own.wants_another is not BaseMethod.wants_another or own.further is not BaseMethod.further

    @property
    def needs_entropy(self) -> bool:
        """Whether the mean entropy of a whole update must be known before its loss: one more forward pass."""
        return False

    @property
    def needs_old(self) -> bool:
        """Whether ``Batch.old_logprobs`` and ``old_entropy`` must be known also where a step has a single update: one
        more forward pass.
        """
        return False

    @property
    def needs_demo_loss(self) -> bool:
        """Whether it goes by ``eval/demo_loss``, so that some held-out problems must have demonstrations."""
        return False

    @property
    def needs_ref(self) -> bool:
        """Whether ``Batch.ref_logprobs`` must be known: those of the policy as the run starts, or of
        ``model.reference``. A frozen model in memory, unless the policy has adapters, and one more forward pass.
        """
        return False

    @property
    def taught_by(self) -> str | None:
        """Who gives ``Batch.teacher_logprobs`` of rollouts: "policy", as it is before the step's updates, "reference",
        the model of ``needs_ref``, a folder or hub id of another, or None for nobody.
        """
        return None

    def __init_subclass__(cls) -> None:
        """Take an inherited ``has_gradient`` away from a loss that it was not written for."""
        super().__init_subclass__()
        if "loss" in cls.__dict__ and "has_gradient" not in cls.__dict__:
            cls.has_gradient = BaseMethod.has_gradient  # type: ignore[method-assign]

    def kinds_in(self, totals: Totals) -> set[Kind]:
        """Return the kinds of its terms that an update has: of both, one without rollouts, or demonstrations, has one.

        Args:
            totals: Counts over the update.
        """
        kinds = set(self.terms.values())
        if len(kinds) > 1:
            kinds -= {"rl"} if not totals.rollout_tokens else {"sft"} if not totals.demo_tokens else set()
        return kinds

    def asks(self, now: StepInfo) -> tuple[bool, bool]:
        """Return whether a step wants rollouts, and whether demonstrations.

        Args:
            now: The step.
        """
        return self.needs_rollouts, self.needs_demos

    def resets_optimizer(self, now: StepInfo) -> bool:
        """Return whether the optimizer forgets its moments before the updates of a step.

        Args:
            now: The step.
        """
        return False

    def prefixes(self, demo_ids: Sequence[int], rollouts: int, now: StepInfo, rng: Random) -> list[int]:
        """Return with how many tokens of a demonstration of its prompt each rollout begins: 0 to all but the last.

        The policy goes on from there to the end or to ``max_new_tokens`` in all; rollout and prefix are judged as one.

        Args:
            demo_ids: The demonstration, its end token included.
            rollouts: Of the prompt.
            now: The step.
            rng: Seeded by run, step and prompt.
        """
        return [0] * rollouts

    def further(self, groups: Sequence[Group], now: StepInfo, gather: Callable[[Any], list[Any]]) -> list[Response]:
        """Return what one more update of the step learns from, after those of its groups; the same on every rank.

        Args:
            groups: This rank's, judged.
            now: The step.
            gather: Returns what every rank calls it with, by rank.
        """
        return []

    def note(self, row: Mapping[str, float], now: StepInfo) -> None:
        """Note in ``now.memory`` what later steps go by.

        Args:
            row: The row of the step as it is logged, its evaluation included where it has one.
            now: The step.
        """

    def wants_another(self, group: Group, tried: int) -> bool:
        """Return whether a group gives way to one of a new prompt before anything is learned.

        Args:
            group: Judged rollouts, one at least, and demonstrations of one prompt.
            tried: Groups that gave way in its place before, >= 0; for some number and all above the answer must be no.
        """
        return False

    def show(self, prompt: str, demo: str, is_chat: bool) -> str:
        """Return what the teacher reads in place of a prompt where ``shows_demos``.

        Args:
            prompt: The text of the prompt, of a conversation that of its last turn.
            demo: The demonstration. Rollout k of a prompt has the k-th that is joined to its group, and around again.
            is_chat: Whether the chat template then takes it; otherwise the completion goes on right after it.
        """
        return prompt

    @abstractmethod
    def learn_from(self, group: Group) -> list[Response]:
        """Fill in the advantages of a prompt's responses and return those that are learned from.

        Args:
            group: Judged rollouts and demonstrations of one prompt, advantages 0; modified in place.
        """

    def has_gradient(self, response: Response) -> bool:
        """Return whether the loss may give a response a gradient; one that it cannot is in no forward pass.

        It still counts in ``UpdateInfo.totals``, so that the gradient of the others is what it was. Yes is always
        right, and is the answer for a loss that a subclass defines without this.

        Args:
            response: Of ``learn_from``, with its advantages.
        """
        return True

    @abstractmethod
    def loss(self, batch: Batch, update: UpdateInfo) -> Loss:
        """Return an op of ``srft_kernels`` that lacks nothing but the head, the labels and the temperature.

        Args:
            batch: One micro-batch of the update.
            update: The update as a whole; what is divided by its counts does not depend on the split.
        """

    def figures(self, terms: Mapping[str, float], update: UpdateInfo) -> dict[str, Figure]:
        """Return what is logged beside losses and entropies, by metric name.

        Args:
            terms: Terms of the loss, summed over the micro-batches.
            update: The update as a whole.
        """
        return {}
