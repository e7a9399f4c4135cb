"""Everything a resumed run needs, written so that a kill at any moment leaves the last complete checkpoint.

A checkpoint is a folder of a model, or of its adapters where these are all that is trained, with the optimizer's
moments and the loop's state. Each rank writes its own rows, into files that are the same whatever the number of ranks,
so that any other number can go on from them, and texts of its own beside. A manifest, the size and hash of every file,
is written last and checked before a checkpoint is taken.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from srft.disk import WriteError, writing
from srft.policy.adapter import ADAPTER, named_adapters, write_settings
from srft.policy.export import write_config
from srft.policy.learner import Learner
from srft.policy.lora import adapted
from srft.policy.manifest import damage, digests, finish_folder, names_in, partial_of, start_folder
from srft.policy.parallel import Elsewhere
from srft.policy.tensor_files import FILE_BYTES, TensorFiles, files_of, open_slices
from srft.policy.weights import named_weights, own_part, own_rows, with_rows

_T = TypeVar("_T")
_STATE = "trainer_state.json"
_WEIGHTS, _OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class _Snapshot:
    """What a checkpoint will hold, and this rank's rows of it: (stem, name, first row, rows) each."""

    step: int
    state: dict[str, Any]
    texts: Mapping[str, str]
    files: dict[str, TensorFiles]
    parts: list[tuple[str, str, int, Tensor]]


class Checkpoints:
    """Writes the checkpoints of a run, beside training or while it waits; all ranks call every method together.

    No random-number state is stored: every step seeds its generators from the run's seed and the step's number.

    Args:
        run_dir: Folder of the run.
        learner: The state of its optimizer is stored under the parameters' names. ``train.async_checkpoints`` says
            whether training waits; of the checkpoints the newest ``train.keep_checkpoints`` stay, older ones go once
            a new one is complete.
    """

    def __init__(self, run_dir: Path, learner: Learner) -> None:
        self._run_dir, self._learner, self._world = run_dir, learner, learner.world
        beside = learner.config.train.async_checkpoints
        self._beside = self._world.size > 1 if beside is None else beside
        self._talk = self._world.beside()
        self._writer: threading.Thread | None = None
        self._fault: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], texts: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write ``checkpoints/step_<step>``, after the one before.

        Where training goes on meanwhile, this returns when the weights and moments are copied.

        Args:
            step: Steps done.
            state: Anything JSON holds; the first rank's is written.
            texts: Further files of this rank, by name.

        Raises:
            WriteError: On the first rank, when the disk refuses on one of them, now or for the one before; what was
                written of this checkpoint is gone, those before are whole.
            Elsewhere: On the other ranks then.
        """
        self.wait()
        snapshot = self._snapshot(step, state, texts)
        if not self._beside:
            self._write(snapshot)
            return
        # a daemon: where a rank is lost and the others are waited for in vain, the process can end all the same
        self._writer = threading.Thread(target=self._write_beside, args=(snapshot,), daemon=True, name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; nothing to do where there is none.

        Raises:
            WriteError: As ``save``.
            Elsewhere: As ``save``.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _snapshot(self, step: int, state: dict[str, Any], texts: Mapping[str, str]) -> _Snapshot:
        files, parts = {}, []
        for stem, tensors in (_trained(self._learner.model), (_OPTIMIZER, _moments(self._learner))):
            held = [(name, tensor.detach()) for name, tensor in tensors]
            # peft reads one file
            files[stem] = TensorFiles(stem, held, sys.maxsize if stem == ADAPTER else FILE_BYTES)
            for number, (name, tensor) in enumerate(held):
                if (rows := self._to_write(tensor, number)) is not None:
                    parts.append((stem, name, *rows))
        return _Snapshot(step, {"step": step, **state}, texts, files, parts)

    def _to_write(self, tensor: Tensor, number: int) -> tuple[int, Tensor] | None:
        """The rows of a tensor that this rank writes and the number of the first; replicas take turns."""
        if not isinstance(tensor, DTensor):
            rows, first, is_own = tensor, 0, self._world.is_first
        else:
            rows, first, mesh = own_part(tensor), own_rows(tensor)[0], tensor.device_mesh
            copies = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
            is_own = all(number % mesh.size(dim) == mesh.get_local_rank(dim) for dim in copies)
        if not is_own or (tensor.dim() and not len(rows)):
            return None
        # training moves what it does not wait for
        return first, rows.to("cpu", copy=self._beside)

    def _write_beside(self, snapshot: _Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # raised where it is waited for
            self._fault = error

    def _write(self, snapshot: _Snapshot) -> None:
        folder = self._run_dir / "checkpoints" / f"step_{snapshot.step:06d}"
        try:
            self._together(folder, lambda: self._begin(folder, snapshot) if self._world.is_first else None)
            self._together(folder, lambda: _write_parts(partial_of(folder), snapshot))
            found = self._together(folder, lambda: self._own_digests(partial_of(folder)))
            digest_of = {name: digest for part in found for name, digest in part.items()}
            self._together(folder, lambda: self._finish(folder, digest_of) if self._world.is_first else None)
        except BaseException:
            if self._world.is_first:
                shutil.rmtree(partial_of(folder), ignore_errors=True)
            raise

    def _together(self, folder: Path, do: Callable[[], _T]) -> list[_T]:
        """Do something on every rank and return all results; where one fails, all of them do."""
        result, fault = None, None
        try:
            with writing(folder):
                result = do()
        except Exception as error:
            if self._world.size == 1:
                raise
            fault = error
        if self._world.size == 1:
            return [result]  # type: ignore[list-item]
        told = None if fault is None else (isinstance(fault, WriteError), str(fault))
        everyone = self._talk.gather((told, result))
        faults = [each[0] for each in everyone if each[0] is not None]
        if not faults:
            return [each[1] for each in everyone]  # type: ignore[misc]
        if not self._world.is_first:
            raise Elsewhere(faults[0][1]) from fault
        if fault is not None:
            raise fault
        is_disk, message = faults[0]
        raise (WriteError if is_disk else RuntimeError)(message)

    def _begin(self, folder: Path, snapshot: _Snapshot) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left_over in folder.parent.glob(".step_*"):  # of a killed run
            shutil.rmtree(left_over)
        partial = start_folder(folder)
        (write_settings if adapted(self._learner.model) else write_config)(partial, self._learner.model)
        self._learner.tokenizer.save_pretrained(partial)
        (partial / _STATE).write_text(json.dumps(snapshot.state))
        for files in snapshot.files.values():
            files.create(partial)

    def _own_digests(self, partial: Path) -> dict[str, Any]:
        return digests(partial, self._world.own(names_in(partial)))

    def _finish(self, folder: Path, digest_of: dict[str, Any]) -> None:
        finish_folder(folder, digest_of)
        for old in checkpoints_of(self._run_dir)[: -self._learner.config.train.keep_checkpoints]:
            shutil.rmtree(old)


def _write_parts(partial: Path, snapshot: _Snapshot) -> None:
    for name, text in snapshot.texts.items():
        (partial / name).write_text(text)
    for stem, files in snapshot.files.items():
        files.write(partial, ((name, first, rows) for of, name, first, rows in snapshot.parts if of == stem))


def _trained(model: PreTrainedModel) -> tuple[str, Iterator[tuple[str, Tensor]]]:
    """What a checkpoint holds of a policy, and the stem of its files: of one with adapters these alone."""
    return (ADAPTER, named_adapters(model)) if adapted(model) else (_WEIGHTS, named_weights(model))


def _moments(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in learner.model.named_parameters():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            yield f"{name}:{key}", value


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
    for folder in reversed(checkpoints_of(run_dir)):
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
    return max(checkpoints_of(run_dir), default=None, key=step_of)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the loop's state stored in a checkpoint.

    Args:
        folder: From ``whole_checkpoint``.
    """
    return json.loads((folder / _STATE).read_text())


@torch.no_grad()
def load_optimizer(folder: Path, learner: Learner) -> None:
    """Restore the optimizer's moments; each rank reads those of its own rows.

    Args:
        folder: From ``whole_checkpoint``; any number of ranks may have written it.
        learner: Its optimizer is filled in.

    Raises:
        ValueError: When the stored moments belong to another model.
    """
    parameters = dict(learner.model.named_parameters())
    with ExitStack() as stack:
        for name, stored in open_slices(files_of(folder, _OPTIMIZER), stack).items():
            of, key = name.rsplit(":", 1)
            if of not in parameters:
                raise ValueError(f"{folder} holds the optimizer's moments of {of}, which this model lacks")
            parameter, shape = parameters[of], stored.get_shape()
            state = learner.optimizer.state[parameter]
            if not shape:
                state[key] = stored[...]  # AdamW keeps its step counter on the CPU
                continue
            if shape != list(parameter.shape):
                raise ValueError(
                    f"{folder} holds the optimizer's moments of {of} in the shape {shape}, and this model's is "
                    f"{list(parameter.shape)}"
                )
            first, beyond = own_rows(parameter)
            rows = torch.empty_like(own_part(parameter))
            if first < beyond:
                rows.copy_(stored[first:beyond])
            state[key] = with_rows(parameter, rows)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Return every checkpoint of a run, oldest first; none is half written, any may have been damaged since.

    Args:
        run_dir: Folder of the run.
    """
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was made.

    Args:
        folder: From ``checkpoints_of``.
    """
    return int(folder.name.removeprefix("step_"))
