"""TRL: GRPOTrainer with the loss head of srft_kernels."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..linear_logprobs import linear_logprobs
from ._trl_loss import LOSS_METHODS, FusedLoss, check_fused_loss, is_trls_own

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
LOSS = "_compute_loss"
STEP = "training_step"
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


def patch_grpo_trainer(trainer: GRPOTrainer | None = None, *, fused_loss: bool = False) -> Patch:
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
        fused_loss: Take the gradient from ``linear_grpo_loss``, 6NDV instead of 8NDV. TRL still computes the value of
            the loss and every metric, and each step checks that both values agree. For the losses grpo, bnpo, dr_grpo,
            dapo and cispo and for ratios of sequences, with delta, and with KL where ``use_bias_correction_kl`` is
            off; not for entropy bonuses and masks, and not where ``compute_loss``, ``_compute_loss`` or
            ``_get_per_token_logps_and_entropies`` is a subclass's, was set on the trainer or was replaced in TRL.

    Returns:
        Patch, whose call or end as a context manager undoes it.

    Raises:
        ValueError: If it is patched already, is no GRPOTrainer, or has a loss that ``fused_loss`` does not cover; for
            the class, the last is known in its first step.
        RuntimeError: On a version of TRL whose loss head is not the one expected, or for ``fused_loss`` any but the
            known one. Also in training: for parameters sharded by DeepSpeed ZeRO-3, where a subclass does not use
            TRL's head, or where the losses differ.
    """
    _check_trl(fused_loss)
    if trainer is not None and not isinstance(trainer, GRPOTrainer):
        raise ValueError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}; pass none for the class")
    owner, kind = (GRPOTrainer, GRPOTrainer) if trainer is None else (trainer, type(trainer))
    if hasattr(getattr(owner, METHOD), "_srft_patched"):
        raise ValueError("GRPOTrainer is patched already; undo the first patch, or keep it")
    if fused_loss and trainer is not None:
        check_fused_loss(trainer, {})
    replaced = [name for name in LOSS_METHODS if not is_trls_own(inspect.getattr_static(GRPOTrainer, name), name)]
    if fused_loss and replaced:
        raise ValueError(
            f"fused_loss=True does not cover {', '.join(replaced)} of GRPOTrainer, which TRL did not define; "
            "pass fused_loss=False"
        )
    originals = {}
    for name, function in _replacements(kind, fused_loss).items():
        originals[name] = getattr(kind, name)
        setattr(owner, name, function if trainer is None else types.MethodType(function, trainer))

    def undo() -> None:
        for name, original in originals.items():
            if trainer is None:
                setattr(GRPOTrainer, name, original)
            else:
                delattr(trainer, name)

    return Patch(undo)


def _replacements(kind: type, fused_loss: bool) -> dict[str, Callable[..., Any]]:
    """By name, the methods that stand in for those of the trainer class ``kind``."""
    original, original_loss, original_step = (getattr(kind, name) for name in (METHOD, LOSS, STEP))
    # the fused loss that is being computed, if any
    current: list[FusedLoss] = []
    # whether the step has come to METHOD
    entered: list[bool] = []
    ours: dict[str, Callable[..., Any]] = {}

    @functools.wraps(original)
    def with_our_head(self: GRPOTrainer, *args: Any, **kwargs: Any) -> Any:
        entered.append(True)
        head, theirs = _Head(current[-1].statistics if current else None), getattr(trl_utils, HEAD)
        setattr(trl_utils, HEAD, head)
        try:
            result = original(self, *args, **kwargs)
        finally:
            setattr(trl_utils, HEAD, theirs)
        if not head.used:
            raise RuntimeError(
                f"GRPOTrainer.{METHOD} did not call TRL's fused lm_head, so the patch has no effect; "
                f"undo it, or use TRL {KNOWN_VERSIONS}"
            )
        if current:
            current[-1].collect(result[0])
        return result

    @functools.wraps(original_loss)
    def with_our_loss(self: GRPOTrainer, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not torch.is_grad_enabled():
            return original_loss(self, model, inputs)
        current.append(FusedLoss(self, inputs, ours))
        try:
            return current[-1].attach(original_loss(self, model, inputs))
        finally:
            current.pop()

    @functools.wraps(original_step)
    def with_a_check(self: GRPOTrainer, *args: Any, **kwargs: Any) -> Any:
        if fused_loss:
            check_fused_loss(self, ours)
        entered.clear()
        result = original_step(self, *args, **kwargs)
        if not entered:
            warnings.warn(
                f"a step of {type(self).__name__} did not call GRPOTrainer.{METHOD}, so the patch had no effect on it",
                stacklevel=2,
            )
        return result

    with_our_head._srft_patched = True  # type: ignore[attr-defined]
    ours.update({METHOD: with_our_head, STEP: with_a_check} | ({LOSS: with_our_loss} if fused_loss else {}))
    return ours


def _check_trl(fused_loss: bool) -> None:
    """Raise RuntimeError unless TRL's head, the method that leads to it and its losses are as expected."""
    head = getattr(trl_utils, HEAD, None)
    found = None if head is None else list(inspect.signature(head.forward).parameters)
    if found != HEAD_ARGUMENTS or not hasattr(GRPOTrainer, METHOD):
        raise RuntimeError(
            f"patch_grpo_trainer is known to work with TRL {KNOWN_VERSIONS}, got {trl.__version__}, where "
            f"trl.trainer.utils.{HEAD}.forward takes {found} instead of {HEAD_ARGUMENTS}; install a known version"
        )
    if fused_loss and trl.__version__ != KNOWN_VERSIONS:
        raise RuntimeError(
            f"fused_loss=True knows the losses of TRL {KNOWN_VERSIONS}, got {trl.__version__}; pass fused_loss=False"
        )


class _Head:
    """Stands in for TRL's ChunkedLogProbFunction: the same arguments and results, from our ops."""

    def __init__(self, statistics: Callable[..., tuple[Tensor, Tensor]] | None = None) -> None:
        self.used = False
        self._statistics = statistics

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
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "logit_softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        if self._statistics is None:
            logprobs, entropy = linear_logprobs(hidden, weight, targets, entropy_grad="entropy" in outputs, **head)
        else:
            logprobs, entropy = self._statistics(hidden, weight, targets, **head)
        return logprobs, entropy if "entropy" in outputs else None, None, None, None
