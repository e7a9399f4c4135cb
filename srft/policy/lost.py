"""Which rank the others wait for in vain, and where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_PLACE, _BESIDE = "srft/at/{}", "srft/beside/{}"
_FAILED = "srft/failed/{}"
# ranks that wait for another one give up within moments of each other; who comes later is the one
_HEARING_S = 1.5
_POLL_S = 0.05


class LostRank(RuntimeError):
    """Ranks that should have met did not; the message says which is missing, and where it was."""


def note_place(rank: int, place: str, *, beside: bool = False) -> None:
    """Note where a rank is, in the store that all ranks of the default process group share.

    Args:
        rank: This one.
        place: Such as "step 3, rollout"; empty: nowhere.
        beside: It is where a thread of the rank is, beside the one that trains.
    """
    _store().set((_BESIDE if beside else _PLACE).format(rank), place)


@contextmanager
def lost_ranks_named(rank: int, size: int, deadline_s: float) -> Iterator[None]:
    """While entered, a collective that fails because another rank does not take part says which one that is.

    Args:
        rank: This one.
        size: How many there are.
        deadline_s: Seconds that a collective waits.

    Raises:
        LostRank: In place of what torch.distributed raised.
    """
    try:
        yield
    except LostRank:
        raise
    except RuntimeError as error:
        # gloo has no type of its own, only the path of its source in the message
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostRank(_diagnosis(rank, size, deadline_s, error)) from error


def _diagnosis(rank: int, size: int, deadline_s: float, error: RuntimeError) -> str:
    others = [other for other in range(size) if other != rank]
    try:
        store = _store()
        store.set(_FAILED.format(rank), "1")
        had_given_up = [other for other in others if store.check([_FAILED.format(other)])]
        until = time.monotonic() + _HEARING_S
        while time.monotonic() < until and not store.check([_FAILED.format(other) for other in others]):
            time.sleep(_POLL_S)
        missing = [other for other in others if not store.check([_FAILED.format(other)])]
        places = {place: _place(place) for place in range(size)}
    except (dist.DistError, RuntimeError) as gone:
        return f"the first rank is gone, and the store of places with it ({_first_line(gone)})"
    if not rank:
        time.sleep(_HEARING_S)  # the store ends with this rank, and others may still read it
    here = f"at {places[rank]!r}"
    if not missing:
        if len(had_given_up) == len(others):
            return f"the other ranks gave up waiting for rank {rank}, {here} until now"
        where = "; ".join(f"rank {other} was at {place!r}" for other, place in places.items())
        return f"the ranks lost each other ({_first_line(error)}): {where}"
    who = "; ".join(f"rank {other}, last at {places[other]!r}" for other in missing)
    how = "did not come" if "imed out" in str(error) else "is gone or has failed"
    wait = f" within train.collective_deadline_s={deadline_s:g} s" if "imed out" in str(error) else ""
    return f"rank {rank} waited {here}, and another {how}{wait}: {who}"


def _place(rank: int) -> str:
    keys = [key.format(rank) for key in (_PLACE, _BESIDE)]
    own, beside = (_store().get(key).decode() if _store().check([key]) else "" for key in keys)
    return "; beside it ".join(filter(None, (own or "the start", beside)))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
