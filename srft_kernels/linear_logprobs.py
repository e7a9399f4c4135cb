"""linear_logprobs: statistics for any loss, and the sweeps over chunks of rows that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_head, check_mechanism, check_rows
from ._chunked_head import (
    Head,
    LoraDelta,
    Tokens,
    chunking,
    compute_dtype,
    drops_dead_rows,
    keep_live,
    live_rows,
    project,
    row_stats,
    rows_backend,
    scalar,
    workspace,
)
from ._compiled import logprobs_op
from ._gradients import Gradients, Inputs, Wanted
from ._last_gradient import last_gradient, links
from ._row_cpu import Smoothing, Stats
from ._score_gradients import ScoreGradients
from .vocab_parallel import IGNORED, VocabParallel, local_labels

__all__ = ["linear_logprobs"]


def make_head(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    lora: LoraDelta | None,
    vocab_parallel: VocabParallel | None,
    weight_grad: Tensor | None,
    logits_dtype: torch.dtype | None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> tuple[Inputs, Head, Tokens]:
    """Check the arguments that every op shares and reduce them to the rows that are computed."""
    tensors = isinstance(hidden_states, Tensor) and isinstance(lm_head_weight, Tensor)
    if tensors and torch.is_autocast_enabled(hidden_states.device.type):
        # the body of a model leaves 16-bit states there, beside a weight in fp32
        lm_head_weight = lm_head_weight.to(hidden_states.dtype)
    check_head(
        hidden_states, lm_head_weight, labels, bias, temperature, logit_softcap, logit_scale, lora, ignore_index
    )
    check_mechanism(hidden_states, lm_head_weight, vocab_parallel, weight_grad, logits_dtype)
    vocab = vocab_parallel.vocab_size if vocab_parallel else lm_head_weight.shape[0]
    check_rows(labels, ignore_index, vocab, temperature)
    tokens = Tokens(labels, ignore_index)
    dtype = compute_dtype(hidden_states.dtype)
    # c tanh(s x / c) / T = (c / s) tanh(x / (c / s)) / (T / s): the scale is part of cap and temperature
    softcap = None if logit_softcap is None else logit_softcap / logit_scale
    inv_temperature = None
    if isinstance(temperature, Tensor) or temperature != logit_scale:
        reciprocal = scalar(temperature, dtype, hidden_states.device).reciprocal() * logit_scale
        inv_temperature = tokens.select(reciprocal.expand(labels.shape))
    kept_labels = tokens.select(labels).contiguous()
    if vocab_parallel is not None:
        kept_labels = local_labels(kept_labels, vocab_parallel, lm_head_weight.shape[0], ignore_index)
        ignore_index = IGNORED
    head = Head(
        tokens.select(hidden_states.detach()),
        lm_head_weight.detach(),
        kept_labels,
        None if bias is None else bias.detach().to(dtype),
        inv_temperature,
        softcap,
        ignore_index,
        None if lora is None else LoraDelta(lora.a.detach(), lora.b.detach(), lora.scale),
        vocab_parallel,
        dtype if logits_dtype is None else logits_dtype,
        Smoothing(label_smoothing, z_loss_coef) if label_smoothing or z_loss_coef else None,
    )
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    return Inputs(hidden_states, lm_head_weight, bias, a, b), head, tokens


def stats_sweep(head: Head) -> Stats:
    """Statistics of every row; 2NDV."""
    chunks = chunking(head).split(0, head.labels.numel())
    space = workspace(head, chunks)
    out = Stats(*(space.new_empty(head.labels.numel(), dtype=compute_dtype(space.dtype)) for _ in range(4)))
    with torch.autocast(space.device.type, enabled=False):
        for rows in chunks:
            part = head.at(rows)
            known = row_stats(part, project(part, space), overwrite=True)
            for total, x in zip(out, known, strict=True):
                total[rows] = x
    return out


def gradient_sweep(
    head: Head,
    inputs: Inputs,
    wanted: Wanted,
    weight_grad: Tensor | None,
    known: Stats,
    dlogp: Tensor,
    dentropy: Tensor | None,
) -> Gradients:
    """Gradients of all inputs, given those of logprobs and entropy; 6NDV, of the rows that have any."""
    sizes = chunking(head)
    chunks = sizes.split(0, head.labels.numel())
    space = workspace(head, chunks)
    grads = Gradients(head, inputs, wanted, weight_grad)
    gathered = ScoreGradients(head, grads, sizes)
    with torch.autocast(space.device.type, enabled=False):
        for rows in chunks:
            own = Stats(*(x[rows] for x in known))
            de = None if dentropy is None else dentropy[rows]
            add_chunk(gathered, head, rows, own, dlogp[rows], de, space)
        gathered.flush()
        grads.reduce()
    return grads


def add_chunk(
    gathered: ScoreGradients,
    head: Head,
    rows: slice,
    known: Stats,
    dlogp: Tensor,
    dentropy: Tensor | None,
    space: Tensor,
    scores: Tensor | None = None,
    overwritten: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """Add the gradients of a chunk's live rows.

    Args:
        gathered: Takes them.
        head: All rows.
        rows: The chunk.
        known: Its statistics.
        dlogp: [C] derivative of the loss by logp.
        dentropy: [C] the same by the entropy, or None for zero.
        space: Workspace, where ``scores`` are.
        scores: [C, V] of the whole chunk; None to project its live rows.
        overwritten: As passed to ``row_stats`` for ``scores``.
        grad_scale: Factor of the gradients of the scores, which ``gathered`` takes out again.
    """
    part, live = head.at(rows), live_rows(dlogp.numel(), dlogp, dentropy, drops_dead_rows(head))
    if live.positions is not None:
        part, known = part.at(live.positions), Stats(*(x[live.positions] for x in known))
        dlogp, dentropy = dlogp[live.positions], None if dentropy is None else dentropy[live.positions]
        scores = None if scores is None else keep_live(scores, live.positions)
    if scores is None:
        scores = project(part, space)
    dscores = rows_backend(scores).gradient(
        scores, part.rows(grad_scale), known, dlogp, dentropy, overwritten, gathered.memory(rows)
    )
    gathered.add(part, dscores, rows, live)


def directions_sweep(head: Head, inputs: Inputs) -> tuple[Stats, Tensor]:
    """Statistics, and the gradient of hidden [n, D] for a derivative by logp of 1; 4NDV."""
    sizes, count = chunking(head), head.labels.numel()
    chunks = sizes.split(0, count)
    space = workspace(head, chunks)
    out = Stats(*(space.new_empty(count, dtype=compute_dtype(space.dtype)) for _ in range(4)))
    grads = Gradients(head, inputs, Wanted(True, False, False, False, False), None)
    gathered = ScoreGradients(head, grads, sizes)
    overwrite = head.may_overwrite
    with torch.autocast(space.device.type, enabled=False):
        for rows in chunks:
            part = head.at(rows)
            scores = project(part, space)
            known = row_stats(part, scores, overwrite)
            for total, x in zip(out, known, strict=True):
                total[rows] = x
            ones = torch.ones_like(known.logprobs)
            dscores = rows_backend(scores).gradient(
                scores, part.rows(), known, ones, None, overwrite, gathered.memory(rows)
            )
            gathered.add(part, dscores, rows, live_rows(ones.numel(), None, None, drop=False))
        gathered.flush()
        grads.reduce()
    return out, grads.directions()


class _LinearLogprobs(torch.autograd.Function):
    """Saves the statistics; backward computes each chunk of logits again."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, head: Head, tokens: Tokens, weight_grad, entropy_grad: bool
    ):
        known = stats_sweep(head)
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
        grads = gradient_sweep(
            ctx.head, Inputs(*saved, *optional), Wanted(*ctx.needs_input_grad[:5]), ctx.weight_grad, known,
            dlogp, dentropy,
        )  # fmt: skip
        return *grads.finish(tokens.put), None, None, None, None


class _FrozenLogprobs(torch.autograd.Function):
    """Saves the direction of each row's gradient, of which backward is a multiple."""

    @staticmethod
    def forward(ctx, hidden, head: Head, tokens: Tokens, inputs):
        known, directions = directions_sweep(head, Inputs(hidden, head.weight, head.bias, None, None))
        ctx.save_for_backward(directions)
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
    inputs: Inputs, head: Head, tokens: Tokens, weight_grad: Tensor | None, entropy_grad: bool
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
    backward nothing. Where the loss is known, ``linear_grpo_loss``, ``linear_srft_loss`` or
    ``linear_policy_loss`` cost 6NDV in all, and 4NDV with a frozen head.

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
    inputs, head, tokens = make_head(
        hidden_states, lm_head_weight, labels, bias, temperature, logit_softcap, logit_scale, ignore_index, lora,
        vocab_parallel, weight_grad, logits_dtype,
    )  # fmt: skip
    return differentiable_logprobs(inputs, head, tokens, weight_grad, entropy_grad)
