"""Which problems are the same, which are held out, and what a checkpoint remembers of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srft.data.examples import Example, load_examples
from srft.data.problems import Problems, data_state, drop_shared, hold_out
from srft.rewards.verifiers import ANSWER_ALONE, VERIFIERS

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")


def example(prompt: Any = "2+3=", demo: str | None = "#5") -> Example:
    """A small example."""
    return Example("t:0", prompt, "5", [] if demo is None else [demo], {})


def test_held_out_problems_are_not_trained_on() -> None:
    """The last tenth of the problems goes with every row of theirs, however often a problem stands in the file."""
    plain = [Example(f"f:{i}", f"{i}", "1", [], {}) for i in range(25)]
    assert hold_out(plain) == (plain[:-2], plain[-2:])
    twice = [Example(f"f:{i}", f"{i % 9}", "1", [], {}) for i in range(18)]
    training, held_out = hold_out(twice)
    assert [e.prompt for e in held_out] == ["8"] and len(training) == 16
    with pytest.raises(ValueError, match="f has one problem, and needs one more to hold out"):
        hold_out([twice[0], twice[9]])


def test_drop_shared_compares_prompts() -> None:
    """Equal text or messages are shared, whatever the ids."""
    a, b, c = example("x"), example([{"role": "user", "content": "x"}]), example("y")
    assert drop_shared([a, b, c], [example("x")]) == [b, c]
    assert drop_shared([a, b, c], [b, c]) == [a]


def test_numbers_of_countdown_of_several_types_have_no_order() -> None:
    """A number given as text does not stop the run, and still is the same number; nor do numbers that are none."""
    a, b, c, d = (Example("", "", "7", [], {"nums": nums, "target": 7}) for nums in ([3, "4"], ["4", 3], [3, 5], b"7"))
    assert drop_shared([b, c, d], [a]) == [c, d]


@needs_data
def test_drop_shared_finds_the_repeats_of_countdown() -> None:
    """The five test rows that repeat a train row in another order of numbers are dropped, and no other."""
    train = load_examples(str(DATA / "train/countdown_train.jsonl"))
    test = load_examples(str(DATA / "eval/countdown_test.jsonl"))
    kept = {e.id for e in drop_shared(test, train)}
    assert sorted(int(e.id.split(":")[1]) for e in test if e.id not in kept) == [257, 263, 370, 494, 922]


class Closed(dict):
    """A row that nobody may look at."""

    def __getitem__(self, key: object) -> Any:
        raise AssertionError(key)

    get = __contains__ = __iter__ = keys = values = items = __getitem__


@pytest.mark.parametrize("kind", VERIFIERS)
def test_verifiers_that_judge_by_the_answer_alone_do_not_look_at_the_row(kind: str) -> None:
    """Those and no others: what they do not look at may change between a checkpoint and its resume."""
    if kind == "math":
        pytest.importorskip("latex2sympy2_extended", reason="needs math-verify, the extra srft[train]")
    if kind in ANSWER_ALONE:
        assert VERIFIERS[kind](r"\boxed{5}", "5", Closed()) == 1.0
    else:
        with pytest.raises(AssertionError):
            VERIFIERS[kind](r"\boxed{5}", "5", Closed())


@pytest.mark.parametrize("kind", [*VERIFIERS, "reasoning_gym:gcd", "path/to/file.py:judge"])
def test_checkpoint_remembers_what_judges(kind: str) -> None:
    """Id, prompt, answer and demonstrations always, the rest of the row where the verifier may look at it."""
    one = replace(example(), row={"a": 1, "b": [2]})

    def state(**changes: Any) -> dict[str, Any]:
        return data_state(Problems([one, replace(one, **changes)], [replace(one, **changes)], kind))

    same = state()
    assert same["rows"] == 2 and state(row={"b": [2], "a": 1}) == same
    for changes in ({"id": "t:1"}, {"prompt": "3+2="}, {"answer": "6"}, {"demos": []}):
        other = state(**changes)
        assert other["train"] != same["train"] and other["held_out"] != same["held_out"]
    other = state(row={"a": 2, "b": [2]})
    assert (other == same) is (kind in ANSWER_ALONE)
