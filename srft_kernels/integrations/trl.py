"""TRL: GRPOTrainer with the loss head of srft_kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..linear_logprobs import linear_logprobs

try:
    import trl
    import trl.trainer.utils as trl_utils
    from trl import GRPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "srft_kernels.integrations.trl needs TRL; run: pip install trl", name="trl"
    ) from None

__all__ = ["Patch", "patch_grpo_trainer"]

KNOWN_VERSIONS = "1.16.0"
METHOD = "_get_per_token_logps_and_entropies"
HEAD = "_ChunkedLogProbFunction"
HEAD_ARGUMENTS = [
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
]  # fmt: skip


class Patch:
    """A patch that is in place. Call it, or use it as a context manager, to undo it; a second undo does nothing."""

    def __init__(self, undo: Callable[[], None]):
        """``undo`` restores what the patch replaced."""
        self._undo: Callable[[], None] | None = undo

    def __call__(self) -> None:
        """Undo the patch."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def __enter__(self) -> Patch:
        """The patch, in place until the block ends."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo the patch, whatever ``exception`` ended the block."""
        self()


def patch_grpo_trainer(trainer: GRPOTrainer | None = None) -> Patch:
    """Let TRL's GRPOTrainer take log-probabilities and entropies from ``linear_logprobs``.

    TRL keeps its forward, its losses and its metrics; only the projection through the lm_head and what follows from the
    logits is replaced, for the policy, the reference model and the log-probabilities before the update alike. Logits
    are fp32 whatever the dtype of the model, where TRL rounds them to that dtype. The entropy carries a gradient
    wherever TRL uses one. Under autocast the head computes in the autocast dtype from a copy of the weight.

    ::

        undo = patch_grpo_trainer()
        GRPOTrainer(model, reward, args=config, train_dataset=dataset).train()
        undo()

    Args:
        trainer: The trainer to patch, a GRPOTrainer or a subclass. None: the class, so every GRPOTrainer of this
            process, including those that exist.

    Returns:
        Patch, whose call or end as a context manager undoes it.

    Raises:
        ValueError: If it is patched already, or is no GRPOTrainer.
        RuntimeError: On a version of TRL whose loss head is not the one expected. Also in training: for parameters
            sharded by DeepSpeed ZeRO-3, or where a subclass does not use TRL's head.
    """
    _check_trl()
    owner = GRPOTrainer if trainer is None else trainer
    if trainer is not None and not isinstance(trainer, GRPOTrainer):
        raise ValueError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}; pass none for the class")
    original = getattr(owner, METHOD)
    if hasattr(original, "_srft_patched"):
        raise ValueError("GRPOTrainer is patched already; undo the first patch, or keep it")

    @functools.wraps(original)
    def with_our_head(*args: Any, **kwargs: Any) -> Any:
        head, theirs = _Head(), getattr(trl_utils, HEAD)
        setattr(trl_utils, HEAD, head)
        try:
            result = original(*args, **kwargs)
        finally:
            setattr(trl_utils, HEAD, theirs)
        if not head.used:
            raise RuntimeError(
                f"GRPOTrainer.{METHOD} did not call TRL's fused lm_head, so the patch has no effect; "
                f"undo it, or use TRL {KNOWN_VERSIONS}"
            )
        return result

    with_our_head._srft_patched = True  # type: ignore[attr-defined]
    setattr(owner, METHOD, with_our_head)
    if trainer is None:
        return Patch(lambda: setattr(GRPOTrainer, METHOD, original))
    return Patch(lambda: delattr(trainer, METHOD))


def _check_trl() -> None:
    """Raise RuntimeError unless TRL's head and the method that leads to it are as expected."""
    head = getattr(trl_utils, HEAD, None)
    found = None if head is None else list(inspect.signature(head.forward).parameters)
    if found != HEAD_ARGUMENTS or not hasattr(GRPOTrainer, METHOD):
        raise RuntimeError(
            f"patch_grpo_trainer is known to work with TRL {KNOWN_VERSIONS}, got {trl.__version__}, where "
            f"trl.trainer.utils.{HEAD}.forward takes {found} instead of {HEAD_ARGUMENTS}; install a known version"
        )


class _Head:
    """Stands in for TRL's ChunkedLogProbFunction: the same arguments and results, from ``linear_logprobs``."""

    def __init__(self) -> None:
        self.used = False

    # under torch.compile a graph break here spares tracing a loop over chunks
    @torch.compiler.disable
    def apply(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        self.used = True
        if not set(outputs) <= {"log_probs", "entropy"}:
            raise RuntimeError(f"the patched head gives log_probs and entropy, but TRL asks for {outputs}")
        if hasattr(weight, "ds_id"):
            raise RuntimeError(
                "the patched head reads lm_head.weight again in backward, which DeepSpeed ZeRO-3 has taken away by "
                "then; use ZeRO-2 or FSDP2, or undo the patch"
            )
        if not logit_scale > 0:
            raise ValueError(f"the model's logit_scale must be > 0, got {logit_scale}; undo the patch")
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # c tanh(s z / c) / T = (c / s) tanh(z / (c / s)) / (T / s): the scale is part of cap and temperature
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        logprobs, entropy = linear_logprobs(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=bias,
            temperature=temperature / logit_scale,
            logit_softcap=softcap,
            entropy_grad="entropy" in outputs,
        )
        return logprobs, entropy if "entropy" in outputs else None, None, None, None
