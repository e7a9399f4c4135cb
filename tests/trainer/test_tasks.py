"""Built-in tasks: the arithmetic is right, streams are repeatable, and the splits never meet."""

from __future__ import annotations

import re
import sys

import pytest

from srft.data.examples import load_examples
from srft.data.schemas import find_schema
from srft.data.tasks import (
    CHAIN_ALPHABET,
    calculator_rows,
    chain_rows,
    countdown_rows,
    in_eval_split,
    reasoning_gym_rows,
    sums_rows,
)
from srft.environments.calculator import Calculator
from srft.rewards.arithmetic import evaluate_expression
from srft.rewards.verifiers import countdown, exact, numeric


def left_to_right(prompt: str) -> int:
    """Value of a chain, worked out apart from the generator."""
    value = int(prompt[0])
    for op, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        value = eval(f"{value} {op} {digit}") % 10
    return value


@pytest.mark.parametrize("split", ["train", "eval"])
def test_chain_rows_are_right(split: str) -> None:
    """Every prompt, step and answer agrees with an independent evaluation, in the exported alphabet."""
    for row in chain_rows(300, split=split, seed=1, min_ops=1, max_ops=6):
        steps = row["demo"].split(";")
        assert row["answer"] == str(left_to_right(row["prompt"])) == steps[-1].removeprefix("#")
        assert [int(step[-1]) for step in steps[:-1]] == [left_to_right(step[:-1]) for step in steps[:-1]]
        assert len(steps) - 1 == (len(row["prompt"]) - 2) // 2
        assert set(row["prompt"] + row["demo"]) <= set(CHAIN_ALPHABET)
        assert exact(row["demo"], row["answer"], row) == 1


def test_chain_known_problem_text() -> None:
    """The format is the documented one: the whole working, then '#' and the answer."""
    row = chain_rows(1, split="train", seed=0, min_ops=3, max_ops=3)[0]
    a, x, b, y, c, z, d, equals = row["prompt"]
    first = left_to_right(f"{a}{x}{b}=")
    second = left_to_right(f"{first}{y}{c}=")
    last = left_to_right(f"{second}{z}{d}=")
    assert equals == "="
    assert row["demo"] == f"{a}{x}{b}={first};{first}{y}{c}={second};{second}{z}{d}={last};#{last}"


def test_chain_row_depends_on_seed_and_index_alone() -> None:
    """A longer request starts with the shorter one, and another seed gives other rows."""
    long = chain_rows(50, split="train", seed=3)
    assert long[:20] == chain_rows(20, split="train", seed=3)
    assert long != chain_rows(50, split="train", seed=4)


def test_chain_lengths_fill_the_range() -> None:
    """Chains have every length from min_ops to max_ops and no other."""
    rows = chain_rows(200, split="train", seed=0, min_ops=2, max_ops=5)
    assert {(len(row["prompt"]) - 2) // 2 for row in rows} == {2, 3, 4, 5}


def test_chain_splits_never_meet() -> None:
    """No text is in both splits under any seeds, and evaluation texts are distinct."""
    train = {
        row["prompt"] for seed in range(4) for row in chain_rows(2000, split="train", seed=seed, min_ops=1)
    }
    held_out = [row["prompt"] for row in chain_rows(500, split="eval", seed=0, min_ops=2)]
    assert len(set(held_out)) == len(held_out)
    assert not train & set(held_out)
    assert all(map(in_eval_split, held_out)) and not any(map(in_eval_split, train))


def test_chain_says_when_problems_run_out() -> None:
    """300 one-step texts exist, an eighth of them for evaluation: more cannot be distinct."""
    with pytest.raises(ValueError, match="distinct evaluation problems, 64 were asked for; raise max_ops"):
        chain_rows(64, split="eval", seed=0, min_ops=1, max_ops=1)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (3, 2)])
def test_chain_refuses_an_empty_range(low: int, high: int) -> None:
    """Lengths that make no chain are named in the error."""
    with pytest.raises(ValueError, match=f"min_ops={low} max_ops={high}"):
        chain_rows(1, split="train", seed=0, min_ops=low, max_ops=high)


def test_chain_refuses_unknown_options() -> None:
    """A misspelt option is an error that lists the real ones."""
    with pytest.raises(ValueError, match=r"no option \['max_op'\].*min_ops, max_ops and notations"):
        load_examples("chain", task={"max_op": 3})


@pytest.mark.parametrize("split", ["train", "eval"])
def test_countdown_rows_are_right(split: str) -> None:
    """Every demonstration makes the target out of all the numbers, in the sizes asked for, and in a few bytes."""
    options = {"min_numbers": 2, "max_numbers": 4, "largest": 12, "max_target": 60, "demos": 2}
    rows = countdown_rows(150, split=split, seed=1, **options)
    assert {len(row["nums"]) for row in rows} == {2, 3, 4}
    assert max(max(row["nums"]) for row in rows) == 12 and 50 < max(row["target"] for row in rows) <= 60
    for row in rows:
        assert row["prompt"] == f"{' '.join(map(str, row['nums']))}:{row['target']}="
        assert row["target"] not in row["nums"] and len(set(row["demo"])) == 2
        for demo in row["demo"]:
            value, used = evaluate_expression(demo)
            assert value == row["target"] and sorted(used) == sorted(row["nums"]) and len(demo) <= 15
            assert countdown(demo, row["target"], row) == 1


def test_countdown_parentheses_are_those_it_needs() -> None:
    """Without any pair of them an expression has another value, whatever its numbers."""
    shown = [row["demo"][0] for row in countdown_rows(300, split="train", seed=0, min_numbers=4, max_numbers=4)]
    assert any("(" in demo for demo in shown) and any("((" in demo or "))" in demo for demo in shown)
    for demo in shown:
        # by chance numbers such as 1 give the same value either way, and these primes do not
        primes = iter((101, 211, 307, 401))
        general = re.sub("[0-9]+", lambda _, primes=primes: str(next(primes)), demo)
        for start in (i for i, char in enumerate(general) if char == "("):
            depth, end = 1, start
            while depth:
                end += 1
                depth += {"(": 1, ")": -1}.get(general[end], 0)
            bare = general[:start] + general[start + 1 : end] + general[end + 1 :]
            assert evaluate_expression(bare)[0] != evaluate_expression(general)[0], demo


def test_countdown_demonstrations_are_drawn_among_many() -> None:
    """The same problem, met again, is often answered in another way."""
    rows = countdown_rows(2000, split="train", seed=0, largest=9)
    ways: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        ways.setdefault((*sorted(row["nums"]), row["target"]), set()).add(row["demo"][0])
    assert max(map(len, ways.values())) >= 6


def test_countdown_row_depends_on_seed_and_index_alone() -> None:
    """A longer request starts with the shorter one, and another seed gives other rows."""
    long = countdown_rows(50, split="train", seed=3)
    assert long[:20] == countdown_rows(20, split="train", seed=3)
    assert long != countdown_rows(50, split="train", seed=4)


def test_countdown_splits_never_meet() -> None:
    """No problem is in both splits, in whatever order its numbers are given, and evaluation problems are distinct."""
    train, held_out = (
        [(*sorted(row["nums"]), row["target"]) for row in countdown_rows(count, split=split, seed=0, largest=9)]
        for count, split in ((3000, "train"), (150, "eval"))
    )
    assert len(set(held_out)) == len(held_out) and not set(train) & set(held_out)
    examples = load_examples("countdown", split="test", limit=20)
    assert [(e.prompt, e.answer) for e in examples] == [(e.row["prompt"], e.row["target"]) for e in examples]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"largest": 4}, "5 <= largest .* largest=4"),
        ({"min_numbers": 4, "max_numbers": 3}, "min_numbers=4 max_numbers=3"),
        ({"min_numbers": 2, "demos": 3}, "demos=3; raise min_numbers"),
        ({"demos": 5}, "1 <= demos <= 4"),
        ({"numbers": 3}, r"no option \['numbers'\]; it has min_numbers, .* and demos"),
        ({"largest": "ten"}, r"whole numbers, got \{'largest': 'ten'\}; give task.largest one"),
    ],
)
def test_countdown_refuses_what_it_cannot_follow(options: dict[str, object], words: str) -> None:
    """Options out of range or of another name are named."""
    with pytest.raises(ValueError, match=words):
        load_examples("countdown", split="test", task=options)


def test_countdown_says_when_problems_run_out() -> None:
    """Two numbers up to 5 have some 25 targets up to 9, an eighth of them for evaluation."""
    options = {"min_numbers": 2, "max_numbers": 2, "largest": 5, "max_target": 9}
    with pytest.raises(ValueError, match="distinct evaluation problems, 16 were asked for; raise largest or max_num"):
        countdown_rows(16, split="eval", seed=0, **options)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_sums_are_right(split: str) -> None:
    """Steps follow each other from left to right, nowhere below 0, to the answer, and by the verifier that it gets."""
    rows = sums_rows(150, split=split, seed=1, terms=4, largest=9)
    signs = ""
    for row in rows:
        text = row["prompt"].removeprefix("What is ").removesuffix("?")
        numbers = [int(number) for number in text.split()[::2]]
        assert len(numbers) == 4 and 1 <= min(numbers) and max(numbers) <= 9
        value = numbers[0]
        for step, sign, number in zip(row["demo"].split("\n"), text.split()[1::2], numbers[1:], strict=True):
            after = value + number if sign == "+" else value - number
            assert step == f"{value}{sign}{number}={after}" and after >= 0
            value = after
            signs += sign
        assert row["answer"] == str(value) == str(eval(text)) and numeric(row["demo"], row["answer"], row) == 1
    assert 0.2 < signs.count("-") / len(signs) < 0.5
    (example,) = load_examples("sums", split=split, limit=1)
    assert find_schema("sums", example.row).reward == "numeric" and example.demos == [example.row["demo"]]


@pytest.mark.parametrize("split", ["train", "test"])
def test_calculator_demonstrations_say_what_the_calculator_says(split: str) -> None:
    """Turn by turn, up to an answer that its verifier accepts; rows are repeatable."""
    rows = calculator_rows(100, split=split, seed=3)
    assert rows == calculator_rows(100, split=split, seed=3)
    for row in rows:
        assert str(eval(row["prompt"].rstrip(":"))) == row["answer"]
        *steps, last = row["demo"]
        calculator = Calculator(row["answer"], row)
        for asked, told in zip(steps[::2], steps[1::2], strict=True):
            assert (asked["role"], told["role"]) == ("assistant", "user")
            assert calculator.step(asked["content"]) == told["content"]
        assert calculator.step(last["content"]) is None and exact(last["content"], row["answer"], row) == 1
    with pytest.raises(ValueError, match="task calculator needs terms >= 2"):
        load_examples("calculator", task={"terms": 1}, turns=True)


def test_sums_say_what_they_cannot_follow() -> None:
    """Options out of range are named, and a space that is used up says what to raise; splits never meet."""
    with pytest.raises(ValueError, match="terms >= 2 and largest >= 1, got terms=1 largest=20"):
        load_examples("sums", task={"terms": 1})
    with pytest.raises(ValueError, match="2 numbers up to 3 has only about .* raise largest or terms"):
        sums_rows(50, split="eval", seed=0, terms=2, largest=3)
    sizes = ((3000, "train"), (256, "eval"))
    train, held_out = ({row["prompt"] for row in sums_rows(n, split=split, seed=0)} for n, split in sizes)
    assert len(held_out) == 256 and not train & held_out


def test_reasoning_gym_splits_never_meet() -> None:
    """Entries are repeatable, evaluation questions distinct and in no training stream."""
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    train = reasoning_gym_rows("chain_sum", 400, split="train", seed=0, options=options)
    held_out = [
        row["question"] for row in reasoning_gym_rows("chain_sum", 40, split="eval", seed=0, options=options)
    ]
    assert train[:50] == reasoning_gym_rows("chain_sum", 50, split="train", seed=0, options=options)
    assert len(set(held_out)) == 40 and not {row["question"] for row in train} & set(held_out)


def test_reasoning_gym_says_when_questions_run_out() -> None:
    """A task with few distinct questions fails with the number it could give."""
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match="gave only .* of 500 problems of split 'eval'"):
        reasoning_gym_rows("chain_sum", 500, split="eval", seed=0, options=options)


def test_reasoning_gym_unknown_task_names_the_nearest() -> None:
    """A misspelt task is answered with its likely meaning."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="no task 'chain_sm'; nearest: chain_sum"):
        load_examples("reasoning_gym:chain_sm")


def test_reasoning_gym_unknown_option_is_named() -> None:
    """An option that the task's configuration lacks is named, with the task."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="'chain_sum' refuses .*nonsense"):
        load_examples("reasoning_gym:chain_sum", task={"nonsense": 1})


def test_reasoning_gym_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match=r"srft\[gym\]"):
        load_examples("reasoning_gym:chain_sum")


def test_chain_in_several_notations() -> None:
    """The working and the answer are as ever; only what ends a step is drawn, among as many signs as asked for."""
    rows = chain_rows(300, split="train", seed=3, min_ops=2, max_ops=4, notations=8)
    ends = set()
    for row in rows:
        steps = re.findall(r"(\d[-+*]\d)=(\d)(\D)", row["demo"])
        assert "".join(f"{sum_}={result}{end}" for sum_, result, end in steps) + f"#{row['answer']}" == row["demo"]
        assert [int(result) for _, result, _ in steps] == [left_to_right(f"{sum_}=") for sum_, _, _ in steps]
        assert exact(row["demo"], row["answer"], row) == 1
        ends |= {end for _, _, end in steps}
    assert len(ends) == 8
    with pytest.raises(ValueError, match="notations from 1 to 8, got notations=9"):
        chain_rows(1, split="train", seed=3, notations=9)
