"""Everything a resumed run needs, written so that a kill at any moment leaves the last complete checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``checkpoints/step_<step>``: a Hugging Face folder, the optimizer's moments, and the loop's state.

    No random-number state is stored: every step seeds its generators from the run's seed and the step's number.

    Args:
        run_dir: Folder of the run.
        step: Steps done.
        model: The policy.
        tokenizer: Saved beside the model.
        optimizer: Its per-parameter state is stored under the parameters' names.
        state: Anything JSON holds.
        keep: Newest checkpoints that stay; older ones go once this one is complete.

    Returns:
        The folder.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name("." + folder.name + ".partial")
    for left_over in folder.parent.glob(".step_*"):  # of a killed run
        shutil.rmtree(left_over)
    export_model(partial, model, tokenizer)
    names = {id(p): n for n, p in model.named_parameters()}
    moments = {
        f"{names[id(p)]}:{key}": value.detach().cpu().contiguous()
        for p, entries in optimizer.state.items()
        for key, value in entries.items()
    }
    save_file(moments, partial / _OPTIMIZER)
    (partial / _STATE).write_text(json.dumps({"step": step, **state}))
    _replace_folder(partial, folder)
    complete = sorted(folder.parent.glob("step_*"), key=_step_of)
    for old in complete[:-keep]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None.

    Args:
        run_dir: Folder of the run.
    """
    return max((run_dir / "checkpoints").glob("step_*"), default=None, key=_step_of)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the loop's state stored in a checkpoint.

    Args:
        folder: From ``latest_checkpoint``.
    """
    return json.loads((folder / _STATE).read_text())


def load_optimizer(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's moments.

    Args:
        folder: From ``latest_checkpoint``.
        model: The policy the moments belong to.
        optimizer: Filled in.

    Raises:
        ValueError: When the stored moments belong to another model.
    """
    stored = load_file(folder / _OPTIMIZER)
    parameters = dict(model.named_parameters())
    for name, value in stored.items():
        parameter_name, key = name.rsplit(":", 1)
        if parameter_name not in parameters:
            raise ValueError(
                f"{folder / _OPTIMIZER} holds moments of {parameter_name}, which this model lacks"
            )
        parameter = parameters[parameter_name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][key] = value if value.dim() == 0 else value.to(parameter.device)


def export_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a plain Hugging Face folder that ``AutoModelForCausalLM`` and vLLM load.

    Args:
        folder: Created or replaced.
        model: The policy.
        tokenizer: Saved beside it.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _replace_folder(partial, folder)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _replace_folder(partial: Path, final: Path) -> None:
    """Make a fully written folder appear under its name at once."""
    for path in [*partial.iterdir(), partial]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    shutil.rmtree(old, ignore_errors=True)
    handle = os.open(final.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
