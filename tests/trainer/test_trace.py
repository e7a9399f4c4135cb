"""The tokens of a step that stand out, found in its record."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srft.policy.model import byte_tokenizer
from srft.trace import tables
from tests.trainer.runs import ROOT, environment, train


def row(place: int, text: str, **changes: Any) -> dict[str, Any]:
    """A recorded rollout, every token of which both find as likely as 1/e."""
    ids = list(byte_tokenizer()(text)["input_ids"])
    return {
        "id": "t:1", "group": 3, "place": place, "gave_way": False, "is_demo": False, "prefix_tokens": 0,
        "advantage": 0.5, "reward": 1.0, "response_ids": ids, "rollout_logprobs": [-1.0] * len(ids),
        "logprobs": [-1.0] * len(ids),
    } | changes  # fmt: skip


def test_each_table_begins_with_what_stands_out_most() -> None:
    """A gap, an unlikely token of a demonstration, and a large advantage; what gave way has no part."""
    apart = row(0, "abcd", logprobs=[-1.0, -1.0, -1.5, -1.0])
    shown = row(1, "wxyz", is_demo=True, rollout_logprobs=[], logprobs=[-1.0, -9.0, -1.0, -1.0], advantage=7.0)
    pulled = row(2, "mnop", advantage=-2.0, logprobs=[-1.0, -1.0, -1.0, -1.2], prefix_tokens=1)
    other = row(0, "none", gave_way=True, logprobs=[-99.0] * 4)
    gap, unlikely, pull = tables([apart, shown, pulled, other], byte_tokenizer(), 2)
    assert gap.rows[0] == ["3.0 rollout t:1", "2", "0.5", "-1.5", "-1", "0.5", "1", "'ab'", "'c'"]
    assert unlikely.rows[0] == ["3.1 demo t:1", "1", "9", "-9", "", "7", "1", "'w'", "'x'"]
    assert pull.rows[0][:3] == ["3.2 rollout t:1", "3", f"{2 * (1 - math.exp(-1.2)):.4g}"]
    assert [len(table.rows) for table in (gap, unlikely, pull)] == [2, 2, 2]


def test_what_was_said_to_the_policy_is_passed_over() -> None:
    """Of "abcdef" the tokens "cd" are an environment's; the third number of a list is of "e"."""
    now, sampled = [-1.0, -1.0, -3.0, -1.0], [-1.0, -1.0, -2.0, -1.0]
    talk = row(0, "abcdef", spans=[2, 2, 2], logprobs=now, rollout_logprobs=sampled)
    for table in tables([talk], byte_tokenizer(), 1):
        assert table.rows[0][1] == "4" and table.rows[0][-2:] == ["'abcd'", "'e'"]


def test_what_is_no_number_comes_first() -> None:
    """A NaN is where a spike came from."""
    found = tables([row(0, "abcd", logprobs=[-1.0, -5.0, math.nan, -1.0])], byte_tokenizer(), 1)
    assert [table.rows[0][1] for table in found] == ["2", "2", "2"]


def test_a_record_without_log_probabilities_is_refused() -> None:
    """In one line."""
    with pytest.raises(ValueError, match="no log-probabilities of the policy"):
        tables([row(0, "abcd", logprobs=None)], byte_tokenizer(), 1)


def test_the_command_prints_them(tmp_path: Path) -> None:
    """Of a run that recorded, every number whole in a pipe, too; of a step that is not there it says so."""
    run = train(tmp_path, train__steps=1, train__record_rollouts=True)
    command = [sys.executable, "-m", "srft.trace", str(run)]
    done, absent = (
        subprocess.run([*command, step], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
        for step in ("1", "2")
    )
    assert done.returncode == 0, done.stderr
    assert all(title in done.stdout for title in ("Policy and engine apart", "Least likely", "Pulled most"))
    rows = [line.split() for line in done.stdout.splitlines() if " rollout chain:" in line]
    assert rows and [float(word) for words in rows for word in words[3:9]], "a number that is cut is none"
    assert absent.returncode == 2 and "step_000002.arrow; record it" in absent.stderr
