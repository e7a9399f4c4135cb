"""The folder of an adapter, as peft writes and reads it: its configuration, its two matrices a layer, and its base."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.config import Config, LoraConfig
from srft.policy.lora import (
    adapted,
    adapters,
    attach,
    checkpoint_name,
    fill_adapters,
    import_peft,
    inject,
    new_adapters,
    places,
)
from srft.policy.manifest import appearing_at_once
from srft.policy.parallel import ALONE, World, whole

ADAPTER = "adapter_model"
"""What peft calls the file of tensors, without its ending."""
_CONFIG = "adapter_config.json"
# what peft puts before a layer's name, and between it and the matrix
_PREFIX, _NAME = "base_model.model.", ".default"
# settings of an adapter that is more than s B A, with the value that means it is not
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False, "modules_to_save": None,
    "target_parameters": None, "trainable_token_indices": None, "layer_replication": None, "fan_in_fan_out": False,
}  # fmt: skip


def is_adapter(source: str | Path) -> bool:
    """Say whether this is the folder of an adapter instead of a whole model's.

    Args:
        source: Folder or hub id.
    """
    return (Path(source) / _CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """Return the folder or hub id of the model that an adapter is for.

    Args:
        folder: For which ``is_adapter``.

    Raises:
        ValueError: When the folder does not say, or says a folder that is not there.
    """
    base = _settings(Path(folder)).get("base_model_name_or_path")
    path = Path(folder) / _CONFIG
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} does not name its base; set base_model_name_or_path in it to a folder or hub id")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"the adapter in {folder} is for the model in {base}, which is not there; bring it back, or set "
            f"base_model_name_or_path in {path} to where it is now"
        )
    return base


def rank_of(folder: str | Path) -> int:
    """Return the rank of an adapter.

    Args:
        folder: For which ``is_adapter``.

    Raises:
        ValueError: When the folder does not say.
    """
    rank = _settings(Path(folder)).get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{Path(folder) / _CONFIG} must have a rank, r, of 1 or more, got {rank!r}")
    return rank


def named_adapters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters of a policy by the names that peft saves them under.

    Args:
        model: Sharded or not; of a sharded one each is the part that this rank holds.
    """
    return ((_PREFIX + name.replace(_NAME, ""), p) for name, p in adapters(model))


def write_settings(folder: Path, model: PreTrainedModel) -> None:
    """Write what peft reads besides the tensors: the places and the base of the adapters of a policy.

    Args:
        folder: Exists.
        model: Has the adapters.
    """
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    # a set has another order in every process
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)


def export_adapter(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World = ALONE
) -> None:
    """Write the folder by which ``peft.PeftModel.from_pretrained`` puts the adapters on their base, and its manifest.

    Args:
        folder: Created or replaced.
        model: The policy, with adapters.
        tokenizer: Saved beside them.
        world: All ranks call this.

    Raises:
        WriteError: On the first rank, when the disk refuses; a folder that was there before is whole.
        Elsewhere: On the other ranks then.
    """
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in named_adapters(model)}

    def write() -> None:
        with appearing_at_once(folder) as partial:
            write_settings(partial, model)
            save_file(tensors, partial / f"{ADAPTER}.safetensors", metadata={"format": "pt"})
            tokenizer.save_pretrained(partial)

    world.on_first(write)


def put_adapters(model: PreTrainedModel, source: str | Path, config: Config) -> None:
    """Put adapters into a policy: those of a folder, or new ones where the options ask for them.

    Args:
        model: Without adapters; on the meta device they are there, too, until ``fill_adapters``.
        source: Folder or hub id of the model or of adapters, whose base the model is then.
        config: The whole configuration; what it sets must be what the adapters of the folder have.

    Raises:
        ValueError: When peft is not installed, the adapters are no plain LoRA, are not for this model or not of these
            options, or a file is missing or damaged; when a target is no linear layer, or a tied head has one.
    """
    if getattr(model, "peft_config", None):
        # transformers has put them there, from a hub
        raise ValueError(f"{source} is an adapter; download it and set model.name to its folder")
    if is_adapter(source):
        _put_stored(model, Path(source), config.model.lora)
    elif config.model.lora.rank:
        base = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
        attach(model, config.model.lora, base=base)
    if model.device.type != "meta":
        fill_adapters(model, first_adapters(model, source, config))


def first_adapters(model: PreTrainedModel, source: str | Path, config: Config) -> Iterable[tuple[str, Tensor]]:
    """Return what the adapters of a policy start from, whole, by their names in it.

    Args:
        model: After ``put_adapters``; only names and shapes are read.
        source: As there.
        config: As there.

    Raises:
        ValueError: As ``read_adapter``.
    """
    if is_adapter(source):
        return read_adapter(Path(source), model).items()
    return new_adapters(model, config.train.seed)


def _put_stored(model: PreTrainedModel, folder: Path, options: LoraConfig) -> None:
    _refuse_others(folder, options)
    config = import_peft().LoraConfig.from_pretrained(folder)
    # some ways to start an adapter change the base
    config.init_lora_weights, config.lora_dropout, config.inference_mode = True, 0.0, False
    asked = places(model, options) if options.targets or options.head else None
    inject(model, config)
    if asked is not None and (different := sorted(asked ^ adapted(model).keys())):
        raise ValueError(
            f"model.lora.targets and model.lora.head do not say what the adapter in {folder} has: {different[0]} and "
            f"{len(different) - 1} others differ; leave both unset"
        )


def read_adapter(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of an adapter's folder by the names of a policy's parameters.

    Args:
        folder: For which ``is_adapter``.
        model: Has adapters in the same places.

    Raises:
        ValueError: When the file is missing, damaged, or not of these adapters.
    """
    path = folder / f"{ADAPTER}.safetensors"
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; save the adapter with peft as safetensors") from None
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    named = {_policy_name(name): tensor for name, tensor in stored.items()}
    expected = {name: p.shape for name, p in adapters(model)}
    found = {name: tensor.shape for name, tensor in named.items()}
    if found != expected:
        different = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        first = different[0]
        raise ValueError(
            f"{path} is not of this model's adapters: {len(different)} tensors differ, the first {first}: expected "
            f"{_shape(expected.get(first))}, got {_shape(found.get(first))}"
        )
    return named


def _policy_name(name: str) -> str:
    plain = name.removeprefix(_PREFIX)
    return plain if checkpoint_name(plain) is not None else plain.removesuffix(".weight") + f"{_NAME}.weight"


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / _CONFIG} must hold a table, got {type(settings).__name__}")
    return settings


def _refuse_others(folder: Path, options: LoraConfig) -> None:
    """Adapters that compute more than s B A, or are not those of the options."""
    settings = _settings(folder)
    for name, value in _PLAIN.items():
        if (settings.get(name) or None) != (value or None):
            raise ValueError(
                f"{folder / _CONFIG} has {name}={settings.get(name)!r}; only plain LoRA, {name}={value!r}, is trained: "
                "merge this adapter into its base and start from that"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not options.rank:
        raise ValueError(
            f"{folder} is an adapter of rank {rank}: set model.lora.rank={rank} to go on training it, or merge it into "
            "its base to train the whole model"
        )
    wrong = {"rank": (options.rank, rank), "alpha": (options.alpha or alpha, alpha)}
    for name, (asked, has) in wrong.items():
        if asked != has:
            raise ValueError(f"model.lora.{name}={asked}, but the adapter in {folder} has {has}; set that")
