"""How far a run is that records rollouts and learns nothing: the files of its steps are its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srft.data.sampler import StepSampler
from srft.policy.parallel import World
from srft.record.files import read_json_lines
from srft.record.rollouts import read_about, step_file

# of what ``data_state`` returns; held-out problems are not asked
_ROWS = ("rows", "train", "demos")


class Recorded:
    """Has the interface of ``Progress``; a step's file says where it left the sampler: nothing is to be saved.

    Args:
        run_dir: Folder of the run.
        sampler: Draws prompts and demonstrations.
        data: From ``problems.data_state``, by which a resume tells other rows.
        world: The ranks.
    """

    def __init__(self, run_dir: Path, sampler: StepSampler, data: Mapping[str, Any], world: World) -> None:
        self._run_dir, self._sampler, self._world = run_dir, sampler, world
        self._data = {name: data[name] for name in _ROWS}
        self.step = 0
        """Steps done."""
        self.unlogged: dict[str, float] | None = None
        """Nothing is evaluated, and no row lacks it."""

    def restore(self, checkpoint: Path | None) -> None:
        """Go on after the last step that has its file and its row.

        Args:
            checkpoint: There is none.

        Raises:
            ValueError: When its rollouts are of other data.
        """
        self.step = self._world.on_first(lambda: steps_recorded(self._run_dir))
        if not self.step:
            return
        path = step_file(self._run_dir, self.step)
        about = read_about(path)
        if about["data"] != self._data:
            raise ValueError(
                f"{path} has rollouts of other rows than data.train and data.demos hold now; restore them, or set "
                "another name"
            )
        self._sampler.load_state_dict(about["sampler"])

    def facts(self) -> dict[str, Any]:
        """Return what the file of a step just made must tell beside its options, so that a run can go on after it."""
        return {"sampler": self._sampler.state_dict(), "data": self._data}

    def reached(self, step: int, unlogged: Mapping[str, float] | None) -> None:
        """Note that a step has its file and its row.

        Args:
            step: Its number.
            unlogged: None.
        """
        self.step = step

    def save(self) -> None:
        """Nothing is left to save."""

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Nothing is left to save then, either."""
        yield


def steps_recorded(run_dir: Path) -> int:
    """Return how many steps have their file and their row, from the first on without a gap.

    Args:
        run_dir: Folder of the run.
    """
    rows, _ = read_json_lines(run_dir / "metrics.jsonl")
    logged = max((row["step"] for row in rows), default=0)
    return next((step for step in range(logged) if not step_file(run_dir, step + 1).is_file()), logged)
