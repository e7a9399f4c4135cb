"""How far a run is: the last step after which its state was whole, and the checkpoint of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from srft.data.sampler import StepSampler
from srft.disk import sync_to_disk, writing
from srft.options import to_toml
from srft.policy.checkpoint import Checkpoints, load_optimizer, read_state
from srft.policy.learner import Learner
from srft.record.log import RECORDS
from srft.record.waiting import Waiting
from srft.responses import Group
from srft.sampled import Sampled
from srft.stop import Stopped


class Progress:
    """What a checkpoint needs besides the weights: a step that was not finished leaves no trace in it.

    All ranks have one and call it together.

    Args:
        run_dir: Folder of the run.
        learner: Holds the policy and its optimizer.
        sampler: Draws prompts and demonstrations; its state is noted after each step.
        data: From ``problems.data_state``, by which a resume tells other rows.
        waiting: Batches made for later steps, and groups that go on, noted with the sampler's state.
    """

    def __init__(
        self, run_dir: Path, learner: Learner, sampler: StepSampler, data: dict[str, Any], waiting: Waiting
    ) -> None:
        self._run_dir, self._learner, self._sampler, self._data = run_dir, learner, sampler, data
        self._waiting = waiting
        self.step = 0
        """Steps done."""
        self.unlogged: dict[str, float] | None = None
        """The row of that step while it lacks its evaluation."""
        self._saved_step = 0
        self._checkpoints = Checkpoints(run_dir, learner)
        self._sampler_state = sampler.state_dict()
        self._batches: list[Sampled] = []
        self._going: list[Group] = []
        self._memory: dict[str, Any] = {}

    def restore(self, checkpoint: Path | None) -> None:
        """Take the optimizer's, the sampler's and the loop's state from a checkpoint.

        Args:
            checkpoint: From ``whole_checkpoint``; the model was loaded from it. None: the run is at its start.

        Raises:
            ValueError: When it belongs to another model or other data.
        """
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        self._sampler.load_state_dict(state["sampler"])
        self._learner.memory.update(state.get("memory", {}))
        load_optimizer(checkpoint, self._learner)
        written = takewhile(Path.exists, (checkpoint / _waiting_of(rank) for rank in count()))
        self._waiting.read([path.read_text() for path in written], self._learner.world)
        self.reached(state["step"], state["unlogged"])
        self._saved_step = self.step

    def reached(self, step: int, unlogged: Mapping[str, float] | None) -> None:
        """Note that a step is whole: weights and moments have moved, and the engine has them.

        Args:
            step: Its number.
            unlogged: Its row as far as it is known, None once ``metrics.jsonl`` has it.
        """
        self.step, self._sampler_state = step, self._sampler.state_dict()
        self._batches, self._going = list(self._waiting.batches.values()), self._waiting.going
        self._memory = copy.deepcopy(self._learner.memory)
        self.unlogged = None if unlogged is None else dict(unlogged)

    def save(self) -> None:
        """Write a checkpoint of the last whole step, unless there is one, or begin to: see ``Checkpoints.save``.

        Raises:
            WriteError: On the first rank, when the disk refuses this one or the one before; others are whole.
            Elsewhere: On the other ranks then.
        """
        if self.step == self._saved_step:
            return
        self._learner.world.on_first(self._sync_record)
        state = {
            "sampler": self._sampler_state,
            "memory": self._memory,
            "config": to_toml(self._learner.config.without_resume()),
            "unlogged": self.unlogged,
            "data": self._data,
            "start": self._learner.frozen.start,
        }
        own = _waiting_of(self._learner.world.rank)
        # of every rank or none, for they are read up to the first that is missing
        has_any = self._learner.world.largest(len(self._batches) + len(self._going))
        texts = {own: self._waiting.lines(self._batches, self._going)} if has_any else {}
        self._checkpoints.save(self.step, state, texts)
        self._saved_step = self.step

    def _sync_record(self) -> None:
        for name in RECORDS:
            # on the disk before the checkpoint is, which promises the rows up to its step
            with writing(path := self._run_dir / f"{name}.jsonl"):
                sync_to_disk(path)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save the last whole step when a signal ends the body; however it ends, wait for what is being written.

        Raises:
            WriteError: As ``save``, unless the body raised something else that is no signal.
            Elsewhere: As ``save``.
        """
        try:
            yield
        except Stopped:
            self.save()
            self._checkpoints.wait()
            raise
        except BaseException as error:
            try:
                self._checkpoints.wait()
            except (OSError, RuntimeError) as failure:
                error.add_note(str(failure))
            raise
        self._checkpoints.wait()


def _waiting_of(rank: int) -> str:
    """The file of a checkpoint with the batches that wait on a rank."""
    return f"rollouts-{rank}.jsonl" if rank else "rollouts.jsonl"
