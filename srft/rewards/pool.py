"""Grades completions in processes that cannot hang the run: a hard deadline per item, then SIGKILL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from srft.rewards.kinds import check_kind
from srft.workers.ahead import Ahead
from srft.workers.pool import DIED, WorkerPool

_DEATHS = 8  # a verifier that has ended its process on so many items and graded none ends the run
Item = tuple[str, Any, dict[str, Any]]


@dataclass(frozen=True)
class RewardResult:
    """The grade of one completion.

    Args:
        value: 0 or 1 from the built-in verifiers, any finite float from others; 0 unless ``status`` is "ok".
        status: "ok"; "unjudged": the verifier returned None; "timeout": killed at the deadline; "error": the
            verifier raised, or its process died twice; "bad_gold": the ground truth cannot be read.
        message: What went wrong, empty for "ok".
    """

    value: float
    status: Literal["ok", "unjudged", "timeout", "error", "bad_gold"]
    message: str = ""


class Judge(Protocol):
    """What gives answers their grades: a ``RewardPool``, or what stands before one."""

    def score(self, items: Sequence[Item]) -> list[RewardResult]:
        """Return the grade of each answer, in order.

        Args:
            items: (completion, answer, row) each.
        """


class RewardPool(WorkerPool[RewardResult]):
    """Worker processes that share one verifier; started by the first use, or by ``prewarm``.

    Args:
        kind: "exact", "numeric", "countdown", "math", "reasoning_gym:<task>" or "path/to/file.py:function",
            where function(completion, answer, row) returns a float, or None for a completion that it does
            not judge.
        workers: Number of processes, >= 1.
        deadline_s: Seconds that one item may run, > 0; the start of a process does not count.

    Raises:
        ValueError: On an unknown verifier, a missing file, or a bad number.
    """

    def __init__(self, kind: str, workers: int, deadline_s: float) -> None:
        super().__init__("srft.rewards.worker", kind, f"reward {kind!r}", workers, deadline_s)
        check_kind(kind)
        self.kind = kind
        self.counts: Counter[str] = Counter()
        self._graded = False
        # an answer and its row are the problem's own objects
        self._ahead = Ahead(self, lambda item: (item[0], id(item[1]), id(item[2])), self._give_up)

    def begin(self, item: Item) -> None:
        """Let an answer be graded while others are still to come; ``score`` returns its grade.

        Args:
            item: Of those that the next ``score`` is asked for, the same objects; from any thread.
        """
        self._ahead.begin(item)

    def close(self) -> None:
        """Kill the workers; safe to call twice."""
        self._ahead.close()
        super().close()

    def score(self, items: Sequence[Item], *, may_fail: bool = False) -> list[RewardResult]:
        """Grade (completion text, answer, row) triples; result ``i`` belongs to item ``i``.

        Args:
            items: Any number of triples; answer and row must be picklable.
            may_fail: Return the results of a batch on which the verifier failed throughout, instead of raising.

        Raises:
            ValueError: If the verifier cannot be loaded, if it fails on a whole batch, or if the pool is closed.
        """
        if self._ahead.has_begun:
            ordered = self._ahead.finish(items)
        else:
            ordered = self._run(items, None if may_fail else self._give_up)
        self.counts.update(result.status for result in ordered)
        if not may_fail:
            self._stop_if_useless(ordered)
        return ordered

    def _give_up(self, results: dict[int, RewardResult]) -> None:
        """Refuse to go on with a verifier that has ended its process on each of its first items."""
        if not self._graded and len(results) >= _DEATHS:
            # each death costs two starts of a process: nobody should wait for a whole batch of them
            if all(result.message.startswith(DIED) for result in results.values()):
                self._stop_if_useless(list(results.values()))

    def _stop_if_useless(self, results: list[RewardResult]) -> None:
        """Refuse to go on with a verifier that has failed on all of its first items, or on a whole batch of several."""
        failed = [result for result in results if result.status not in ("ok", "unjudged")]
        if len(failed) < len(results) or not results:
            self._graded = True
            return
        broken = len(failed) > 1 and all(result.status == "error" for result in failed)
        if broken or not self._graded:
            what = {"timeout": "hit its deadline", "bad_gold": "could not read the answer"}
            raise ValueError(
                f"reward {self.kind!r} {what.get(failed[0].status, 'failed')} on all of the first "
                f"{len(failed)} items of a batch, the first with: {failed[0].message}"
            )

    def _result(self, payload: Any) -> RewardResult:
        return RewardResult(*payload)

    def _failure(self, status: Literal["timeout", "error"], message: str) -> RewardResult:
        return RewardResult(0.0, status, message)
