"""linear_grpo_loss: the policy gradients of the GRPO family; 6NDV, of gspo up to 8.

Rows whose gradient depends on tokens outside their chunk (a sequence longer than a chunk) cost more: their logits are
computed twice, but for the last chunk's. Or, on a CPU and over many chunks, their weight gradients wait for the ratio
of the sequence, in a buffer of their own. Without a gradient to compute it costs 2NDV, with a frozen head 4NDV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compile.ops import loss_op
from ..head.arguments import make_head
from ..head.chunks import compute_dtype, taking_part
from ..head.loss import loss_with_gradients
from ..objectives.grpo import GRPO, GrpoArguments, GrpoInputs, GrpoObjective
from ..types import HeadOptions, LoraDelta, PolicyLoss, VocabParallel
from ._vectors import count_of, host_bounds, pack, reciprocal

__all__ = ["linear_grpo_loss"]


@loss_op(GRPO)
def linear_grpo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    loss_type: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoraDelta | None = None,
    vocab_parallel: VocabParallel | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """Policy-gradient loss of the GRPO family, without materialising the [N, V] logits.

    loss = (1 / num_tokens) sum_n w_n [ rho_n l_n + kl_coef k3_n - entropy_coef H_n ], with w = token_weights
    and rho = rollout_weights, r_n = exp(logp_n - old_logp_n), k3 = exp(ref - logp) - (ref - logp) - 1, and
    l_n by ``loss_type``:

    - grpo, bnpo, dr_grpo, dapo: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); they differ only in the
      weights and denominators that the caller passes. For A < 0, ``dual_clip`` also bounds the term by -A
      dual_clip.
    - gspo: the same with r = exp of the mean log-ratio over the token's sequence.
    - cispo: -clip(r, ...) A logp, with no gradient through the clipped ratio.
    - reinforce: -A logp.

    A log-ratio stays within ``max_log_ratio``: in k3 and in r it is taken to be at the bound where it lies beyond, and
    has no gradient there; between two log-probabilities of -inf it is 0. (cispo and reinforce keep their gradient,
    which is not that of the ratio.)

    A weight of exactly 0 takes out what it multiplies, whatever stands in the other vectors, NaN included. A token with
    ``token_weights`` 0 is ignored as if its label were ``ignore_index``, but counted where ``num_tokens`` is None.
    ``advantages`` or ``rollout_weights`` of 0 take out the policy term; the KL and the entropy bonus stay. In gspo such
    a token stays in the mean log-ratio of its sequence, which others are multiplied by, unless its own log-ratio is
    NaN or not within the bound.

    Args:
        hidden_states: [N, D], see ``linear_logprobs``, as for every argument that is not described here.
        lm_head_weight: [V, D].
        labels: [N] int64, already shifted.
        advantages: [N] one value per token.
        old_logprobs: [N] log-probabilities before this update, nats. None: on-policy, ratio 1 in value with
            its gradient.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo" or "reinforce".
        clip_low: > 0; the ratio is kept above 1 - clip_low. May be inf.
        clip_high: > 0; the ratio is kept below 1 + clip_high. May be inf.
        dual_clip: > 1, largest ratio for a negative advantage; None: no such bound.
        max_log_ratio: > 0, nats; bounds logp - old_logp (in gspo its mean) and ref_logp - logp from both sides,
            against overflow. May be inf.
        ref_logprobs: [N] log-probabilities of the reference model, needed where ``kl_coef`` is not 0.
        kl_coef: Weight of the KL estimate k3, >= 0.
        rollout_weights: [N] multiplies the policy term, such as a truncated trainer-to-sampler ratio; 0 takes it out.
        entropy_coef: Weight of the entropy bonus, which has a gradient.
        cu_seqlens: [B+1] int32 sequence bounds from 0 to N, for gspo, on CPU where possible: chunks of logits
            can then end where sequences do.
        token_weights: [N] multiplies all terms of a token (1 / length gives a mean over sequences); 0 ignores it.
        num_tokens: Denominator, counted over micro-batches and ranks; int or 0-d tensor, 0 counts as 1. None:
            the tokens of this call with a label, whatever their weight.
        bias: [V].
        temperature: Divides the logits, > 0; a float or [N].
        logit_softcap: Cap of the logits, > 0, or None.
        logit_scale: Multiplies the logits, > 0.
        ignore_index: Label of rows to skip.
        lora: Low-rank change of the weight.
        vocab_parallel: Where this rank's rows of the weight are.
        weight_grad: [V, D] buffer for the gradient of the weight. It is filled in forward, so the loss must
            enter backward with factor 1.
        logits_dtype: 16-bit dtype to round the logits to, or None.

    Returns:
        PolicyLoss. ``terms``: "policy", "kl" (0 where ``kl_coef`` is) and "entropy_bonus" as they enter the
        loss, whose sum is the loss; "clip_low_sum" and "clip_high_sum", counts of clipped tokens with a ratio
        below and above 1; "sum_entropy" over the tokens that are not ignored. Each adds up over micro-batches when
        ``num_tokens`` is given.

    Raises:
        ValueError: As ``linear_logprobs``, or for an argument out of the ranges above.

    Reference: Shao et al., https://arxiv.org/abs/2402.03300 (eq. 3); GSPO https://arxiv.org/abs/2507.18071;
    CISPO https://arxiv.org/abs/2506.13585; dual clip https://arxiv.org/abs/1912.09729. Eager twin:
    ``reference.linear_grpo_loss``.
    """
    given = GrpoArguments(
        advantages, old_logprobs, loss_type, clip_low, clip_high, dual_clip, max_log_ratio, ref_logprobs, kl_coef,
        rollout_weights, entropy_coef, cu_seqlens, token_weights, num_tokens,
    )  # fmt: skip
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    kept = taking_part(labels, token_weights, ignore_index)
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, kept, options)
    given.check(labels)
    dtype = compute_dtype(hidden_states.dtype)
    ones = torch.ones_like(labels, dtype=dtype)
    vectors = pack(
        tokens,
        dtype,
        GrpoInputs._fields,
        weight=ones if token_weights is None else token_weights,
        advantage=advantages,
        old_logp=old_logprobs,
        ref_logp=ref_logprobs,
        rollout_weight=ones if rollout_weights is None else rollout_weights,
    )
    GrpoInputs(*vectors).weight.mul_(reciprocal(count_of(num_tokens, labels != ignore_index, dtype)))
    objective = GrpoObjective(
        GRPO.formulas[loss_type],
        vectors,
        given.numbers(),
        tokens.valid,
        scope="sequence" if loss_type == "gspo" else "token",
        offsets=tokens.offsets(cu_seqlens) if loss_type == "gspo" else None,
        entropy_grad=entropy_coef != 0,
    )
    return loss_with_gradients(inputs, head, tokens, objective, host_bounds(objective, cu_seqlens), weight_grad)
