"""Rollouts of an older policy, made while training goes on: by which weights, what is saved of them, what fails."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from srft import rollouts
from srft import train as loop
from srft.data.prompts import Prompt
from srft.data.sampler import StepSampler
from srft.dataset import Prompts
from srft.engine.start import cores_divided
from srft.policy.parallel import World
from srft.record.metrics import Clock
from srft.record.waiting import Waiting
from srft.responses import SCORES, Group, Response
from srft.rollout import Actor
from srft.sampled import Sampled
from srft.stop import Stopped
from tests.trainer.runs import (
    ROOT,
    arguments,
    assert_same_run,
    comparable_rows,
    during_call,
    environment,
    kill_runs,
    read_lines,
    train,
)
from tests.trainer.test_stop import terminated
from tests.trainer.tiny import CPU, FakePool, example, learner_of, tiny_config

STEPS = 4
ODD = "def odd(completion, answer, row):\n    return float(len(completion) % 2)\n"


def options(folder: Path, lag: int, **changes: object) -> dict[str, Any]:
    """A run whose rewards differ and whose steps are large, with a checkpoint every second step."""
    reward = folder.parent / "odd.py"
    reward.write_text(ODD)
    return {
        "train__steps": STEPS, "train__save_every": 2, "train__eval_every": 2, "train__keep_checkpoints": 1,
        "train__lr": 0.01, "reward__kind": f"{reward}:odd", "data__bad_demos": "keep", "rollout__max_lag": lag,
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a lag of 1 in one piece."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return train(folder, **options(folder, 1))


def test_rows_tell_of_the_lag(uninterrupted: Path) -> None:
    """The first step's rollouts are its own, those of each later one a step old, and their weights are not 1."""
    rows = comparable_rows(uninterrupted)[1:]
    # which would be the lag, and is the engine's alone elsewhere
    assert not [name for row in rows for name in row if name.startswith("mismatch")]
    assert [row["lag/mean"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["lag/is_max"] == pytest.approx(1, abs=1e-4) and rows[0]["lag/is_off"] == 0
    for row in rows[1:]:
        assert row["lag/is_max"] > 1.01 and 0 < row["lag/is_ess"] < 1
    assert "time/ahead" in read_lines(uninterrupted / "metrics.jsonl")[-1]


def test_more_lag_is_older_weights(tmp_path: Path, uninterrupted: Path) -> None:
    """With a lag of 2 the third step has rollouts of the first policy; and the same run twice is the same."""
    first, second = (train(tmp_path / name, **options(tmp_path / name, 2)) for name in ("first", "second"))
    assert [row["lag/max"] for row in comparable_rows(first)[1:]] == [0, 1, 2, 2]
    assert_same_run(second, first)
    assert comparable_rows(first)[-1] != comparable_rows(uninterrupted)[-1]


def test_training_and_rollouts_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1 is trained only once the next batch is being made, which waits for that training to have begun."""
    trains, makes = threading.Event(), threading.Event()
    learn, roll_out = loop.learn, rollouts.roll_out

    def learning(learner: Any, groups: Any, step: int) -> Any:
        if step == 1:
            trains.set()
            assert makes.wait(30)
        return learn(learner, groups, step)

    def rolling(config: Any, actor: Any, prompts: Any, now: Any, shown: Any, going: Any) -> Any:
        if now.step == 2:
            assert threading.current_thread() is not threading.main_thread()
            makes.set()
            assert trains.wait(30)
        return roll_out(config, actor, prompts, now, shown, going)

    monkeypatch.setattr(loop, "learn", learning)
    monkeypatch.setattr(rollouts, "roll_out", rolling)
    train(tmp_path / "run", **options(tmp_path / "run", 1, train__steps=1))
    assert makes.is_set() and trains.is_set()


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__max_lag": 2},
        {"method__name": "grpo", "train__updates_per_step": 2, "rollout__is_mode": "mask", "rollout__is_cap": 1.02},
        {"method__name": "dapo"},
    ],
    ids=["srft-2", "grpo-2updates-mask", "dapo"],
)
def test_two_halves_are_the_whole(changes: dict[str, object], tmp_path: Path) -> None:
    """Resumed after half of its steps, a run takes up the batches of its checkpoint, those that gave way too."""
    run = options(tmp_path / "run", 1, **changes)
    whole = train(tmp_path / "whole", **run)
    half = train(tmp_path / "halves", **run | {"train__steps": 2})
    assert (half / "checkpoints" / "step_000002" / "rollouts.jsonl").exists()
    assert_same_run(train(tmp_path / "halves", **run, train__resume=True), whole)


# the batch of step 4 is begun when step 3 is: its fourth judging, in the thread; the gradient of step 3 is the third
MOMENTS = {
    "in-the-batch-ahead": ("srft.rollouts.judge", 4),
    "in-mid-step": ("torch.nn.utils.clip_grad_norm_", 3),
    "before-first-checkpoint": ("srft.rollouts.roll_out", 2),
    "checkpoint-before-rename": ("srft.policy.manifest._digest_of_list", 1),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that were killed at each of the moments."""
    folders = {moment: tmp_path_factory.mktemp(moment) / "run" for moment in MOMENTS}
    kill_runs([(*MOMENTS[moment], arguments(folder, **options(folder, 1))) for moment, folder in folders.items()])
    return folders


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_to_the_same_bytes(moment: str, uninterrupted: Path, killed: dict[str, Path]) -> None:
    """SIGKILL while a batch is made, trained, or saved; resume: the same rows and weights to the last bit."""
    assert_same_run(train(killed[moment], **options(killed[moment], 1), train__resume=True), uninterrupted)


def test_stopped_run_resumes_to_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    """A signal while the next batch is made, in training, and in an evaluation; no thread is left over."""
    folder = tmp_path / "run"
    for where, call in (("srft.rollouts.judge", 3), ("srft.learning.update", 2), ("srft.train.evaluate", 1)):
        with pytest.MonkeyPatch.context() as patch:
            during_call(patch, where, call, terminated)
            with pytest.raises(Stopped, match="stopped by SIGTERM"):
                train(folder, **options(folder, 1), train__resume=True)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]
    assert_same_run(train(folder, **options(folder, 1), train__resume=True), uninterrupted)


# a trainer in step 2 is told to stop while the batch of step 3 is made, which has no end, and again once it has saved
STUCK = """
import os, signal, sys, time
from pathlib import Path
from srft import rollouts, train

roll_out, learn = rollouts.roll_out, train.learn
saved = Path(sys.argv.pop(1))

def stuck(config, actor, prompts, now, shown, going):
    if now.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 100
        while time.monotonic() < until:
            if saved.exists():
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        os._exit(9)
    return roll_out(config, actor, prompts, now, shown, going)

def learning(learner, groups, step):
    if step == 2:
        time.sleep(200)
    return learn(learner, groups, step)

rollouts.roll_out, train.learn = stuck, learning
train.main()
"""


def test_first_signal_saves_and_the_second_does_not_wait_for_the_thread(tmp_path: Path) -> None:
    """A batch that is being made has no part in the checkpoint, and is waited for after it."""
    words = arguments(tmp_path / "run", **options(tmp_path / "run", 1))
    saved = tmp_path / "run" / "runs" / "run" / "checkpoints" / "step_000001"
    done = subprocess.run(
        [sys.executable, "-c", STUCK, saved, *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "ended by SIGTERM" in done.stderr


def test_what_fails_in_the_thread_ends_the_run(uninterrupted: Path, tmp_path: Path) -> None:
    """An error of the batch of step 4 is raised from the run, which goes on from step 2."""
    folder = tmp_path / "run"

    def failing() -> Any:
        raise ValueError("no verdict")

    with pytest.MonkeyPatch.context() as patch:
        during_call(patch, "srft.rollouts.judge", 4, failing)
        with pytest.raises(ValueError, match="no verdict"):
            train(folder, **options(folder, 1))
    assert_same_run(train(folder, **options(folder, 1), train__resume=True), uninterrupted)


def test_written_batches_are_as_they_were() -> None:
    """Every field of a response that is known before a step learns from it, of groups of both sets; a batch of none."""
    prompts, demos = ([Prompt(example(i), [i, 9], []) for i in numbers] for numbers in (range(3), range(5, 7)))

    def response(prompt: Prompt, **fields: Any) -> Response:
        return Response(prompt.prompt_ids, [3, 1], False, True, [-0.1, -float("inf")], "a\u2028\n\ud800", **fields)

    full = response(
        prompts[2], reward=1 / 3, status="timeout", message="late", teacher_prompt_ids=[4], prefix_tokens=1,
        versions=[(5, 1), (7, 2)], spans=[1, 0, 1], transcript="c", is_rewarded=True, seed=2**62 + 1,
    )
    other = response(prompts[0])
    changed = {f.name for f in dataclasses.fields(full) if getattr(full, f.name) != f.default}
    later = {"advantage", "prefix_advantage", "importance", "entropy", "logprobs", "entropies", *SCORES}
    assert changed | later | {"is_demo"} == {f.name for f in dataclasses.fields(full)}
    batches = [
        Sampled(4, [Group(prompts[2], [full], [response(prompts[2])], 12)], [Group(prompts[0], [other, other])]),
        Sampled(5, [Group(demos[1], demos=[Response([6, 9], [2], True, False, [], "d")])], [], ended=(1, 2)),
        Sampled(6, [], [], ended=(0, 2)),
    ]
    going = [Group(prompts[2], [full], drawn=(6, 0)), Group(prompts[0], [other, other], [other], 12, (6, 1))]
    read = Waiting(prompts, demos)
    read.read([Waiting(prompts, demos).lines(batches, going)])
    assert read.batches == {batch.step: batch for batch in batches} and read.going == going
    assert read.batches[4].groups[0].prompt is prompts[2] and read.batches[5].groups[0].prompt is demos[1]


@pytest.mark.parametrize("written_by", [1, 2, 5])
def test_any_number_of_ranks_takes_up_waiting_batches(written_by: int) -> None:
    """Each has the groups that it would have made, those that gave way and those that go on too."""
    prompts, demos = ([Prompt(example(i), [i, 9], []) for i in numbers] for numbers in (range(9), range(9, 12)))

    def group(step: int, place: int, number: int) -> Group:
        """Of a prompt, or of a demonstration alone."""
        if number < 9:
            return Group(prompts[number], [Response([number, 9], [3], False, False, [-0.1], "")], drawn=(step, place))
        demo = Response([number, 9], [3], True, False, [], "")
        return Group(demos[number - 9], demos=[demo], drawn=(step, place))

    def dealt(steps_and_numbers: Sequence[tuple[int, int]], rank: int, ranks: int) -> list[Group]:
        """Those of a rank, in the order in which their prompts were drawn."""
        every = [group(step, place, i) for place, (step, i) in enumerate(steps_and_numbers)]
        return [one for one in every if one.drawn[1] % ranks == rank]

    def batch(rank: int, ranks: int) -> Sampled:
        """Three rounds gave way in the second place."""
        groups = dealt([(4, i) for i in range(4)], rank, ranks) + dealt([(4, 9), (4, 10)], rank, ranks)
        return Sampled(4, groups, [group(4, 1, i) for i in range(4, 7) if rank == 1 % ranks])

    def going(rank: int, ranks: int) -> list[Group]:
        """Of one step all but the first two have ended, of the next none."""
        first = dealt([(3, 7), (3, 8)], rank, ranks)
        return first + dealt([(4, 5), (4, 6), (4, 7), (4, 8)], rank, ranks)

    every = [batch(rank, written_by) for rank in range(written_by)]
    texts = [Waiting(prompts, demos).lines([own], going(rank, written_by)) for rank, own in enumerate(every)]
    for ranks in (1, 2, 3, 5):
        for rank in range(ranks):
            waiting = Waiting(prompts, demos)
            waiting.read(texts, World(rank, ranks))
            assert waiting.batches == {4: batch(rank, ranks)}
            assert waiting.going == going(rank, ranks)


def test_a_copy_is_learned_from() -> None:
    """What a step fills in does not reach the batch that a checkpoint would have."""
    prompt = Prompt(example(1), [1], [])
    batch = Sampled(1, [Group(prompt, [Response([1], [2], False, False, [-1.0], "")])], [])
    own = batch.copy()
    own.groups[0].rollouts[0].advantage = 3.0
    own.groups[0].rollouts.append(own.groups[0].rollouts[0])
    assert [s.advantage for s in batch.groups[0].rollouts] == [0.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.name=sft"], 'method.name="sft" with these options.*max_lag=0, or take one of .*grpo.*srft'),
        (["method.name=sft_then_rl", "method.patience=2"], 'method.name="sft_then_rl" with these options does not'),
    ],
)
def test_methods_that_cannot(words: list[str], said: str) -> None:
    """One without rollouts, and one that asks for them by what the step before has shown."""
    with pytest.raises(ValueError, match=f"rollout.max_lag=1, but {said}"):
        tiny_config("rollout.max_lag=1", *words)
    tiny_config("rollout.max_lag=1", "method.name=sft_then_rl")


def test_a_method_of_ones_own_says_that_it_can(tmp_path: Path) -> None:
    """Its loss would else take rollouts of an older policy for its own."""
    path = tmp_path / "own.py"
    text = "from srft.methods.grpo import Method as Grpo\nclass Method(Grpo):\n    takes_lag = False\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="does not weight rollouts of an older policy"):
        tiny_config("rollout.max_lag=1", f"method.name={path}")
    path.write_text(text.replace("False", "True"))
    assert tiny_config("rollout.max_lag=1", f"method.name={path}").method.takes_lag


@pytest.mark.parametrize(("every", "trainer", "engine"), [(1, 1, 1), (2, 1, 1), (5, 3, 2)])
def test_threads_are_divided(every: int, trainer: int, engine: int) -> None:
    """Between training and rollouts where both go on at once on CPUs, and given back."""
    before = torch.get_num_threads()
    torch.set_num_threads(every)
    try:
        with cores_divided(tiny_config("rollout.max_lag=1"), World()) as threads:
            assert (torch.get_num_threads(), threads) == (trainer, engine)
        assert torch.get_num_threads() == every
        for config, device in ((tiny_config(), CPU), (tiny_config("rollout.max_lag=1"), torch.device("cuda"))):
            with cores_divided(config, World(device=device)) as threads:
                assert (torch.get_num_threads(), threads) == (every, None)
    finally:
        torch.set_num_threads(before)


def test_a_batch_is_asked_for_by_what_is_known_when_it_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step notes while the next batch is being made does not reach that one, however slow it is."""
    config = tiny_config("rollout.max_lag=1", "method.name=grpo")
    learner, noted = learner_of(config, None, None), threading.Event()  # type: ignore[arg-type]
    asked: dict[int, dict[str, int]] = {}

    def rolling(_config: Any, _actor: Any, _prompts: Any, now: Any, _shown: Any, _going: Any) -> list[Group]:
        assert now.step == 1 or noted.wait(30)
        asked[now.step] = dict(now.memory)
        return [Group(Prompt(example(now.step), [1], []))]

    monkeypatch.setattr(rollouts, "roll_out", rolling)
    monkeypatch.setattr(rollouts, "judge", lambda groups, pool: None)
    monkeypatch.setattr(rollouts, "resample", lambda config, actor, groups, draw, now: [])
    prompts = Prompts([Prompt(example(i), [1], []) for i in range(10)], [], [], "")
    waiting, actor = Waiting(prompts.train, []), Actor(None, None, None, FakePool())  # type: ignore[arg-type]
    with closing(rollouts.Rollouts(learner, prompts, StepSampler(10, 0, 0), actor, waiting)) as made:
        taken = made.take(1, Clock())
        learner.memory["noted"] = 1
        noted.set()
        made.wait()
        assert taken.groups[0].prompt.example == example(1) and list(waiting.batches) == [2]
        made.take(2, Clock())
        made.wait()
    assert asked == {1: {}, 2: {}, 3: {"noted": 1}}
