"""From the configuration to the prompts of a run: what is left out or changed on the way, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from srft.config import Config
from srft.dataset import Prompts, make_prompts, read_problems
from srft.policy.model import load_tokenizer
from srft.rewards.pool import RewardPool
from srft.warm_start import cached_start
from tests.trainer.runs import small_config

SKIP = {"data__bad_rows": "skip", "data__bad_demos": "skip", "data__overlong": "skip"}


def sums(count: int = 20) -> list[dict[str, Any]]:
    """Problems of which the last two are held out, each with two demonstrations."""
    return [{"prompt": f"{a}+1=", "answer": str(a + 1), "demo": [f"#{a + 1}", f"so #{a + 1}"]} for a in range(count)]


def config_for(folder: Path, rows: list[dict[str, Any]], **changes: object) -> Config:
    """A small run on these rows, judged by their number."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return small_config(folder, data__train=path, reward__kind="numeric", **changes)


@pytest.fixture(scope="module")
def prompts_of() -> Iterator[Callable[[Config], Prompts]]:
    """What makes the prompts that a run with a configuration would have."""
    with RewardPool("numeric", 1, 20.0) as pool:
        yield lambda config: make_prompts(config, read_problems(config), load_tokenizer(config.model), pool)


def test_nothing_is_left_out_of_good_rows(prompts_of: Callable, tmp_path: Path) -> None:
    """Every row is a prompt, its demonstrations as they are; the last tenth is held out."""
    found = prompts_of(config_for(tmp_path, sums()))
    assert [len(p.demo_ids) for p in found.train] == [2] * 18
    assert [(p.example.id, len(p.demo_ids)) for p in found.held_out] == [("rows.jsonl:18", 2), ("rows.jsonl:19", 2)]
    assert found.note == f"18 training and 2 held-out problems from {tmp_path / 'rows.jsonl'}"


def test_what_is_left_out_is_said_and_counted(prompts_of: Callable, tmp_path: Path) -> None:
    """Answers, demonstrations and lengths, each with its number, in the order in which they are looked at."""
    rows = sums(30)
    rows[28]["answer"] = "none"
    rows[1]["demo"] = ["#99", "so #98"]
    rows[2]["demo"][0] = "#99"
    rows[3]["prompt"] = "1+" * 40
    rows[4]["demo"][1] = f"{'so ' * 20} #5"
    rows[5]["demo"] = ["#6 and more"]
    rows[29]["prompt"] = "2+" * 40
    found = prompts_of(config_for(tmp_path, rows, rollout__stop='["and"]', **SKIP))
    assert found.note.split(", ")[1:] == [
        "1 rows skipped whose answer 'numeric' cannot read",
        "1 rows skipped whose demonstration fails its verifier", "of 3 demonstrations",
        "1 training rows skipped as too long", "1 demonstrations skipped as too long",
        "1 held-out rows skipped as too long", "1 demonstrations that go on after a text of rollout.stop",
    ]  # fmt: skip
    assert [p.example.id for p in found.held_out] == ["rows.jsonl:27"]
    assert [len(p.demo_ids) for p in found.train] == [2, 1, 1, 1, *[2] * 21]


def test_held_out_demonstrations_are_no_more_than_welcome(prompts_of: Callable, tmp_path: Path) -> None:
    """A held-out problem stays where its demonstration is too long or absent, as where nobody asks for any."""
    rows, other = sums(), [{"prompt": f"{a}+2=", "answer": str(a + 2)} for a in range(2)]
    rows[18]["demo"] = [f"{'so ' * 20} #19", "#19"]
    rows[19]["demo"] = [f"{'so ' * 20} #20"]
    held_out = prompts_of(config_for(tmp_path, rows)).held_out
    assert [p.example.demos for p in held_out] == [["#19"], []]
    assert [p.demo_ids for p in prompts_of(config_for(tmp_path, rows, method__name="grpo")).held_out] == [[], []]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    separate = {"data__eval": tmp_path / "other.jsonl", "data__columns__demo": "demo"}
    assert [p.demo_ids for p in prompts_of(config_for(tmp_path, rows[:18], **separate)).held_out] == [[], []]
    waits = {"method__name": "sft_then_rl", "method__patience": 1}
    assert prompts_of(config_for(tmp_path, rows, **waits)).held_out == held_out
    with pytest.raises(ValueError, match=r"sft_then_rl goes by the loss of held-out demonstrations, but no held-out"):
        prompts_of(config_for(tmp_path, rows[:18], **separate, **waits))


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_more_demonstrations_than_any_prompt_has(prompts_of: Callable, bad_rows: str, tmp_path: Path) -> None:
    """Then nothing is left to skip to, and the only remedy is named."""
    config = config_for(tmp_path, sums(), train__demos_per_prompt=3, data__bad_rows=bad_rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl:0 has only 2 demonstrations, as 18 of 18 prompts do; lower it$"):
        prompts_of(config)


def test_prompts_with_too_few_demonstrations_can_be_skipped(prompts_of: Callable, tmp_path: Path) -> None:
    """Where others have enough."""
    rows = sums()
    rows[4]["demo"].pop()
    with pytest.raises(ValueError, match=r"as 1 of 18 prompts do; lower it, or set data\.bad_rows=skip$"):
        prompts_of(config_for(tmp_path, rows, train__demos_per_prompt=2))
    found = prompts_of(config_for(tmp_path, rows, train__demos_per_prompt=2, data__bad_rows="skip"))
    assert len(found.train) == 17 and found.note.endswith(", 1 prompts skipped that have too few demonstrations")


def test_imperfect_demonstrations_are_said_and_kept(prompts_of: Callable, tmp_path: Path) -> None:
    """Though they fail their verifier, which looks at them as they were; their tokens are what they say now."""
    rows = sums()
    rows[3]["demo"] = ["#99"]
    plain = prompts_of(config_for(tmp_path, rows, **SKIP))
    config = config_for(tmp_path, rows, data__corrupt_demos=0.4, data__corrupt_kind="wrong-answer", **SKIP)
    found = prompts_of(config)
    after = [demo for p in found.train for demo in p.example.demos]
    changed = sum(a != b for a, b in zip(after, (d for p in plain.train for d in p.example.demos), strict=True))
    assert found.note == f"{plain.note}, {changed} of 34 demonstrations corrupted: wrong-answer" and 5 < changed < 25
    decode = load_tokenizer(config.model).decode
    assert [decode(ids, skip_special_tokens=True) for p in found.train for ids in p.demo_ids] == after


def test_imperfect_demonstrations_that_are_right_all_the_same_are_told(prompts_of: Callable, tmp_path: Path) -> None:
    """Where the number that was changed is not the one that is judged; and a text without a number stays."""
    rows = sums()
    for row in rows:
        row["demo"] = [f"<answer>{row['answer']}</answer> #7"]
    rows[0]["demo"] = ["nothing"]
    note = prompts_of(
        config_for(
            tmp_path, rows, data__corrupt_demos=1, data__corrupt_kind="wrong-answer", data__bad_demos="keep"
        )
    ).note
    assert note.endswith(
        "17 of 18 demonstrations corrupted: wrong-answer, of which the verifier accepts 17 all the same, "
        "1 more could not be and stayed"
    )


def test_the_warm_start_is_the_same_whatever_was_corrupted(prompts_of: Callable, tmp_path: Path) -> None:
    """Arms that differ in their demonstrations share one start, from the demonstrations as they were read."""
    warm = {"model__warm_start__max_steps": 5}
    plain, bad = (
        (config, prompts_of(config))
        for config in (config_for(tmp_path, sums(), **warm, data__corrupt_demos=share) for share in (0, 0.6))
    )
    assert plain[1].start == plain[1].train == bad[1].start != bad[1].train
    assert cached_start(*plain, "numeric") == cached_start(*bad, "numeric")
    assert prompts_of(config_for(tmp_path, sums())).start == []
