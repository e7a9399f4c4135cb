"""One sweep over chunks of logits gives loss and gradients, whatever a coefficient depends on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import CallableObjective, TokenObjective
from ..rows import gpu as row_kernels
from ..rows.types import Stats
from ..types import Inputs, PolicyLoss, Wanted
from .chunks import (
    Chunking,
    HeadRows,
    Tokens,
    chunking,
    compute_dtype,
    drops_dead_rows,
    keep_live,
    live_rows,
    project,
    row_stats,
    rows_backend,
    workspace,
)
from .gradients import Gradients
from .last_gradient import last_gradient, links
from .score_gradients import ScoreGradients

# Weight gradients that wait for a scalar, where each saves a second projection. A fixed number, so that a result
# does not depend on what else is in memory.
CPU_DEFERRED_BYTES = 2 * 2**30
GPU_DEFERRED_BYTES = 4 * 2**30
# Below this number of chunks a second projection costs less than to fill the waiting gradients and to add them up:
# measured on a CPU for two of them, where both cost the same at 5 chunks.
DEFERRED_CHUNKS = 5


class _AttachGradients(torch.autograd.Function):
    """Gives a computed loss the gradients that were computed with it, beside those that it has of its own."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, loss, gradients: Gradients, tokens: Tokens, inputs):
        ctx.gradients, ctx.tokens, ctx.links = gradients, tokens, inputs
        return loss.clone()

    @staticmethod
    @last_gradient
    def backward(ctx, dloss):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss was already differentiated: its gradients, computed in forward, were given "
                "away by the first backward; call the loss again, or use linear_logprobs to keep a graph"
            )
        # a comparison would make a GPU wait
        is_one = dloss.device.type == "cpu" and bool(dloss == 1)
        if gradients.external and dloss.device.type == "cpu" and not is_one:
            raise RuntimeError(
                f"the gradient of the weight is in weight_grad already, for a loss that enters backward with "
                f"factor 1, got {dloss.item()}; put the factor into token_weights, or drop weight_grad"
            )
        if gradients.external and dloss.is_cuda:
            torch._assert_async(dloss == 1)
        scale = None if is_one else dloss
        return *gradients.finish(ctx.tokens.put, scale), dloss, None, None, None


def stats_sweep(head: HeadRows) -> Stats:
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
    head: HeadRows,
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
    head: HeadRows,
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


def directions_sweep(head: HeadRows, inputs: Inputs) -> tuple[Stats, Tensor]:
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


def _units(scope: str, bounds: list[int] | None, count: int, sizes: Chunking) -> list[list[slice]]:
    """Rows whose coefficients become known together, as chunks.

    Args:
        scope: What a coefficient depends on: "token", "sequence" or "batch".
        bounds: B+1 sequence bounds, from 0 to ``count``; None where the host does not know them.
        count: Number of rows.
        sizes: Rows of a chunk.
    """
    chunks = sizes.split(0, count)
    if scope == "token":
        return [[chunk] for chunk in chunks]
    if scope == "batch" or bounds is None or len(chunks) <= 1:
        return [chunks] if chunks else []
    units, start = [], 0
    for end, following in zip(bounds[1:], [*bounds[2:], None], strict=True):
        if end > start and (following is None or following - start > sizes.scores):
            units.append(sizes.split(start, end))
            start = end
    return units


class _Sweep:
    """Statistics and gradients of every row, unit by unit; afterwards logp and entropy [n] are filled."""

    def __init__(
        self,
        head: HeadRows,
        objective: TokenObjective | CallableObjective,
        grads: Gradients,
        space: Tensor,
        sizes: Chunking,
    ):
        self._head, self._objective, self._grads, self._space = head, objective, grads, space
        self._backend = rows_backend(space)
        dtype = compute_dtype(head.hidden.dtype)
        self.logp, self.entropy = (space.new_empty(head.labels.numel(), dtype=dtype) for _ in range(2))
        # the CPU rows then keep exp(logit - top) in place of the scores
        self._overwrite = not objective.entropy_grad and head.may_overwrite
        # fp16 ends at 2^-24 and 2^16: a token in a mean over thousands needs the room below, one in a sum that above
        alpha = 1.0
        if torch.float16 in (head.scores_dtype, head.hidden.dtype if self._backend is row_kernels else None):
            alpha = 2.0**-8
        self._grad_scale, self._gathered = 1 / alpha, ScoreGradients(head, grads, sizes, alpha)

    def one_chunk(self, rows: slice) -> None:
        """Rows that need nothing of the rows outside."""
        head, objective = self._head.at(rows), self._objective
        scores = project(head, self._space)
        if (
            self._backend is row_kernels
            and isinstance(objective, TokenObjective)
            and objective.scope == "token"
            and head.vocab_parallel is None
        ):
            known, dscores = row_kernels.objective_gradient(
                scores,
                head.rows(self._grad_scale),
                objective.formula,
                objective.inputs[:, rows],
                objective.params,
                objective.entropy_grad,
                self._gathered.memory(rows),
            )
            self._keep(rows, known)
            self._gathered.add(head, dscores, rows, live_rows(scores.shape[0], None, None, drop=False))
            return
        known = row_stats(head, scores, self._overwrite)
        self._keep(rows, known)
        dlogp, dentropy = objective.coefficients(known.logprobs, known.entropy, rows)
        add_chunk(
            self._gathered, self._head, rows, known, dlogp, dentropy, self._space, scores, self._overwrite,
            self._grad_scale,
        )  # fmt: skip

    def stats_first(self, chunks: list[slice]) -> None:
        """A unit of several chunks whose scores, but for the last chunk's, are computed twice."""
        known, scores = [], self._space
        for rows in chunks:
            head = self._head.at(rows)
            scores = project(head, self._space)
            known.append(row_stats(head, scores, self._overwrite and rows is not chunks[-1]))
            self._keep(rows, known[-1])
        unit = slice(chunks[0].start, chunks[-1].stop)
        dlogp, dentropy = self._objective.coefficients(self.logp[unit], self.entropy[unit], unit)
        for rows, part in zip(reversed(chunks), reversed(known), strict=True):
            own = slice(rows.start - unit.start, rows.stop - unit.start)
            de = None if dentropy is None else dentropy[own]
            kept = scores if rows is chunks[-1] else None
            add_chunk(
                self._gathered, self._head, rows, part, dlogp[own], de, self._space, scores=kept,
                grad_scale=self._grad_scale,
            )  # fmt: skip

    def deferred(self, chunks: list[slice]) -> None:
        """A unit of several chunks, each of which is projected once, before its scalars are known."""
        objective = self._objective
        assert isinstance(objective, TokenObjective)
        for rows in chunks:
            head = self._head.at(rows)
            scores = project(head, self._space)
            known = row_stats(head, scores, self._overwrite)
            self._keep(rows, known)
            ones = torch.ones_like(known.logprobs)
            self._gathered.flush()
            dscores = self._backend.gradient(
                scores, head.rows(), known, ones, None, self._overwrite, self._gathered.memory(rows)
            )
            fixed, scaled = objective.parts(known.logprobs, rows)
            live = live_rows(ones.numel(), None, None, drops_dead_rows(head))
            self._grads.add_directions(head, dscores, rows, live, fixed, scaled)
        unit = slice(chunks[0].start, chunks[-1].stop)
        logp, entropy = self.logp[unit], self.entropy[unit]
        dlogp, _ = objective.coefficients(logp, entropy, unit)
        self._grads.settle(unit, dlogp, objective.scalars(logp, entropy, unit))

    def finish(self) -> None:
        """Add up what still waits."""
        self._gathered.flush()

    def _keep(self, rows: slice, known: Stats) -> None:
        self.logp[rows], self.entropy[rows] = known.logprobs, known.entropy


def _can_defer(objective: TokenObjective | CallableObjective, head: HeadRows, wants_weight: bool) -> bool:
    """Coefficients that are not known in time may wait: cheaper than a second projection, and in memory."""
    if not objective.deferred or objective.entropy_grad or head.lora is not None:
        return False
    # dead rows of a part stay in its product on a GPU, so that two parts cost as much as a second projection
    if not drops_dead_rows(head) and objective.products > 1:
        return False
    limit = GPU_DEFERRED_BYTES if head.hidden.is_cuda else CPU_DEFERRED_BYTES
    size = head.weight.numel() * compute_dtype(head.hidden.dtype).itemsize
    return not wants_weight or objective.deferred * size <= limit


def loss_with_gradients(
    inputs: Inputs,
    head: HeadRows,
    tokens: Tokens,
    objective: TokenObjective | CallableObjective,
    bounds: list[int] | None,
    weight_grad: Tensor | None,
) -> PolicyLoss:
    """Run ``objective``, choosing for each unit the cheapest sweep that knows its coefficients in time.

    Args:
        inputs: As autograd sees them.
        head: The computed rows.
        tokens: Maps results to all rows.
        objective: The loss.
        bounds: Sequence bounds in computed rows, where they are known without a device sync.
        weight_grad: [V, D] fp32 to add the gradient of the weight to, or None.
    """
    wanted = inputs.wanted()
    grads = None
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        if any(wanted):
            sizes = chunking(head, together=objective.scope != "token")
            units = _units(objective.scope, bounds, head.labels.numel(), sizes)
            can_defer = _can_defer(objective, head, wanted.weight)
            grads = Gradients(head, inputs, wanted, weight_grad)
            space = workspace(head, [chunk for unit in units for chunk in unit])
            sweep = _Sweep(head, objective, grads, space, sizes)
            for unit in units:
                if len(unit) == 1:
                    sweep.one_chunk(unit[0])
                elif len(unit) >= DEFERRED_CHUNKS and can_defer:
                    sweep.deferred(unit)
                else:
                    sweep.stats_first(unit)
            sweep.finish()
            grads.reduce()
            logp, entropy = sweep.logp, sweep.entropy
        else:
            known = stats_sweep(head)
            logp, entropy = known.logprobs, known.entropy
        loss, ratio, clipped, terms = objective.evaluate(logp, entropy)
    if grads is not None:
        loss = _AttachGradients.apply(*inputs, loss, grads, tokens, links(inputs))
    put = tokens.put
    return PolicyLoss(loss, put(logp), put(entropy), put(ratio, 1.0), put(clipped, False), terms)
