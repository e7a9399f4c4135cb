"""The rows of a run in TensorBoard and in Weights & Biases, as extras beside ``metrics.jsonl``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from srft.config import Config


class Tracker(Protocol):
    """Takes the rows of ``metrics.jsonl``, one after another."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Args:
            row: As it is written; values that are not finite are None.
        """

    def close(self) -> None:
        """Finish; nothing follows."""


_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def refuse_absent(config: Config) -> None:
    """Check that what the options ask for is installed.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: When it is not.
    """
    for option, package in _PACKAGES.items():
        asked = getattr(config.train, option)
        if asked and importlib.util.find_spec(package) is None:
            value = "true" if asked is True else asked
            remedy = f"pip install 'srft[{option}]', or leave it unset"
            raise ValueError(f"train.{option}={value}, but {package} is not installed; {remedy}")


def open_trackers(config: Config, run_dir: Path, resume_step: int | None) -> list[Tracker]:
    """Start what the options ask for.

    Args:
        config: The whole configuration.
        run_dir: The run's folder, in which their files lie.
        resume_step: Step of the checkpoint the run goes on from; None starts anew.
    """
    trackers: list[Tracker] = []
    if config.train.tensorboard:
        trackers.append(TensorBoard(run_dir / "tensorboard", resume_step))
    if config.train.wandb:
        trackers.append(WandB(config, run_dir, resume_step))
    return trackers


class TensorBoard:
    """Event files in a folder, for ``tensorboard --logdir runs``.

    Args:
        folder: Made when missing.
        resume_step: Later steps of an earlier session are not shown.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """As ``Tracker.write``."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """As ``Tracker.close``."""
        self._writer.close()


class WandB:
    """A run of a project in Weights & Biases; where it goes and who may see it is set by its own environment variables.

    Args:
        config: The whole configuration, which is shown beside it.
        run_dir: Its files lie there, and the id by which a resumed run goes on.
        resume_step: None starts a new run.
    """

    def __init__(self, config: Config, run_dir: Path, resume_step: int | None) -> None:
        wandb = importlib.import_module("wandb")
        noted = run_dir / "wandb-id.txt"
        known = noted.read_text().strip() if resume_step is not None and noted.exists() else None
        self._run = wandb.init(
            project=config.train.wandb, name=config.name, dir=str(run_dir), id=known,
            resume="allow" if known else None, config=config.model_dump(mode="json"),
            # the screen is the run's own, and no code leaves the machine
            settings={"silent": True, "console": "off", "save_code": False},
        )  # fmt: skip
        noted.write_text(self._run.id + "\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """As ``Tracker.write``."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        """As ``Tracker.close``."""
        self._run.finish()
