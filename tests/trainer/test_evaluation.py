"""The parts of an evaluation: estimators, sets, the record, tables and page."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srft.data.examples import Example
from srft.data.prompts import Prompt
from srft.evaluation import page
from srft.evaluation.answering import room_for
from srft.evaluation.answers import Answer
from srft.evaluation.estimators import Tally, accuracy, bootstrap_interval, pass_at, pass_at_k
from srft.evaluation.page import write_page
from srft.evaluation.paper import ELSEWHERE, MATHEMATICS, TABLE_2, published
from srft.evaluation.record import Answered, keep_settings, read_settings, taken
from srft.evaluation.sets import BOX, LETTER_BOX, read_set
from srft.evaluation.summary import make_tables, markdown, read_results, warnings
from srft.options import load_config
from srft.rewards.pool import RewardResult

CONFIG = load_config([])


@pytest.mark.parametrize(("right", "drawn"), [(0, 5), (1, 5), (3, 5), (5, 5), (2, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right: int, drawn: int) -> None:
    """Counted over every choice of k of the n answers, for every k."""
    for k in range(1, drawn + 1):
        subsets = list(itertools.combinations([i < right for i in range(drawn)], k))
        assert pass_at_k(right, drawn, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def tally(right: int, judged: int) -> Tally:
    return Tally(judged, judged, right, 0, 0, 0)


def test_figures_are_means_over_problems() -> None:
    """Problems count alike, however many of their answers were judged; those without any are left out."""
    tallies = [tally(1, 4), tally(2, 2), tally(0, 0)]
    assert accuracy(tallies).value == pytest.approx((0.25 + 1) / 2)
    assert pass_at(tallies, 2).value == pytest.approx((0.5 + 1) / 2)
    assert pass_at(tallies, 4).value == 1.0
    assert accuracy(tallies[2:]) is None and pass_at(tallies, 5) is None


def test_bootstrap_interval_is_that_of_resampled_problems() -> None:
    """Beside a plain bootstrap over the values; it is a function of its seed, and narrows with more problems."""
    rng = random.Random(0)
    values = [rng.choice([0.0, 0.25, 0.25, 1.0]) for _ in range(60)]
    means = sorted(sum(rng.choices(values, k=60)) / 60 for _ in range(4000))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((means[100], means[3899]), abs=0.02)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    wide = bootstrap_interval(values * 10)
    assert wide[1] - wide[0] < 0.5 * (high - low)


ROWS = {
    "math500": [{"problem": "What is 2+3?", "answer": "5"}, {"problem": "And 2+2?", "answer": "4"}],
    "olympiadbench": [{"question": "Solve.", "context": "Let x > 0.", "final_answer": ["$1$,$\\frac{1}{2}$."]}],
    "arc_c": [
        {"question": "Which is hot?\n\n1) ice\n2) fire\n3) snow", "answer": "2"},
        {"question": "Which is hot?", "choices": {"label": ["A", "B", "C"], "text": ["ice", "fire", "snow"]},
         "answerKey": "B"},
    ],
    "gpqa_d": [
        {"Question": "Which is hot?", "Correct Answer": "fire\n", "Incorrect Answer 1": "ice",
         "Incorrect Answer 2": "snow", "Incorrect Answer 3": "hail"},
    ],
    "mmlu_pro": [{"question": "Which is hot?", "options": ["ice", "fire", "snow"], "answer_index": 1, "answer": "B"}],
}  # fmt: skip


def a_file(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[name]))
    return str(path)


@pytest.mark.parametrize("name", ["arc_c", "gpqa_d", "mmlu_pro"])
def test_options_are_shuffled_under_letters(tmp_path: Path, name: str) -> None:
    """The letter of the answer stands before the right option, wherever it is; a seed always gives the same order."""
    word, orders = f"{name}={a_file(tmp_path, name)}", set()
    for seed in range(20):
        read = read_set(word, CONFIG, seed=seed)
        assert read.examples == read_set(word, CONFIG, seed=seed).examples
        for example in read.examples:
            lines = str(example.prompt).split("\n\n")
            assert lines[0] == "Which is hot?" and lines[2] == LETTER_BOX + "\n"
            options = lines[1].splitlines()
            assert f"({example.answer}) fire" in options and len(options) == 4 - (name != "gpqa_d")
            orders.add(lines[1])
    assert len(orders) > 3


def test_written_answers(tmp_path: Path) -> None:
    """Questions with what follows them, several answers without their dollars, and how often each is answered."""
    word = f"math500={a_file(tmp_path, 'math500')}"
    read = read_set(word, CONFIG)
    assert [e.prompt for e in read.examples] == [f"What is 2+3?\n\n{BOX}\n", f"And 2+2?\n\n{BOX}\n"]
    assert (read.reward, read.samples, read.rows, read.examples[0].id) == ("math", 1, 2, "math500:0")
    assert read_set(word, CONFIG, instruction="Be brief.").examples[0].prompt == "What is 2+3?\n\nBe brief.\n"
    boxed = load_config(["data.system=Put it in \\boxed{}."])
    assert read_set(word, boxed, limit=1).examples[0].prompt == "What is 2+3?\n"
    assert len(read_set(word, CONFIG, limit=1).examples) == 1 and read_set(word, CONFIG, limit=1).rows == 2
    (example,) = read_set(f"olympiadbench={a_file(tmp_path, 'olympiadbench')}", CONFIG).examples
    assert example.answer == "1,\\frac{1}{2}" and str(example.prompt).startswith("Let x > 0.\n\nSolve.")
    assert read_set(f"amc={tmp_path / 'math500.jsonl'}", CONFIG).samples == 32
    one = a_file(tmp_path, "one", [ROWS["olympiadbench"][0] | {"final_answer": "$12$, $13$"}])
    assert read_set(f"olympiadbench={one}", CONFIG).examples[0].answer == "12, 13"
    asked = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 2+3?"}]
    turns = a_file(tmp_path, "turns", [{"prompt": asked, "answer": "5"}, {"prompt": json.dumps(asked), "answer": "5"}])
    assert {e.prompt for e in read_set(f"aime24={turns}", CONFIG).examples} == {f"What is 2+3?\n\n{BOX}\n"}


def test_any_source_is_a_set(tmp_path: Path) -> None:
    """A task as the run has it, and a file that is judged as its layout is."""
    run = load_config(["data.train=chain", "data.task.max_ops=3", "data.task.min_ops=3"])
    chain = read_set("chain", run, limit=5)
    assert (chain.name, chain.reward, len(chain.examples)) == ("chain", "exact", 5)
    assert all(len(str(example.prompt)) == 8 for example in chain.examples)
    file = a_file(tmp_path, "own.test", [{"question": "2+3?", "answer": "so\n#### 5"}])
    own = read_set(file, run)
    assert (own.name, own.reward, own.examples[0].answer) == ("own", "numeric", "5")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("math50", "no set is called 'math50'; did you mean 'math500'"),
        ("{file}", "math500.jsonl has the name of a set; give math500="),
        ("mine={file}", "no set is called 'mine'; expected one of aime24"),
        ("gpqa_d={file}", "line 1: GPQA-D needs a column 'Incorrect Answer 1', got problem, answer"),
        ("olympiadbench={file}", "line 1: OlympiadBench needs a column 'final_answer', got problem, answer"),
        ("math500={empty}", "line 2: not a row of MATH500: its question or its answer is empty"),
        ("arc_c={arc}", "line 1: not a row of ARC-C: the right option is 'D', which is none of 1, 2, 3"),
        ("mmlu_pro={mmlu}", "line 1: not a row of MMLU-Pro: answer_index is 0 to 2, got 4"),
        ("mmlu_pro={half}", "line 1: not a row of MMLU-Pro: answer_index is 0 to 2, got 0.5"),
        ("mmlu_pro={parts}", "line 1: not a row of MMLU-Pro: its answer is 'A' and its answer_index 1, another option"),
        ("mmlu_pro={letters}", "line 1: not a row of MMLU-Pro: options are a list of texts, which a CSV"),
        ("gpqa_d={gap}", "line 1: not a row of GPQA-D: options are a list of texts"),
        ("aime24={mute}", "line 1: not a row of AIME24: its question is a text, or messages with a user's turn"),
        ("olympiadbench={none}", "line 1: not a row of OlympiadBench: its question or its answer is empty"),
    ],
)
def test_what_is_no_set_is_refused_with_its_place(tmp_path: Path, word: str, message: str) -> None:
    """One line that says what was expected."""
    files = {
        "file": a_file(tmp_path, "math500"),
        "empty": a_file(tmp_path, "empty", [ROWS["math500"][0], {"problem": "x", "answer": " "}]),
        "arc": a_file(tmp_path, "arc", [ROWS["arc_c"][0] | {"answer": "D"}]),
        "mmlu": a_file(tmp_path, "mmlu", [ROWS["mmlu_pro"][0] | {"answer_index": 4}]),
        "half": a_file(tmp_path, "half", [ROWS["mmlu_pro"][0] | {"answer_index": 0.5}]),
        "parts": a_file(tmp_path, "parts", [ROWS["mmlu_pro"][0] | {"answer": "A"}]),
        "letters": a_file(tmp_path, "letters", [ROWS["mmlu_pro"][0] | {"options": "['ice', 'fire']"}]),
        "gap": a_file(tmp_path, "gap", [ROWS["gpqa_d"][0] | {"Incorrect Answer 2": None}]),
        "mute": a_file(tmp_path, "mute", [{"prompt": [{"role": "system", "content": "Think."}], "answer": "5"}]),
        "none": a_file(tmp_path, "none", [ROWS["olympiadbench"][0] | {"final_answer": None}]),
    }
    with pytest.raises(ValueError, match=message):
        read_set(word.format(**files), CONFIG)


def test_the_table_of_the_paper_has_its_averages() -> None:
    """As the paper prints them."""
    means = {"SRFT": (59.5, 62.5), "LUFFY": (55.5, 57.8), "SFT": (54.3, 49.2), "Qwen2.5-Math-7B": (23.5, 15.4)}
    for row, expected in means.items():
        values = published(row)
        for names, mean in zip((MATHEMATICS, ELSEWHERE), expected, strict=True):
            assert sum(values[name] for name in names) / len(names) == pytest.approx(mean, abs=0.0501)
    assert {len(values) for values in TABLE_2.values()} == {8}


def prompt(number: int, answer: str = "5") -> Prompt:
    return Prompt(Example(f"math500:{number}", f"question {number} <b>", answer, [], {}), [number], [])


def said(*values: float, text: str = "so <i>5</i>") -> list[Answer]:
    return [Answer(text, 7, "stop", RewardResult(value, "ok")) for value in values]


def test_half_a_line_is_cut_off_and_its_problem_answered_again(tmp_path: Path) -> None:
    """What a killed process leaves; whole lines stay, and no problem is written twice."""
    answered = Answered(tmp_path, "math500")
    answered.add([(prompt(0), said(1, 0)), (prompt(1), said(0, 0))])
    whole = answered.path.read_bytes()
    answered.path.write_bytes(whole[:-9])
    again = Answered(tmp_path, "math500")
    assert list(again.rows) == ["math500:0"]
    again.add([(prompt(0), said(0, 0)), (prompt(1), said(0, 0))])
    assert again.path.read_bytes() == whole
    again.add([(prompt(2), said(1))])
    assert list(Answered(tmp_path, "math500").rows) == ["math500:0", "math500:1", "math500:2"]


def test_another_problem_under_the_same_id_is_refused(tmp_path: Path) -> None:
    """Whether its words or its answer are others."""
    answered = Answered(tmp_path, "math500")
    answered.add([(prompt(0), said(1))])
    answered.refuse_others([prompt(0), prompt(1)])
    for other in (prompt(0, "6"), replace(prompt(0), prompt_ids=[9])):
        with pytest.raises(ValueError, match="another problem under the id math500:0"):
            answered.refuse_others([other])
    answered.path.write_text('{"no": "id"}\n')
    with pytest.raises(ValueError, match="line 1 is no answered problem"):
        Answered(tmp_path, "math500")


def about(**changes: Any) -> dict[str, Any]:
    asked = {"samples": 2, "max_new_tokens": 8192, "temperature": 0.6} | changes
    return {"title": "MATH500", "source": "x", "rows": 3, "left_out": {}, "asked": asked}


def test_a_folder_holds_one_evaluation(tmp_path: Path) -> None:
    """Other settings and another process are refused; further sets join."""
    keep_settings(tmp_path, {"seed": 0}, {"math500": about()}, {"command": "a"})
    keep_settings(tmp_path, {"seed": 0}, {"amc": about()}, {"command": "b"})
    assert list(read_settings(tmp_path)["sets"]) == ["math500", "amc"]
    assert [session["command"] for session in read_settings(tmp_path)["sessions"]] == ["a", "b"]
    # nothing is answered yet
    keep_settings(tmp_path, {"seed": 2}, {"minerva": about()}, {"command": "c"})
    assert list(read_settings(tmp_path)["sets"]) == ["minerva"]
    keep_settings(tmp_path, {"seed": 0}, {"math500": about()}, {"command": "a"})
    Answered(tmp_path, "math500").add([(prompt(0), said(1))])
    with pytest.raises(ValueError, match="seed was 0, now 1; math500.samples was 2, now 4. Set --out"):
        keep_settings(tmp_path, {"seed": 1}, {"math500": about(samples=4)}, {})
    with taken(tmp_path), pytest.raises(ValueError, match="another process is writing"), taken(tmp_path):
        pass
    with taken(tmp_path):
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation of two problems, of three, with two answers each."""
    settings = about() | {"left_out": {"math500:2": "empty"}}
    keep_settings(tmp_path, {"seed": 0}, {"math500": settings}, {})
    Answered(tmp_path, "math500").add([(prompt(0), said(1, 0)), (prompt(1), said(0, 0, text="</details>\x00 no"))])
    return tmp_path


def test_tables(folder: Path) -> None:
    """Figures of each set, the paper's rows beside them, and a sentence on what is not as there."""
    results = read_results(folder, [2, 5])
    accuracies, paper = make_tables(results, "mine")
    row = dict(zip(accuracies.columns, accuracies.rows[0], strict=True))
    assert row["problems"] == "2 of 3" and row["measure"] == "avg@2" and row["tokens"] == "7"
    assert (row["accuracy"], row["interval"], row["pass@2"]) == ("25.0", "0.0 to 50.0", "50.0")
    assert "pass@5" not in row
    assert paper.columns == ["", "MATH500"] and paper.rows[0] == ["mine", "25.0"] and ["SRFT", "89.8"] in paper.rows
    assert warnings(results) == [
        "MATH500 is not as in the paper: 2 answers for 1; 1 of 3 problems not answered.",
        "MATH500 leaves out 1 problems, the first is math500:2: empty.",
    ]
    assert "| MATH500 | 2 of 3 | avg@2 | 25.0 |" in markdown("T", [accuracies], [])


def shown(folder: Path) -> str:
    results = read_results(folder)
    write_page(folder, "T", make_tables(results, "mine"), [], results, read_settings(folder))
    return (folder / "report.html").read_text()


def test_every_answer_can_be_read_on_the_page(folder: Path) -> None:
    """Escaped, with its problem and its verdict, and nothing of it is run."""
    html = shown(folder)
    assert html.count("so &lt;i&gt;5&lt;/i&gt;") == 2
    assert html.count("&lt;/details&gt;\N{REPLACEMENT CHARACTER} no") == 2
    assert "question 1 &lt;b&gt;" in html and "✓ correct" in html and "0 of 2" in html
    assert "<script" not in html and html.count("<details") == html.count("</details>") == 6


def test_contamination_is_told(folder: Path) -> None:
    """How many problems share words with a training set, the accuracy of the others, and a mark on each."""
    settings = read_settings(folder)["sets"]["math500"] | {"overlaps": {"train.jsonl": {"math500:1": 0.6}}}
    keep_settings(folder, {"seed": 0}, {"math500": settings}, {})
    table = make_tables(read_results(folder), "mine")[-1]
    assert (table.title, table.rows) == ("Contamination", [["MATH500", "train.jsonl", "1", "1", "25.0", "50.0"]])
    html = shown(folder)
    assert html.count("! 60% in training") == 1 and html.index("! 60%") > html.index("math500:0")


def test_long_answers_go_on_pages_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem is on one, each is linked, and pages that are no longer needed go."""
    monkeypatch.setattr(page, "_PAGE_CHARACTERS", 10)
    html = shown(folder)
    names = ["answers-math500-001.html", "answers-math500-002.html"]
    assert "so &lt;i&gt;" not in html and all(f'href="{name}"' in html for name in names)
    assert sorted(path.name for path in folder.glob("answers-*")) == names
    assert "math500:0" in (folder / names[0]).read_text() and "math500:1" in (folder / names[1]).read_text()
    monkeypatch.undo()
    assert "so &lt;i&gt;" in shown(folder) and not list(folder.glob("answers-*"))


def test_room_for_answers() -> None:
    """The paper's tokens, what the positions leave, or what is asked for, and no less than that."""
    prompts = [prompt(0), replace(prompt(1), prompt_ids=[1] * 100)]
    assert room_for(prompts, "S", None, None, 8192) == 8192
    assert room_for(prompts, "S", 576, None, 8192) == 476
    assert room_for(prompts, "S", 576, 50, 8192) == 50
    with pytest.raises(ValueError, match="longest prompt of S has 100 tokens and the model 576 .* leaves 476"):
        room_for(prompts, "S", 576, 477, 8192)
    with pytest.raises(ValueError, match="leaves 0 for an answer; give a model with more"):
        room_for(prompts, "S", 100, None, 8192)
