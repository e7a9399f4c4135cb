"""linear_logprobs: statistics for any loss, as autograd knows them."""

from __future__ import annotations

import torch
from torch import Tensor

from .compile.ops import logprobs_op
from .head.arguments import make_head
from .head.chunks import HeadRows, Tokens
from .head.gradients import Gradients
from .head.last_gradient import last_gradient, links
from .head.sweep import Given, When, sweep
from .rows.types import Coefficients, Stats
from .types import HeadOptions, Inputs, LoraDelta, VocabParallel, Wanted

__all__ = ["linear_logprobs"]


class _LinearLogprobs(torch.autograd.Function):
    """Saves the statistics; backward computes each chunk of logits again."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, head: HeadRows, tokens: Tokens, weight_grad, entropy_grad: bool
    ):
        known = sweep(head, When.NEVER)
        # results of their own, which the caller may write to
        logprobs, entropy = tokens.put(known.logprobs.clone()), tokens.put(known.entropy.clone())
        ctx.inputs_given = tuple(x is not None for x in (bias, lora_a, lora_b))
        # the inputs are saved for autograd's check that nobody wrote to them meanwhile
        given = [x for x in (bias, lora_a, lora_b) if x is not None]
        ctx.save_for_backward(*known, head.labels, hidden, weight, *given)
        ctx.head, ctx.tokens, ctx.weight_grad = head, tokens, weight_grad
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @last_gradient
    def backward(ctx, dlogprobs, dentropy):
        logprobs, entropy, top, log_sum, _, *saved = ctx.saved_tensors
        known = Stats(logprobs, entropy, top, log_sum)
        optional = [saved.pop(2) if given else None for given in ctx.inputs_given]
        tokens = ctx.tokens
        dlogp = torch.zeros_like(known.logprobs) if dlogprobs is None else tokens.take(dlogprobs)
        dentropy = None if dentropy is None else tokens.take(dentropy)
        inputs, wanted = Inputs(*saved, *optional), Wanted(*ctx.needs_input_grad[:5])
        grads = Gradients(ctx.head, inputs, wanted, ctx.weight_grad)
        sweep(ctx.head, When.BEFORE, grads, Given(known, Coefficients(dlogp, dentropy)))
        return *grads.finish(tokens.put), None, None, None, None


class _FrozenLogprobs(torch.autograd.Function):
    """Saves the direction of each row's gradient, of which backward is a multiple."""

    @staticmethod
    def forward(ctx, hidden, head: HeadRows, tokens: Tokens, inputs):
        grads = Gradients(head, Inputs(hidden, head.weight, head.bias), Wanted(hidden=True), None)
        known = sweep(head, When.ONE, grads)
        ctx.save_for_backward(grads.directions())
        ctx.tokens, ctx.dtype, ctx.links = tokens, hidden.dtype, inputs
        entropy = tokens.put(known.entropy)
        ctx.mark_non_differentiable(entropy)
        return tokens.put(known.logprobs), entropy

    @staticmethod
    @last_gradient
    def backward(ctx, dlogprobs, _dentropy):
        (directions,) = ctx.saved_tensors
        dlogp = ctx.tokens.take(dlogprobs)
        return ctx.tokens.put((directions * dlogp[:, None]).to(ctx.dtype)), None, None, None


def differentiable_logprobs(
    inputs: Inputs, head: HeadRows, tokens: Tokens, weight_grad: Tensor | None, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """The two vectors [N] of ``linear_logprobs`` for arguments that ``make_head`` took."""
    wanted = inputs.wanted()
    if wanted.hidden and not any(wanted[1:]) and not entropy_grad:
        return _FrozenLogprobs.apply(inputs.hidden, head, tokens, links(inputs))
    return _LinearLogprobs.apply(*inputs, head, tokens, weight_grad, entropy_grad)


@logprobs_op
def linear_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
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
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution, without materialising the [N, V] logits.

    Equivalent, with memory that does not grow with N V, to::

        weight = lm_head_weight.float() + lora.scale * lora.b.float() @ lora.a.float()
        logits = hidden_states.float() @ weight.T + bias
        logits = logit_softcap * tanh(logit_scale * logits / logit_softcap) / temperature
        logprobs = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        entropy = Categorical(logits=logits).entropy()

    Use it for a loss that is not known in advance: forward costs 2NDV, backward computes the logits again
    (6NDV). Where only the hidden states need a gradient and ``entropy_grad`` is off, forward costs 4NDV and
    backward nothing. A loss that is known costs 6NDV in all as an op of its own, and 4NDV with a frozen head;
    ``linear_policy_loss``, which takes any, up to 8NDV.

    Args:
        hidden_states: [N, D] bf16, fp16, fp32 (fp64 on CPU); final normed states, batch and time flattened.
        lm_head_weight: [V, D], dtype of ``hidden_states``; a plain tensor, not a DTensor.
        labels: [N] int64 in [0, V), already shifted. Values on a GPU, such as these, are checked by an assertion on
            the device, for which the host does not wait, and after which the process cannot use it.
        bias: [V], added to the logits; -inf removes a word, such as the padding of a vocabulary.
        temperature: Divides the logits, > 0; a float, or [N] with one value per token, not looked at on rows to
            skip. No gradient flows to it.
        logit_softcap: c > 0 in z = c tanh(z / c), applied before the temperature; a word that a bias of -inf removes
            stays removed. None: no cap.
        logit_scale: s > 0 in z = s (hidden weight^T + bias), applied before the softcap.
        ignore_index: Label of rows to skip: log-probability 0, entropy 0, no gradient.
        lora: LoraDelta(a [r, D], b [V, r], scale): the weight is lm_head_weight + scale b a. ``a`` and ``b``
            may need gradients and may be of another floating dtype than the weight.
        vocab_parallel: VocabParallel(group, vocab_start, vocab_size) where ``lm_head_weight``, ``bias`` and
            ``lora.b`` are this rank's rows of a head that a process group shares; labels stay global.
        weight_grad: [V, D] fp32 (fp64 for fp64 inputs) buffer that the gradient of the weight is added to;
            ``lm_head_weight`` then gets none from autograd. Not inside activation checkpointing, which runs
            the op twice.
        logits_dtype: None keeps logits in fp32. The 16-bit dtype of ``hidden_states`` rounds them to it,
            which is faster and, in bf16, moves a log-probability by up to 0.1 nats.
        entropy_grad: Let the entropy carry a gradient.

    Returns:
        (logprobs, entropy), each [N] fp32 (fp64 for fp64 inputs), in nats. ``entropy`` carries a gradient
        only with ``entropy_grad``.

    Raises:
        ValueError: On a wrong rank, shape, dtype or device, a DTensor, a temperature, softcap or scale that is not
        positive, or one of the last arguments that does not fit the head.
        RuntimeError: Where a gradient, taken with ``create_graph=True``, is differentiated again.

    Numerics: logits, softmax and sums in fp32; the weight gradient is added up in fp32 and rounded once.
    Deterministic: yes; on a CPU, for D a multiple of 4, the results of a token do not depend on the others.
    Peak extra memory: a workspace of logits (256 MiB on a CPU; on a GPU, with their gradients, at most 2 GiB,
    whatever N), the gradients, of which those of a 16-bit head keep the fp32 memory they were added up in, and O(N);
    with a frozen head N D in fp32 until backward.
    Eager twin: ``reference.linear_logprobs``.
    """
    options = HeadOptions(
        bias, temperature, logit_softcap, logit_scale, ignore_index, lora, vocab_parallel, weight_grad, logits_dtype
    )
    inputs, head, tokens = make_head(hidden_states, lm_head_weight, labels, options)
    return differentiable_logprobs(inputs, head, tokens, weight_grad, entropy_grad)
