"""Losses that are known in advance: loss and gradient in one sweep over chunks of logits, 6NDV.

Rows whose gradient depends on tokens outside their chunk (a sequence longer than a chunk, the batch) cost more. Their
logits are computed twice, but for the last chunk's: up to 8NDV. Or, on a CPU and over many chunks, their weight
gradients wait for the entropy weights, in a buffer a weight, and tokens with several parts (demonstrations) have one
product more. Without a gradient to compute every op costs 2NDV, with a frozen head 4NDV.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_grpo, check_srft
from .compile.ops import loss_op, user_loss_op
from .head.arguments import make_head
from .head.chunks import Tokens, compute_dtype, scalar, taking_part
from .head.sweep import loss_with_gradients
from .linear_logprobs import linear_logprobs
from .objectives import (
    GRPO_FORMULAS,
    GRPO_TERMS,
    SRFT_FORMULAS,
    SRFT_TERMS,
    CallableObjective,
    GrpoInputs,
    GrpoNumbers,
    GrpoObjective,
    SrftInputs,
    SrftNumbers,
    SrftObjective,
    TokenObjective,
)
from .presets import srft_switches
from .types import HeadOptions, LoraDelta, PolicyLoss, VocabParallel

__all__ = ["linear_grpo_loss", "linear_policy_loss", "linear_srft_loss"]


def count_of(given: int | Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """``given``, or the number of true entries of ``counted``, as a 0-d tensor beside ``counted``."""
    return scalar(counted.sum() if given is None else given, dtype, counted.device)


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, and 1 where there is nothing to divide."""
    return torch.where(count > 0, count, 1.0).reciprocal()


def pack(tokens: Tokens, dtype: torch.dtype, fields: tuple[str, ...], **vectors: Tensor | None) -> Tensor:
    """[K, n] inputs of a formula from [N] ``vectors``, None being zeros, named by ``fields`` in their order."""
    assert tuple(vectors) == fields, f"expected {fields}, got {tuple(vectors)}"
    zeros = torch.zeros_like(tokens.valid, dtype=dtype)
    return torch.stack([zeros if x is None else tokens.take(x.detach().to(dtype)) for x in vectors.values()])


@loss_op(*GRPO_TERMS)
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
    kept = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, kept, options)
    check_grpo(
        labels, advantages, old_logprobs, loss_type, clip_low, clip_high, dual_clip, max_log_ratio, ref_logprobs,
        kl_coef, rollout_weights, entropy_coef, cu_seqlens, token_weights, num_tokens,
    )  # fmt: skip
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
    vectors[0] *= reciprocal(count_of(num_tokens, labels != ignore_index, dtype))
    numbers = GrpoNumbers(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=float("inf") if dual_clip is None else dual_clip,
        off_policy=old_logprobs is not None,
        kl_coef=kl_coef,
        with_ref=ref_logprobs is not None and kl_coef != 0,
        entropy_coef=entropy_coef,
        max_log_ratio=max_log_ratio,
    )
    objective = GrpoObjective(
        GRPO_FORMULAS[loss_type],
        vectors,
        GrpoNumbers(*map(float, numbers)),
        tokens.valid,
        scope="sequence" if loss_type == "gspo" else "token",
        offsets=tokens.offsets(cu_seqlens) if loss_type == "gspo" else None,
        entropy_grad=entropy_coef != 0,
    )
    bounds = host_bounds(objective, cu_seqlens)
    return loss_with_gradients(inputs, head, tokens, objective, bounds, weight_grad)


def host_bounds(objective: TokenObjective, cu_seqlens: Tensor | None) -> list[int] | None:
    """Sequence bounds in computed rows, where the host knows them."""
    if objective.offsets is None or cu_seqlens is None:
        return None
    if objective.offsets.device.type == "cpu":
        return objective.offsets.tolist()
    return cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else None


@loss_op(*SRFT_TERMS)
def linear_srft_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
    is_demo: Tensor,
    is_correct: Tensor,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None = None,
    preset: str = "paper",
    sft_coef: float = 0.5,
    rl_coef: float = 0.1,
    max_log_ratio: float = 20.0,
    sft_entropy_sign: int | None = None,
    entropy_scope: str | None = None,
    batch_entropy: float | Tensor | None = None,
    self_rollout: str | None = None,
    demo_gamma: float | None = None,
    entropy_coef: float | None = None,
    token_weights: Tensor | None = None,
    sft_weights: Tensor | None = None,
    num_rollout_tokens: int | Tensor | None = None,
    num_demo_tokens: int | Tensor | None = None,
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
    """SRFT loss on demonstrations and rollouts together, without materialising the [N, V] logits.

    With s_n = sft_coef exp(sign sg H), c_n = rl_coef exp(+sg H), w = token_weights, v = sft_weights or w, and f(p) = p,
    or p / (p + demo_gamma)::

        loss = (1 / num_demo_tokens)    sum_demo    [ -v_n s_n logp_n - w_n A_n f(p_n) ]
             + (1 / num_rollout_tokens) sum_rollout w_n l_n
             - entropy_coef * mean of H over all valid tokens

    For self_rollout "likelihood", l_n is -c_n logp_n where ``is_correct`` and +logp_n elsewhere; for "ratio"
    it is -A_n r_n (c_n if A_n > 0 else 1). No gradient flows through s and c. The mean of H is its sum over
    num_demo_tokens + num_rollout_tokens, without ``token_weights``. The log of r stays within ``max_log_ratio``: beyond
    it r is that of the bound and has no gradient; between two log-probabilities of -inf r is 1.

    A weight of exactly 0 takes out what it multiplies, whatever stands in the other vectors, NaN included. A token with
    ``token_weights`` 0 is ignored as if its label were ``ignore_index``, also in every mean of H, but counted where a
    denominator is None. An advantage, ``sft_weights``, ``sft_coef`` or ``rl_coef`` of 0 takes out the term it
    multiplies: the rest of the token, its entropy too, stays. Likelihood rollouts read no advantage.

    ============================  ============  ==========  ============
    switch                        "paper"       "official"  "upt"
    ============================  ============  ==========  ============
    ``self_rollout``              "likelihood"  "ratio"     "likelihood"
    ``sft_entropy_sign``          -1            +1          -1
    ``entropy_scope``             "sequence"    "token"     "sequence"
    ``demo_gamma``                0             0.1         0.1
    ``entropy_coef``              0             0.001       0.001
    ============================  ============  ==========  ============

    Args:
        hidden_states: [N, D], see ``linear_logprobs``, as for every argument that is not described here.
        lm_head_weight: [V, D].
        labels: [N] int64, already shifted.
        advantages: [N] one value per token.
        is_demo: [N] bool, the token belongs to a demonstration.
        is_correct: [N] bool, the token belongs to a correct rollout; not read on demonstrations.
        cu_seqlens: [B+1] int32 sequence bounds from 0 to N, on CPU where possible: chunks of logits can then
            end where sequences do. May be None unless ``entropy_scope`` is "sequence".
        old_logprobs: [N] log-probabilities before this update, nats. None: on-policy, ratio 1 in value with
            its gradient.
        preset: "paper", "official" or "upt": the switches above that are not given.
        sft_coef: Scale of the weight s, >= 0.
        rl_coef: Scale of the weight c, >= 0.
        max_log_ratio: > 0, nats; bounds logp - old_logp from both sides, against overflow. May be inf.
        sft_entropy_sign: -1 or +1, sign of H in s. 0 makes s constant. None: by preset.
        entropy_scope: H in s and c: "token" its own; "sequence" the mean over the valid tokens of its
            sequence; "batch" the mean over all valid tokens of this call, or ``batch_entropy``. None: by
            preset.
        batch_entropy: Mean entropy of the whole batch in nats, >= 0, a number or 0-d tensor, for scope
            "batch".
        self_rollout: "likelihood" or "ratio". None: by preset.
        demo_gamma: gamma >= 0 of f; 0: no shaping, f(p) = p. None: by preset.
        entropy_coef: Weight of the entropy bonus, which has a gradient. None: by preset.
        token_weights: [N] multiplies the terms of a token (1 / length gives a mean over sequences); 0 ignores it.
        sft_weights: [N] multiplies the log-likelihood of demonstrations in place of ``token_weights``, so that it may
            be aggregated otherwise; of any sign, not read on rollouts. None: ``token_weights``.
        num_rollout_tokens: Denominator of rollout terms, counted over micro-batches and ranks; int or 0-d
            tensor, 0 counts as 1. None: the rollout tokens of this call with a label, whatever their weight.
        num_demo_tokens: The same for demonstrations.
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
        PolicyLoss; ``clipped`` is all False. ``terms``: "demo_sft", "demo_rl", "rollout_positive",
        "rollout_negative" and "entropy_bonus" as they enter the loss, whose sum is the loss; the first four
        also as "<name>_unweighted", with s and c replaced by 1; and sums over tokens of s ("sum_weight_sft",
        demonstrations), of c ("sum_weight_rl", all rollouts) and of H ("sum_entropy_demo",
        "sum_entropy_rollout"), for the caller to divide by token counts. Every term adds up over
        micro-batches when both denominators are given.

    Raises:
        ValueError: As ``linear_logprobs``, or for an argument out of the ranges above.

    Reference: Fu et al., https://arxiv.org/abs/2506.19767 (eq. 8 to 13). Eager twin:
    ``reference.linear_srft_loss``.
    """
    kept = taking_part(labels, token_weights, ignore_index)
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, kept, options)
    switches = srft_switches(preset, self_rollout, sft_entropy_sign, entropy_scope, demo_gamma, entropy_coef)
    check_srft(
        labels, advantages, is_demo, is_correct, cu_seqlens, old_logprobs, sft_coef, rl_coef, max_log_ratio,
        batch_entropy, token_weights, sft_weights, num_rollout_tokens, num_demo_tokens, switches,
    )  # fmt: skip
    dtype = compute_dtype(hidden_states.dtype)
    demo = tokens.select(is_demo)
    labelled = labels != ignore_index
    num_demo = count_of(num_demo_tokens, is_demo & labelled, dtype)
    num_rollout = count_of(num_rollout_tokens, ~is_demo & labelled, dtype)
    weight = tokens.valid.to(dtype) if token_weights is None else tokens.take(token_weights.detach().to(dtype))
    given_entropy = switches.entropy_scope == "batch" and batch_entropy is not None
    scope_entropy = scalar(0.0 if batch_entropy is None else batch_entropy, dtype, labels.device).expand(labels.shape)
    demo_n = is_demo.to(dtype)
    # a demonstration has no old_logprobs, a rollout no sft_weights: whatever stands there must not reach the sums
    vectors = pack(
        tokens,
        dtype,
        SrftInputs._fields,
        demo_weight=demo_n,
        rollout_weight=1 - demo_n,
        entropy_weight=None,
        sft_share=None if sft_weights is None else torch.where(is_demo, sft_weights, 0.0),
        advantage=advantages,
        correct=is_correct,
        old_logp=None if old_logprobs is None else torch.where(is_demo, 0.0, old_logprobs),
        scope_entropy=scope_entropy,
    )
    token = SrftInputs(*vectors)
    token.demo_weight.mul_(weight * reciprocal(num_demo))
    token.rollout_weight.mul_(weight * reciprocal(num_rollout))
    token.entropy_weight.copy_(switches.entropy_coef * tokens.valid.to(dtype) * reciprocal(num_demo + num_rollout))
    if sft_weights is None:
        token.sft_share.fill_(1.0)
    else:
        token.sft_share.div_(torch.where(weight != 0, weight, 1.0))
    # f(p) = p / (gamma_p p + gamma)
    gamma_p, gamma = (0.0, 1.0) if switches.demo_gamma == 0 else (1.0, switches.demo_gamma)
    scope = "token" if given_entropy else switches.entropy_scope
    numbers = SrftNumbers(
        sft_coef=sft_coef,
        sft_sign=switches.sft_entropy_sign,
        gamma_p=gamma_p,
        gamma=gamma,
        rl_coef=rl_coef,
        off_policy=old_logprobs is not None,
        own_entropy=switches.entropy_scope == "token",
        max_log_ratio=max_log_ratio,
    )
    objective = SrftObjective(
        SRFT_FORMULAS[switches.self_rollout],
        vectors,
        SrftNumbers(*map(float, numbers)),
        tokens.valid,
        scope=scope,
        offsets=tokens.offsets(cu_seqlens) if scope == "sequence" else None,
        entropy_grad=switches.entropy_coef != 0,
        is_demo=demo,
    )
    bounds = host_bounds(objective, cu_seqlens)
    return loss_with_gradients(inputs, head, tokens, objective, bounds, weight_grad)


@user_loss_op(linear_logprobs)
def linear_policy_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
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
    """Any loss of (logprobs, entropy), without materialising the [N, V] logits.

    ``objective`` is differentiated by autograd on two [N] vectors, once the logits of all rows have been seen. It
    costs 6NDV where they fit in one workspace, and up to 8NDV otherwise: all but the last chunk of logits are
    computed twice. Under torch.compile it is traced into the graph, at 8NDV, and backward fills
    ``weight_grad``.

    Args:
        hidden_states: [N, D], see ``linear_logprobs``, as for every argument that is not described here.
        lm_head_weight: [V, D].
        labels: [N] int64, already shifted.
        objective: Takes logprobs [N] and entropy [N], fp32 in nats and 0 where ignored, and returns a 0-d
            loss. Called once; other tensors that it reads, such as a learned log Z or the parameters of a module that
            it calls, get their gradient too.
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
        PolicyLoss, with a ratio of 1, nothing clipped and no terms.

    Raises:
        ValueError: As ``linear_logprobs``, or where ``objective`` does not return a 0-d tensor.

    Eager twin: ``reference.linear_policy_loss``.
    """
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, labels, options)
    if not callable(objective):
        raise ValueError(
            f"objective must be callable as objective(logprobs, entropy), got {type(objective).__name__}"
        )
    user = CallableObjective(objective, tokens.put, tokens.take)
    return loss_with_gradients(inputs, head, tokens, user, None, weight_grad)
