"""linear_srft_loss: demonstrations and rollouts together; 6NDV where the scope of H allows it, else up to 8.

Rows whose gradient depends on tokens outside their chunk (a sequence longer than a chunk, the batch) cost more. Their
logits are computed twice, but for the last chunk's. Or, on a CPU and over many chunks, their weight gradients wait for
s and c, in a buffer for each, and demonstrations have one product more. Without a gradient to compute it costs 2NDV,
with a frozen head 4NDV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compile.ops import loss_op
from ..head.arguments import make_head
from ..head.chunks import Tokens, compute_dtype, scalar, taking_part
from ..head.loss import loss_with_gradients
from ..objectives.srft import SRFT, SrftArguments, SrftInputs, SrftObjective
from ..presets import SrftSwitches
from ..types import HeadOptions, LoraDelta, PolicyLoss, VocabParallel
from ._vectors import count_of, host_bounds, pack, reciprocal

__all__ = ["linear_srft_loss"]


@loss_op(SRFT)
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
    negative_coef: float = 1.0,
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

    With s_n = sft_coef exp(sign sg H), c_n = rl_coef exp(+sg H), m = negative_coef, w = token_weights, v = sft_weights
    or w, and f(p) = p, or p / (p + demo_gamma)::

        loss = (1 / num_demo_tokens)    sum_demo    [ -v_n s_n logp_n - w_n A_n f(p_n) ]
             + (1 / num_rollout_tokens) sum_rollout w_n l_n
             - entropy_coef * mean of H over all valid tokens

    For self_rollout "likelihood", l_n is -c_n logp_n where ``is_correct`` and +m logp_n elsewhere; for "ratio"
    it is -A_n r_n (c_n if A_n > 0 else m). No gradient flows through s and c. The mean of H is its sum over
    num_demo_tokens + num_rollout_tokens, without ``token_weights``. The log of r stays within ``max_log_ratio``: beyond
    it r is that of the bound and has no gradient; between two log-probabilities of -inf r is 1.

    A weight of exactly 0 takes out what it multiplies, whatever stands in the other vectors, NaN included. A token with
    ``token_weights`` 0 is ignored as if its label were ``ignore_index``, also in every mean of H, but counted where a
    denominator is None. An advantage, ``sft_weights``, ``sft_coef``, ``rl_coef`` or ``negative_coef`` of 0 takes out
    the term it multiplies: the rest of the token, its entropy too, stays. Likelihood rollouts read no advantage.

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
        negative_coef: Scale of the rollout terms that have no c, >= 0.
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
        also as "<name>_unweighted", with s, c and m replaced by 1; and sums over tokens of s ("sum_weight_sft",
        demonstrations), of c ("sum_weight_rl", all rollouts) and of H ("sum_entropy_demo",
        "sum_entropy_rollout"), for the caller to divide by token counts. Every term adds up over
        micro-batches when both denominators are given.

    Raises:
        ValueError: As ``linear_logprobs``, or for an argument out of the ranges above.

    Reference: Fu et al., https://arxiv.org/abs/2506.19767 (eq. 8 to 13). Eager twin:
    ``reference.linear_srft_loss``.
    """
    given = SrftArguments(
        advantages, is_demo, is_correct, cu_seqlens, old_logprobs, preset, sft_coef, rl_coef, negative_coef,
        max_log_ratio, sft_entropy_sign, entropy_scope, batch_entropy, self_rollout, demo_gamma, entropy_coef,
        token_weights, sft_weights, num_rollout_tokens, num_demo_tokens,
    )  # fmt: skip
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    kept = taking_part(labels, token_weights, ignore_index)
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, kept, options)
    switches = given.check(labels)
    dtype = compute_dtype(hidden_states.dtype)
    scope = "token" if batch_entropy is not None else switches.entropy_scope
    objective = SrftObjective(
        SRFT.formulas[switches.self_rollout],
        _inputs(given, switches, labels != ignore_index, tokens, dtype),
        given.numbers(switches),
        tokens.valid,
        scope=scope,
        offsets=tokens.offsets(cu_seqlens) if scope == "sequence" else None,
        entropy_grad=switches.entropy_coef != 0,
        is_demo=tokens.select(is_demo),
    )
    return loss_with_gradients(inputs, head, tokens, objective, host_bounds(objective, cu_seqlens), weight_grad)


def _inputs(
    given: SrftArguments, switches: SrftSwitches, labelled: Tensor, tokens: Tokens, dtype: torch.dtype
) -> Tensor:
    """SrftInputs [K, n]; ``labelled`` [N] are the tokens that a denominator counts where it is not given."""
    is_demo, old, sft_weights = given.is_demo, given.old_logprobs, given.sft_weights
    num_demo = count_of(given.num_demo_tokens, is_demo & labelled, dtype)
    num_rollout = count_of(given.num_rollout_tokens, ~is_demo & labelled, dtype)
    entropy = scalar(0.0 if given.batch_entropy is None else given.batch_entropy, dtype, labelled.device)
    demo_n = is_demo.to(dtype)
    # a demonstration has no old_logprobs, a rollout no sft_weights: whatever stands there must not reach the sums
    vectors = pack(
        tokens,
        dtype,
        SrftInputs._fields,
        demo_weight=demo_n,
        rollout_weight=1 - demo_n,
        entropy_weight=torch.full_like(demo_n, switches.entropy_coef),
        sft_share=torch.ones_like(demo_n) if sft_weights is None else torch.where(is_demo, sft_weights, 0.0),
        advantage=given.advantages,
        correct=given.is_correct,
        old_logp=None if old is None else torch.where(is_demo, 0.0, old),
        scope_entropy=entropy.expand(labelled.shape),
    )
    token, weights = SrftInputs(*vectors), given.token_weights
    weight = tokens.valid.to(dtype) if weights is None else tokens.take(weights.detach().to(dtype))
    token.demo_weight.mul_(weight * reciprocal(num_demo))
    token.rollout_weight.mul_(weight * reciprocal(num_rollout))
    token.entropy_weight.mul_(reciprocal(num_demo + num_rollout))
    if sft_weights is not None:
        token.sft_share.div_(torch.where(weight != 0, weight, 1.0))
    return vectors
