"""The loss of TRL's GRPOTrainer in one pass over the logits: what ``linear_grpo_loss`` has to be told."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.grpo import linear_grpo_loss

# what the fused loss stands in for, or is called by: somebody else's would be lost, or would change what it is told
LOSS_METHODS = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
TRAINER, MODULE = "GRPOTrainer", "trl.trainer.grpo_trainer"


def is_trls_own(attribute: object, name: str) -> bool:
    """``attribute`` is the function that TRL's source has as ``GRPOTrainer.name``, in no wrapper but TRL's."""
    function = attribute
    while isinstance(function, types.FunctionType):
        module = function.__globals__.get("__name__", "")
        if module.partition(".")[0] != "trl":
            return False
        if "__wrapped__" not in vars(function):
            # functools.wraps gives a function another's name, but not its code
            return module == MODULE and function.__code__.co_qualname == f"{TRAINER}.{name}"
        function = vars(function)["__wrapped__"]
    return False


def _replaced_methods(trainer: Any, ours: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Those of LOSS_METHODS that are neither TRL's nor the functions ``ours`` of this patch."""
    kind, found = type(trainer), []
    for name in LOSS_METHODS:
        own = getattr(vars(trainer).get(name), "__func__", None)
        if name in vars(trainer) and (own is None or own is not ours.get(name)):
            found.append(f"{name}, which was set on this trainer")
        of_class = inspect.getattr_static(kind, name)
        if of_class is not ours.get(name) and not is_trls_own(of_class, name):
            owner = next(c for c in kind.__mro__ if name in vars(c))
            found.append(f"{owner.__name__}.{name}, which is not TRL's own")
    return found


def check_fused_loss(trainer: Any, ours: Mapping[str, Callable[..., Any]]) -> None:
    """Raise ValueError unless the trainer's loss is TRL's and ``linear_grpo_loss`` has all of it.

    Args:
        trainer: A GRPOTrainer.
        ours: By name, the functions that the patch has put, or will put, in the place of TRL's.
    """
    args, cispo = trainer.args, trainer.loss_type == "cispo"
    sequence = trainer.importance_sampling_level == "sequence"
    reasons = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
        "loss_type='cispo' with importance_sampling_level='sequence'": cispo and sequence,
        "loss_type='cispo' with epsilon_high <= 1": cispo and trainer.epsilon_high <= 1,
        "delta < 1 + epsilon_high": not cispo and args.delta is not None and args.delta < 1 + trainer.epsilon_high,
        "top_entropy_quantile < 1": trainer.top_entropy_quantile < 1,
        "entropy_coef or use_adaptive_entropy": trainer._entropy_bonus_enabled,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "use_bias_correction_kl": trainer.beta != 0 and args.use_bias_correction_kl,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    found += _replaced_methods(trainer, ours)
    if found:
        raise ValueError(f"fused_loss=True does not cover {', '.join(found)}; pass fused_loss=False")


class FusedLoss:
    """One call of TRL's ``_compute_loss``: TRL computes value and metrics, ``linear_grpo_loss`` the gradient.

    Every log-probability that TRL's model returns carries the gradient of the whole loss, so that the wrappers of
    distributed training see it leave through the model's output.
    """

    def __init__(self, trainer: Any, inputs: dict[str, Any], ours: Mapping[str, Callable[..., Any]]) -> None:
        """Of ``trainer`` for the micro-batch ``inputs``, both as ``_compute_loss`` has them; ``ours`` as above."""
        check_fused_loss(trainer, ours)
        if "tool_mask" in inputs and trainer.importance_sampling_level == "sequence":
            raise ValueError(
                "fused_loss=True does not cover tools with importance_sampling_level='sequence'; pass fused_loss=False"
            )
        self._trainer, self._inputs = trainer, inputs
        self._valid = inputs["completion_mask"]  # [B, C] positions that TRL scores
        self._mask = self._valid * inputs["tool_mask"] if "tool_mask" in inputs else self._valid
        self._given: Tensor | None = None
        self._logprobs: Tensor | None = None
        self._loss: Tensor | None = None

    def statistics(self, hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n] of the rows that TRL hands over, and on the side the loss."""
        trainer, inputs, args = self._trainer, self._inputs, self._trainer.args
        cispo, sequence = trainer.loss_type == "cispo", trainer.importance_sampling_level == "sequence"
        before = inputs["prompt_ids"].shape[1] - 1
        length = before + self._valid.shape[1]
        compact = targets.numel() != self._valid.shape[0] * length
        scored = F.pad(self._valid, (before, 0)).flatten().bool()

        def rows(x: Tensor) -> Tensor:
            x = x if x.dim() == 2 else x[:, None]
            x = F.pad(x.expand(self._valid.shape), (before, 0)).flatten()
            return x[scored] if compact else x

        bounds = self._valid.sum(1) if compact else torch.full_like(self._valid[:, 0], length)
        old = inputs.get("old_per_token_logps")
        corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        out = linear_grpo_loss(
            hidden,
            weight,
            torch.where(rows(self._valid) > 0, targets, -100),
            rows(inputs["advantages"]),
            None if old is None else rows(old),
            loss_type="cispo" if cispo else "gspo" if sequence else "grpo",
            # TRL's epsilon_high for cispo is the largest ratio itself, and there is no smallest
            clip_low=math.inf if cispo else trainer.epsilon_low,
            clip_high=trainer.epsilon_high - 1 if cispo else trainer.epsilon_high,
            dual_clip=None if cispo else args.delta,
            # TRL has no such bound
            max_log_ratio=math.inf,
            ref_logprobs=rows(inputs["ref_per_token_logps"]) if trainer.beta != 0 else None,
            kl_coef=trainer.beta,
            rollout_weights=rows(inputs["importance_sampling_ratio"]) if corrected else None,
            cu_seqlens=F.pad(bounds.cumsum(0), (1, 0)).int() if sequence else None,
            token_weights=rows(self._token_weights()),
            num_tokens=1,
            **head,
        )
        logprobs = out.logprobs
        if old is not None:
            # tokens of weight 0 have no log-probability here, and TRL multiplies their ratio by 0: let it be 1
            logprobs = torch.where(rows(self._mask) < rows(self._valid), rows(old), logprobs)
        self._loss = out.loss
        self._given = logprobs if compact else logprobs[scored]
        return logprobs + (out.loss - out.loss.detach()), out.entropy

    def _token_weights(self) -> Tensor:
        """[B, C] weights whose sum with the token losses is TRL's loss."""
        trainer, mask = self._trainer, self._mask.float()
        steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
        if trainer.loss_type == "grpo":
            return mask / (mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[0] * steps)
        if trainer.loss_type == "bnpo":
            return mask / (mask.sum().clamp(min=1) * steps)
        if trainer.loss_type == "dr_grpo":
            return mask / (mask.shape[0] * trainer.max_completion_length * steps)
        # tokens of the generation batch, of which one accumulation window is a part
        num_tokens = self._inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        return mask * trainer.args.steps_per_generation / (num_tokens * steps)

    def collect(self, logprobs: Tensor) -> None:
        """Keep ``logprobs`` [B, C], which the model returned; raise RuntimeError where they are not the head's."""
        assert self._given is not None
        if not torch.equal(logprobs.detach()[self._valid.bool()], self._given):
            raise RuntimeError(
                "the model returns other log-probabilities than its lm_head gave it, so the gradient of "
                "linear_grpo_loss is not that of TRL's loss; pass fused_loss=False"
            )
        self._logprobs = logprobs

    def attach(self, value: Tensor) -> Tensor:
        """TRL's ``value`` of the loss with the gradient; raise RuntimeError where the two losses differ."""
        assert self._loss is not None and self._logprobs is not None
        ours, theirs = self._loss.item(), value.item()
        if not math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-3) and math.isfinite(theirs):
            raise RuntimeError(
                f"TRL's loss is {theirs} and that of linear_grpo_loss {ours}: this trainer computes another loss than "
                "GRPOTrainer of the versions known to work; pass fused_loss=False"
            )
        carried = self._logprobs.sum() / self._valid.sum().clamp(min=1)
        return value.detach() + (carried - carried.detach())
