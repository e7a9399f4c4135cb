"""linear_logprobs: statistics for any loss, and the sweeps over chunks of rows that every op uses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_head
from ._chunked_head import (
    Gradients,
    Head,
    Tokens,
    compute_dtype,
    even_chunks,
    max_rows,
    project,
    rows_backend,
    workspace,
)
from ._row_cpu import Stats

__all__ = ["linear_logprobs"]


def make_head(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_softcap: float | None,
    ignore_index: int,
) -> tuple[Head, Tokens]:
    """Check the arguments that every op shares and reduce them to the rows that are computed."""
    check_head(hidden_states, lm_head_weight, labels, bias, temperature, logit_softcap)
    tokens = Tokens(labels, ignore_index)
    dtype = compute_dtype(hidden_states.dtype)
    inv_temperature = None
    if isinstance(temperature, Tensor) or temperature != 1.0:
        temperature = torch.as_tensor(temperature, dtype=dtype, device=hidden_states.device).detach()
        inv_temperature = tokens.select(temperature.reciprocal().expand(labels.shape))
    head = Head(
        tokens.select(hidden_states.detach()),
        lm_head_weight.detach(),
        tokens.select(labels).contiguous(),
        None if bias is None else bias.detach().to(dtype),
        inv_temperature,
        logit_softcap,
        ignore_index,
    )
    return head, tokens


def stats_sweep(head: Head) -> Stats:
    """Statistics of every row; 2NDV."""
    chunks = even_chunks(head.labels.numel(), max_rows(head))
    space = workspace(head, chunks)
    out = Stats(*(space.new_empty(head.labels.numel()) for _ in range(4)))
    backend = rows_backend(head)
    with torch.autocast(space.device.type, enabled=False):
        for rows in chunks:
            part = backend.stats(project(head, rows, space), head.rows(rows), overwrite=True)
            for total, x in zip(out, part, strict=True):
                total[rows] = x
    return out


def gradient_sweep(
    head: Head, known: Stats, dlogp: Tensor, dentropy: Tensor | None, wants: tuple[bool, ...]
) -> Gradients:
    """Gradients of hidden, weight and bias, given those of logprobs and entropy; 6NDV."""
    chunks = even_chunks(head.labels.numel(), max_rows(head))
    space = workspace(head, chunks)
    grads = Gradients(head, wants)
    backend = rows_backend(head)
    with torch.autocast(space.device.type, enabled=False):
        for rows in chunks:
            dscores = backend.gradient(
                project(head, rows, space),
                head.rows(rows),
                Stats(*(x[rows] for x in known)),
                dlogp[rows],
                None if dentropy is None else dentropy[rows],
                overwritten=False,
            )
            grads.add(head, dscores, rows)
    return grads


class _LinearLogprobs(torch.autograd.Function):
    """Saves the statistics; backward computes each chunk of logits again."""

    @staticmethod
    def forward(ctx, hidden_states, lm_head_weight, bias, head: Head, tokens: Tokens, entropy_grad: bool):
        known = stats_sweep(head)
        logprobs, entropy = tokens.put(known.logprobs), tokens.put(known.entropy)
        # hidden and weight are saved for autograd's check that nobody wrote to them meanwhile
        ctx.save_for_backward(hidden_states, lm_head_weight, *known)
        ctx.head, ctx.tokens = head, tokens
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy):
        known, tokens = Stats(*ctx.saved_tensors[2:]), ctx.tokens
        dlogp = torch.zeros_like(known.logprobs) if dlogprobs is None else tokens.take(dlogprobs)
        dentropy = None if dentropy is None else tokens.take(dentropy)
        grads = gradient_sweep(ctx.head, known, dlogp, dentropy, ctx.needs_input_grad[:3])
        return *grads.finish(tokens.put, ctx.bias_dtype), None, None, None


def linear_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution, without materialising the [N, V] logits.

    Equivalent, with memory that does not grow with N V, to::

        logits = hidden_states.float() @ lm_head_weight.float().T + bias
        logits = logit_softcap * tanh(logits / logit_softcap) / temperature
        logprobs = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        entropy = Categorical(logits=logits).entropy()

    Use it for a loss that is not known in advance: forward costs 2NDV, backward computes the logits again
    (6NDV). Where the loss is known, ``linear_grpo_loss``, ``linear_srft_loss`` or ``linear_policy_loss`` cost
    6NDV in all.

    Args:
        hidden_states: [N, D] bf16, fp16, fp32 (fp64 on CPU); final normed states, batch and time flattened.
        lm_head_weight: [V, D], dtype of ``hidden_states``; a plain tensor, not a DTensor.
        labels: [N] int64 in [0, V), already shifted. Not checked, since that would wait for the GPU.
        bias: [V], added to the logits.
        temperature: Divides the logits, > 0; a float, or [N] with one value per token. No gradient flows to
            it.
        logit_softcap: c > 0 in z = c tanh(z / c), applied before the temperature. None: no cap.
        ignore_index: Label of rows to skip: log-probability 0, entropy 0, no gradient.
        entropy_grad: Let the entropy carry a gradient.

    Returns:
        (logprobs, entropy), each [N] fp32 (fp64 for fp64 inputs), in nats. ``entropy`` carries a gradient
        only with ``entropy_grad``.

    Raises:
        ValueError: On a wrong rank, shape, dtype or device, a DTensor, or a temperature or softcap that is
        not positive.

    Numerics: logits, softmax and sums in fp32; the weight gradient is added up in fp32 and rounded once.
    Deterministic: yes. Peak extra memory: one workspace of logits, the gradients, O(N).
    Eager twin: ``reference.linear_logprobs``.
    """
    head, tokens = make_head(
        hidden_states, lm_head_weight, labels, bias, temperature, logit_softcap, ignore_index
    )
    return _LinearLogprobs.apply(hidden_states, lm_head_weight, bias, head, tokens, entropy_grad)
