"""Which kernel computes the attention of a policy: the option, the device and the model decide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from srft.config import ModelConfig
from srft.policy.attention import PACKED_NAMES
from srft.policy.flash import PACKAGES, find_flash, lacks

# Where a model needs more than varlen_attn computes, these are looked for: whatever caps scores, and what knows sinks.
_FOR_SOFTCAPS, _FOR_SINKS = "flash_attention_2", "flash_attention_4"


@dataclass(frozen=True)
class PackedAttention:
    """The kernel of a policy.

    Args:
        kernel: A key of ``attention.PACKED_NAMES``.
        sentence: Names it, and the reason where it is not the usual one.
    """

    kernel: str
    sentence: str

    @property
    def name(self) -> str:
        """What transformers knows it as."""
        return PACKED_NAMES[self.kernel]


def choose_attention(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> PackedAttention:
    """Choose the kernel that ``model.attention`` asks for.

    Args:
        model: Its configuration and parameters say whether it caps scores or has sinks.
        config: The model section of the configuration.
        device: Where it computes.

    Raises:
        ValueError: When the kernel does not run here, is not installed, or does not compute what the model needs.
    """
    wanted, softcap, sinks = config.attention, caps_scores(model), _has_sinks(model)
    is_fast = device.type == "cuda" and config.compute_dtype != "float32"
    model_type = model.config.get_text_config().model_type
    if wanted == "auto":
        return _automatic(model_type, is_fast, softcap, sinks)
    if wanted != "sdpa":
        if not is_fast:
            raise ValueError(
                f"model.attention={wanted} computes in 16 bit on a GPU, got model.compute_dtype={config.compute_dtype} "
                f"on {device.type}; set model.attention=sdpa or auto, or model.compute_dtype=bfloat16 and a GPU"
            )
        if missing := _missing(wanted, softcap, sinks):
            raise ValueError(
                f"{model_type} has {missing} in its attention, which model.attention={wanted} does not compute; "
                "set model.attention=auto"
            )
    return PackedAttention(wanted, f"Attention: {_DESCRIBED[wanted]}.")


def caps_scores(model: PreTrainedModel) -> bool:
    """Say whether a model caps the scores of its attention, which transformers' own "sdpa" leaves out.

    Args:
        model: Any.
    """
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _has_sinks(model: PreTrainedModel) -> bool:
    return any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters())


def _missing(kernel: str, softcap: bool, sinks: bool) -> str:
    if kernel in PACKAGES:
        return lacks(kernel, softcap=softcap, sinks=sinks)
    return "a cap on scores" if softcap else "sinks" if sinks else ""


def _automatic(model_type: str, is_fast: bool, softcap: bool, sinks: bool) -> PackedAttention:
    if not is_fast:
        return PackedAttention("sdpa", f"Attention: {_DESCRIBED['sdpa']}.")
    if not (missing := _missing("varlen", softcap, sinks)):
        return PackedAttention("varlen", f"Attention: {_DESCRIBED['varlen']}.")
    why = f"since {model_type} has {missing}, which varlen_attn does not compute"
    other = _FOR_SINKS if sinks else _FOR_SOFTCAPS
    try:
        find_flash(other)
    except ValueError:
        return PackedAttention(
            "sdpa",
            f"Attention: sdpa, which holds the score of every pair of tokens, {why}, and {other} is not installed: "
            f"{PACKAGES[other].command} makes it faster and smaller.",
        )
    if lacks(other, softcap=softcap, sinks=sinks):
        return PackedAttention("sdpa", f"Attention: sdpa, which holds the score of every pair of tokens, {why}.")
    return PackedAttention(other, f"Attention: {other}, {why}.")


_DESCRIBED = {
    "sdpa": "sdpa, PyTorch's scaled_dot_product_attention over sequences of like length",
    "varlen": "varlen, PyTorch's varlen_attn over the bounds of the sequences",
    **{kernel: f"{kernel}, {package.module} over the bounds of the sequences" for kernel, package in PACKAGES.items()},
}
