"""Items that a pool works on while others are still to come."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from srft.workers.pool import Batch, WorkerPool

_Result = TypeVar("_Result")


class Ahead(Generic[_Result]):
    """Hands a batch of items to a pool one by one, in a thread, until it is asked for all of them.

    The thread lives as long as the pool does: on Linux a worker ends with the thread that started it.

    Args:
        pool: Nobody else uses it from the first ``begin`` of a batch to its ``finish``.
        key: By which an item that was begun is found again.
        after: Told of the results of a batch after every event; what it raises ends the batch.
    """

    def __init__(
        self,
        pool: WorkerPool[_Result],
        key: Callable[[Any], Hashable],
        after: Callable[[dict[int, _Result]], None],
    ) -> None:
        self._pool, self._key, self._after = pool, key, after
        self._changed = threading.Condition()
        # rings when there is more to do than the thread knew when it began to wait for the workers
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._new_batch()

    @property
    def has_begun(self) -> bool:
        """Whether items wait for ``finish``."""
        return bool(self._items)

    def begin(self, item: Any) -> None:
        """Let an item be worked on as soon as a worker is free; from any thread.

        Args:
            item: One of the next ``finish``, or one too many.
        """
        with self._changed:
            self._add(item)
            self._go_on()

    def finish(self, items: Sequence[Any]) -> list[_Result]:
        """Return the result of each item, in order, and of those that were not begun, too.

        Args:
            items: Any number; equal ones are each worked on.

        Raises:
            Exception: Whatever ended the batch.
        """
        with self._changed:
            begun: dict[Hashable, deque[int]] = {}
            for place, item in enumerate(self._items):
                begun.setdefault(self._key(item), deque()).append(place)
            places = [of.popleft() if (of := begun.get(self._key(item))) else self._add(item) for item in items]
            self._go_on()
            # one too many is waited for as well, since a worker may be on it
            self._changed.wait_for(lambda: self._error or self._closed or len(self._batch.results) == len(self._items))
            error, results = self._error, self._batch.results
            if error is None and len(results) < len(self._items):
                error = ValueError("the pool was closed before all items had results")
            self._new_batch()
            # the thread lets others have the pool
            self._changed.notify_all()
        if error is not None:
            raise error
        return [results[place] for place in places]

    def close(self) -> None:
        """End the thread, whatever it is at; safe to call twice."""
        with self._changed:
            self._closed = True
            self._go_on()
        if self._thread is not None:
            self._thread.join()
        self._bell.close()
        self._ringer.close()

    def _new_batch(self) -> None:
        self._items: list[Any] = []
        self._batch: Batch[_Result] = Batch()
        self._error: BaseException | None = None

    def _add(self, item: Any) -> int:
        self._items.append(item)
        return len(self._items) - 1

    def _go_on(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        with suppress(BlockingIOError, OSError):  # it has been ringing for long, or is closed
            self._ringer.send(b".")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (bool(self._items) and self._error is None))
                if self._closed:
                    return
                batch = self._batch
            try:
                with self._pool.held():
                    while self._more(batch):
                        self._pool.turn(batch, self._bell)
                        self._after(batch.results)
            except Exception as error:  # it is for whoever asks for the results
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

    def _more(self, batch: Batch[_Result]) -> bool:
        """Wait until there is something to do for a batch, and take it up; False once it is finished."""
        with suppress(BlockingIOError):
            while self._bell.recv(4096):
                pass
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._closed or batch is not self._batch or len(batch.results) < len(self._items)
            )
            if self._closed or batch is not self._batch:
                return False
            batch.add(self._items[len(batch.items) :])
            return True
