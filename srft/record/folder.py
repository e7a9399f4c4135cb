"""Which folder a run writes to, and which checkpoint it goes on from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.options import changed_keys, load_config_text
from srft.policy.checkpoint import newest_checkpoint, read_state, whole_checkpoint
from srft.policy.parallel import ALONE, World
from srft.record.files import LOCK, lock_folder
from srft.record.recorded import steps_recorded

METHOD_FILE = "method.py"
"""The file of a user's method as the run was started with it."""
# options that may change when a run is resumed without making it another run
_FREE_ON_RESUME = (
    "train.steps", "train.resume", "train.eval_every", "train.eval_samples",
    "train.eval_temperature", "data.eval_sets", "train.save_every", "train.keep_checkpoints",
    "train.async_checkpoints", "train.tokens_per_microbatch", "train.canary_tolerance", "train.device", "train.ranks",
    "train.shard_ranks", "train.cpu_offload", "train.collective_deadline_s", "train.max_skipped_updates", "engine.",
    "reward.workers", "name", "runs_dir", "cache_dir", "data.eval_limit", "model.gradient_checkpointing",
    "model.attention", "model.compile", "model.trust_remote_code", "model.lora.merge", "train.page",
    "train.tensorboard", "train.wandb", "train.grad_terms_every", "train.stop_on_alarm", "train.record_rollouts",
    "alarms.",
)  # fmt: skip
# where the data lies is free too once a checkpoint remembers its rows
_JUDGED_BY_ROWS = ("data.train", "data.eval", "data.demos")


@contextmanager
def run_folder(config: Config, world: World = ALONE) -> Iterator[tuple[Path, Path | None]]:
    """Take the run's folder for as long as the body runs, and find the checkpoint to go on from; the first rank does.

    The folder is locked, so that no other process writes to it; the lock goes with the process, however it ends.
    Without resume a folder that holds a run is left alone and a numbered one beside it is taken. A folder in which
    nothing was written is removed again. What ends the body after training has begun carries a note that says from
    which checkpoint the run can go on.

    Args:
        config: The whole configuration.
        world: The ranks.

    Yields:
        The folder, and the newest complete checkpoint when resuming, else None.

    Raises:
        ValueError: When another process has the folder, or its checkpoint is another run's or past train.steps, or
            every checkpoint is damaged.
    """
    with ExitStack() as stack:
        yield world.on_first(lambda: stack.enter_context(_taken_folder(config)))


@contextmanager
def _taken_folder(config: Config) -> Iterator[tuple[Path, Path | None]]:
    folder, number = config.run_dir, 2
    lock = lock_folder(folder)
    if config.train.resume and lock is None:
        raise ValueError(f"another process is writing to {folder}; wait for it to end, or set another name")
    while not config.train.resume and (lock is None or (folder / "metrics.jsonl").exists()):
        if lock is not None:
            lock.close()
        folder = config.runs_dir / f"{config.name}-{number}"
        lock = lock_folder(folder)
        number += 1
    assert lock is not None
    try:
        yield folder, _checkpoint(config, folder) if config.train.resume else None
    except ValueError:  # a mistake in the options or the data, before anything was trained
        raise
    except BaseException as error:
        error.add_note(_what_is_safe(folder, rollouts=config.train.rollouts_only))
        raise
    finally:
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
            with suppress(OSError):  # refused where other runs are
                folder.parent.rmdir()
        lock.close()


def refuse_other_data(config: Config, now: dict[str, Any], checkpoint: Path | None) -> None:
    """Check that a resumed run has the rows that its checkpoint was made on.

    Args:
        config: The whole configuration.
        now: ``data_state`` of the problems as read.
        checkpoint: Holds ``data_state`` when it was made; None for a run from the start.

    Raises:
        ValueError: Naming the source whose rows are other ones.
    """
    if checkpoint is None:
        return
    stored = read_state(checkpoint)["data"]
    if (stored["rows"], stored["train"]) != (now["rows"], now["train"]):
        counts = f"{stored['rows']} problems then, {now['rows']} now" if stored["rows"] != now["rows"] else "other ones"
        raise ValueError(
            f"data.train={config.data.train} does not hold the rows that {checkpoint} was made on ({counts}); restore "
            "them, or set another name"
        )
    if stored.get("demos") != now.get("demos"):
        raise ValueError(
            f"data.demos={config.data.demos} does not hold the demonstrations that {checkpoint} was made on; restore "
            "them, or set another name"
        )
    # data.eval_limit may change: the first problems must be the same
    if any(old != new for old, new in zip(stored["held_out"], now["held_out"], strict=False)):
        raise ValueError(
            f"data.eval={config.data.eval or config.data.train} does not hold the held-out rows that {checkpoint} was "
            "judged on; restore them, or set another name"
        )


def _checkpoint(config: Config, folder: Path) -> Path | None:
    """Newest whole checkpoint, after checking that it and the options belong to one run."""
    kept = folder / METHOD_FILE
    if config.method.file_text and kept.is_file() and kept.read_bytes() != config.method.file_text.encode():
        raise ValueError(
            f"method.name={config.method.name} differs from the file that {folder} was made with; "
            f"restore that, which is kept as {kept}, or set another name"
        )
    checkpoint, notes = whole_checkpoint(folder)
    for note in notes:
        print(note, file=sys.stderr)
    if checkpoint is not None:
        made_with = read_state(checkpoint)["config"]
    elif (folder / "config.toml").exists():
        made_with = (folder / "config.toml").read_text()
    else:
        return None
    try:
        before = load_config_text(made_with)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint or folder} was made with options that cannot be read: {error}; set another name"
        ) from None
    changed = {
        key: values
        for key, values in changed_keys(before, config).items()
        if not key.startswith(_FREE_ON_RESUME) and not (checkpoint is not None and key in _JUDGED_BY_ROWS)
    }
    if "method.name" in changed:
        # that another method has other options goes without saying
        changed = {key: values for key, values in changed.items() if key == "method.name" or key[:7] != "method."}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"{checkpoint or folder} belongs to a run with other options: {listed}. Restore them, or set another name"
        )
    if checkpoint is not None and (step := read_state(checkpoint)["step"]) > config.train.steps:
        raise ValueError(f"{checkpoint} is at step {step}, past train.steps={config.train.steps}; raise train.steps")
    return checkpoint


def _what_is_safe(folder: Path, *, rollouts: bool) -> str:
    """Say from where a run that ended early can go on."""
    if rollouts:
        done = f"the rollouts of {steps_recorded(folder)} steps are complete"
        return f"{done}, and name={folder.name} train.resume=true goes on after them"
    newest = newest_checkpoint(folder)
    if newest is None:
        return "no checkpoint was written yet"
    return f"{newest} is complete, and name={folder.name} train.resume=true goes on from it"
