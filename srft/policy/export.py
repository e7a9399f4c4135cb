"""The policy as a plain Hugging Face folder, for engines and for whoever wants the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from srft.policy.adapter import export_adapter
from srft.policy.learner import Learner
from srft.policy.lora import adapted
from srft.policy.manifest import appearing_at_once
from srft.policy.parallel import ALONE, World, is_sharded
from srft.policy.weights import whole_tensors

# the first rank holds one file in memory at a time
_FILE_BYTES = 4 * 2**30


def export_policy(run_dir: Path, learner: Learner) -> dict[str, str]:
    """Write what a run has come to: ``model``, the whole of it or its adapters, and on request these merged.

    Args:
        run_dir: Folder of the run.
        learner: Holds the policy; all ranks call this.

    Returns:
        The folders, by what they are.

    Raises:
        WriteError: As ``export_model``.
        Elsewhere: As ``export_model``.
    """
    model, options = learner.model, learner.config.model.lora
    folders = {"model": run_dir / "model"}
    if not options.rank:
        export_model(folders["model"], model, learner.tokenizer, learner.world)
    else:
        export_adapter(folders["model"], model, learner.tokenizer, learner.world)
        if options.merge:
            folders["merged"] = run_dir / "merged"
            export_model(folders["merged"], model, learner.tokenizer, learner.world)
    return {name: str(folder) for name, folder in folders.items()}


def export_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World = ALONE
) -> None:
    """Write a plain Hugging Face folder that ``AutoModelForCausalLM`` and vLLM load, and its manifest.

    The weights of a sharded policy pass by one at a time; the first rank writes them. Adapters are added to theirs.

    Args:
        folder: Created or replaced.
        model: The policy.
        tokenizer: Saved beside it.
        world: All ranks call this.

    Raises:
        WriteError: On the first rank, when the disk refuses; a folder that was there before is whole.
        Elsewhere: On the other ranks then.
    """
    if not is_sharded(model) and not adapted(model):
        with appearing_at_once(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        return
    tensors = whole_tensors(model)
    if not world.is_first:
        for _ in tensors:  # each is gathered by all ranks
            pass
    world.on_first(lambda: _write(folder, model, tokenizer, tensors))


def _write(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    try:
        with appearing_at_once(folder) as partial:
            write_config(partial, model)
            _write_tensors(partial, _as_published(model, tensors))
            tokenizer.save_pretrained(partial)
    finally:
        for _ in tensors:  # the other ranks go on gathering, whatever happened here
            pass


def write_config(folder: Path, model: PreTrainedModel) -> None:
    """Write what ``save_pretrained`` writes besides the weights.

    Args:
        folder: Exists.
        model: The policy, sharded or not.
    """
    config = copy.deepcopy(model.config)
    # fully_shard puts a class of its own in front, named after the model's
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _as_published(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names and in the shapes of published checkpoints, on the CPU."""
    left_out = model._keys_to_ignore_on_save or ()
    own = ((name, tensor.cpu()) for name, tensor in tensors if name not in left_out)
    rules = getattr(model, "_weight_conversions", None) or []
    if any(isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1 for rule in rules):
        # several parameters are one tensor there
        yield from revert_weight_conversion(model, dict(own)).items()
        return
    for name, tensor in own:
        yield from revert_weight_conversion(model, {name: tensor}).items()


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write files of at most 4 GB, or of one larger tensor, and their index where there are several."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > _FILE_BYTES:
            _write_file(folder, files, held)
            held = {}
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    _write_file(folder, files, held)
    if len(files) == 1:
        (folder / _numbered(1)).rename(folder / SAFE_WEIGHTS_NAME)
        return
    final = {_numbered(i): f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)}
    for name, wanted in final.items():
        (folder / name).rename(folder / wanted)
    weight_map = {name: file for file, names in zip(final.values(), files, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(folder: Path, files: list[list[str]], held: dict[str, Tensor]) -> None:
    files.append(list(held))
    save_file(held, folder / _numbered(len(files)), metadata={"format": "pt"})


def _numbered(number: int) -> str:
    return f"model-{number:05d}.safetensors"
