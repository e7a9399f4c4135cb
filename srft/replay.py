"""The judged groups of each step as a run has recorded them, in place of new ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.data.prompts import Prompt
from srft.dataset import Prompts
from srft.method import BaseMethod, StepInfo
from srft.policy.learner import Learner
from srft.record.metrics import Clock
from srft.record.rollouts import SHAPES, by_group, options_of, read_about, read_rows, step_file
from srft.responses import SAMPLED, Group, Response
from srft.sampled import Sampled


class Replay:
    """Has the interface of ``Rollouts``, and neither an engine nor verifiers.

    Args:
        learner: ``train.replay`` of its configuration names the run; what the method asks for is taken.
        prompts: Those of the record are among them.

    Raises:
        ValueError: When the record has a problem that these prompts lack.
    """

    def __init__(self, learner: Learner, prompts: Prompts) -> None:
        self._learner = learner
        self._train = {prompt.example.id: prompt for prompt in prompts.train}
        self._demos = {prompt.example.id: prompt for prompt in prompts.demos}
        for step in range(1, learner.config.train.steps + 1):
            for row in read_rows(self._file(step), ["id"]):
                if row["id"] not in self._train and row["id"] not in self._demos:
                    raise ValueError(
                        f"{self._file(step)} has the problem {row['id']}, which is not among the training prompts; set "
                        "data.* as in the run that was recorded"
                    )

    def take(self, step: int, clock: Clock) -> Sampled:
        """Return a step's groups with the rewards that they were given.

        Args:
            step: Its number.
            clock: Has the seconds of reading as "rollout".

        Raises:
            ValueError: When prompts have other tokens than then, or there is nothing of what the method learns from.
        """
        with clock("rollout"):
            now, world = self._learner.now(step), self._learner.world
            asked: list[Group] = []
            shown: list[Group] = []
            gave_way: list[Group] = []
            for rows in by_group(read_rows(self._file(step))):
                group = self._group(rows)
                (gave_way if rows[0]["gave_way"] else asked if group.rollouts else shown).append(group)
            ended = read_about(self._file(step)).get("ended")
            self._keep_asked(asked + shown, now, may_lack=ended is not None)
            groups = world.own([g for g in asked if g.rollouts or g.demos]) + world.own([g for g in shown if g.demos])
            return Sampled(step, groups, world.own(gave_way), ended=ended and (ended[0], ended[1]))

    def wait(self) -> None:
        """Nothing is being made."""

    def close(self) -> None:
        """Nothing is open."""

    def _file(self, step: int) -> Path:
        assert self._learner.config.train.replay is not None
        return step_file(self._learner.config.train.replay, step)

    def _group(self, rows: Sequence[Mapping[str, Any]]) -> Group:
        only_demos = all(row["is_demo"] for row in rows)
        prompt = self._prompt(rows[0], of_demos=only_demos)
        responses = [_response(prompt, row) for row in rows]
        return Group(
            prompt, [s for s in responses if not s.is_demo], [s for s in responses if s.is_demo],
            self._learner.config.rollout.max_new_tokens,
        )  # fmt: skip

    def _prompt(self, row: Mapping[str, Any], *, of_demos: bool) -> Prompt:
        first, second = (self._demos, self._train) if of_demos else (self._train, self._demos)
        prompt = first.get(row["id"]) or second[row["id"]]
        if prompt.prompt_ids != row["prompt_ids"]:
            raise ValueError(
                f"train.replay={self._learner.config.train.replay}: the prompt of {row['id']} has other tokens now; "
                "set data.*, model.tokenizer and model.chat_template as in the run that was recorded"
            )
        return prompt

    def _keep_asked(self, groups: list[Group], now: StepInfo, may_lack: bool) -> None:
        """Leave out the kind of response that the method does not learn from at this step.

        Of completions that go on over steps a step may have none.
        """
        method = self._learner.config.method
        for wanted, kind in zip(method.asks(now), ("rollouts", "demos"), strict=True):
            if wanted and not may_lack and not any(getattr(group, kind) for group in groups):
                raise ValueError(
                    f"{self._file(now.step)} has no {kind}, from which method.name={method.name} learns; record a run "
                    "that has"
                )
            if not wanted:
                for group in groups:
                    setattr(group, kind, [])


def _response(prompt: Prompt, row: Mapping[str, Any]) -> Response:
    # a record may be of before there were conversations, or several versions in a rollout
    known = [name for name in SAMPLED if name in row and name != "versions"]
    response = Response(prompt.prompt_ids, **{name: row[name] for name in known})
    sampled = 0 if row["is_demo"] else response.num_own - row["prefix_tokens"]
    of_tokens = [version for version in row.get("versions", [row["version"]] * sampled) if version is not None]
    response.versions = [(version, len(list(tokens))) for version, tokens in itertools.groupby(of_tokens)]
    return response


def refuse_unfit_record(config: Config) -> None:
    """Check that a run to be replayed has every step, with the options on which rollouts depend.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: Naming the step, or the option.
    """
    folder, method = config.train.replay, config.method
    if folder is None:
        return
    own = options_of(config)
    oldest = (0, 0, folder)
    # what such a method samples is no other one's
    is_particular = type(method).prefixes is not BaseMethod.prefixes or method.shows_demos
    for step in range(1, config.train.steps + 1):
        path = step_file(folder, step)
        if not path.is_file():
            raise ValueError(
                f"train.replay={folder} has no rollouts of step {step} of train.steps={config.train.steps}: there is "
                f"no {path}; lower train.steps, or record them with train.record_rollouts=true"
            )
        about = read_about(path)
        binding = SHAPES if is_particular or about["has_prefixes"] else SHAPES[:-1]
        for name in binding:
            if about[name] != own[name]:
                raise ValueError(
                    f"{path} was made with {name}={about[name]}, and this run has {own[name]}; set it to that"
                )
        versions = [row["version"] for row in read_rows(path, ["version", "is_demo"]) if not row["is_demo"]]
        oldest = max(oldest, (step - 1 - min(versions, default=step - 1), step, path))
    behind, step, path = oldest
    if method.needs_rollouts and behind > config.rollout.max_lag:
        raise ValueError(
            f"{path} has rollouts of the policy after {step - 1 - behind} steps, {behind} behind the one that learns, "
            f"and rollout.max_lag={config.rollout.max_lag} weights none so old; set it to {behind}"
        )


def describe_replay(config: Config) -> str:
    """Say in a sentence or two where rollouts come from, and what is left out.

    Args:
        config: The whole configuration, with ``train.replay``.
    """
    weighted = " What an older policy sampled counts by how likely it still is." if config.rollout.max_lag else ""
    return (
        f"Rollouts and rewards are those recorded in {config.train.replay}: no engine is started and no canary "
        f"compared, and of the held-out problems the loss of demonstrations alone is measured.{weighted}"
    )
