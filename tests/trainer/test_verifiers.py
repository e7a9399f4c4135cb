"""Verifiers agree with known grades."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft.data.examples import load_examples
from srft.data.judging import check_demos
from srft.rewards.arithmetic import evaluate_expression
from srft.rewards.pool import RewardPool
from srft.rewards.verifiers import BadGold, countdown, exact, last_boxed, math, numeric

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")


def read(name: str) -> list[dict[str, Any]]:
    """Rows of a data file."""
    return [json.loads(line) for line in (DATA / name).open()]


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("7+5=2;#8", "8", 1), ("7+5=2;#8", 8, 1), ("#7#8", "8", 1), ("#8#7", "8", 0), ("#88", "8", 0),
        ("# 8 \n", " 8", 1), ("8", "8", 1), ("working\n8\n", "8", 1), ("8\nworking", "8", 0), ("", "8", 0),
        (r"so \boxed{C}", "C", 1), (r"#A then \boxed{C}", "C", 1), (r"\boxed{A} #C", "C", 1),
        ("<answer> C </answer>.", "C", 1), ("<think>#8</think>#7", "8", 0), ("<think>#8", "8", 0),
        ("#8 or #", "8", 0),
    ],
)  # fmt: skip
def test_exact(completion: str, answer: Any, value: int) -> None:
    """The last mark counts, else the last line; text inside <think> never does."""
    assert exact(completion, answer, {}) == value


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"), (r"\fbox{4}", "4"), (r"$\boxed 5$.", "5"), (r"\boxed {6}", "6"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{}", ""), (r"{x} \boxed{7}", "7"), ("none", None),
        (r"\boxed{", None),
    ],
)  # fmt: skip
def test_last_boxed(text: str, content: str | None) -> None:
    """The last complete box, with balanced braces."""
    found = last_boxed(text)
    assert (found and found[1]) == content


def test_last_boxed_is_linear() -> None:
    """A completion that opens boxes for ever is read in one pass; a second pass per box would not end."""
    assert last_boxed(r"\boxed{" * 100_000) is None


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so 18", "18", 1), ("18 eggs for $18.00.", "18", 1), ("#### 18", "18", 1),
        ("#### $1,234 in 3 days", "1234", 1),
        ("it is 65960", "65,960", 1), ("1,234,567", 1234567, 1), ("17 then 18", "17", 0),
        ("no number", "18", 0),
        ("-5", "-5", 1), ("3-5", "-5", 0), ("$-5", "-5", 1), ("-$5", "-5", 1), ("−5", "-5", 1),
        ("1/2", "0.5", 1),
        (".5", "1/2", 1), (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{-\frac{1}{2}}", "-0.5", 1),
        (r"\boxed{\dfrac{3}{6}}", "1/2", 1), ("50%", "50", 1), ("50%", "0.5", 1), ("0.5", "50%", 1),
        (r"50\%", "0.5", 1),
        ("0.333", "1/3", 0), ("1/0", "1", 0), ("won by #12 with 16", "16", 1),
        ("<answer>7</answer> not 8", "7", 1),
        ("<think>18</think> 17", "18", 0), ("9" * 5000, "9", 0), ("1e999999999", "1", 0),
        ("5 - 3 = 2", "2", 1),
    ],
)  # fmt: skip
def test_numeric(completion: str, answer: Any, value: int) -> None:
    """Exact comparison of the final number; signs, currency, thousands, fractions and percents are read."""
    assert numeric(completion, answer, {}) == value


def test_numeric_without_gold() -> None:
    """An answer without a number cannot grade anything."""
    with pytest.raises(BadGold, match="no number in the answer 'many'"):
        numeric("3", "many", {})


@needs_data
def test_numeric_agrees_with_the_published_grades() -> None:
    """All 4 x 1319 published verdicts on model solutions are reproduced, so the known totals come out."""
    rows = read("eval/gsm8k_example_model_solutions.jsonl")
    totals = {}
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        verdicts = [
            numeric(row[model]["solution"], row["ground_truth"].rpartition("A: ")[2], row) for row in rows
        ]
        assert [value == 1 for value in verdicts] == [row[model]["is_correct"] for row in rows]
        totals[model] = sum(verdicts)
    assert list(totals.values()) == [286, 515, 458, 742]

Tree = tuple[str, Fraction | None, list[Fraction]]


def _join(parts: tuple[Tree, str, Tree]) -> Tree:
    (a, x, m), op, (b, y, n) = parts
    if x is None or y is None or (op == "/" and y == 0):
        value = None
    else:
        value = {"+": x + y, "-": x - y, "*": x * y}[op] if op != "/" else x / y
    return f"({a} {op} {b})", value, m + n


literals: st.SearchStrategy[Tree] = st.one_of(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n), [Fraction(n)])),
    st.integers(0, 99).map(lambda n: (f"-{n}", Fraction(-n), [Fraction(n)])),
    st.tuples(st.integers(0, 9), st.integers(0, 99)).map(
        lambda p: (f"{p[0]}.{p[1]:02}", Fraction(f"{p[0]}.{p[1]:02}"), [Fraction(f"{p[0]}.{p[1]:02}")])
    ),
)
trees = st.recursive(
    literals, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(_join), max_leaves=8
)


@given(trees)
def test_expression_value_is_the_tree_it_was_written_from(tree: Tree) -> None:
    """With all parentheses written, the parser gives back the exact value and every literal in order."""
    text, value, numbers = tree
    if value is None:
        with pytest.raises(ZeroDivisionError):
            evaluate_expression(text)
    else:
        assert evaluate_expression(text) == (value, numbers)


@given(
    st.lists(
        st.tuples(st.sampled_from(["+", "-", "*", "/", "-("]), st.integers(1, 20)), min_size=1, max_size=9
    )
)
def test_expression_precedence_is_pythons(steps: list[tuple[str, int]]) -> None:
    """Without parentheses, and with some, operators bind and associate as in Python on Fractions."""
    text, opened = "7", 0
    for op, number in steps:
        opened += op == "-("
        text += f"{op}{number}"
    text += ")" * opened
    digits = "".join(f"Fraction({token})" if token.isdigit() else token for token in _split(text))
    try:
        expected = eval(digits, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate_expression(text)
    else:
        assert evaluate_expression(text)[0] == expected


def _split(text: str) -> list[str]:
    """Numbers and single characters."""
    parts: list[str] = []
    for character in text:
        if character.isdigit() and parts and parts[-1].isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return parts


@pytest.mark.parametrize(
    "text",
    ["2**3", "2//3", "2(3)", "(1+2", "1+2)", "1+", "", "x+1", "1 2", "٣+1", "1e3", "__import__('os')",
     "1" + "+1" * 100],
)  # fmt: skip
def test_expression_refuses(text: str) -> None:
    """Powers, implicit products, names and anything unfinished or endless are no expressions."""
    with pytest.raises(ValueError):
        evaluate_expression(text)


@pytest.mark.parametrize(
    "text", ["(" * 100 + "1" + ")" * 99, "-" * 199 + "1", "(" * 98 + "1" + ")" * 98 + "+1"]
)
def test_expression_depth_is_bounded(text: str) -> None:
    """The longest nesting that is read at all stays within Python's stack."""
    try:
        evaluate_expression(text)
    except ValueError as error:
        assert "parenthesis" in str(error)


ROW = {"nums": [3, 4, 6], "target": 24}


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<answer>6 * 4</answer>", 1), ("<answer>6*4*(4-3)</answer>", 0),
        ("<answer>6 * (3 + 4) - 18</answer>", 0),
        ("<answer>24</answer>", 0), ("<answer>6*4 = 24</answer>", 1), ("<answer>24 = 6*4</answer>", 1),
        ("<answer>6*4 = 25</answer>", 0), ("<answer>6*4 = 3*8</answer>", 0),
        ("<answer>6*4=24=24</answer>", 0),
        ("steps\nanswer: 6 × 4", 1), ("Therefore, the final equation is 4 * 6.", 1), ("6*4\nI am sure", 0),
        (r"\boxed{6 * 4}", 1), ("#6*4", 1), ("<answer>6*4</answer> <answer>3</answer>", 0), ("6 / 0", 0),
        ("", 0),
        ("<think><answer>6*4</answer>", 0), ("<answer>" + "(" * 500 + "</answer>", 0), ("6 × 4 = 24", 1),
        ("<answer>-4 * -6</answer>", 1), ("<answer>6*4*3**0</answer>", 0),
    ],
)  # fmt: skip
def test_countdown(completion: str, value: int) -> None:
    """The expression must equal the target and use each number at most once, in any of the usual places."""
    assert countdown(completion, 24, ROW) == value


def test_countdown_counts_repeats_and_takes_the_target_from_the_answer() -> None:
    """A number given twice may be used twice, division is exact, and the answer stands in for the target."""
    assert countdown("5 + 5", 10, {"nums": [5, 5]}) == 1
    assert countdown("5 + 5", 10, {"nums": [5, 6]}) == 0
    assert countdown("8 / (3 - 8 / 3)", 24, {"nums": [3, 3, 8, 8]}) == 1
    with pytest.raises(BadGold, match="needs nums and target"):
        countdown("5 + 5", 10, {})


@needs_data
@pytest.mark.parametrize("file", ["train/countdown_train.jsonl", "eval/countdown_test.jsonl"])
def test_countdown_data_is_right(file: str) -> None:
    """Every published solution, bare answer and built demonstration scores 1; a wrong target scores 0."""
    for example in load_examples(str(DATA / file), require_demo=True):
        row = example.row
        for text in (
            example.demos[0],
            row["solution"],
            row["answer"],
            f"<answer>{row['answer']} = {row['target']}</answer>",
        ):
            assert countdown(text or "", example.answer, row) == 1
        assert countdown(row["answer"], example.answer, {**row, "target": row["target"] + 1}) == 0


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"\boxed{0.5}", r"\frac12", 1), (r"\boxed{\frac{2}{4}}", "0.5", 1), (r"\boxed{1,234}", "1234", 1),
        (r"\boxed{50\%}", "0.5", 1), (r"\boxed{25}", "025", 1), (r"\boxed{142}", "142.0", 1),
        (r"\boxed{(1,2)}", "[1,2]", 0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1), (r"\boxed{5} then \boxed{6}", "5", 0), ("5", "5", 0),
        ("5 5 5", "5", 0),
        ("3.14159265", r"\pi", 0), (r"<think>\boxed{5}</think> \boxed{6}", "6", 1),
        (r"<think>\boxed{5}", "5", 0),
        (r"\boxed{\text{east}}", r"\text{east}", 1), (r"\boxed{\text{west}}", r"\text{east}", 0),
        (r"\boxed{}", "5", 0),
        (r"\boxed 2", "2", 1), (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\pi/2)", 1),
        (r"\boxed{10}", r"\boxed{10}", 1),
    ],
)  # fmt: skip
def test_math(completion: str, answer: str, value: int) -> None:
    """Equal mathematics in the last box scores; numbers outside a box, or in an earlier one, do not."""
    pytest.importorskip("math_verify")
    assert math(completion, answer, {}) == value


@needs_data
def test_math_demos_score(caplog: pytest.LogCaptureFixture) -> None:
    """The worked solutions of MATH-500 and of a thousand training rows all reach their own answer."""
    pytest.importorskip("math_verify")
    train = load_examples(str(DATA / "train/math_train.jsonl"), bad_rows="skip", require_demo=True)
    test = load_examples(str(DATA / "eval/math500.jsonl"), require_demo=True)
    with RewardPool("math", 2, 10.0) as pool:
        assert check_demos([*test, *random.Random(0).sample(train, 1000)], pool) == []
        assert pool.counts == {"ok": 1500}


@needs_data
def test_gsm8k_demos_score() -> None:
    """Five hundred worked solutions without their calculator marks score 1, and with another answer 0."""
    examples = load_examples(str(DATA / "train/gsm8k_train.jsonl"), limit=500, require_demo=True)
    with RewardPool("numeric", 2, 5.0) as pool:
        assert check_demos(examples, pool) == []
        spoiled = pool.score([(e.demos[0], f"{e.answer}7", e.row) for e in examples])
    assert {result.value for result in spoiled} == {0.0}
