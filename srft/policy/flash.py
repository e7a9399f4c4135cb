"""The flash-attn packages: where each is found, what it lacks, and one call over the bounds of packed sequences."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Package:
    """A package of kernels.

    Args:
        module: Has ``flash_attn_varlen_func``.
        command: Installs it, as far as a command can.
        unlimited: What its ``window_size`` takes for no limit on the left and on the right.
        has_sinks: Whether its kernels know sinks, and their gradient.
        any_width: Whether values may have another width than queries.
    """

    module: str
    command: str
    unlimited: int | None
    has_sinks: bool = False
    any_width: bool = False


# FA4 is called directly, not by torch.nn.attention.activate_flash_attention_impl: that replaces the attention of the
# whole process, the model's own, which the proof compares with, included; and it knows neither caps nor sinks.
PACKAGES = {
    "flash_attention_2": Package("flash_attn", "pip install --no-build-isolation 'srft[flash]'", -1),
    "flash_attention_3": Package(
        "flash_attn_interface",
        "python setup.py install in the folder hopper of github.com/Dao-AILab/flash-attention "
        "(no index has it; srft[flash] is flash-attn 2)",
        -1,
    ),
    "flash_attention_4": Package(
        "flash_attn.cute", "pip install 'srft[flash4]'", None, has_sinks=True, any_width=True
    ),
}


def find_flash(kernel: str) -> Callable[..., Any]:
    """Return the packed attention of an installed package; nothing is fetched from a hub.

    Args:
        kernel: A key of ``PACKAGES``.

    Raises:
        ValueError: When the package is missing, or does not import; the message says how to install it.
    """
    package = PACKAGES[kernel]
    try:
        # flash-attn 2 and 4 share the name flash_attn, which one of them alone leaves without the other's function
        return importlib.import_module(package.module).flash_attn_varlen_func
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"model.attention={kernel} needs {package.module}.flash_attn_varlen_func, which is not installed "
            f"({error}); run {package.command}, or set model.attention=auto"
        ) from error
    except ImportError as error:  # built for another torch or CUDA
        raise ValueError(
            f"model.attention={kernel}: {package.module} is installed but does not import: {error}; build it against "
            f"this torch ({torch.__version__}): {package.command}, or set model.attention=auto"
        ) from error


def lacks(kernel: str, *, softcap: bool, sinks: bool) -> str:
    """Say what a model needs that an installed package does not compute; empty where it has everything.

    Args:
        kernel: A key of ``PACKAGES``.
        softcap: Whether the model caps its scores.
        sinks: Whether it has sinks.

    Raises:
        ValueError: When the package is not installed.
    """
    accepted = inspect.signature(find_flash(kernel)).parameters
    if softcap and "softcap" not in accepted:
        return "a cap on scores"
    return "sinks" if sinks and not (PACKAGES[kernel].has_sinks and "learnable_sink" in accepted) else ""


def flash_attention(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    bounds: tuple[Tensor, Tensor],
    longest: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention within each packed sequence by an installed package.

    Args:
        kernel: A key of ``PACKAGES``.
        query: [T, H, d], 16 bit.
        key: [T_k, H_kv, d].
        value: [T_k, H_kv, d_v].
        scaling: Of the scores; None: 1 / sqrt(d).
        window: Tokens a token sees, itself among them; None: all before it.
        bounds: [B+1] int32 of the queries and of the keys, on their device; the queries are the last of the keys'
            tokens.
        longest: Most keys of a sequence.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None: as they are.
        sinks: [H] logit of a token that nothing is read from; None: no such token.

    Returns:
        [T, H, d_v].
    """
    package, width = PACKAGES[kernel], value.shape[-1]
    if width != query.shape[-1] and not package.any_width:
        value = F.pad(value, (0, query.shape[-1] - width))
    options: dict[str, Any] = {}
    if softcap is not None:
        options["softcap"] = softcap
    if sinks is not None:
        options["learnable_sink"] = sinks.to(query.dtype)
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    none = package.unlimited
    out = find_flash(kernel)(
        query,
        key,
        value,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        # a window of w tokens is the token itself and w - 1 before it
        window_size=(none, none) if window is None else (window - 1, 0),
        **options,
    )
    # some versions of FA3 and FA4 return the log-sum-exp as well
    return (out[0] if isinstance(out, tuple) else out)[..., :width]
