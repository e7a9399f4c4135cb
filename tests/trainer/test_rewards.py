"""Verifiers agree with known grades; the pool that runs them survives whatever a completion does to it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft.data.examples import load_examples
from srft.data.judging import check_demos
from srft.rewards.pool import RewardPool, RewardResult
from srft.rewards.verifiers import BadGold, countdown, evaluate_expression, exact, last_boxed, math, numeric

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data files at ../shared/data")
TOWER = r"\boxed{9^{9^{9^{9}}}}"
FRACTIONS = r"\boxed{" + r"\frac{1}{" * 60 + "2" + "}" * 60 + "}"
VERIFIERS = """
import itertools, os, sys, time

def graded(completion, answer, row):
    return {"right": 1.0, "half": 0.5, "wrong": 0.0, "truth": True}[completion]

def trouble(completion, answer, row):
    if completion == "endless":
        sum(itertools.repeat(0, 10**15))
    if completion == "sleep":
        time.sleep(60)
    if completion == "exit":
        os._exit(3)
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    if completion == "quit":
        sys.exit(1)
    if completion == "once" and not os.path.exists(answer):
        open(answer, "w").close()
        os.kill(os.getpid(), 9)
    return float(row["value"])

def modules(completion, answer, row):
    return float("torch" in sys.modules or "transformers" in sys.modules or "numpy" in sys.modules)

def process(completion, answer, row):
    time.sleep(0.02)
    return float(os.getpid())

not_a_function = 3
"""


@pytest.fixture
def custom(tmp_path: Path) -> str:
    """Path of a file of custom verifiers."""
    path = tmp_path / "my_rewards.py"
    path.write_text(VERIFIERS)
    return str(path)


def read(name: str) -> list[dict[str, Any]]:
    """Rows of a data file."""
    return [json.loads(line) for line in (DATA / name).open()]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all processes end within the time."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


# ---- exact ----


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


# ---- numeric ----


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


# ---- countdown ----

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


# ---- math ----


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


# ---- the pool: what it grades ----


def test_order_and_values_are_kept(custom: str) -> None:
    """Results stand where their items stood, over more items than workers; custom values pass through."""
    words = random.Random(0).choices(["right", "half", "wrong", "truth"], k=200)
    with RewardPool(f"{custom}:graded", 2, 5.0) as pool:
        results = pool.score([(word, "", {}) for word in words])
        assert [r.value for r in results] == [
            {"right": 1, "half": 0.5, "wrong": 0, "truth": 1}[w] for w in words
        ]
        assert {r.status for r in results} == {"ok"}
        assert pool.score([]) == []
        assert pool.counts == {"ok": 200}


def test_check_demos_names_those_that_fail() -> None:
    """Demonstrations without their final answer are listed by id; examples without one are passed over."""
    examples = load_examples("chain", limit=6)
    broken = [
        e if i % 2 else type(e)(e.id, e.prompt, e.answer, ["forgot"], e.row) for i, e in enumerate(examples)
    ]
    without = type(examples[0])("none:0", "p", "1", [], {})
    with RewardPool("exact", 1, 5.0) as pool:
        assert check_demos([*broken, without], pool) == [("chain:0", 0), ("chain:2", 0), ("chain:4", 0)]


def test_reasoning_gym_scores_with_the_tasks_own_scorer() -> None:
    """Answers, bare or tagged, get the task's own score from the entry that came with the example."""
    pytest.importorskip("reasoning_gym")
    examples = load_examples("reasoning_gym:spell_backward", limit=20, require_demo=True)
    with RewardPool("reasoning_gym:spell_backward", 1, 10.0) as pool:
        assert check_demos(examples, pool) == []
        e = examples[0]
        right, wrong = pool.score(
            [(f"so <answer>{e.answer}</answer>", e.answer, e.row), ("?", e.answer, e.row)]
        )
    assert right.value == 1 and wrong.value < 0.5


# ---- the pool: what a completion can do to it ----


def test_math_bombs_earn_nothing_and_cost_nothing() -> None:
    """Power towers and deep fractions are not worked out; every item around them gets its grade."""
    pytest.importorskip("math_verify")
    good = (r"\boxed{5}", "5", {})
    bombs = [(TOWER, "5", {}), (FRACTIONS, "5", {})]
    with RewardPool("math", 2, 10.0) as pool:
        results = pool.score([good, bombs[0], good, good, bombs[1], good])
        assert [r.value for r in results] == [1, 0, 1, 1, 0, 1]
        assert pool.counts == {"ok": 6}


def test_endless_c_calls_time_out_and_the_rest_is_graded(custom: str) -> None:
    """What no Python signal can end is killed at the deadline; every item around it gets its grade."""
    good = ("", "", {"value": 1})
    with RewardPool(f"{custom}:trouble", 2, 1.0) as pool:
        pool.prewarm()
        results = pool.score([good, ("endless", "", {}), good, good, ("endless", "", {}), good])
        assert [r.status for r in results] == ["ok", "timeout", "ok", "ok", "timeout", "ok"]
        assert [r.value for r in results] == [1, 0, 1, 1, 0, 1]
        assert pool.score([good]) == [RewardResult(1.0, "ok")]
        assert pool.counts == {"ok": 5, "timeout": 2}


def test_bad_items_wait_one_deadline_each_at_most(custom: str) -> None:
    """Four sleepers on two workers hold a batch up for two deadlines and restarts, not for their sleep."""
    items = [("sleep", "", {})] * 4 + [("", "", {"value": 1})] * 20
    with RewardPool(f"{custom}:trouble", 2, 1.0) as pool:
        pool.prewarm()
        start = time.monotonic()
        results = pool.score(items)
        waited = time.monotonic() - start
    assert [r.status for r in results] == ["timeout"] * 4 + ["ok"] * 20
    assert 2.0 <= waited < 15.0  # the sleep alone is 60 s


def test_deadline_does_not_count_the_start(tmp_path: Path) -> None:
    """A verifier that takes longer to import than the deadline grades, also after a worker was replaced."""
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\ntime.sleep(1.0)\ndef f(completion, answer, row):\n"
        "    time.sleep(float(completion))\n    return 1.0\n"
    )
    with RewardPool(f"{path}:f", 1, 0.5) as pool:
        results = pool.score([("0", "", {}), ("30", "", {}), ("0", "", {})])
    assert [r.status for r in results] == ["ok", "timeout", "ok"]


def test_exceptions_keep_their_message(custom: str) -> None:
    """What a verifier raises or returns in error is that item's status, never another's."""
    good = {"value": 1}
    items = [("", "", {}), ("nan", "", good), ("none", "", good), ("quit", "", good), ("", "", good)]
    with RewardPool(f"{custom}:trouble", 1, 5.0) as pool:
        missing, nan, none, quits, fine = pool.score(items)
    assert (missing.status, missing.value, missing.message) == ("error", 0.0, "KeyError: 'value'")
    assert nan.status == "error" and "returned nan" in nan.message
    assert (none.status, none.value) == ("unjudged", 0.0)
    assert quits.status == "error" and "exit code 1" in quits.message
    assert fine == RewardResult(1.0, "ok")


def test_bad_gold_is_not_a_wrong_answer() -> None:
    """A ground truth that cannot be read has its own status."""
    with RewardPool("numeric", 1, 5.0) as pool:
        bad, good = pool.score([("3", "many", {}), ("3", "3", {})])
    assert (bad.status, bad.value) == ("bad_gold", 0.0) and "many" in bad.message
    assert good == RewardResult(1.0, "ok")


def test_worker_that_dies_twice_on_an_item_gives_it_up(custom: str) -> None:
    """An item that ends its process is tried once more, then is an error; its neighbours are graded."""
    items = [("", "", {"value": 1}), ("exit", "", {}), ("", "", {"value": 0.5})]
    with RewardPool(f"{custom}:trouble", 1, 5.0) as pool:
        first, dead, last = pool.score(items)
    assert (first.value, last.value) == (1.0, 0.5)
    assert dead.status == "error" and "died twice on this item: exit code 3" in dead.message


def test_item_is_retried_when_its_worker_is_killed(custom: str, tmp_path: Path) -> None:
    """A worker killed in the middle of an item, as by the kernel's memory killer, costs the item nothing."""
    with RewardPool(f"{custom}:trouble", 1, 5.0) as pool:
        (result,) = pool.score([("once", str(tmp_path / "mark"), {"value": 1})])
    assert result == RewardResult(1.0, "ok")


def test_idle_workers_that_are_killed_are_replaced(custom: str) -> None:
    """SIGKILL between two batches goes unnoticed by the second."""
    items = [("", "", {})] * 8
    with RewardPool(f"{custom}:process", 2, 5.0) as pool:
        first = {int(r.value) for r in pool.score(items)}
        assert len(first) == 2
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        second = {int(r.value) for r in pool.score(items)}
        assert len(second) == 2 and not first & second


def test_pool_started_in_a_thread_outlives_it(custom: str) -> None:
    """The kernel ends workers with the thread that started them; the next batch starts new ones."""
    with RewardPool(f"{custom}:graded", 1, 5.0) as pool:
        starter = threading.Thread(target=pool.prewarm)
        starter.start()
        starter.join()
        assert pool.score([("right", "", {})] * 3) == [RewardResult(1.0, "ok")] * 3


def test_interrupted_batch_leaves_a_usable_pool(custom: str) -> None:
    """After an error on our side no answer of the old batch can be taken for one of the next."""
    with RewardPool(f"{custom}:graded", 2, 5.0) as pool:
        pool.prewarm()
        with pytest.raises(Exception, match="pickle"):
            pool.score([("half", "", {}), ("half", lambda: None, {})])
        assert pool.score([("right", "", {})]) == [RewardResult(1.0, "ok")]


# ---- the pool: processes ----


def test_workers_do_not_import_the_heavy_packages(custom: str) -> None:
    """A worker imports neither torch nor transformers nor numpy, though this process has."""
    assert "torch" in sys.modules
    with RewardPool(f"{custom}:modules", 1, 5.0) as pool:
        assert pool.score([("", "", {})])[0].value == 0


def test_pool_module_imports_light() -> None:
    """Importing data and rewards costs no torch either."""
    modules = "srft.data.judging, srft.data.problems, srft.data.prompts, srft.rewards.pool"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.timeout(60)
def test_close_ends_the_workers_after_a_signal_inside_poll() -> None:
    """A handler that raises while ``Popen.poll`` holds its lock leaves it locked, and the pool closes all the same."""
    pool = RewardPool("exact", 2, 5.0)
    pool.prewarm()
    processes = [worker.process for worker in pool._workers]
    for process in processes:
        assert process._waitpid_lock.acquire(False)
    pool.close()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    with pytest.raises(ChildProcessError):
        os.waitpid(processes[0].pid, os.WNOHANG)


def test_close_ends_the_workers_and_can_be_repeated(custom: str) -> None:
    """No process is left after close; a closed pool says so."""
    pool = RewardPool(f"{custom}:process", 2, 5.0)
    pool.close()
    pool = RewardPool(f"{custom}:process", 2, 5.0)
    pids = list({int(r.value) for r in pool.score([("", "", {})] * 8)})
    assert len(pids) == 2 and all(map(alive, pids))
    pool.close()
    pool.close()
    assert not any(map(alive, pids))
    with pytest.raises(ValueError, match="closed"):
        pool.score([("", "", {})])


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc; only Linux kills a busy worker with its parent"
)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit"])
def test_workers_end_with_their_parent(custom: str, tmp_path: Path, how: str) -> None:
    """However the parent ends, idle workers and one inside an endless C call end too."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, threading, time
        from srft.rewards.pool import RewardPool
        pool = RewardPool({f"{custom}:trouble"!r}, 2, 500.0)
        pool.prewarm()
        threading.Thread(target=pool.score, args=([("endless", "", {{}})],), daemon=True).start()
        time.sleep(0.5)
        print(*[worker.process.pid for worker in pool._workers], flush=True)
        {"os._exit(0)" if how == "exit" else "time.sleep(60)"}
        """)
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if how != "exit":
        assert all(map(alive, pids))
        parent.send_signal(getattr(signal, how))
    parent.wait(10)
    parent.stdout.close()
    assert wait_until_gone(pids)


# ---- the pool: what a user can get wrong ----


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("exakt", "did you mean 'exact'"),
        ("judge", "choose from exact, numeric, countdown, math"),
        ("nowhere/rewards.py:score", "no such file nowhere/rewards.py"),
        ("{custom}:", "is not a function name"),
        ("{custom}", "unknown reward"),
    ],
)
def test_wrong_kind_fails_at_once(custom: str, kind: str, message: str) -> None:
    """Names that cannot be right are refused before any process starts."""
    with pytest.raises(ValueError, match=message):
        RewardPool(kind.format(custom=custom), 1, 1.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("grade", "has no function 'grade'; it has: graded, trouble"),
        ("not_a_function", "no function 'not_a_function'"),
    ],
)
def test_missing_function_fails_in_prewarm(custom: str, function: str, message: str) -> None:
    """A function that the file lacks is reported with those it has."""
    with RewardPool(f"{custom}:{function}", 2, 1.0) as pool, pytest.raises(ValueError, match=message):
        pool.prewarm()


@pytest.mark.parametrize(
    ("code", "message"),
    [("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
     ("def f(:", "SyntaxError"),
     ("import os\nos._exit(7)", "ended with exit code 7 while loading"),
     ("import sys\nsys.exit(2)", "exit code 2")],
    ids=["import", "syntax", "crash", "exit"],
)  # fmt: skip
def test_file_that_fails_to_import(tmp_path: Path, code: str, message: str) -> None:
    """Whatever goes wrong while loading reaches the caller, from prewarm and from score alike."""
    path = tmp_path / "broken.py"
    path.write_text(code)
    with RewardPool(f"{path}:f", 1, 1.0) as pool:
        for call in (pool.prewarm, lambda: pool.score([("", "", {})])):
            with pytest.raises(ValueError, match=message):
                call()


def test_custom_file_imports_its_neighbours(tmp_path: Path) -> None:
    """A verifier file may be split over modules that lie beside it."""
    (tmp_path / "beside_it.py").write_text("VALUE = 0.25\n")
    (tmp_path / "reward.py").write_text("from beside_it import VALUE\ndef f(c, a, r):\n    return VALUE\n")
    with RewardPool(f"{tmp_path}/reward.py:f", 1, 5.0) as pool:
        assert pool.score([("", "", {})])[0].value == 0.25


def test_unknown_reasoning_gym_task_fails_in_prewarm() -> None:
    """The nearest task is named."""
    pytest.importorskip("reasoning_gym")
    with (
        RewardPool("reasoning_gym:gdc", 1, 1.0) as pool,
        pytest.raises(ValueError, match="no task 'gdc'; nearest: gcd"),
    ):
        pool.prewarm()


@pytest.mark.parametrize(("workers", "deadline"), [(0, 1.0), (1, 0.0)])
def test_bad_numbers(workers: int, deadline: float) -> None:
    """A pool needs a worker and some time."""
    with pytest.raises(ValueError, match="workers >= 1 and deadline_s > 0"):
        RewardPool("exact", workers, deadline)


def test_many_items_of_mixed_kinds_keep_their_places(custom: str) -> None:
    """Timeouts, deaths, errors and grades interleaved come back in order."""
    kinds = {"": "ok", "sleep": "timeout", "exit": "error", "nan": "error"}
    words = list(chain.from_iterable(("", "", word, "") for word in ("sleep", "exit", "nan")))
    with RewardPool(f"{custom}:trouble", 2, 0.5) as pool:
        results = pool.score([(word, "", {"value": index}) for index, word in enumerate(words)])
    assert [r.status for r in results] == [kinds[word] for word in words]
    assert [r.value for r in results] == [float(i) if word == "" else 0.0 for i, word in enumerate(words)]
