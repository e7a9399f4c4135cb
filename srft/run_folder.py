"""Which folder a run writes to, and which checkpoint it goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from srft.checkpoint import latest_checkpoint, read_state
from srft.config import Config
from srft.options import changed_keys, load_config_text

# options that may change when a run is resumed without making it another run
_FREE_ON_RESUME = (
    "train.steps", "train.resume", "train.eval_every", "train.save_every", "train.keep_checkpoints",
    "train.tokens_per_microbatch", "train.canary_tolerance", "train.device", "engine.", "reward.workers",
    "name", "runs_dir", "cache_dir", "data.eval_limit",
)  # fmt: skip


def choose_run_dir(config: Config) -> tuple[Path, Path | None]:
    """Pick the run's folder and the checkpoint to go on from.

    Args:
        config: The whole configuration.

    Returns:
        The folder, and the newest complete checkpoint when resuming, else None. Without resume a folder that
        holds a run is left alone and a numbered one beside it is taken.

    Raises:
        ValueError: When the checkpoint was made with options that make it another run, or is past train.steps.
    """
    folder = config.run_dir
    if not config.train.resume:
        number = 2
        while True:
            try:
                folder.mkdir(parents=True)  # taken at once, so that two runs started together do not share it
                return folder, None
            except FileExistsError:
                folder = config.runs_dir / f"{config.name}-{number}"
                number += 1
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None:
        made_with = read_state(checkpoint)["config"]
    elif (folder / "config.toml").exists():
        made_with = (folder / "config.toml").read_text()
    else:
        return folder, None
    changed = {
        key: values
        for key, values in changed_keys(load_config_text(made_with), config).items()
        if not key.startswith(_FREE_ON_RESUME)
    }
    if changed:
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"{checkpoint or folder} belongs to a run with other options: {listed}. Restore them, or set another name"
        )
    if checkpoint is not None and (step := read_state(checkpoint)["step"]) > config.train.steps:
        raise ValueError(f"{checkpoint} is at step {step}, past train.steps={config.train.steps}; raise train.steps")
    return folder, checkpoint


@contextmanager
def given_back_if_empty(run_dir: Path) -> Iterator[None]:
    """Remove the run's folder when the body fails before anything is written to it.

    Args:
        run_dir: From ``choose_run_dir``.
    """
    try:
        yield
    finally:
        with suppress(OSError):  # rmdir refuses a folder that holds something
            run_dir.rmdir()
            run_dir.parent.rmdir()
