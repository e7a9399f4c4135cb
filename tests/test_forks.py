"""Calls in processes of their own: how they end reaches the caller, and none is left."""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.forks import run_forked
from tests.trainer.processes import state_and_parent


def ends(how: str) -> None:
    """What a call may do; the process that it leaves behind is in its group."""
    print(how, os.environ["MARK"], os.getpid() == os.getsid(0))
    if how == "status":
        sys.exit(7)
    if how == "words":
        sys.exit("what is wrong")
    if how == "error":
        raise ValueError("an error")
    if how == "signal":
        os.abort()
    if child := os.fork():
        print(child)
    if child == 0 or how == "hang":
        time.sleep(600)


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [("returns", 0, ""), ("status", 7, ""), ("words", 1, "what is wrong\n"), ("error", 1, "ValueError: an error\n"),
     ("signal", -6, "")],
)  # fmt: skip
def test_status_and_words_are_those_of_the_call(how: str, status: int, said: str) -> None:
    """Of one that returns, leaves, fails or is killed; in the environment that it is given."""
    found, out, err = run_forked("tests.test_forks:ends", [how], {"MARK": "given"}, 60)
    assert found == status and err.endswith(said)
    assert how == "signal" or out.startswith(f"{how} given True\n")


def test_what_a_call_has_started_ends_with_it() -> None:
    """Whatever it was to do, it has no one to do it for."""
    _, out, _ = run_forked("tests.test_forks:ends", ["returns"], {"MARK": ""}, 60)
    deadline = time.monotonic() + 10
    while (left := state_and_parent(int(out.split()[-1]))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def test_a_call_that_hangs_is_killed() -> None:
    """It is an error of the test, and the next call has its own answer."""
    with pytest.raises(AssertionError, match="has not ended after 0.2 s"):
        run_forked("tests.test_forks:ends", ["hang"], {"MARK": ""}, 0.2)
    assert run_forked("tests.test_forks:ends", ["status"], {"MARK": "again"}, 60)[:2] == (7, "status again True\n")
