"""A policy of which no rank ever holds the whole: its shape first, then each rank's own rows from the checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from srft.policy.lora import of_base
from srft.policy.model import in_short
from srft.policy.parallel import Elsewhere, World, is_sharded
from srft.policy.tensor_files import open_slices
from srft.policy.weights import named_weights, own_part, own_rows


def skeleton(
    source: str | Path, *, trust_remote_code: bool, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Build the model of a checkpoint without its weights: parameters on the meta device, buffers as they will be.

    Args:
        source: Folder or hub id.
        trust_remote_code: Run Python code shipped with the checkpoint.
        config: What it is configured by; None takes its own.

    Returns:
        The model that ``load_model`` gives, in fp32 and evaluation mode, for ``fill`` to fill in.

    Raises:
        ValueError: When its configuration cannot be read, or its weights are quantized.
    """
    try:
        shape = config or AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(shape, "quantization_config", None) is not None:
            raise ValueError("its weights are quantized, and ranks train from fp32, bf16 or fp16 alone")
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file fails in the libraries below with whatever they happen to raise
        raise ValueError(f"cannot load a causal LM from {str(source)!r}: {in_short(error)}") from error
    if (generation := _generation_config(source)) is not None:
        model.generation_config = generation
    model.tie_weights()
    # the rules by which transformers would load it; they go by the name of its class, which sharding changes
    model._weight_conversions = get_model_conversion_mapping(model)
    return model.eval()


def bare_copy(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Build another model of the class of one, sharded or not, with its parameters on the meta device.

    Args:
        model: Its class is taken.
        config: Of the new model.
    """
    # fully_shard puts a class of its own in front
    plain: Any = next(
        c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, FSDPModule)
    )
    with _parameters_on_meta():
        bare = plain._from_config(config, dtype=torch.float32)
    bare.tie_weights()
    return bare.eval()


@torch.no_grad()
def fill(model: PreTrainedModel, source: str | Path, world: World) -> None:
    """Fill in the weights of a skeleton, its adapters excepted: every rank reads its own rows and nothing else.

    What the files hold under other names or in another shape, transformers' rules for the architecture turn into the
    model's parameters; a rank then holds one of these whole at a time.

    Args:
        model: From ``skeleton``, prepared and sharded as it will be trained.
        source: Where the skeleton is from.
        world: All ranks call this.

    Raises:
        ValueError: On the first rank, when one of them cannot read its rows or the files lack a parameter.
        Elsewhere: On the other ranks then.
    """
    allocate(model, world.device, torch.device("cpu") if world.cpu_offload else world.device)
    fault = ""
    try:
        with ExitStack() as stack:
            _read(model, open_slices(_files(source), stack))
    except Exception as error:  # as for the skeleton
        fault = in_short(error)
    if faults := list(filter(None, world.gather(fault))):
        if not world.is_first:
            raise Elsewhere(faults[0])
        raise ValueError(f"cannot load the weights of {str(source)!r}: {faults[0]}")


def _read(model: PreTrainedModel, files: Mapping[str, Any]) -> None:
    """Fill in the rows that this rank holds.

    Args:
        model: On its devices.
        files: A slice of each tensor of the files by its name in them, of which nothing is read yet.

    Raises:
        ValueError: When a tensor has another shape in the files, or is in none of them.
    """
    targets = dict(of_base(model.state_dict(keep_vars=True).items()))
    rules, prefix = model._weight_conversions, model.base_model_prefix
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    conversions: dict[str, WeightConverter] = {}
    filled: set[int] = set()
    for key in sorted(files, key=dot_natural_key):  # the experts of a layer by number
        name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:
            name, pattern = key, None
        if name not in targets:
            continue
        if pattern is None:
            _take(targets[name], files[key], name, filled)
        else:
            rule = conversions.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            rule.add_tensor(name, key, pattern, files[key])
    for name, rule in conversions.items():
        _convert(model, name, rule, targets, filled)
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # as from_pretrained leaves it
    if missing := [name for name, tensor in of_base(named_weights(model)) if id(tensor) not in filled]:
        raise ValueError(f"its files lack {len(missing)} of the model's tensors, such as {missing[0]}")


def _take(target: Tensor, source: Any, name: str, filled: set[int]) -> None:
    """Copy this rank's rows of a tensor; ``source`` is the slice of a file, or a tensor."""
    shape = list(source.get_shape() if hasattr(source, "get_shape") else source.shape)
    if shape != list(target.shape):
        raise ValueError(f"{name} has the shape {shape} in its files, and {list(target.shape)} in the model")
    if target.dim() == 0:
        target.copy_(source[...])
    elif (rows := own_rows(target))[0] < rows[1]:
        part, found = own_part(target), source[rows[0] : rows[1]]
        if id(target) in filled and not torch.equal(part.cpu(), found.to(part.dtype)):
            raise ValueError(
                f"its config ties {name} to a tensor that has other values in its files; set tie_word_embeddings=false "
                "in the config"
            )
        part.copy_(found)
    filled.add(id(target))


def _convert(
    model: PreTrainedModel, name: str, rule: WeightConverter, targets: dict[str, Tensor], filled: set[int]
) -> None:
    """Fill in what transformers makes of several tensors of the files, such as the experts of a layer."""
    sources = rule.collected_tensors
    merge, *rest = rule.operations
    if (
        isinstance(merge, MergeModulelist)
        and merge.dim == 0
        and all(isinstance(step, Concatenate) and step.dim != 0 for step in rest)
        and all(len(found) == len(targets[name]) for found in sources.values())
    ):
        # one tensor a row of the parameter: those of other ranks are not read
        first, beyond = own_rows(targets[name])
        filled.add(id(targets[name]))
        if first == beyond:
            return
        sources.update({pattern: found[first:beyond] for pattern, found in sources.items()})
        part = own_part(targets[name])
    else:
        part = None
    sources.update({pattern: [each[...] for each in found] for pattern, found in sources.items()})
    for target, made in rule.convert(name, model=model, config=model.config).items():
        tensor = made[0] if isinstance(made, list) else made
        if part is None:
            _take(targets[target], tensor, target, filled)
        elif tensor.shape == part.shape:
            part.copy_(tensor)
        else:
            raise ValueError(f"rows of {name} have the shape {list(tensor.shape)}, and {list(part.shape)} in the model")


def _files(source: str | Path) -> list[str]:
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [cached_file(source, SAFE_WEIGHTS_NAME)]
    names = set(json.loads(Path(index).read_text())["weight_map"].values())
    return [cached_file(source, name) for name in sorted(names)]


def allocate(model: PreTrainedModel, buffers: torch.device, parameters: torch.device) -> None:
    """Give what is on the meta device uninitialised memory, and move buffers to theirs.

    Args:
        model: Sharded or not; what is tied stays so.
        buffers: Where buffers go.
        parameters: Where the parameters are to lie.
    """

    def allocated(x: Tensor) -> Tensor:
        if own_part(x).is_meta:
            return torch.empty_like(x, device=parameters)
        return x if isinstance(x, nn.Parameter) else x.to(buffers)  # a tied parameter comes by twice

    # to_empty would take the buffers' values too
    model._apply(allocated)
    if not is_sharded(model):  # plain parameters were replaced, one by one
        model.tie_weights()


def _generation_config(source: str | Path) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # it has none, and the model made one of its own configuration
        return None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules built in the body have their parameters on the meta device, where they cost nothing.

    Buffers are left alone: many are computed by constructors, saved nowhere, and needed as they are.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
