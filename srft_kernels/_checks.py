"""Checks at the public door: each says what was expected, what came, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._numbers import is_number
from .types import HeadOptions, LoraDelta

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_head(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, options: HeadOptions) -> None:
    """Raise ValueError unless the arguments that every op shares fit together, but for where things are kept."""
    bias, temperature, logit_softcap, logit_scale, ignore_index, lora, *_ = options
    for name, x in (
        ("hidden_states", hidden_states),
        ("lm_head_weight", lm_head_weight),
        ("labels", labels),
        ("bias", bias),
    ):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if hasattr(x, "full_tensor"):
            raise ValueError(
                f"{name} must be a plain tensor, got a DTensor; call the op through FusedLMHead, which also reduces "
                "its gradient over the ranks"
            )
        if x.device != hidden_states.device:
            raise ValueError(
                f"{name} must be on the device of hidden_states, {hidden_states.device}, got {x.device}"
            )
    if hidden_states.dim() != 2:
        raise ValueError(
            f"hidden_states must be [N, D], got {list(hidden_states.shape)}; flatten batch and time first"
        )
    if hidden_states.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"hidden_states must be bf16, fp16, fp32 or fp64, got {hidden_states.dtype}; cast it"
        )
    num_tokens, hidden_size = hidden_states.shape
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden_size or lm_head_weight.shape[0] == 0:
        raise ValueError(
            f"lm_head_weight must be [V, D] with V >= 1 and D={hidden_size}, "
            f"got {list(lm_head_weight.shape)}; pass it as nn.Linear stores it"
        )
    if lm_head_weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"lm_head_weight must have the dtype of hidden_states, {hidden_states.dtype}, "
            f"got {lm_head_weight.dtype}; cast one of them"
        )
    if labels.shape != (num_tokens,):
        raise ValueError(f"labels must be [N]=[{num_tokens}], got {list(labels.shape)}; flatten first")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    if bias is not None and (bias.shape != lm_head_weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be floating point [V]=[{lm_head_weight.shape[0]}], "
            f"got {bias.dtype} {list(bias.shape)}"
        )
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (num_tokens,)):
            raise ValueError(
                f"temperature must be a float or [N]=[{num_tokens}], got {list(temperature.shape)}"
            )
        if temperature.dim() == 1 and temperature.device != hidden_states.device:
            raise ValueError(
                f"temperature must be on {hidden_states.device}, got {temperature.device}; move it"
            )
    else:
        check_positive("temperature", temperature)
        if math.isinf(temperature):
            raise ValueError(f"temperature must be finite, got {temperature}")
    if logit_softcap is not None:
        check_positive("logit_softcap", logit_softcap)
        if math.isinf(logit_softcap):
            raise ValueError(f"logit_softcap must be finite, got {logit_softcap}; None turns it off")
    check_positive("logit_scale", logit_scale)
    if math.isinf(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}; a model that divides has 1 / its divisor")
    if not is_number(ignore_index) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}")
    if lora is not None:
        _check_lora(lora, lm_head_weight)


def check_gpu_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError for float64 on a GPU, which the row kernels do not compute and the references do."""
    if x.is_cuda and x.dtype == torch.float64:
        raise ValueError(f"{name} must be bf16, fp16 or fp32 on a GPU, got float64; use srft_kernels.reference")


def check_rows(labels: Tensor, ignore_index: int, vocab: int, temperature: float | Tensor) -> None:
    """Refuse a label that is neither in [0, vocab) nor ``ignore_index``, or a temperature of a row that counts.

    Args:
        labels: Of any shape.
        ignore_index: Label of rows at which the temperature may be anything.
        vocab: Words in all.
        temperature: A number, or 0-d, or in the shape of ``labels``.
    """
    valid = labels != ignore_index
    _refuse(
        "labels",
        f"in [0, V={vocab}) or ignore_index={ignore_index}",
        labels,
        valid & ((labels < 0) | (labels >= vocab)),
        "mask such rows with ignore_index",
    )
    if isinstance(temperature, Tensor):
        wrong = ~((temperature > 0) & (temperature < math.inf))
        if temperature.dim() > 0:
            wrong = wrong & valid
        _refuse("temperature", "> 0 and finite", temperature, wrong, "rows to skip are labelled ignore_index")


def _refuse(name: str, expected: str, values: Tensor, wrong: Tensor, remedy: str) -> None:
    """Raise ValueError where any of ``values`` is ``wrong``; on a GPU assert it on the device, without waiting."""
    if wrong.is_cuda:
        torch._assert_async(~wrong.any(), f"{name} must be {expected}; {remedy}")
    elif wrong.device.type == "cpu" and bool(wrong.any()):
        raise ValueError(f"{name} must be {expected}, got {values[wrong].flatten()[0].item()}; {remedy}")


def _check_lora(lora: LoraDelta, lm_head_weight: Tensor) -> None:
    vocab, hidden_size = lm_head_weight.shape
    if not isinstance(lora, tuple) or not hasattr(lora, "_fields"):
        raise ValueError(f"lora must be a LoraDelta(a, b, scale), got {type(lora).__name__}")
    a, b, scale = lora
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
            raise ValueError(f"lora.{name} must be a floating-point matrix; pass it as nn.Linear stores it")
        if hasattr(x, "full_tensor"):
            raise ValueError(f"lora.{name} must be a plain tensor, got a DTensor; call the op through FusedLMHead")
        if x.device != lm_head_weight.device:
            raise ValueError(f"lora.{name} must be on {lm_head_weight.device}, got {x.device}; move it")
    if a.shape[1] != hidden_size or b.shape != (vocab, a.shape[0]):
        raise ValueError(
            f"lora.a must be [r, D={hidden_size}] and lora.b [V={vocab}, r], "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"lora.scale must be a finite number, got {scale!r}; it is alpha / r")


def check_mechanism(hidden_states: Tensor, lm_head_weight: Tensor, options: HeadOptions) -> None:
    """Raise ValueError unless the arguments fit that say where things are kept."""
    vocab_parallel, weight_grad, logits_dtype = options.vocab_parallel, options.weight_grad, options.logits_dtype
    vocab, dtype = lm_head_weight.shape[0], hidden_states.dtype
    if vocab_parallel is not None:
        if not isinstance(vocab_parallel, tuple) or not hasattr(vocab_parallel, "_fields"):
            raise ValueError("vocab_parallel must be a VocabParallel(group, vocab_start, vocab_size)")
        group, start, size = vocab_parallel
        if not hasattr(group, "size"):
            raise ValueError(f"vocab_parallel.group must be a process group, got {type(group).__name__}")
        if not (isinstance(start, int) and isinstance(size, int) and 0 <= start <= start + vocab <= size):
            raise ValueError(
                f"vocab_parallel must hold this rank's {vocab} rows of the weight, "
                f"got vocab_start={start} and vocab_size={size}; vocab_size counts the rows of all ranks"
            )
    if weight_grad is not None:
        accumulator = torch.promote_types(dtype, torch.float32)
        fits = isinstance(weight_grad, Tensor) and weight_grad.shape == lm_head_weight.shape
        if not fits or weight_grad.dtype != accumulator or weight_grad.device != lm_head_weight.device:
            raise ValueError(
                f"weight_grad must be a {accumulator} tensor {list(lm_head_weight.shape)} beside the weight"
            )
        if weight_grad.requires_grad or not weight_grad.is_contiguous():
            raise ValueError("weight_grad must be contiguous and need no gradient; pass a plain buffer")
        if weight_grad.untyped_storage().data_ptr() == lm_head_weight.untyped_storage().data_ptr():
            raise ValueError("weight_grad must not share the memory of lm_head_weight; pass a buffer of its own")
        if torch.is_grad_enabled() and not lm_head_weight.requires_grad:
            raise ValueError("weight_grad is given, but lm_head_weight does not require a gradient; drop one")
    if logits_dtype not in (None, dtype, torch.promote_types(dtype, torch.float32)):
        raise ValueError(
            f"logits_dtype must be None, torch.float32 or the dtype of hidden_states, {dtype}, got {logits_dtype}"
        )


def check_vectors(labels: Tensor, **vectors: Tensor | None) -> None:
    """Raise ValueError unless each of ``vectors`` that is given is real and [N], on the device of ``labels`` [N]."""
    for name, x in vectors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor [N]=[{labels.numel()}], got {type(x).__name__}")
        if x.shape != labels.shape:
            raise ValueError(
                f"{name} must be [N]=[{labels.numel()}], got {list(x.shape)}; give one value per token, "
                "also where labels are ignored"
            )
        if x.is_complex():
            raise ValueError(f"{name} must be real, got {x.dtype}; pass {name}.real")
        if x.device != labels.device:
            raise ValueError(f"{name} must be on {labels.device}, got {x.device}; move it")


def check_bool(**vectors: Tensor) -> None:
    """Raise ValueError unless each of ``vectors`` is a bool tensor."""
    for name, x in vectors.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {x.dtype}; use {name}.bool()")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a number above 0."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a number > 0, got {value!r}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: float | Tensor | None) -> None:
    """Refuse what is not None, a number >= 0 or a 0-d tensor of one; a number on a GPU is looked at there."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            got = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"{name} must be a number >= 0 or a 0-d tensor of one, got {got}; reduce it")
        wrong = ~((value >= 0) & (value < math.inf))
        _refuse(name, "a number >= 0 or a 0-d tensor of one", value, wrong, "take it over all micro-batches")
    elif value is not None and not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number >= 0 or a 0-d tensor of one, got {value!r}")


def check_cu_seqlens(cu_seqlens: Tensor | None, num_tokens: int, reason: str) -> None:
    """Raise ValueError unless ``cu_seqlens`` holds the sequence bounds of ``num_tokens`` rows."""
    if cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens is required by {reason}; pass the [B+1] int32 bounds of the packed sequences"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError("cu_seqlens must be a [B+1] tensor that starts with 0")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu":
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to N={num_tokens}, "
                f"got {cu_seqlens[:8].tolist()} … {int(cu_seqlens[-1])}"
            )


def check_required(name: str, value: object) -> None:
    """Raise ValueError where a tensor that has no default is None."""
    if value is None:
        raise ValueError(f"{name} must be a tensor, got None")
