"""Rollouts that are recorded, and runs that learn from the record: to the same bits, by another method, not at all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from srft import prepare
from srft.data.prompts import Prompt
from srft.disk import WriteError
from srft.policy.parallel import World
from srft.record.rollouts import by_group, read_about, read_rows, step_file, write_step
from srft.responses import Group, Response
from srft.sampled import Sampled
from tests.trainer.runs import (
    arguments,
    assert_same_run,
    comparable_rows,
    kill_runs,
    read_lines,
    train,
    weights,
)
from tests.trainer.tiny import example, tiny_config

STEPS = 3
ODD = "def odd(completion, answer, row):\n    return float(len(completion) % 2)\n"


def options(folder: Path, **changes: object) -> dict[str, Any]:
    """A run whose rewards differ and whose steps are large."""
    reward = folder.parent / "odd.py"
    reward.write_text(ODD)
    return {
        "train__steps": STEPS, "train__save_every": 2, "train__eval_every": 2, "train__lr": 0.01,
        "reward__kind": f"{reward}:odd", "data__bad_demos": "keep",
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that recorded what it learned from."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return train(folder, **options(folder, train__record_rollouts=True))


def rows_of(run_dir: Path) -> list[list[Any]]:
    return [list(read_rows(step_file(run_dir, step))) for step in range(1, STEPS + 1)]


def test_the_record_is_what_was_learned_from(recorded: Path) -> None:
    """A row a response, with the engine's and the policy's log-probabilities of each of its tokens."""
    for step, rows in enumerate(rows_of(recorded), 1):
        assert [len(group) for group in by_group(rows)] == [4] * 4
        assert [row["place"] for row in rows] == [0, 1, 2, 3] * 4
        rollouts = [row for row in rows if not row["is_demo"]]
        assert len(rollouts) == 12 and {row["version"] for row in rollouts} == {step - 1}
        for row in rows:
            assert len(row["logprobs"]) == len(row["entropies"]) == len(row["response_ids"])
        for row in rollouts:
            assert row["logprobs"] == pytest.approx(row["rollout_logprobs"], abs=1e-4)
        mean = sum(row["reward"] for row in rollouts) / 12
        assert comparable_rows(recorded)[step]["reward/mean"] == pytest.approx(mean)
    shown = [line for line in read_lines(recorded / "samples.jsonl") if line["step"] == STEPS]
    assert [(line["id"], line["completion"], line["advantage"]) for line in shown] == [
        (row["id"], row["text"], row["advantage"]) for row in rows
    ]


def replayed(recorded: Path, folder: Path, **changes: object) -> Path:
    reward = recorded.parents[2] / "odd.py"
    return train(folder, **options(folder, train__replay=recorded, **changes) | {"reward__kind": f"{reward}:odd"})


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"method__name": "dapo"}, {"method__name": "grpo", "train__updates_per_step": 2},
        {"method__name": "grpo", "rollout__max_lag": 2},
    ],
    ids=["srft", "dapo", "grpo-2updates", "grpo-lag"],
)
def test_replay_gives_the_same_bits(
    changes: dict[str, Any], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, and rows but for what needs an engine, where prompts gave way too; nobody is asked for a rollout."""
    if changes:
        recorded = train(tmp_path / "first", **options(tmp_path / "first", train__record_rollouts=True, **changes))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(prepare, "start_engine", never)
    again = replayed(recorded, tmp_path / "again", train__record_rollouts=True, **changes)
    assert weights(again) == weights(recorded)
    assert rows_of(again) == rows_of(recorded)
    assert any(row["gave_way"] for rows in rows_of(again) for row in rows) == (changes.get("method__name") == "dapo")

    def without_engine(run: Path) -> list[dict[str, Any]]:
        left_out = ("canary/", "eval/accuracy", "eval/ci", "eval/truncated", "eval/timeouts", "engine/", "sync/")
        return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in comparable_rows(run)]

    assert without_engine(again) == comparable_rows(again) == without_engine(recorded)
    assert "no engine is started" in (again / "run.json").read_text()


def test_other_methods_and_rates_learn_from_it(recorded: Path, tmp_path: Path) -> None:
    """From the kinds of responses that each asks for."""
    for name, kinds in (("grpo", {False}), ("sft", {True})):
        run = replayed(recorded, tmp_path / name, method__name=name, train__lr=0.02, train__record_rollouts=True)
        assert weights(run) != weights(recorded)
        for ours, theirs in zip(rows_of(run), rows_of(recorded), strict=True):
            assert {row["is_demo"] for row in ours} == kinds
            taken = [row for row in theirs if row["is_demo"] in kinds]
            assert [row["response_ids"] for row in ours] == [row["response_ids"] for row in taken]


def test_replay_resumes(recorded: Path, tmp_path: Path) -> None:
    """Two steps and one more are three at once."""
    folder = tmp_path / "run"
    whole = replayed(recorded, tmp_path / "whole")
    replayed(recorded, folder, train__steps=2)
    assert_same_run(replayed(recorded, folder, train__resume=True), whole)


# in the third step, after a checkpoint of the second
MOMENTS = {"in-the-record": ("srft.record.rollouts.replace_file", 3), "after-it": ("srft.train.group_metrics", 3)}


def test_killed_run_has_every_file_when_it_went_on(recorded: Path, tmp_path: Path) -> None:
    """SIGKILL between step and record, and between record and row."""
    reward = f"{recorded.parents[2] / 'odd.py'}:odd"
    run = options(tmp_path / "run", train__record_rollouts=True) | {"reward__kind": reward}
    kill_runs([(*where, arguments(tmp_path / moment, **run)) for moment, where in MOMENTS.items()])
    for moment in MOMENTS:
        left = tmp_path / moment / "runs" / "run"
        assert step_file(left, 2).exists() and step_file(left, 3).exists() == (moment == "after-it")
        again = train(tmp_path / moment, **run, train__resume=True)
        assert_same_run(again, recorded)
        assert rows_of(again) == rows_of(recorded)
        assert len(list((again / "rollouts").iterdir())) == STEPS


def full_group(number: int) -> Group:
    prompt = Prompt(example(number), [number, 9], [])
    response = Response(
        prompt.prompt_ids, [3, 1], False, True, [1 / 3, -math.inf], "a\u2028\n\ud800", 1 / 3, "timeout", "late",
        advantage=-0.1, old_logprobs=torch.tensor([-0.5, -0.25]), old_entropy=torch.tensor([0.5, 1.0]),
        logprobs=torch.tensor([-9.0, -9.0]), entropies=torch.tensor([9.0, 9.0]), teacher_prompt_ids=[4],
        prefix_tokens=1, versions=[(7, 1)], spans=[1, 0, 1], transcript="\ud800",
    )  # fmt: skip
    return Group(prompt, [response], [Response(prompt.prompt_ids, [2], True, False, [], "d")], 12)


def test_numbers_keep_every_bit_and_what_is_not_known_is_null(tmp_path: Path) -> None:
    """The policy's numbers are those before the step, where its updates have moved it."""
    shown = Group(Prompt(example(5), [5], []), demos=full_group(5).demos)
    batch = Sampled(4, [full_group(1), shown], [full_group(2)])
    write_step(tmp_path, batch, tiny_config(), World())
    path = step_file(tmp_path, 4)
    rollout, demo, alone, *gave_way = read_rows(path)
    assert rollout["rollout_logprobs"] == [1 / 3, -math.inf] and rollout["reward"] == 1 / 3
    assert (rollout["logprobs"], rollout["entropies"]) == ([-0.5, -0.25], [0.5, 1.0])
    assert (rollout["spans"], rollout["transcript"]) == ([1, 0, 1], "?")
    assert (rollout["version"], rollout["versions"], demo["versions"]) == (7, [None, 7], [])
    assert rollout["text"] == "a\u2028\n?" and rollout["message"] == "late" and rollout["advantage"] == -0.1
    assert (rollout["truncated"], rollout["teacher_prompt_ids"], rollout["prefix_tokens"]) == (True, [4], 1)
    assert demo["logprobs"] is None and demo["entropies"] is None and demo["teacher_prompt_ids"] is None
    assert (alone["group"], alone["id"], alone["is_demo"]) == (1, "t:5", True)
    assert [(row["group"], row["gave_way"]) for row in gave_way] == [(2, True)] * 2
    assert read_about(path)["has_prefixes"] and read_about(path)["rollout.max_new_tokens"] == 12


def test_groups_of_several_ranks_are_in_the_order_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has one of every so many; what they learn is not told apart from where it was sampled."""

    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            if not others:
                others.append(value)
            return [value, others[0]]

        def on_first(self, make: Any) -> Any:
            return make() if len(done) else done.append(1)

    others: list[Any] = []
    done: list[int] = []
    write_step(tmp_path, Sampled(1, [full_group(2)], []), tiny_config(), Two(1, 2))
    write_step(tmp_path, Sampled(1, [full_group(1), full_group(3)], []), tiny_config(), Two(0, 2))
    rows = read_rows(step_file(tmp_path, 1))
    assert [row["id"] for row in rows] == [f"t:{n}" for n in (1, 1, 2, 2, 3, 3)]
    assert all(row["logprobs"] is None for row in rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__steps": 4}, "no rollouts of step 4 of train.steps=4: .*lower train.steps"),
        ({"rollout__temperature": 0.9}, "rollout.temperature=1.0, and this run has 0.9; set it to that"),
        ({"train__rollouts_per_prompt": 4}, "train.rollouts_per_prompt=3, and this run has 4"),
        ({"method__name": "prefix_rft"}, "method.name=srft, and this run has prefix_rft"),
        ({"data__limit": 5}, "which is not among the training prompts"),
        ({"data__system": "Other words"}, "has other tokens now"),
    ],
    ids=["steps", "temperature", "rollouts", "method", "problems", "tokens"],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str, recorded: Path, tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(ValueError, match=said):
        replayed(recorded, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "runs" / "run" / "checkpoints").exists()


def test_kinds_that_are_not_there_are_refused(recorded: Path, tmp_path: Path) -> None:
    """A record of rollouts alone has no demonstrations to learn from."""
    only = replayed(recorded, tmp_path / "only", method__name="grpo", train__record_rollouts=True)
    with pytest.raises(ValueError, match="has no demos, from which method.name=srft learns"):
        replayed(only, tmp_path / "run")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    """In one line."""
    path = step_file(tmp_path, 1)
    with pytest.raises(ValueError, match="there is no .*step_000001.arrow; record it"):
        read_about(path)
    path.parent.mkdir()
    path.write_bytes(b"ARROW1")
    with pytest.raises(ValueError, match="cannot be read"):
        read_about(path)


def test_damage_is_told_with_the_file(tmp_path: Path) -> None:
    """That of its end, of its frame, and of an offset that would end the process when it is followed."""
    path = step_file(tmp_path, 1)
    write_step(tmp_path, Sampled(1, [full_group(1)], []), tiny_config(), World())
    whole = path.read_bytes()
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    ids = table.column("prompt_ids").chunk(0).offsets.to_numpy().astype("int32").tobytes()
    damaged = {
        "frame": bytes(len(whole) // 2) + whole[len(whole) // 2 :],
        "end": whole[:-200] + bytes(60) + whole[-140:],
        "offset": whole.replace(ids, ids[:4] + (10**9).to_bytes(4, "little") + ids[8:]),
    }
    for what, text in damaged.items():
        assert text != whole, what
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"{path} cannot be read: "):
            read_rows(path)


def test_a_refused_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a part beside it."""
    write_step(tmp_path, Sampled(1, [full_group(1)], []), tiny_config(), World())
    before = step_file(tmp_path, 1).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match=r"step_000001.arrow: No space left"):
        write_step(tmp_path, Sampled(1, [full_group(2)], []), tiny_config(), World())
    assert [path.read_bytes() for path in (tmp_path / "rollouts").iterdir()] == [before]
