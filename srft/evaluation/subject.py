"""What is evaluated: a run, a checkpoint or a model, with the options that it was trained with where it has some."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srft.config import Config, LoraConfig
from srft.models import NAMES, with_local_model
from srft.options import load_config
from srft.policy.adapter import base_of, is_adapter, rank_of
from srft.policy.checkpoint import newest_checkpoint
from srft.policy.model import read_config

_BLOCK = 2**24


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated.

    Args:
        label: As tables have it.
        config: Of its run, or the defaults; ``model.name`` is its folder or hub id.
        weights: What tells its weights from others: a digest of the files, or the hub's commit.
        positions: Most tokens that it takes; None where it names no limit.
        out: Folder of its evaluation unless another is given.
    """

    label: str
    config: Config
    weights: str
    positions: int | None
    out: Path


def find_subject(word: str, options: Sequence[str]) -> Subject:
    """Return the model that a word names.

    Args:
        word: Folder of a run, of which ``model/`` is taken or else the newest checkpoint; folder of a model, of a
            checkpoint or of adapters; a name of ``srft.models``; or a hub id.
        options: Files and dotted overrides that win over what its run was trained with, but for ``model.lora``:
            adapters are as their folder has them, and a whole model has none.

    Raises:
        ValueError: When there is no such model, or an option is wrong.
    """
    if lora := [option for option in options if option.startswith("model.lora.")]:
        raise ValueError(f"adapters are evaluated as their folder has them; leave out {', '.join(lora)}")
    folder = Path(word).expanduser()
    if word in NAMES:
        config = with_local_model(load_config([*options, f"model.name={word}"]))
        return _subject(word, config, Path("runs") / "evaluation" / word)
    if not folder.is_dir():
        if word == "tiny" or folder.is_absolute() or word.startswith("."):
            raise ValueError(f"no such folder: {word}; give that of a run or of a model, or a hub id")
        return _subject(word, load_config([*options, f"model.name={word}"]), _default_out(word))
    model, run = _model_in(folder), _run_of(folder)
    words = [*([str(run / "config.toml")] if run else []), *options, f"model.name={model}"]
    label = str(folder) if run is None else run.name if model == run / "model" else f"{run.name}, {model.name}"
    out = _default_out(folder.name) if run is None else run / "evaluation"
    if run is not None and model != run / "model":
        out = run / f"evaluation-{model.name}"
    return _subject(label, load_config(words), out)


def _model_in(folder: Path) -> Path:
    for place in (folder, folder / "model", newest_checkpoint(folder)):
        if place is not None and ((place / "config.json").is_file() or is_adapter(place)):
            return place
    raise ValueError(f"{folder} holds no model: neither config.json, nor model/ or a checkpoint as a run has them")


def _run_of(folder: Path) -> Path | None:
    """The folder of the run that a folder is, or lies in."""
    near = [folder, folder.resolve().parent, folder.resolve().parents[1]]
    return next((place for place in near if all((place / f).is_file() for f in ("config.toml", "run.json"))), None)


def _default_out(name: str) -> Path:
    return Path("runs") / "evaluation" / re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _subject(label: str, config: Config, out: Path) -> Subject:
    source = config.model.name
    adapts = is_adapter(source)
    base = base_of(source) if adapts else source
    lora = LoraConfig(rank=rank_of(source) if adapts else 0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
    shape = read_config(base, config.model)
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    commit = str(getattr(shape, "_commit_hash", None))
    parts = [_digest(Path(part)) if Path(part).is_dir() else commit for part in dict.fromkeys([source, base])]
    theta = config.model.rope_theta
    weights = " on ".join(parts) + (f" with rope_theta={theta}" if theta else "")
    return Subject(label, config, weights, positions, out)


def _digest(folder: Path) -> str:
    """Of all weights, read once: sizes and times do not tell one training from the next."""
    seen = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        seen.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                seen.update(block)
    return seen.hexdigest()
