"""No wrong answer earns a reward: the graded table, and answers of real data against themselves and each other."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft.rewards.answers import BadGold, after_thinking, final_box, gold_text, printed
from srft.rewards.quantities import read_quantity
from srft.rewards.verifiers import exact, math, numeric
from tests.trainer import verdicts
from tests.trainer.verdicts_sentences import SENTENCES

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "eval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")


def boxed(rows: list[verdicts.Row]) -> list[verdicts.Row]:
    """The rows with a box around what is said."""
    return [(answer, rf"\boxed{{{said}}}", verdict) for answer, said, verdict in rows]


GRADED = [
    *((exact, *row) for row in verdicts.EXACT),
    *((numeric, *row) for row in [*boxed(verdicts.NUMERIC_BOXED), *verdicts.NUMERIC, *SENTENCES]),
    *((math, *row) for row in [*boxed([*verdicts.MATH_BOXED, *verdicts.FALSE_NEGATIVES]), *verdicts.MATH]),
]


def verdict_of(verifier: Any, answer: Any, completion: str) -> float | None:
    """Its grade, None where it cannot read the answer."""
    try:
        return verifier(completion, answer, {})
    except BadGold:
        return None


def name(row: tuple[Any, ...]) -> str:
    """A test id that shows the row."""
    return f"{row[0].__name__}-{row[1]!s:.30}-{row[2]:.40}".replace("\\", "/").replace("\x00", "")


@pytest.mark.parametrize(("verifier", "answer", "completion", "verdict"), GRADED, ids=map(name, GRADED))
def test_verdict(verifier: Any, answer: Any, completion: str, verdict: int | None) -> None:
    """Right, wrong, or an answer that cannot be read."""
    if verifier is math:
        pytest.importorskip("latex2sympy2_extended")
    assert verdict_of(verifier, answer, completion) == verdict


def test_what_five_is_and_is_not() -> None:
    """In a box, for the answer 5; what else there is beside a number, and how else it can be written."""
    pytest.importorskip("latex2sympy2_extended")
    assert [said for said in verdicts.FIVE if not math(rf"\boxed{{{said}}}", "5", {})] == []
    assert [said for said in verdicts.NOT_FIVE if math(rf"\boxed{{{said}}}", "5", {})] == []
    assert [said for said in verdicts.NOT_FIVE if numeric(rf"\boxed{{{said}}}", "5", {})] == []


@pytest.mark.parametrize("place", ["#### {}", "<answer>{}</answer>", "so\nAnswer: {}", "The answer is {}.", "{}"])
def test_a_number_is_the_same_wherever_it_stands(place: str) -> None:
    """After hashes, in a tag, after the word answer and alone on a line as in a box."""
    for answer, said, verdict in verdicts.NUMERIC_BOXED:
        if not said.endswith("."):
            assert verdict_of(numeric, answer, place.format(said)) == verdict, (answer, said)


@pytest.mark.parametrize("row", range(len(verdicts.TYPES)))
@pytest.mark.parametrize("verifier", [exact, numeric, math], ids=["exact", "numeric", "math"])
def test_the_type_of_a_column_changes_no_verdict(verifier: Any, row: int) -> None:
    """Text, bytes, int, float, Decimal, Fraction, numpy's scalars and arrays, and lists of one."""
    pytest.importorskip("latex2sympy2_extended")
    answers, said, verdict = verdicts.TYPES[row]
    grades = [verifier(rf"\boxed{{{said}}}", answer, {}) for answer in answers]
    assert grades == [verdict] * len(answers)


@pytest.mark.parametrize(
    ("completion", "judged"),
    [
        ("7", "7"),
        ("<think>8</think>7", "7"), ("<think>8", ""), ("8</think>7", "7"), ("<think>\n8\n</think>\n7", "\n7"),
        ("<think>8</think>7<think>9", ""), ("<think>a</think>8<think>b</think>7", "7"), ("<THINK>8</THINK>7", "7"),
        ("<thinking>8</thinking>7", "7"), ("[THINK]8[/THINK]7", "7"), ("[THINK]8", ""), ("", ""), ("</think>", ""),
    ],
)  # fmt: skip
def test_only_what_follows_the_last_thought_is_judged(completion: str, judged: str) -> None:
    """While a thought is open there is no answer; one that the prompt opened is given with its tag in front."""
    assert after_thinking(completion) == judged


def test_an_unclosed_thought_earns_nothing_from_any_verifier() -> None:
    """Whatever is in it, in the words of every verifier."""
    inside = "<think>\nso it is\n#### 7\n#7\n\\boxed{7}\n<answer>7</answer>\n7"
    for verifier in (exact, numeric, math):
        assert verifier(inside, "7", {}) == 0
        assert verifier(f"{inside}</think>\n\\boxed{{7}}", "7", {}) == 1


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"), (r"\boxed{1} or $\boxed{2}$", "1 or 2"), (r"\boxed{1}, \boxed{1}", "1"),
        (r"\boxed{1}. Then \boxed{2}", "2"), (r"\boxed{1} \boxed{}", ""), (r"\boxed{\boxed{1}}", "1"), ("1", None),
    ],
)  # fmt: skip
def test_boxes_offered_together_are_one_answer(text: str, content: str | None) -> None:
    """Two answers side by side are not the last of them."""
    found = final_box(text)
    assert (found and found[1]) == content


def test_a_null_says_that_the_answer_is_missing() -> None:
    """So do NaN, nothing, and bytes that are no text."""
    answers = [None, float("nan"), "", b"\xff", {"a": 1}]
    for answer, reason in zip(answers, ["missing", "nan", "empty", "no UTF-8", "mapping"], strict=True):
        with pytest.raises(BadGold, match=reason):
            gold_text(answer)


def test_printed_numbers_have_one_spelling() -> None:
    """Only what a program prints of a number; an identifier keeps its zeros."""
    assert {printed(text) for text in ("18", "18.0")} == {"18"}
    assert {printed(text) for text in ("1e-05", "0.00001", "1E-05")} == {"0.00001"}
    assert [printed(text) for text in ("007", "1.10", "+5", "1_0", "nan")] == ["007", "1.10", "+5", "1_0", "nan"]


@pytest.mark.parametrize(
    "text",
    ["#" * 50_000, "<answer>" * 20_000, "1" * 50_000, "1," * 30_000, "(" * 50_000, r"\boxed{" * 10_000 + "5",
     "x = " * 20_000 + "5", "1/" * 30_000 + "1", "- " * 40_000 + "5"],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_long_completions_are_read_in_one_pass(text: str) -> None:
    """None of them is right, and none takes the quadratic time that the deadline would have to end."""
    assert numeric(text, "7", {}) == 0
    assert math(rf"\boxed{{{text}}}", "7", {}) == 0
    assert read_quantity(text) is None


# numbers, by their properties

FORMS = [
    "{n}/{d}", "$\\frac{{{n}}}{{{d}}}$", "\\dfrac{{{n}}}{{{d}}}", " {n} / {d} ", "({n}/{d})", "x = {n}/{d}",
    "{n}/{d} cm",
]  # fmt: skip


@given(st.integers(-99, 99), st.integers(1, 99), st.sampled_from(FORMS))
def test_fractions_are_read_as_what_they_are(top: int, bottom: int, form: str) -> None:
    """In every spelling; a unit and a name beside change nothing."""
    found = read_quantity(form.format(n=top, d=bottom))
    assert found is not None and found.value == Fraction(top, bottom)


@given(
    st.integers(-(10**25), 10**25),
    st.integers(0, 30),
    st.sampled_from(["{}", "{} dollars", "${}$", "{}.", "\\boxed{{{}}}"]),
)
def test_decimals_are_read_to_the_last_digit(digits: int, places: int, form: str) -> None:
    """Written out, with exponents, and with thousands in groups; one more in the last place is another number."""
    value, plain = Fraction(digits, 10**places), f"{Decimal(digits).scaleb(-places):f}"
    other = f"{Decimal(digits + 1).scaleb(-places):f}"
    for text in (plain, f"{digits}e-{places}", rf"{digits} \times 10^{{-{places}}}"):
        assert numeric(form.format(text), plain, {}) == 1
        assert numeric(form.format(text), other, {}) == 0
    if places == 0:
        assert read_quantity(f"{digits:,}") == read_quantity(str(digits))
    found = read_quantity(plain)
    assert found is not None and found.value == value


@given(st.integers(0, 99), st.integers(1, 98), st.integers(2, 99))
def test_mixed_numbers_are_sums(whole: int, top: int, bottom: int) -> None:
    """A whole number beside a proper fraction; beside an improper one it is nothing."""
    for text in (f"{whole} {top}/{bottom}", rf"{whole}\frac{{{top}}}{{{bottom}}}"):
        found = read_quantity(text)
        assert (found and found.value) == (whole + Fraction(top, bottom) if top < bottom else None)
    negative = read_quantity(f"-{whole} {top}/{bottom}")
    assert (negative and negative.value) == (-whole - Fraction(top, bottom) if top < bottom else None)


# real data


def answers_of(file: str) -> list[str]:
    """The answers of a data file that has one a row."""
    rows = [json.loads(line) for line in (DATA / file).open()]
    if file == "olympiadbench.jsonl":
        return [row["final_answer"][0] for row in rows if not row["is_multiple_answer"]]
    return [str(row["answer"]).rpartition("#### ")[2] for row in rows]


# of the larger files a part, so that the test stays quick
FILES = {"gsm8k_test.jsonl": 300, "aime24.jsonl": 30, "aime25.jsonl": 30, "amc83.jsonl": 83, "math500.jsonl": 250,
         "olympiadbench.jsonl": 250}  # fmt: skip


@needs_data
@pytest.mark.parametrize("file", FILES)
def test_real_answers_accept_themselves_and_no_other(file: str) -> None:
    """At least 99 in 100 answers are read and equal themselves; that of another row is right only if it is equal."""
    pytest.importorskip("latex2sympy2_extended")
    answers = answers_of(file)
    rng = random.Random(0)
    chosen = rng.sample(answers, min(FILES[file], len(answers)))
    accepted = [verdict_of(math, answer, rf"\boxed{{{answer}}}") == 1 for answer in chosen]
    assert sum(accepted) >= 0.99 * len(chosen), [a for a, fine in zip(chosen, accepted, strict=True) if not fine]
    for answer in chosen:
        other = rng.choice(answers)
        if other.strip("$").removeprefix("x=") != answer.strip("$").removeprefix("x="):
            assert verdict_of(math, answer, rf"\boxed{{{other}}}") in (0, None), (answer, other)
