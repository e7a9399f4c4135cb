"""Demonstrations made imperfect: which ones, in which way, and that each of them is wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from srft.data.corruption import CorruptKind, corrupted
from srft.data.examples import Example, load_examples
from srft.rewards.arithmetic import evaluate_expression
from srft.rewards.verifiers import VERIFIERS, exact, math, numeric

KINDS: tuple[CorruptKind, ...] = ("wrong-step", "wrong-answer", "other")


def example(demo: str, answer: Any = "72", row: int = 0) -> Example:
    """A problem of a file with one demonstration."""
    return Example(f"rows.jsonl:{row}", f"question {row}", answer, [demo], {})


def demos_of(source: str, examples: list[Example], share: float, kind: CorruptKind, seed: int = 0) -> list[list[str]]:
    return [e.demos for e in corrupted(source, examples, share, kind, seed)[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["chain", "countdown"])
def test_every_imperfect_demonstration_of_a_task_is_wrong(task: str, kind: CorruptKind) -> None:
    """With a share of 1 none is accepted any more, and none is longer than any was."""
    options = {"demos": 2} if task == "countdown" else {}
    examples = load_examples(task, limit=300, task=options)
    worse, changed, unchanged = corrupted(task, examples, 1.0, kind, 0)
    assert unchanged == 0 and len(changed) == sum(len(e.demos) for e in examples)
    verify = VERIFIERS["exact" if task == "chain" else "countdown"]
    longest = max(len(demo) for e in examples for demo in e.demos)
    for before, after in zip(examples, worse, strict=True):
        assert replace(after, demos=before.demos) == before
        for demo in after.demos:
            assert verify(demo, after.answer, after.row) == 0 and len(demo) <= longest


def test_wrong_step_of_a_chain_is_one_step() -> None:
    """One result is false; those before are as they were, those after follow from it, and the answer is the last."""
    examples = load_examples("chain", limit=300, task={"min_ops": 1, "max_ops": 5})
    wrong_at = []
    for before, (after,) in zip(examples, demos_of("chain", examples, 1.0, "wrong-step"), strict=True):
        steps, old = after.split(";"), before.demos[0].split(";")
        false = [i for i, step in enumerate(steps[:-1]) if eval(step[:3]) % 10 != int(step[4])]
        assert len(false) == 1 and steps[: false[0]] == old[: false[0]]
        carried = [step[0] for step in steps[1:-1]] + [steps[-1][1]]
        assert carried == [step[4] for step in steps[:-1]] and len(steps) == len(old)
        wrong_at.append(false[0])
    assert set(wrong_at) == {0, 1, 2, 3, 4}


def test_wrong_step_of_a_chain_whatever_ends_it() -> None:
    """What stands between the steps stays."""
    chain = [example("3+5=8|8*2=6,6-1=5;#5", "5")]
    found = {demos_of("chain", chain, 1.0, "wrong-step", seed)[0][0] for seed in range(300)}
    assert "3+5=7|7*2=4,4-1=3;#3" in found and "3+5=8|8*2=6,6-1=4;#4" in found
    # of 27 results that are false, that of the first step which twice itself hides is none
    assert len(found) == 26 and "3+5=3|3*2=6,6-1=5;#5" not in found


def test_wrong_answer_of_a_chain_is_its_last_digit() -> None:
    """Every step stays."""
    examples = load_examples("chain", limit=50)
    for before, (after,) in zip(examples, demos_of("chain", examples, 1.0, "wrong-answer"), strict=True):
        assert after[:-1] == before.demos[0][:-1] and after[-1] != before.demos[0][-1]


def test_countdown_gets_another_operation_or_another_number() -> None:
    """One of them is another, and nothing else."""
    examples = load_examples("countdown", limit=100)
    for before, (step,), (answer,) in zip(
        examples, demos_of("countdown", examples, 1.0, "wrong-step"),
        demos_of("countdown", examples, 1.0, "wrong-answer"), strict=True,
    ):  # fmt: skip
        demo = before.demos[0]
        assert len(step) == len(demo) and sum(a != b for a, b in zip(step, demo, strict=True)) == 1
        used, now = evaluate_expression(demo)[1], evaluate_expression(answer)[1]
        assert sum(a != b for a, b in zip(used, now, strict=True)) == 1


GSM8K = "She sold 48/2 = 24 clips in May.\nThat makes 48+24 = 72 in all.\n#### 72"


def test_wrong_step_of_a_text_is_carried_on() -> None:
    """A result becomes another wherever it stands from there on, the answer too, and the words stay."""
    seen = set()
    for seed in range(40):
        ((after,),) = demos_of("rows.jsonl", [example(GSM8K)], 1.0, "wrong-step", seed)
        may, total, final = (line.split() for line in after.split("\n"))
        assert may[:4] == ["She", "sold", "48/2", "="] and len(after) == len(GSM8K)
        assert total[4] == final[1] != "72" and total[2] == f"48+{may[4]}"
        assert numeric(after, "72", {}) == 0
        seen.add(may[4] == "24")
    assert seen == {True, False}


def test_wrong_answer_of_a_text_is_where_it_is_marked() -> None:
    """In the box, between the tags or after the hashes, and nowhere else; without a mark the last number."""
    for text, pattern in (
        ("2+5=7. \\boxed{7}. Check: 7-5=2", r"2+5=7. \boxed{%s}. Check: 7-5=2"),
        ("7 <answer>7</answer> 2", "7 <answer>%s</answer> 2"),
        ("## Step 1\n7\n#### 7\n", "## Step 1\n7\n#### %s\n"),
        ("first 2, then 7 apples.", "first 2, then %s apples."),
    ):
        ((after,),) = demos_of("rows.jsonl", [example(text, "7")], 1.0, "wrong-answer")
        found = [digit for digit in "012345689" if after == pattern % digit]
        assert len(found) == 1, after
    assert math(demos_of("x", [example(r"\boxed{\frac{1}{2}}", "1/2")], 1.0, "wrong-answer")[0][0], "1/2", {}) == 0


def test_numbers_keep_their_length() -> None:
    """So that a demonstration still fits where it did; one digit is another, and no 0 comes in front."""
    rng = random.Random(0)
    for _ in range(200):
        number = str(rng.randrange(1, 10**5))
        ((after,),) = demos_of("rows.jsonl", [example(f"so {number}", number)], 1.0, "wrong-step", rng.randrange(1000))
        new = after.removeprefix("so ")
        assert new == str(int(new)) and len(new) == len(number) and sum(map(str.__ne__, new, number)) == 1


def test_other_is_a_demonstration_of_another_answer() -> None:
    """As it was, and never one that happens to end alike."""
    examples = load_examples("chain", limit=40)
    every = {demo for e in examples for demo in e.demos}
    for before, (after,) in zip(examples, demos_of("chain", examples, 1.0, "other"), strict=True):
        assert after in every and exact(after, before.answer, {}) == 0


def test_the_chosen_depend_on_the_seed_and_their_row_alone() -> None:
    """The same ones whatever the kind and whoever is beside them, more of them with a larger share, others by seed."""
    examples = load_examples("chain", limit=2000)
    chosen = {share: corrupted("chain", examples, share, "wrong-step", 0)[1] for share in (0.0, 0.1, 0.3, 1.0)}
    assert chosen[0.0] < chosen[0.1] < chosen[0.3] < chosen[1.0]
    assert [round(len(c) / 2000, 1) for c in chosen.values()] == [0.0, 0.1, 0.3, 1.0]
    assert corrupted("chain", examples, 0.3, "other", 0)[1] == chosen[0.3]
    few = corrupted("chain", examples[:100], 0.3, "wrong-step", 0)
    assert few[0] == corrupted("chain", examples, 0.3, "wrong-step", 0)[0][:100]
    assert corrupted("chain", examples, 0.3, "wrong-step", 1)[1] != chosen[0.3]


def test_what_cannot_be_corrupted_stays_and_is_counted() -> None:
    """Text without a number, and a problem among others with the same answer."""
    words = [example("the sea", "the sea", i) for i in range(3)]
    for kind in KINDS:
        worse, changed, unchanged = corrupted("rows.jsonl", words, 1.0, kind, 0)
        assert (worse, changed, unchanged) == (words, set(), 3)
