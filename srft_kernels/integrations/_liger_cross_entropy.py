"""Liger's cross-entropies of a linear head: per token with entropy, and reduced."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_choice
from ..linear_logprobs import linear_logprobs
from ..losses.cross_entropy import linear_cross_entropy
from ..types import VocabParallel


class CalledByName:
    """A function of Liger's whose ``apply`` is called: what a subclass overrides in Liger would not be read here."""

    def __init_subclass__(cls) -> None:
        """Refuse a subclass of a subclass."""
        if CalledByName not in cls.__bases__:
            raise ValueError(
                f"{cls.__name__} cannot change {cls.__bases__[0].__name__}, which has no parts to override here; "
                "derive it from liger_kernel's own class"
            )


class LigerFusedLinearScaledCrossEntropyFunction(CalledByName):
    """Negative log-likelihood of each token, as ``liger_kernel.ops`` has it; entropy with its gradient on demand."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return nll, or a tuple of nll, entropy and selected log-probabilities, as asked for; all differentiable.

        Args:
            _input: [N, H].
            weight: [V, H], dtype of _input.
            target: [N] int64 in [0, V).
            temperature: Divides the logits, > 0; a float, or [N].
            ignore_index: Target of rows whose results are 0 and have no gradient.
            m_tiles_per_cluster: Without effect.
            return_entropy: Return the entropy [N] fp32, nats, too.
            selected_token_ids: [K] int64 in [0, V): return log-probabilities [N, K] of these tokens too. Needs
                [N, H] of extra memory, and [V, H] for the gradient of the weight.

        Raises:
            ValueError: As ``linear_logprobs``, or for selected_token_ids that are not [K] int64 or, on CPU, out of
            range.
        """
        logprobs, entropy = linear_logprobs(
            _input, weight, target, temperature=temperature, ignore_index=ignore_index, entropy_grad=return_entropy
        )
        outputs = [-logprobs]
        if return_entropy:
            outputs.append(entropy)
        if selected_token_ids is not None:
            outputs.append(
                _selected(_input, weight, target, logprobs, selected_token_ids, temperature, ignore_index)
            )
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _selected(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
) -> Tensor:
    """Log-probabilities [N, K] of ``ids``, which differ from that of the target as the logits do."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1 or ids.device != weight.device:
        got = f"{ids.dtype} {list(ids.shape)} on {ids.device}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            "selected_token_ids must be an int64 tensor of shape [K] on the same device as weight, "
            f"{weight.device}, got {got}"
        )
    # on a GPU the host would have to wait for the answer
    if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= weight.shape[0])).any()):
        raise ValueError(f"selected_token_ids must be in [0, {weight.shape[0]}), got {ids.tolist()}")
    valid = target != ignore_index
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(logprobs.dtype)
        own = (hidden * weight[torch.where(valid, target, 0)].to(logprobs.dtype)).sum(-1)
        others = hidden @ weight[ids].to(logprobs.dtype).t()
        scale = torch.as_tensor(temperature, dtype=logprobs.dtype, device=hidden.device).reshape(-1, 1)
        return torch.where(valid[:, None], logprobs[:, None] + (others - own[:, None]) / scale, 0.0)


class LigerFusedLinearScaledCrossEntropyTPFunction(CalledByName):
    """The same with the vocabulary spread over a tensor-parallel group, as ``liger_kernel.ops`` has it."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: dist.ProcessGroup | None,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return nll, or (nll, entropy), the same on every rank; the gradient of _input is summed over the group.

        Args:
            _input: [N, H], the same on every rank.
            weight: [V / R, H], this rank's rows of R equal parts in the order of the ranks.
            target: [N] int64 in [0, V).
            tp_group: The group of R ranks; None: all.
            temperature: Divides the logits, > 0; a float, or [N].
            ignore_index: Target of rows whose results are 0 and have no gradient.
            tiles_per_reduce: Without effect.
            return_entropy: Return the entropy [N] fp32, nats, too.

        Raises:
            ValueError: As ``linear_logprobs``, or without an initialised torch.distributed.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("torch.distributed must be initialised before a head is spread over its ranks")
        group = dist.group.WORLD if tp_group is None else tp_group
        assert group is not None
        rows = weight.shape[0]
        logprobs, entropy = linear_logprobs(
            _input,
            weight,
            target,
            temperature=temperature,
            ignore_index=ignore_index,
            vocab_parallel=VocabParallel(group, dist.get_rank(group) * rows, dist.get_world_size(group) * rows),
            entropy_grad=return_entropy,
        )
        return (-logprobs, entropy) if return_entropy else -logprobs


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of a linear head, as ``liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss``."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        """Keep the settings; those that the ops of this package do not have are refused.

        Args:
            ce_weight: Must be None.
            ignore_index: Target of rows to skip.
            lse_square_scale: Weight of the squared log-sum-exp, >= 0.
            label_smoothing: In [0, 1], share of the loss that goes to all words alike.
            reduction: "mean" over the targets that are not ignored, "sum" or "none".
            softcap: Cap of the logits, > 0, or None.
            return_z_loss: Must be False.
            accum_dtype: Without effect: gradients are always added up in fp32.
            use_token_scaling: Must be False.
            return_token_accuracy: Must be False.
            return_predicted_tokens: Must be False.

        Raises:
            ValueError: For a setting that is refused, or an unknown reduction.
        """
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        for name, given in (
            ("ce_weight", ce_weight is not None),
            ("return_z_loss", return_z_loss),
            ("use_token_scaling", use_token_scaling),
            ("return_token_accuracy", return_token_accuracy),
            ("return_predicted_tokens", return_predicted_tokens),
        ):
            if given:
                raise ValueError(f"{name} must be left at its default here; use liger_kernel's own loss for it")
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.accum_dtype = accum_dtype

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """Loss [], or [N] for reduction "none".

        Args:
            lin_weight: [V, H].
            _input: [N, H], dtype of lin_weight.
            target: [N] int64 in [0, V).
            bias: [V].

        Raises:
            ValueError: As ``linear_cross_entropy``.
        """
        return linear_cross_entropy(
            _input,
            lin_weight,
            target,
            label_smoothing=self.label_smoothing,
            z_loss_coef=self.lse_square_scale,
            reduction=self.reduction,
            bias=bias,
            logit_softcap=self.softcap,
            ignore_index=self.ignore_index,
        )
