"""Answers turns of a policy in processes that cannot hang the run; a conversation stays with one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from srft.environments.kinds import check_environment
from srft.workers.pool import Worker, WorkerPool

_FAILURES = 8  # conversations that nothing came of, and no other: each costs two starts of a process, or a deadline


@dataclass(frozen=True)
class Reply:
    """What an environment has to say to a turn.

    Args:
        said: To the policy; None: the conversation is over.
        reward: Of one that is over, where the environment judges.
        status: "ok"; "timeout": its process was killed at the deadline; "error": that died twice.
        message: What went wrong, empty for "ok".
    """

    said: str | None
    status: Literal["ok", "timeout", "error"] = "ok"
    message: str = ""
    reward: float = 0.0


@dataclass(frozen=True)
class Asked:
    """A conversation at its newest turn.

    Args:
        key: Tells it from the others of its batch; >= 0.
        texts: What the policy has said, turn by turn.
        answer: The example's.
        row: The example's.
    """

    key: int
    texts: list[str]
    answer: Any
    row: dict[str, Any]


class EnvironmentPool(WorkerPool[Reply]):
    """Worker processes that answer for one environment.

    Each has the conversations whose key falls to it. One that was killed leaves its conversations to its successor,
    which plays their turns so far again: an environment should answer the same turns alike.

    Args:
        name: "calculator" or "path/to/file.py:Class".
        workers: Number of processes, >= 1.
        deadline_s: Seconds that an answer may take, > 0.

    Raises:
        ValueError: On an unknown environment, a missing file, or a bad number.
    """

    def __init__(self, name: str, workers: int, deadline_s: float) -> None:
        check_environment(name)
        super().__init__("srft.environments.worker", name, f"env.name={name}", workers, deadline_s)
        self._batch = 0
        # of steps and of rewards, by whether it is the latter; None: some had a result
        self._failed: dict[bool, int | None] = {False: 0, True: 0}
        self.judges = False
        """Whether the environment gives rewards by itself; known from the first ``begin`` or ``prewarm`` on."""

    def begin(self) -> None:
        """Forget all conversations: the next are others, whatever their keys.

        Raises:
            ValueError: When the environment cannot be loaded.
        """
        self.prewarm()
        self._batch += 1

    def answer(self, asked: Sequence[Asked]) -> list[Reply]:
        """Answer each conversation's newest turn, in order.

        Args:
            asked: Conversations since the last ``begin``, each once, with one turn at least.

        Raises:
            ValueError: When the environment raises, with file and line; when it cannot be loaded, or has hung or died
                on all of the first conversations.
        """
        return self._replies(asked, is_over=False)

    def judge(self, asked: Sequence[Asked]) -> list[Reply]:
        """Give each conversation its reward, in order; for an environment that ``judges``.

        Args:
            asked: As for ``answer``, with the turns that were answered.

        Raises:
            ValueError: As ``answer``.
        """
        return self._replies(asked, is_over=True)

    def _replies(self, asked: Sequence[Asked], *, is_over: bool) -> list[Reply]:
        before = self._failed[is_over]

        def count(results: dict[int, Reply]) -> None:
            """Refuse to go on with an environment that has ended its process wherever it was asked."""
            bad = [reply for reply in results.values() if reply.status != "ok"]
            if before is None or len(bad) < len(results):
                self._failed[is_over] = None
                return
            self._failed[is_over] = failed = before + len(bad)
            if failed >= _FAILURES:
                raise ValueError(
                    f"{self._about}: {'reward' if is_over else 'step'} has failed in all of the first {failed} "
                    f"conversations, in the last one with: {bad[-1].message}; mend it, or raise env.deadline_s="
                    f"{self.deadline_s:g} where it is slow"
                )

        return self._run([(self._batch, one.key, one.texts, one.answer, one.row, is_over) for one in asked], count)

    def _loaded(self, about: str) -> None:
        self.judges = about == "judges"

    def _result(self, payload: Any) -> Reply:
        said, reward, status, message = payload
        if status == "raised":
            raise ValueError(f"{self._about}: {message}")
        return Reply(said, reward=reward)

    def _failure(self, status: Literal["timeout", "error"], message: str) -> Reply:
        return Reply(None, status, message)

    def _takes(self, worker: Worker, item: Any) -> bool:
        return item[1] % self._size == worker.slot
