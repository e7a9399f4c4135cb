"""Demonstrations of a set of their own: read apart, drawn apart, in groups by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from srft.config import Config
from srft.data.prompts import Prompt
from srft.dataset import Prompts, make_prompts, read_problems
from srft.engine.base import Completion, Sampling
from srft.methods import StepInfo, find_method, method_names
from srft.policy.model import load_tokenizer
from srft.policy.parallel import World
from srft.responses import Group
from srft.rewards.pool import RewardPool
from srft.rollout import Actor, roll_out
from tests.trainer.chat import char_tokenizer
from tests.trainer.runs import assert_same_run, read_lines, small_config, train
from tests.trainer.tiny import FakeEngine, FakePool, example, random_groups


@pytest.fixture(scope="module")
def prompts_of() -> Iterator[Callable[[Config], Prompts]]:
    """What makes the prompts that a run with a configuration would have."""
    with RewardPool("numeric", 1, 20.0) as pool:
        yield lambda config: make_prompts(config, read_problems(config), load_tokenizer(config.model), pool)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(folder: Path, count: int = 30, shown: int = 30, **changes: object) -> Config:
    """Sums to answer, of which the last tenth are held out, and a file of sums with two worked ways each."""
    asked = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(count)]
    rows = [{"q": f"{a}+1=", "answer": str(a + 1), "how": [f"#{a + 1}", f"so #{a + 1}"]} for a in range(shown)]
    changes.setdefault("data__demo_columns", '{prompt = "q", demo = "how"}')
    return small_config(
        folder, data__train=written(folder / "asked.jsonl", asked), data__demos=written(folder / "shown.jsonl", rows),
        reward__kind="numeric", **changes,
    )  # fmt: skip


def test_set_is_read_apart(prompts_of: Callable, tmp_path: Path) -> None:
    """By its own columns; prompts need no demonstration; of held-out problems none is shown; each is one by itself."""
    found = prompts_of(config_for(tmp_path))
    assert [p.demo_ids for p in found.train] == [[]] * 27
    assert [p.example.demos for p in found.demos[:3]] == [["#1"], ["so #1"], ["#2"]]
    assert len(found.demos) == 54 and all(len(p.demo_ids) == 1 for p in found.demos)
    assert not {p.example.prompt for p in found.demos} & {p.example.prompt for p in found.held_out}
    assert found.note == (
        f"27 training and 3 held-out problems from {tmp_path / 'asked.jsonl'}, "
        f"27 problems with demonstrations from {tmp_path / 'shown.jsonl'}"
    )


def test_warm_start_takes_the_set_where_prompts_have_none(prompts_of: Callable, tmp_path: Path) -> None:
    """As it was read, whatever is corrupted; prompts that have demonstrations keep their start."""
    warm = {"model__warm_start__max_steps": 5, "data__corrupt_demos": 1, "data__corrupt_kind": "wrong-answer"}
    found = prompts_of(config_for(tmp_path, **warm))
    assert [p.example.demos for p in found.start[:2]] == [["#1", "so #1"], ["#2", "so #2"]]
    assert found.demos[0].example.demos != ["#1"] and "54 of 54 demonstrations corrupted" in found.note
    task = {"data__train": "chain", "data__demos": "chain", "reward__kind": "exact", "train__steps": 1}
    config = small_config(tmp_path, **task, model__warm_start__max_steps=5, data__demo_task__max_ops=2)
    with RewardPool("exact", 1, 20.0) as pool:
        found = make_prompts(config, read_problems(config), load_tokenizer(config.model), pool)
    assert found.start == found.train and len(found.demos) == 8192
    assert max(len(p.example.prompt) for p in found.demos) == 6 < max(len(p.example.prompt) for p in found.train)


def test_what_a_set_must_be(prompts_of: Callable, tmp_path: Path) -> None:
    """Large enough for a step, with demonstrations, judged as the prompts are, and not all of it held out."""
    with pytest.raises(ValueError, match=r"prompts_per_step=4 and train\.demos_per_prompt=2 take 8 .* gives only 6"):
        prompts_of(config_for(tmp_path, shown=3, train__demos_per_prompt=2))
    with pytest.raises(ValueError, match="no demonstration|no column"):
        prompts_of(config_for(tmp_path, data__demo_columns='{prompt = "q", demo = "none"}'))
    with pytest.raises(ValueError, match=r"is judged by 'exact' and data\.demos=countdown by 'countdown'"):
        read_problems(small_config(tmp_path, data__demos="countdown"))
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1), "demo": f"#{a + 1}"} for a in range(27, 30)]
    config = config_for(tmp_path, data__demo_columns="{}")
    written(tmp_path / "shown.jsonl", rows)
    with pytest.raises(ValueError, match="every problem of data.demos=.* is held out"):
        read_problems(config)


@pytest.mark.parametrize("method", ["srft", "sft"])
def test_each_is_a_group_by_itself(tmp_path: Path, method: str) -> None:
    """Beside the prompts' groups, which have rollouts or are none; each rank has its share of both."""
    config = small_config(tmp_path, method__name=method, data__demos="chain", data__train="chain")
    asked = [Prompt(example(i), [i + 1], []) for i in range(4)]
    shown = [Prompt(example(10 + i), [1], [[2, i]]) for i in range(4)]
    for prompt in shown:
        prompt.example.demos.append("shown")
    answers = {(i + 1,): Completion([5, 1], [-0.1, -0.1], "stop", 0) for i in range(4)}
    got: list[list[Group]] = []
    for rank in range(2):
        actor = Actor(FakeEngine(answers), Sampling(1.0, 4, (1,)), char_tokenizer(), FakePool(), World(rank, 2))
        got.append(roll_out(config, actor, asked, StepInfo(1, 20, 4, {}), shown))
    for rank, groups in enumerate(got):
        own = [g.prompt.example.id for g in groups]
        wanted = [f"t:{i}" for i in (rank, rank + 2) if method == "srft"] + [f"t:{10 + i}" for i in (rank, rank + 2)]
        assert own == wanted
        assert [(len(g.rollouts), len(g.demos)) for g in groups] == [(3, 0)] * (len(wanted) - 2) + [(0, 1)] * 2


@pytest.mark.parametrize("name", method_names())
def test_every_method_that_allows_it_takes_them(name: str) -> None:
    """From a demonstration alone, and from rollouts alone, it learns something or nothing, without an advantage."""
    method = find_method(name)(name=name)
    if not method.needs_demos or method.needs_paired_demos:
        pytest.skip("takes none of their own")
    taken = []
    for group in random_groups(3):
        for alone in (Group(group.prompt, demos=group.demos), Group(group.prompt, rollouts=group.rollouts)):
            taken += method.learn_from(alone)
        assert all(demo.advantage == 0 for demo in group.demos)
    assert any(response.is_demo for response in taken)


def test_only_wrong_demonstrations(prompts_of: Callable, tmp_path: Path) -> None:
    """Of the set: those that are right go, an answer that cannot be read is none that is wrong, and prompts stay."""
    config = config_for(tmp_path, data__bad_demos="only", data__bad_rows="skip")
    rows = [{"q": f"{a}+1=", "answer": str(a + 1), "how": [f"#{a + 1}", f"#{a + 2}"]} for a in range(20)]
    rows[3]["how"], rows[4]["answer"] = ["#4"], "none"
    written(tmp_path / "shown.jsonl", rows)
    found = prompts_of(config)
    wanted = [[f"#{a + 2}"] for a in range(20) if a not in (3, 4)]
    assert [p.example.demos for p in found.demos] == wanted and len(found.train) == 27
    assert "1 rows skipped whose answer" in found.note
    assert found.note.endswith("1 rows skipped whose demonstration passes its verifier, of 19 demonstrations")
    written(tmp_path / "shown.jsonl", rows[3:4] * 9)
    with pytest.raises(ValueError, match="'numeric' accepts all 9 demonstrations; set it to error"):
        prompts_of(config)


def test_no_right_demonstration(prompts_of: Callable, tmp_path: Path) -> None:
    """Where all are skipped, that is said."""
    config = config_for(tmp_path, data__bad_demos="skip")
    written(tmp_path / "shown.jsonl", [{"q": f"{a}+1=", "answer": str(a + 1), "how": "#99"} for a in range(9)])
    with pytest.raises(ValueError, match="skip leaves none of 9 demonstrations, none of which 'numeric' accepts"):
        prompts_of(config)


def test_samples_of_a_run_are_shown_to_another(tmp_path: Path) -> None:
    """The file in which a run keeps some of them is a set of demonstrations, here of those that are wrong."""
    small = {"train__steps": 2, "model__warm_start__max_steps": 20}
    weak = train(tmp_path, name="weak", method__name="grpo", **small)
    run = train(
        tmp_path, data__demos=weak / "samples.jsonl", data__demo_columns__demo="completion", data__bad_demos="only",
        data__bad_rows="skip", data__overlong="skip", **small,
    )  # fmt: skip
    said = {row["completion"] for row in read_lines(weak / "samples.jsonl") if not row["reward"]}
    shown = [row for row in read_lines(run / "samples.jsonl") if row["demo"]]
    assert shown and {row["completion"] for row in shown} <= said and not any(row["reward"] for row in shown)


COUNTS = """
from srft.methods import Figure, srft
class Method(srft.Method):
    def figures(self, terms, update):
        totals = update.totals
        return {"most/demos": Figure(totals.demo_sequences, "max"),
                "most/rollouts": Figure(totals.rollout_sequences, "max")}
"""


def test_every_update_has_its_share(tmp_path: Path) -> None:
    """Of a step's prompts and of its demonstrations, of which the run shows some in its samples."""
    method = tmp_path / "counts.py"
    method.write_text(COUNTS)
    run = train(tmp_path, method__name=method, data__demos="chain", train__updates_per_step=2, train__steps=1)
    row = read_lines(run / "metrics.jsonl")[1]
    assert (row["updates/made"], row["most/demos"], row["most/rollouts"]) == (2, 2, 6)
    samples = read_lines(run / "samples.jsonl")
    assert [row["demo"] for row in samples] == [False] * 12 + [True] * 4
    assert {row["advantage"] for row in samples if row["demo"]} == {0}


def test_resume_goes_on_in_the_set(tmp_path: Path) -> None:
    """The order of the demonstrations is part of a checkpoint, and a set of other rows is refused."""
    def run(folder: Path, **changes: object) -> Path:
        rows = [{"prompt": f"{a}+1=", "answer": f"{a + 1}", "demo": f"#{a + 1}"} for a in range(10)]
        source = written(tmp_path / "shown.jsonl", rows if "shift" not in changes else rows[1:])
        changes.pop("shift", None)
        return train(folder, data__demos=source, reward__kind="exact", data__bad_demos="keep", **changes)

    whole = run(tmp_path / "whole", train__steps=4)
    run(tmp_path / "halves", train__steps=2)
    assert_same_run(run(tmp_path / "halves", train__steps=4, train__resume=True), whole)
    shown = [row["id"] for row in read_lines(whole / "samples.jsonl") if row["demo"]]
    assert len(shown) == 16 and len(set(shown[:8])) == 8
    with pytest.raises(ValueError, match=r"data\.demos=.* does not hold the demonstrations"):
        run(tmp_path / "halves", train__steps=5, train__resume=True, shift=True)
