"""The layer that a model has for its lm_head now: through peft's wrappers, and after another took its place."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn

from ..types import LoraDelta


class _Follower(Protocol):
    def layer_replaced(self, old: nn.Module, new: nn.Module | None) -> None:
        """``new`` takes the place of ``old`` in some module."""


_followers: weakref.WeakSet[Any] = weakref.WeakSet()
_watching: list[object] = []


def tell_of_replacements(follower: _Follower) -> None:
    """From now on call ``follower.layer_replaced`` whenever a module is given another child of the same name."""
    if not _watching:
        _watching.append(nn.modules.module.register_module_module_registration_hook(_registered))
    _followers.add(follower)


def _registered(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    old = parent._modules.get(name)
    if old is not None and old is not new:
        for follower in tuple(_followers):
            follower.layer_replaced(old, new)


def is_lora(module: nn.Module) -> bool:
    """A layer of peft that adds low-rank changes to another layer."""
    return {"base_layer", "lora_A", "lora_B"} <= module._modules.keys()


def is_trained_copy(module: nn.Module) -> bool:
    """peft's wrapper for ``modules_to_save``, which calls a copy of the layer for each adapter."""
    return {"original_module", "modules_to_save"} <= module._modules.keys()


def linear_of(module: nn.Module) -> nn.Linear:
    """The linear layer that ``module`` computes with at this moment: itself, or one inside a wrapper of peft.

    Args:
        module: What a model has for its lm_head.

    Raises:
        ValueError: Where it is anything else, or has a forward of its own.
    """
    layer: Any = module
    if is_lora(module):
        layer = module.base_layer
    elif is_trained_copy(module):
        wrapper: Any = module
        copies, names = wrapper.modules_to_save, wrapper.active_adapters
        is_active = not wrapper.disable_adapters and names and all(name in copies for name in names)
        layer = copies[names[0]] if is_active else wrapper.original_module
    if not isinstance(layer, nn.Linear):
        got = type(module).__name__ + (f" around {type(layer).__name__}" if layer is not module else "")
        raise ValueError(
            "module must be an nn.Linear, or a LoRA layer or modules_to_save of peft around one, "
            f"got {got}; pass the linear layer inside it"
        )
    # accelerate's hooks wrap the forward of a layer without changing what it computes
    if type(layer).forward is not nn.Linear.forward or ("forward" in vars(layer) and not hasattr(layer, "_hf_hook")):
        raise ValueError(
            f"module must compute what nn.Linear does, got {type(layer).__name__} with a forward of its own, which "
            "the fused ops would not call; pass FusedLMHead(weight, bias) with the parameters that give its logits"
        )
    return layer


def active_lora(layer: Any) -> LoraDelta | None:
    """a, b and scale of what a LoRA layer of peft adds at this moment; raise ValueError where that is more.

    Args:
        layer: For which ``is_lora``.
    """
    if layer.merged:
        if layer.disable_adapters:
            raise ValueError("the LoRA adapters of lm_head are disabled but merged; unmerge them first")
        return None
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"lm_head must have one active LoRA adapter, got {', '.join(names)}; merge all but one")
    (name,) = names
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant or b.bias is not None:
        raise ValueError(
            f"the LoRA adapter {name!r} of lm_head is a variant (such as DoRA) or has a bias, "
            "which the fused ops do not compute; configure plain LoRA for lm_head"
        )
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        raise ValueError(
            f"the LoRA adapter {name!r} of lm_head has a dropout of {dropout.p}, which the fused ops do not "
            "compute; set lora_dropout=0, or call .eval() on the model"
        )
    return LoraDelta(a.weight, b.weight, layer.scaling[name])
