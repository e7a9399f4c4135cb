"""A reward that cannot work stops the run with its reason; one that does not judge leaves the sample out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from srft import prepare, train
from srft.data.examples import Example
from srft.data.judging import check_answers, check_demos
from srft.data.prompts import Prompt
from srft.responses import Group
from srft.rewards.pool import RewardPool, RewardResult
from srft.rollout import judge
from tests.trainer.runs import arguments, read_lines
from tests.trainer.runs import train as run_small
from tests.trainer.tiny import example, sequence

REWARDS = '''
import os, time
import asyncio

def as_dict(completion, answer, row):
    return {"score": 1.0, "why": "right"}

def as_list(completion, answer, row):
    return [1.0]

def as_text(completion, answer, row):
    return "1.0"

def as_numpy(completion, answer, row):
    import numpy
    return numpy.float32(answer)

def dies(completion, answer, row):
    with open(row["log"], "a") as file:
        file.write("x")
    os._exit(3)

def raises(completion, answer, row):
    return row["value"]

def forks(completion, answer, row):
    # the child comes back while its parent is at the next item
    time.sleep(0.5 * answer if os.fork() else 0.2)
    return float(answer)

def slow(completion, answer, row):
    time.sleep(60)

def never(completion, answer, row):
    return None

def for_some(completion, answer, row):
    return None if int(answer) % 2 else 1.0

def trl(completions, answer, **kwargs):
    return [1.0 for _ in completions]

def trl_three(prompts, completions, answer):
    return [1.0 for _ in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0

def two(completion, answer):
    return 1.0

def keyword(completion, answer, row, *, scale):
    return 1.0

async def later(completion, answer, row):
    return 1.0

def more(completion, answer, row=None, scale=1.0):
    return scale
'''


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    """Path of a file of rewards."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def pool_of(rewards: str, name: str, deadline_s: float = 5.0) -> RewardPool:
    return RewardPool(f"{rewards}:{name}", 1, deadline_s)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("as_dict", ["failed on all of the first 3 items", "got dict", "values, such as result['score']"]),
        ("as_list", ["got list [1.0]", "called with one completion at a time"]),
        ("as_text", ["must return a number or None, got str '1.0'"]),
        ("raises", ["KeyError: 'value'"]),
    ],
)  # fmt: skip
def test_a_reward_that_fails_throughout_stops_with_its_first_message(
    rewards: str, name: str, parts: list[str]
) -> None:
    """One line names the reward, how many failed, what came first and what to change."""
    with pool_of(rewards, name) as pool, pytest.raises(ValueError) as caught:
        pool.score([("", "1", {})] * 3)
    for part in (f"{rewards}:{name}", *parts):
        assert part in str(caught.value)


def test_one_good_item_keeps_the_run_going(rewards: str) -> None:
    """A batch with a grade goes on with its errors counted; a later batch of errors alone still stops."""
    with pool_of(rewards, "raises") as pool:
        bad, good = pool.score([("", "", {}), ("", "", {"value": 1})])
        assert (bad.status, good.status) == ("error", "ok")
        assert pool.counts == {"error": 1, "ok": 1}
        assert pool.score([("", "", {})])[0].status == "error"
        with pytest.raises(ValueError, match="failed on all of the first 2 items"):
            pool.score([("", "", {})] * 2)


def test_a_first_batch_of_timeouts_stops_and_a_later_one_does_not(rewards: str) -> None:
    """A policy may come to write what hangs a verifier; a verifier that never ends is no verifier."""
    with pool_of(rewards, "slow", 0.2) as pool:
        with pytest.raises(ValueError, match="hit its deadline on all of the first 2 items.*killed after 0.2 s"):
            pool.score([("", "", {})] * 2)
        pool._graded = True
        assert [r.status for r in pool.score([("", "", {})] * 2)] == ["timeout"] * 2


def test_a_reward_that_ends_its_process_stops_early(rewards: str, tmp_path: Path) -> None:
    """Each item is tried twice in a fresh process; nobody waits for hundreds of them to die."""
    log = tmp_path / "log"
    with pool_of(rewards, "dies") as pool, pytest.raises(ValueError, match="died twice on this item: exit code 3"):
        pool.score([("", "", {"log": str(log)})] * 500)
    assert len(log.read_text()) <= 50


def test_a_copy_that_a_reward_forks_gives_no_result(rewards: str) -> None:
    """Where it returns like the process itself: the next item would have its grade."""
    with pool_of(rewards, "forks") as pool:
        assert [r.value for r in pool.score([("", answer, {}) for answer in range(3)])] == [0, 1, 2]


def test_results_of_a_failed_batch_can_be_asked_for() -> None:
    """Whoever names rows asks for the results instead of an error."""
    with RewardPool("numeric", 1, 5.0) as pool:
        results = pool.score([("3", "many", {})] * 2, may_fail=True)
        assert [r.status for r in results] == ["bad_gold"] * 2
        with pytest.raises(ValueError, match="could not read the answer on all of the first 2 items.*'many'"):
            pool.score([("3", "many", {})] * 2)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("trl", ["takes whole batches, as TRL's rewards do", "def judge(completion, answer, row) -> float",
                 "trl(completions=[completion], answer=[answer])[0]"]),
        ("trl_three", ["takes whole batches"]),
        ("compute_score", ["verl's signature", "return compute_score(row.get('data_source'), completion, answer"]),
        ("two", ["signature (completion, answer), expected def judge(completion, answer, row)", "too many"]),
        ("keyword", ["'scale'"]),
        ("later", ["is an async function"]),
    ],
)  # fmt: skip
def test_other_signatures_are_told_what_to_change(rewards: str, name: str, parts: list[str]) -> None:
    """Also those that could be called with three arguments and would then grade nonsense."""
    with pool_of(rewards, name) as pool, pytest.raises(ValueError) as caught:
        pool.prewarm()
    for part in parts:
        assert part in str(caught.value)


def test_further_arguments_with_defaults_are_fine(rewards: str) -> None:
    """Only what cannot be called is refused; numpy numbers are numbers."""
    with pool_of(rewards, "more") as pool:
        assert pool.score([("", "", {})]) == [RewardResult(1.0, "ok")]
    with pool_of(rewards, "as_numpy") as pool:
        assert pool.score([("", np.float64(0.25), {})]) == [RewardResult(0.25, "ok")]


def test_none_is_not_judged(rewards: str) -> None:
    """It is neither an error nor a wrong answer, and no demonstration is bad for it."""
    with pool_of(rewards, "for_some") as pool:
        odd, even = pool.score([("", "1", {}), ("", "2", {})])
        assert (odd.status, odd.value, odd.message) == ("unjudged", 0.0, "the reward returned None")
        assert even == RewardResult(1.0, "ok")
        assert pool.counts == {"unjudged": 1, "ok": 1}
        demos = [Example(f"d:{i}", "p", str(i), "x", {}) for i in range(4)]
        assert check_demos(demos, pool) == []


def test_judge_keeps_the_message(rewards: str) -> None:
    """The sample table shows why a sample has no reward."""
    group = Group(Prompt(example(0, "1"), [1], []))
    group.rollouts = [sequence([1], [2]), sequence([1], [3])]
    with pool_of(rewards, "for_some") as pool:
        judge([group], pool)
    assert [(s.status, s.message) for s in group.rollouts] == [("unjudged", "the reward returned None")] * 2


def test_unreadable_answers_are_named() -> None:
    """By id and reason, whatever the completion; a verifier of the user's own is not asked."""
    examples = [Example(f"d:{i}", "p", answer, None, {}) for i, answer in enumerate(["1", "many", "2"])]
    with RewardPool("numeric", 1, 5.0) as pool:
        found = check_answers(examples, pool)
    assert list(found) == ["d:1"] and "many" in found["d:1"]
    with RewardPool(f"{__file__}:nothing", 1, 5.0) as pool:
        assert check_answers(examples, pool) == {}


# whole runs


def rows_file(folder: Path, answers: list[str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}=", "answer": "{a}"}}\n' for i, a in enumerate(answers)))
    return path


@pytest.mark.parametrize(
    ("answers", "row"),
    [(["1"] * 5 + ["many"] + ["1"] * 34, "rows.jsonl:5"), (["1"] * 38 + ["many"] + ["1"], "rows.jsonl:38")],
    ids=["training", "held-out"],
)
def test_a_run_names_the_row_whose_answer_cannot_be_read(
    answers: list[str], row: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded, without demonstrations too, in training and held-out rows."""

    def no_model(*_args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(prepare, "load_policy", no_model)
    words = arguments(tmp_path, data__train=rows_file(tmp_path, answers), method__name="grpo", reward__kind="numeric")
    monkeypatch.setattr(sys, "argv", ["srft.train", *words])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"answers cannot be read by 'numeric', the first is {row}" in line and "'many'" in line
    assert "data.bad_rows=skip" in line
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_small(tmp_path, data__train=tmp_path / "rows.jsonl", method__name="grpo", reward__kind="numeric",
                  data__bad_rows="skip")  # fmt: skip


def test_a_run_without_any_judgement_says_so_and_learns_nothing(rewards: str, tmp_path: Path) -> None:
    """Every sample is unjudged: the run ends, the weights stay, and each step says that nothing was learned."""
    run = run_small(tmp_path, method__name="grpo", reward__kind=f"{rewards}:never", train__steps=1)
    start, first = read_lines(run / "metrics.jsonl")
    assert first["reward/unjudged"] == 12 and first["canary/max_abs_diff"] == start["canary/max_abs_diff"]
    assert not {"reward/mean", "loss/total", "eval/accuracy"} & set(first)
    assert "no sample was judged" in (run / "run.json").read_text()
    assert {(s["status"], s["message"]) for s in read_lines(run / "samples.jsonl")} == {
        ("unjudged", "the reward returned None")
    }


def test_a_run_goes_on_with_what_is_judged(rewards: str, tmp_path: Path) -> None:
    """Half of the prompts have no reward: they are counted, and the other half trains."""
    run = run_small(tmp_path, reward__kind=f"{rewards}:for_some", train__steps=1, train__updates_per_step=2)
    row = read_lines(run / "metrics.jsonl")[1]
    assert 0 < row["reward/unjudged"] < 16 and row["reward/mean"] == 1.0 and "loss/total" in row
