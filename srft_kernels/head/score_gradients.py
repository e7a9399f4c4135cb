"""Where the gradients of the scores lie until a product takes them."""

from __future__ import annotations

from torch import Tensor

from .chunks import Chunking, HeadRows, Live, live_rows, scores_memory
from .gradients import Gradients, Parts


class ScoreGradients:
    """Gradients of the scores of one chunk after another, for one product of several chunks.

    Without ``chunking.gathered`` they lie over the scores, and each chunk has a product of its own.
    """

    def __init__(self, head: HeadRows, grads: Gradients, chunking: Chunking, alpha: float = 1.0):
        """For all rows of ``head``; ``alpha``, a power of two, divides the gradients until ``grads`` adds them up."""
        self._head, self._grads, self._alpha = head, grads, alpha
        self._limit, self._waiting = chunking.products, slice(0, 0)
        self._memory: Tensor | None = None
        if chunking.gathered:
            rows = min(chunking.products, head.labels.numel())
            self._memory = scores_memory(head, rows, head.hidden.dtype)

    def memory(self, rows: slice) -> Tensor | None:
        """[C, V] for the gradient of a chunk; None: over its scores."""
        if self._memory is None:
            return None
        if rows.start != self._waiting.stop or rows.stop - self._waiting.start > self._limit:
            self.flush()
            self._waiting = slice(rows.start, rows.start)
        return self._memory[rows.start - self._waiting.start : rows.stop - self._waiting.start]

    def add(self, part: HeadRows, dscores: Tensor, rows: slice, live: Live, parts: Parts | None = None) -> None:
        """Add what a chunk sends back, now or with the next ones.

        Args:
            part: The live rows of the chunk.
            dscores: [m, V] gradient of their scores, divided by ``alpha``; in ``memory(rows)``, if there is any.
            rows: Where the chunk is among all rows.
            live: Where the live rows are in the chunk.
            parts: See ``Gradients.add``; ``dscores`` are then not divided, and are added now, each in its product.
        """
        if parts is not None:
            self.flush()
            self._grads.add(part, dscores, rows, live, parts=parts)
        elif self._memory is None:
            self._grads.add(part, dscores, rows, live, self._alpha)
        else:
            assert live.positions is None and self._waiting.stop == rows.start
            self._waiting = slice(self._waiting.start, rows.stop)

    def flush(self) -> None:
        """Give the products the chunks that wait."""
        rows, self._waiting = self._waiting, slice(0, 0)
        if rows.start == rows.stop:
            return
        assert self._memory is not None
        count = rows.stop - rows.start
        live = live_rows(count, None, drop=False)
        self._grads.add(self._head.at(rows), self._memory[:count], rows, live, self._alpha)
