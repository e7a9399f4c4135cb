"""Low-rank adapters of peft in the policy: they are trained in its stead, and added to its weights for everyone else.

A linear layer W that has one computes W x + s B A x. Only A and B get gradients and moments. Engines and checkpoints of
whole models get W + s B A under the names of the base's checkpoint, one weight at a time; W itself is never written.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from srft.config import Config, LoraConfig
from srft.data.sampler import sample_seed
from srft.policy.parallel import blocks_of, whole

# the name under which peft keeps an adapter
_NAME = "default"


def attach(model: PreTrainedModel, options: LoraConfig, *, base: str) -> None:
    """Put new adapters into a policy, to be filled in by ``fill_adapters``, and freeze everything else.

    Args:
        model: A causal LM; on the meta device its adapters are there, too.
        options: Their rank, at least 1, and their places.
        base: Folder or hub id of the model without them, which is noted for whoever loads an adapter alone.

    Raises:
        ValueError: When peft is not installed, a target is no linear layer, or the head is tied to the embedding.
    """
    peft = import_peft()
    if options.head:
        _refuse_tied_head(model)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.scaled_by,
        target_modules=_shortened(model, places(model, options)),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    inject(model, config)


def inject(model: PreTrainedModel, config: Any) -> None:
    """Put adapters that are yet to be filled in into a policy as peft is configured, and freeze everything else.

    Args:
        model: A causal LM.
        config: A ``peft.LoraConfig``.

    Raises:
        ValueError: When it means the head of a model that ties it to the embedding.
    """
    is_meta = model.device.type == "meta"
    # peft draws numbers that are then replaced, from the generator that others use
    with torch.random.fork_rng(devices=[]):
        import_peft().inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=is_meta)
    if "lora_A" in model.get_output_embeddings()._modules:
        _refuse_tied_head(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(checkpoint_name(name) is None)


def without_adapters(config: Config) -> Config:
    """Return the configuration of the same run without adapters.

    Args:
        config: The whole configuration.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": LoraConfig()})})


def import_peft() -> Any:
    """Return the module peft.

    Raises:
        ValueError: When it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(f"model.lora needs peft: pip install 'srft[lora]' ({error})") from error


def new_adapters(model: PreTrainedModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield what new adapters start from, fp32 on the CPU: A uniform within 1/sqrt(in), B zero.

    Args:
        model: From ``attach``; only names and shapes are read.
        seed: Of A.
    """
    for name, parameter in adapters(model):
        if ".lora_B." in name:
            yield name, torch.zeros(parameter.shape)
            continue
        generator = torch.Generator().manual_seed(sample_seed(seed, 0, name, 0))
        yield name, (2 * torch.rand(parameter.shape, generator=generator) - 1) / math.sqrt(parameter.shape[1])


@torch.no_grad()
def fill_adapters(model: PreTrainedModel, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into the adapters of a policy, of which a rank keeps its shard.

    Args:
        model: With real parameters, sharded or not.
        named_tensors: By the names of the policy's parameters.
    """
    own = dict(model.named_parameters())
    for name, tensor in named_tensors:
        parameter = own[name]
        if isinstance(parameter, DTensor):
            tensor = tensor.to(parameter.device)
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(tensor)


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by their place in the model; none where it has no adapters.

    Args:
        model: Any.
    """
    return {path: layer for path, layer in model.named_modules() if "lora_A" in layer._modules}


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of adapters, A and B of every adapted layer, in the order of layers.

    Args:
        model: Any.
    """
    return ((name, p) for name, p in model.named_parameters() if checkpoint_name(name) is None)


def checkpoint_name(name: str) -> str | None:
    """Return the name that a parameter of a policy has in the base's checkpoint; None for one of an adapter.

    Args:
        name: Of ``named_parameters`` or ``state_dict``, of a model with adapters or without.
    """
    if ".lora_A." in name or ".lora_B." in name:
        return None
    return name.replace(".base_layer.", ".")


def of_base(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Leave the adapters out of the state of a policy, and give the rest the names of the base's checkpoint.

    Args:
        named_tensors: Of a model with adapters or without.
    """
    return ((plain, tensor) for name, tensor in named_tensors if (plain := checkpoint_name(name)) is not None)


def merged(named_tensors: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Turn the state of a policy into that of a model without adapters, adding each to its weight on the way.

    Args:
        named_tensors: Of ``model.state_dict()``; all of them as they are where the model has no adapters.
        model: The policy. Of one that is sharded the tensors are sharded alike; all ranks iterate together.

    Yields:
        Names of the base's checkpoint, with W + s B A in the precision of W where there is an adapter.
    """
    layers = adapted(model)
    for name, tensor in of_base(named_tensors):
        layer = layers.get(name.removesuffix(".weight"))
        yield name, tensor if layer is None else merged_weight(layer)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Return W + s B A of an adapted layer, sharded as W is; W alone under ``base_policy``.

    Args:
        layer: From ``adapted``.
    """
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    weight = layer.base_layer.weight.detach()
    if layer.disable_adapters:
        return weight
    if not isinstance(weight, DTensor):
        return torch.addmm(weight, b, a, alpha=layer.scaling[_NAME])
    # W and B are sharded by the same rows
    rows = torch.addmm(weight.to_local(), b.to_local(), whole(a), alpha=layer.scaling[_NAME])
    return DTensor.from_local(
        rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def b_of(layer: Any) -> nn.Parameter:
    """Return B of an adapted layer: where it is zero, the adapter adds nothing.

    Args:
        layer: From ``adapted``.
    """
    return layer.lora_B[_NAME].weight


def merged_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a policy under their own names, with each adapter moved into its weight and B zero.

    The model computes with them what an engine computes with ``merged`` weights.

    Args:
        model: A policy that is not sharded.
    """
    found: dict[str, Tensor] = dict(model.named_parameters())
    for path, layer in adapted(model).items():
        found[f"{path}.base_layer.weight"] = merged_weight(layer)
        b = f"{path}.lora_B.{_NAME}.weight"
        found[b] = torch.zeros_like(found[b])
    return found


@contextmanager
def base_policy(model: nn.Module) -> Iterator[None]:
    """Let a policy compute without its adapters, as the base does, for the length of a ``with`` statement.

    Args:
        model: Any; nothing changes for one without adapters.
    """
    layers = list(adapted(model).values())
    # enable_adapters() of peft would also change what needs a gradient, which a sharded model takes amiss
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _refuse_tied_head(model: PreTrainedModel) -> None:
    text = model.config.get_text_config()
    if text.tie_word_embeddings:
        raise ValueError(
            f"{text.model_type} ties its head to its embedding, and an adapter of the head would part them; "
            "leave model.lora.head=false"
        )


def places(model: PreTrainedModel, options: LoraConfig) -> set[str]:
    """Return the layers of a model, by their names, that the options give an adapter.

    Args:
        model: Without adapters.
        options: With targets, or all linear layers of the blocks.

    Raises:
        ValueError: When there are none, or a target is no linear layer of a block.
    """
    blocks = {id(module) for block in blocks_of(model) for module in block.modules()}
    inside = {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in blocks}
    if not inside:
        raise ValueError(
            f"{model.config.get_text_config().model_type} has no linear layers in its blocks for model.lora; "
            "set model.lora.rank=0"
        )
    if unknown := [target for target in options.targets if not any(_is_meant(path, target) for path in inside)]:
        raise ValueError(
            f"model.lora.targets={','.join(unknown)} is no linear layer of the blocks; "
            f"choose from {', '.join(_kinds(inside))}"
        )
    if options.targets:
        inside = {path for path in inside if any(_is_meant(path, target) for target in options.targets)}
    head = model.get_output_embeddings()
    return inside | ({path for path, m in model.named_modules() if m is head} if options.head else set())


def _shortened(model: PreTrainedModel, chosen: set[str]) -> list[str]:
    """Names by which peft finds these layers and no others: their kinds, as its users expect, where that is so."""
    kinds = _kinds(chosen)
    found = {path for path, _ in model.named_modules() if any(_is_meant(path, kind) for kind in kinds)}
    return kinds if found == chosen else sorted(chosen)


def _kinds(paths: set[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _is_meant(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
