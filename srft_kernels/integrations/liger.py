"""Liger-Kernel's loss heads by their own names and signatures (those of 0.8.5), served by the ops of this package.

Change the import and nothing else::

    from srft_kernels.integrations.liger import LigerFusedLinearGRPOLoss

Liger itself need not be installed. What differs: logits are kept in fp32, and the gradients of weight and bias are
added up in fp32 and rounded once; ignored tokens cost nothing on a CPU; the backward of a loss may run once; and what
Liger asserts is a ValueError here.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .._checks import check_choice
from ..head.chunks import compute_dtype
from ..linear_logprobs import linear_logprobs
from ._liger_cross_entropy import (
    CalledByName,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
)
from ._liger_grpo import LEVELS, LOSS_TYPES, Batch, Options, grpo_loss

__all__ = [
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearGRPOFunction",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "liger_fused_linear_grpo",
]


class LigerFusedLinearGRPOFunction(CalledByName):
    """Functional form of ``LigerFusedLinearGRPOLoss``, as ``liger_kernel.chunked_loss.grpo_loss`` has it."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics; see ``LigerFusedLinearGRPOLoss``, whose constructor and call share the arguments.

        ``weight`` is its lin_weight; selected_token_ids, attention_mask, advantages, bias,
        ref_per_token_logps, old_per_token_logps, ref_input, ref_weight, ref_bias, vllm_is_ratio and
        num_items_in_batch are those of the call; beta, epsilon_low, epsilon_high, loss_type,
        max_completion_length, importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg,
        temperature, compiled, use_ref_model, chunk_size, delta, use_bias_correction_kl, vespo_k_pos,
        vespo_lambda_pos, vespo_k_neg and vespo_lambda_neg those of the constructor.
        """
        options = Options(
            beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level,
            sapo_temperature_pos, sapo_temperature_neg, delta, use_bias_correction_kl,
            vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
        )  # fmt: skip
        _check_options(options)
        dtype = compute_dtype(_input.dtype)
        mask = attention_mask.to(dtype)
        _check_batch(_input, selected_token_ids, mask, advantages, ref_per_token_logps, old_per_token_logps)
        ids = selected_token_ids
        # LUSPO averages over padding too
        labels = (ids if loss_type == "luspo" else torch.where(mask != 0, ids, -100)).flatten()
        if not use_ref_model:
            ref_per_token_logps = None
        elif ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are given. Using ref_per_token_logps.", stacklevel=2
            )
        elif ref_per_token_logps is None and (ref_input is None or ref_weight is None):
            raise ValueError(
                "use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight; pass one of them"
            )
        elif ref_per_token_logps is None and beta != 0:
            assert ref_input is not None and ref_weight is not None
            with torch.no_grad():
                ref_per_token_logps, _ = linear_logprobs(
                    ref_input.reshape(-1, ref_input.shape[-1]),
                    ref_weight.to(ref_input.dtype),
                    labels,
                    bias=ref_bias,
                    temperature=temperature,
                )
        batch = Batch.of(mask, advantages, old_per_token_logps, ref_per_token_logps, vllm_is_ratio, options)
        # as in Liger, a weight of another dtype is rounded to that of the hidden states
        head = (_input.reshape(-1, _input.shape[-1]), weight.to(_input.dtype), labels, bias, temperature)
        return grpo_loss(head, batch, options, num_items_in_batch)


liger_fused_linear_grpo = LigerFusedLinearGRPOFunction.apply


def _check_options(options: Options) -> None:
    check_choice("loss_type", options.loss_type, LOSS_TYPES)
    check_choice("importance_sampling_level", options.level, LEVELS)
    if options.level == "sequence" and options.loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(
            f"Sequence-level importance sampling is not supported for loss_type={options.loss_type!r}; "
            'use importance_sampling_level="token"'
        )
    if options.loss_type == "dr_grpo" and options.max_completion_length is None:
        raise ValueError('max_completion_length is required by loss_type="dr_grpo"; pass it to the constructor')
    if options.loss_type == "sapo":
        _check_above_zero(
            sapo_temperature_pos=options.sapo_temperature_pos, sapo_temperature_neg=options.sapo_temperature_neg
        )
    if options.delta is not None:
        _check_above_zero(delta=options.delta)


def _check_above_zero(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _check_batch(
    hidden: Tensor, ids: Tensor, mask: Tensor, advantages: Tensor, ref: Tensor | None, old: Tensor | None
) -> None:
    if hidden.dim() != 3:
        raise ValueError(f"_input must be [B, T, H], got {list(hidden.shape)}; unflatten the sequences")
    shape = hidden.shape[:2]
    for name, x, expected in (
        ("selected_token_ids", ids, shape),
        ("attention_mask", mask, shape),
        ("advantages", advantages, shape[:1]),
        ("ref_per_token_logps", ref, shape),
        ("old_per_token_logps", old, shape),
    ):
        if x is not None and x.shape != expected:
            raise ValueError(f"{name} must be {list(expected)}, as _input, got {list(x.shape)}")


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO family on padded sequences, as ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``.

    A term of the loss is ``vllm_is_ratio`` times the policy term below plus ``beta`` k3(ref - logp), which
    ``use_bias_correction_kl`` multiplies by r. The ratio r is exp(logp - old), or for level "sequence" exp of the mean
    of logp - old over the sequence.

    =========================  ==========================================================  ======================
    ``loss_type``              policy term                                                 sum over tokens over
    =========================  ==========================================================  ======================
    "grpo"                     -min(min(r, delta) A, clip(r) A)                            B, each sequence's mean
    "bnpo"                     the same                                                    valid tokens here
    "dr_grpo"                  the same                                                    B max_completion_length
    "dapo"                     the same                                                    tokens of the batch
    "luspo"                    the same, times the length; padding counts as in Liger      B, or B T per token
    "cispo"                    -min(r, epsilon_high) A logp, no gradient through r         tokens of the batch
    "sapo"                     -(4 / tau) sigmoid(tau (r - 1)) A                           B, each sequence's mean
    "vespo"                    -phi A logp, no gradient through phi                        tokens of the batch
    =========================  ==========================================================  ======================

    The tokens of the batch are ``num_items_in_batch``, or the valid tokens of all ranks, over the number of ranks; at
    least 1, as every count here. "grpo" to "dapo", and "cispo" with ``epsilon_high`` > 1, cost 6NDV FLOPs;
    the others, and those with ``use_bias_correction_kl``, a ``delta`` up to 1 or an epsilon of 0, 8NDV where the logits
    exceed one workspace.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        """Keep the settings, each as an attribute of its name.

        Args:
            beta: Weight of the KL estimate k3.
            compiled: Without effect: the loss is no Python loop that a compiler could speed up.
            use_ref_model: Read the reference model's inputs of the call. False: its log-probabilities are the policy's
                own.
            chunk_size: Without effect: chunks of rows are chosen by the size of their logits.
            epsilon_low: The ratio is kept above 1 - epsilon_low; not read by cispo.
            epsilon_high: The ratio is kept below 1 + epsilon_high, for cispo below epsilon_high.
            loss_type: A row of the table above.
            max_completion_length: Denominator of "dr_grpo", tokens.
            importance_sampling_level: "token", or "sequence" (GSPO); cispo, sapo and vespo have "token" only.
            sapo_temperature_pos: tau > 0 of sapo where the advantage is positive.
            sapo_temperature_neg: tau > 0 of sapo elsewhere.
            temperature: Divides the logits of policy and reference, > 0.
            delta: Largest ratio before the clip (two-sided clipping), > 0, or None.
            use_bias_correction_kl: Multiply the KL estimate by the ratio.
            vespo_k_pos: phi is w^k exp(lambda (1 - w)) of the sequence's ratio w; k for advantages >= 0.
            vespo_lambda_pos: lambda for advantages >= 0.
            vespo_k_neg: k for negative advantages.
            vespo_lambda_neg: lambda for negative advantages.
        """
        super().__init__()
        _check_above_zero(sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg)
        if delta is not None:
            _check_above_zero(delta=delta)
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics of a padded batch; gradients reach _input, lin_weight and bias.

        Args:
            _input: [B, T, H] hidden states that predict selected_token_ids.
            lin_weight: [V, H].
            selected_token_ids: [B, T] int64 in [0, V).
            attention_mask: [B, T], 1 for tokens that count and 0 for padding.
            advantages: [B].
            bias: [V].
            ref_per_token_logps: [B, T] log-probabilities of the reference model, nats.
            old_per_token_logps: [B, T] log-probabilities before this update, nats. None: on-policy.
            ref_input: [B, T, H'] hidden states of the reference model, in place of ref_per_token_logps.
            ref_weight: [V, H'], with ref_input.
            ref_bias: [V], with ref_input.
            vllm_is_ratio: [B, T], [B, 1] or [B], multiplies the policy term.
            num_items_in_batch: Valid tokens of the whole batch, over micro-batches and ranks; read by dapo, cispo and
                vespo.

        Returns:
            (loss, metrics): [] fp32 (fp64 for fp64 inputs), and detached 0-d means over the valid tokens: the KL
            estimate, where beta is not 0, then the share of tokens that the clip changes.

        Raises:
            ValueError: On shapes that do not fit, a missing reference, an unknown loss_type or level, or what
            ``linear_logprobs`` raises.
        """
        return LigerFusedLinearGRPOFunction.apply(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, bias,
            ref_per_token_logps, old_per_token_logps, ref_input, ref_weight, ref_bias,
            self.beta, self.epsilon_low, self.epsilon_high, self.loss_type, self.max_completion_length,
            self.importance_sampling_level, self.sapo_temperature_pos, self.sapo_temperature_neg,
            self.temperature, self.compiled, self.use_ref_model, self.chunk_size, vllm_is_ratio,
            self.delta, self.use_bias_correction_kl, self.vespo_k_pos, self.vespo_lambda_pos,
            self.vespo_k_neg, self.vespo_lambda_neg, num_items_in_batch,
        )  # fmt: skip
