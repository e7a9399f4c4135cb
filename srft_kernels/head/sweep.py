"""The one sweep over chunks of rows: project, row pass, products, whenever the coefficients become known."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

import torch

from ..objectives import CallableObjective, TokenObjective
from ..rows import gpu as row_kernels
from ..rows.types import Coefficients, Stats
from .chunks import (
    Chunking,
    HeadRows,
    chunking,
    compute_dtype,
    drops_dead_rows,
    live_rows,
    project,
    row_stats,
    rows_backend,
    workspace,
)
from .gradients import Gradients, Parts
from .score_gradients import ScoreGradients

# Below this number of chunks a second projection costs less than to fill the waiting gradients and to add them up:
# measured on a CPU for two of them, where both cost the same at 5 chunks.
DEFERRED_CHUNKS = 5


class When(Enum):
    """When the coefficients of a row are known, the derivatives of the loss by its logp and its entropy."""

    NEVER = auto()
    """No gradient is wanted; 2NDV."""
    BEFORE = auto()
    """Before the sweep, as are the statistics; 6NDV, of the rows that have any."""
    ONE = auto()
    """After the sweep, which takes them for 1: the hidden states alone need a gradient, to be scaled; 4NDV."""
    SEEN = auto()
    """As soon as all chunks of a unit of rows were seen, at once where that is one chunk; 6NDV, and up to 8NDV, since
    all but the last of several are projected a second time."""
    DEFERRED = auto()
    """Likewise, but in units of many chunks gradients for coefficients of 1 wait for them; 6NDV, and for each row 2NDV
    more for every part of its coefficient but one."""


class Given(NamedTuple):
    """What is known of every row before the sweep."""

    known: Stats
    coefficients: Coefficients


# Of the scores z = hidden W^T of a row and its coefficients a and e, the row pass makes dz = a dlogp/dz + e dH/dz, then
#   dhidden = dz W,   dW = sum_n dz_n^T hidden_n,
# one chunk of z after another, if a and e are known with the chunk. Where they depend on a unit of several chunks, all
# z but the last chunk's are gone by then. They are projected again (SEEN), or dz is made for a = 1, e = 0 and put right
# afterwards. In dhidden that takes a factor of each row (ONE, DEFERRED). In dW, where a is linear in few scalars s_k
# that the unit decides, it takes a sum that waits for each of them (DEFERRED):
#   a_n = f_n + sum_k s_k g_kn,   dW = sum_n f_n dz_n^T hidden_n + sum_k s_k (sum_n g_kn dz_n^T hidden_n).
# Dead rows, with a = e = 0, leave as soon as that is known: before a projection, or between both halves of a row pass.
def sweep(
    head: HeadRows,
    when: When,
    grads: Gradients | None = None,
    source: TokenObjective | CallableObjective | Given | None = None,
    bounds: list[int] | None = None,
) -> Stats:
    """Statistics of all rows; ``grads`` takes their gradients.

    Args:
        head: The rows.
        when: Their coefficients are known.
        grads: None where that is never.
        source: Of the coefficients: a loss (SEEN, DEFERRED) or what is ``Given`` (BEFORE), else None.
        bounds: Of sequences, B+1 from 0 to the number of rows; None where the host does not know them.
    """
    given = source if isinstance(source, Given) else None
    loss = None if isinstance(source, Given) else source
    scope = "token" if loss is None else loss.scope
    sizes, backend, drop = chunking(head, scope != "token"), rows_backend(head.hidden), drops_dead_rows(head)
    units = _units(scope, bounds, head.labels.numel(), sizes)
    space = workspace(head, [rows for unit in units for rows in unit])
    known = _empty_stats(head) if given is None else given.known
    alpha = 1.0 if loss is None else _alpha(head)
    gathered = None if grads is None else ScoreGradients(head, grads, sizes, alpha)
    one_launch = backend is row_kernels and scope == "token" and head.vocab_parallel is None
    # the CPU rows then keep exp(logit - top) in place of the scores
    overwrite = head.may_overwrite and (loss is None or not loss.entropy_grad)
    with torch.autocast(space.device.type, enabled=False):
        for unit in units:
            whole = slice(unit[0].start, unit[-1].stop)
            # filled chunk by chunk
            logp, entropy = known.logprobs[whole], known.entropy[whole]
            moment = When.SEEN if when is When.DEFERRED and len(unit) < DEFERRED_CHUNKS else when
            coefficients = None if given is None else given.coefficients.at(whole)
            if moment in (When.ONE, When.DEFERRED):
                coefficients = Coefficients(torch.ones_like(logp))
            for rows, is_new, is_due in _visits(unit, moment):
                count, own = rows.stop - rows.start, slice(rows.start - whole.start, rows.stop - whole.start)
                live, parts = live_rows(count, None if coefficients is None else coefficients.at(own), drop), None
                part = live.of(head.at(rows))
                scores = project(part, space)
                if one_launch and isinstance(loss, TokenObjective):
                    assert gathered is not None
                    stats, dscores = row_kernels.objective_gradient(
                        scores, part.row_arguments(1 / alpha), loss.formula, loss.inputs[:, rows], loss.params,
                        loss.entropy_grad, gathered.memory(rows),
                    )  # fmt: skip
                    known.put(rows, stats)
                else:
                    if is_new:
                        known.put(rows, row_stats(part, scores, overwrite or not is_due))
                    if not is_due:
                        continue
                    assert gathered is not None
                    if coefficients is None:
                        assert loss is not None
                        coefficients = Coefficients(*loss.coefficients(logp, entropy, whole))
                        live = live_rows(count, coefficients.at(own), drop)
                        part, scores = live.of(part), live.scores(scores)
                    if moment is When.DEFERRED:
                        assert isinstance(loss, TokenObjective)
                        parts = Parts(*loss.parts(logp[own], rows))
                    dscores = backend.gradient(
                        scores, part.row_arguments(1.0 if parts else 1 / alpha), live.of(known.at(rows)),
                        *live.of(coefficients.at(own)), is_new and overwrite, gathered.memory(rows),
                    )  # fmt: skip
                gathered.add(part, dscores, rows, live, parts)
            if moment is When.DEFERRED:
                assert grads is not None and isinstance(loss, TokenObjective)
                dlogp, _ = loss.coefficients(logp, entropy, whole)
                grads.settle(whole, dlogp, loss.scalars(logp, entropy, whole))
    if grads is not None and gathered is not None:
        gathered.flush()
        grads.reduce()
    return known


def _visits(unit: list[slice], when: When) -> list[tuple[slice, bool, bool]]:
    """The chunks of a unit in the order of their projections; whether its statistics, and its gradients, are due."""
    if when is not When.SEEN:
        return [(rows, when is not When.BEFORE, when is not When.NEVER) for rows in unit]
    *others, last = unit
    again = [(rows, False, True) for rows in reversed(others)]
    return [*((rows, True, False) for rows in others), (last, True, True), *again]


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


def _empty_stats(head: HeadRows) -> Stats:
    dtype = compute_dtype(head.hidden.dtype)
    return Stats(*(head.hidden.new_empty(head.labels.numel(), dtype=dtype) for _ in range(4)))


def _alpha(head: HeadRows) -> float:
    """What the gradients of 16-bit scores are divided by until their products are added up."""
    # fp16 ends at 2^-24 and 2^16: a token in a mean over thousands needs the room below, one in a sum that above
    is_fp16 = head.scores_dtype == torch.float16
    if rows_backend(head.hidden) is row_kernels:
        is_fp16 |= head.hidden.dtype == torch.float16
    return 2.0**-8 if is_fp16 else 1.0
