"""linear_token_loss: every loss that is, token by token, a choice of weights of five terms; 6NDV."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compile.ops import loss_op
from ..head.arguments import make_head
from ..head.chunks import compute_dtype, scalar
from ..head.loss import loss_with_gradients
from ..objectives.streams import STREAMS, StreamArguments, StreamInputs, StreamObjective
from ..types import HeadOptions, LoraDelta, PolicyLoss, VocabParallel
from ._vectors import host_bounds, pack

__all__ = ["linear_token_loss"]


@loss_op(STREAMS)
def linear_token_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    policy_weights: Tensor | None = None,
    sft_weights: Tensor | None = None,
    shaped_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    policy: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    policy_entropy_coefs: Tensor | None = None,
    sft_entropy_coefs: Tensor | None = None,
    policy_prob_factor: str = "one",
    sft_prob_factor: str = "one",
    shaping_gamma: float | None = None,
    entropy_scope: str = "token",
    batch_entropy: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
    """Sum over tokens of five weighted terms, without materialising the [N, V] logits.

    With p_n = exp(logp_n), H the policy's entropy, sg that no gradient goes through, and k3 = exp(ref - logp) - (ref -
    logp) - 1::

        loss = sum_n   a_n g_n policy(logp_n; A_n, old_n)       policy_weights
                     + b_n h_n (-logp_n)                        sft_weights
                     - d_n A_n f(p_n)                           shaped_weights
                     + k_n k3_n                                 kl_weights
                     - e_n H_n                                  entropy_weights

    g_n = sg[ exp(u_n H) q(p_n) ] with u = policy_entropy_coefs and q = policy_prob_factor, h_n the same of
    sft_entropy_coefs and sft_prob_factor; f(p) = p, or p / (p + shaping_gamma). ``policy``, with r = exp(logp - old):

    - clip: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); for A < 0 at most -A dual_clip. Bounds of inf: -r A.
    - gspo: the same with r = exp of the mean log-ratio over the token's sequence.
    - cispo: -clip(r, ...) A logp, with no gradient through the clipped ratio.
    - reinforce: -A logp.

    The weights hold everything else: signs, coefficients, denominators over micro-batches and ranks, 1 / length. A term
    without weights is absent. A weight or coefficient of exactly 0 takes out what it multiplies, whatever stands in the
    other vectors, NaN included, and so does an advantage of 0. A token all of whose weights are 0 has no gradient, but
    its log-probability and entropy are reported and count in means of H; in gspo it stays in the mean log-ratio of its
    sequence, unless its own is NaN or not within the bound. To leave a token out of everything give it the label
    ``ignore_index``. A log-ratio stays within ``max_log_ratio``, as in ``linear_grpo_loss``.

    It costs 6NDV, 4NDV with a frozen head. Where a gradient depends on a sequence longer than a chunk of logits (gspo,
    factors of its mean H) or on the batch, logits are computed twice, but for the last chunk's: up to 8NDV. On a CPU
    gspo goes without over many chunks, at one product more for rows with a term beside it, unless there is a LoRA, an
    entropy bonus or a factor of the log-likelihood that depends on H. ``batch_entropy`` spares the factors it.

    Args:
        hidden_states: [N, D], see ``linear_logprobs``, as for every argument that is not described here.
        lm_head_weight: [V, D].
        labels: [N] int64, already shifted.
        advantages: [N] A, needed by ``policy_weights`` and ``shaped_weights``.
        old_logprobs: [N] log-probabilities before this update, nats. None: on-policy, ratio 1 in value with
            its gradient.
        ref_logprobs: [N] log-probabilities of the reference model, nats, needed by ``kl_weights``.
        policy_weights: [N] a, of any sign, as all weights; no gradient flows to them. None: no policy term.
        sft_weights: [N] b. None: no log-likelihood term.
        shaped_weights: [N] d. None: no term of probabilities.
        kl_weights: [N] k. None: no KL term.
        entropy_weights: [N] e; the entropy bonus has a gradient. None: no entropy bonus.
        policy: "clip", "cispo", "reinforce" or "gspo". Any but "clip" needs ``policy_weights``, as do ``dual_clip`` and
            ``policy_prob_factor``.
        clip_low: > 0; the ratio is kept above 1 - clip_low. May be inf.
        clip_high: > 0; the ratio is kept below 1 + clip_high. May be inf.
        dual_clip: > 1, largest ratio of clip and gspo for a negative advantage; None: no such bound.
        max_log_ratio: > 0, nats; bounds logp - old_logp (in gspo its mean) and ref_logp - logp from both sides,
            against overflow. May be inf.
        policy_entropy_coefs: [N] u of g; 0, or None for all tokens: no factor exp(u H).
        sft_entropy_coefs: [N] u of h.
        policy_prob_factor: q of g: "one", "p" or "p(1-p)".
        sft_prob_factor: q of h; needs ``sft_weights``.
        shaping_gamma: gamma > 0 of f; None: f(p) = p.
        entropy_scope: H in g and h: "token" its own; "sequence" the mean over the valid tokens of its sequence;
            "batch" the mean over all valid tokens of this call, or ``batch_entropy``. Not read without
            ``policy_entropy_coefs`` and ``sft_entropy_coefs``.
        batch_entropy: Mean entropy of the whole batch in nats, >= 0, a number or 0-d tensor, for scope "batch".
        cu_seqlens: [B+1] int32 sequence bounds from 0 to N, for gspo and scope "sequence", on CPU where possible:
            chunks of logits can then end where sequences do.
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
        PolicyLoss. ``terms``: "policy", "sft", "shaped", "kl" and "entropy_bonus" as they enter the loss, whose sum is
        the loss; "clip_low_sum" and "clip_high_sum", counts of clipped tokens with a ratio below and above 1;
        "sum_entropy" over the tokens that are not ignored. Each adds up over micro-batches.

    Raises:
        ValueError: As ``linear_logprobs``, for an argument out of the ranges above, or for one that says how a term is
        formed whose weights are None (bounds of ratios apart).

    Reference: the ops of this package for the terms; factors exp(u H) https://arxiv.org/abs/2506.19767, p(1 - p)
    https://arxiv.org/abs/2508.11408, p https://arxiv.org/abs/2508.05629, f https://arxiv.org/abs/2504.14945. Eager
    twin: ``reference.linear_token_loss``.
    """
    given = StreamArguments(
        advantages, old_logprobs, ref_logprobs, policy_weights, sft_weights, shaped_weights, kl_weights,
        entropy_weights, policy, clip_low, clip_high, dual_clip, max_log_ratio, policy_entropy_coefs,
        sft_entropy_coefs, policy_prob_factor, sft_prob_factor, shaping_gamma, entropy_scope, batch_entropy, cu_seqlens,
    )  # fmt: skip
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, labels, options)
    given.check(labels)
    dtype = compute_dtype(hidden_states.dtype)
    mean_over, by_sequence = given.mean_over(), policy == "gspo"
    entropy = scalar(0.0 if batch_entropy is None else batch_entropy, dtype, labels.device)
    vectors = pack(
        tokens,
        dtype,
        StreamInputs._fields,
        policy_weight=policy_weights,
        sft_weight=sft_weights,
        shaped_weight=shaped_weights,
        kl_weight=kl_weights,
        entropy_weight=entropy_weights,
        advantage=advantages,
        old_logp=old_logprobs,
        ref_logp=ref_logprobs,
        policy_entropy_coef=policy_entropy_coefs,
        sft_entropy_coef=sft_entropy_coefs,
        scope_entropy=entropy.expand(labels.shape),
    )
    objective = StreamObjective(
        STREAMS.formulas[policy],
        vectors,
        given.numbers(),
        tokens.valid,
        scope="batch" if mean_over == "batch" else "sequence" if by_sequence or mean_over == "sequence" else "token",
        offsets=tokens.offsets(cu_seqlens) if by_sequence or mean_over == "sequence" else None,
        entropy_grad=entropy_weights is not None,
        mean_over=mean_over,
        sequence_policy=by_sequence,
        has_fixed=any(x is not None for x in (sft_weights, shaped_weights, kl_weights)),
        fixed_waits=sft_entropy_coefs is not None and mean_over != "given",
    )
    return loss_with_gradients(inputs, head, tokens, objective, host_bounds(objective, cu_seqlens), weight_grad)
