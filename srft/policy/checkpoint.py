"""Everything a resumed run needs, written so that a kill at any moment leaves the last complete checkpoint.

Each checkpoint ends with a manifest, the size and hash of every file, which is checked before one is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.disk import sync_to_disk, writing
from srft.policy.learner import Learner

_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"


def save_checkpoint(run_dir: Path, step: int, learner: Learner, state: dict[str, Any]) -> Path:
    """Write ``checkpoints/step_<step>``: a Hugging Face folder, the optimizer's moments, and the loop's state.

    No random-number state is stored: every step seeds its generators from the run's seed and the step's number.

    Args:
        run_dir: Folder of the run.
        step: Steps done.
        learner: The state of its optimizer is stored under the parameters' names. Of the checkpoints the newest
            ``train.keep_checkpoints`` stay; older ones go once this one is complete.
        state: Anything JSON holds.

    Returns:
        The folder.

    Raises:
        WriteError: When the disk refuses; what was written of this checkpoint is gone, those before are whole.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    for left_over in folder.parent.glob(".step_*"):  # of a killed run
        shutil.rmtree(left_over)
    names = {id(p): n for n, p in learner.model.named_parameters()}
    moments = {
        f"{names[id(p)]}:{key}": value.detach().cpu().contiguous()
        for p, entries in learner.optimizer.state.items()
        for key, value in entries.items()
    }
    with _appearing_at_once(folder) as partial:
        learner.model.save_pretrained(partial)
        learner.tokenizer.save_pretrained(partial)
        save_file(moments, partial / _OPTIMIZER)
        (partial / _STATE).write_text(json.dumps({"step": step, **state}))
    for old in _checkpoints(run_dir)[: -learner.config.train.keep_checkpoints]:
        shutil.rmtree(old)
    return folder


def whole_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint of a run that is as it was written.

    Newer ones that are damaged are renamed to ``damaged-step_<step>``, so that they are not taken for steps of the
    run that goes on from an older one.

    Args:
        run_dir: Folder of the run.

    Returns:
        (checkpoint, notes): the folder, None when there is none, and a sentence on each damaged one.

    Raises:
        ValueError: When there are checkpoints, and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(_checkpoints(run_dir)):
        found = damage(folder)
        if found is None:
            for each in damaged:
                aside = each.with_name(f"damaged-{each.name}")
                shutil.rmtree(aside, ignore_errors=True)
                each.rename(aside)
            return folder, [
                f"Checkpoint {each} is damaged: {reason}; going on from {folder.name}."
                for each, reason in damaged.items()
            ]
        damaged[folder] = found
    if damaged:
        raise ValueError(
            f"every checkpoint of {run_dir} is damaged, so it cannot go on: "
            + "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
            + ". Set another name to start a new run; model.name=<folder> starts from weights that still load"
        )
    return None, []


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run as it lies there, not looked into; None when there is none.

    Args:
        run_dir: Folder of the run.
    """
    return max(_checkpoints(run_dir), default=None, key=_step_of)


def damage(folder: Path) -> str | None:
    """Say what differs from the folder that was written, by its manifest; None when nothing does.

    Args:
        folder: From ``save_checkpoint`` or ``export_model``.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _digest_of_list(files):
            return f"{_MANIFEST} was changed"
    except FileNotFoundError:
        return f"it has no {_MANIFEST}; an earlier version wrote it, or a copy of it was cut short"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["size"]:
            return f"{name} has {size:,} bytes, and had {expected['size']:,} when it was written"
        if _digest(path) != expected["sha256"]:
            return f"{name} has other contents than were written"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the loop's state stored in a checkpoint.

    Args:
        folder: From ``whole_checkpoint``.
    """
    return json.loads((folder / _STATE).read_text())


def load_optimizer(folder: Path, learner: Learner) -> None:
    """Restore the optimizer's moments.

    Args:
        folder: From ``whole_checkpoint``.
        learner: Its optimizer is filled in.

    Raises:
        ValueError: When the stored moments belong to another model.
    """
    stored = load_file(folder / _OPTIMIZER)
    parameters = dict(learner.model.named_parameters())
    for name, value in stored.items():
        parameter_name, key = name.rsplit(":", 1)
        if parameter_name not in parameters:
            raise ValueError(
                f"{folder / _OPTIMIZER} holds moments of {parameter_name}, which this model lacks"
            )
        parameter = parameters[parameter_name]
        # AdamW keeps its step counter on the CPU
        learner.optimizer.state[parameter][key] = value if value.dim() == 0 else value.to(parameter.device)


def export_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a plain Hugging Face folder that ``AutoModelForCausalLM`` and vLLM load, and its manifest.

    Args:
        folder: Created or replaced.
        model: The policy.
        tokenizer: Saved beside it.

    Raises:
        WriteError: When the disk refuses; a folder that was there before is whole.
    """
    with _appearing_at_once(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Every checkpoint, oldest first; none is half written, any may have been damaged since."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


@contextmanager
def _appearing_at_once(folder: Path) -> Iterator[Path]:
    """Let the body fill a folder beside ``folder``, which takes its place when it is whole and on the disk.

    Whatever breaks the body removes the new folder and leaves the old one.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            yield partial
            files = {
                path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            manifest = {"files": files, "sha256": _digest_of_list(files)}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            for path in [*partial.rglob("*"), partial]:
                sync_to_disk(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
        sync_to_disk(folder.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_list(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
