"""The answers of the evaluation sets, as they are read, before their graders; and a file graded by the command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from srft.evaluation.sets import SETS, EvalSet, read_set
from srft.grade import Columns, grade_file, main, summary
from srft.options import load_config
from srft.rewards.kinds import load_verifier
from tests.trainer.runs import DATA

EVAL = DATA / "eval"
FILES = {
    "aime24": "aime24", "aime25": "aime25", "amc": "amc83", "math500": "math500", "olympiadbench": "olympiadbench",
    "arc_c": "arc_challenge_test", "mmlu_pro": "mmlu_pro_test",
}  # fmt: skip
# answers that are the same although their texts differ, where a unit, or the name of what is asked for, may be left out
SAME = {("90^\\circ", "90"), ("f(x)=1", "1"), ("f(x)=x+1", "x+1"), ("f(x)=2", "2")}
MOST = 40  # answers of a set that the suite looks at


def file_of(name: str) -> Path:
    path = EVAL / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path


@pytest.mark.parametrize("name", FILES)
def test_answers_grade_as_right_against_themselves_alone(name: str) -> None:
    """In a box and in another spelling of LaTeX; against the answer of a neighbour they are wrong."""
    chosen = read(name)
    verify = load_verifier(chosen.reward)
    pairs = [(e, chosen.examples[i - 1]) for i, e in enumerate(chosen.examples)]
    pairs = random.Random(0).sample(pairs, min(MOST, len(pairs)))
    right = wrong = 0
    for example, other in pairs:
        answer, another = str(example.answer), str(other.answer)
        spelled = answer.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right)")
        right += all(verify(f"so \\boxed{{{text}}}.", answer, example.row) == 1.0 for text in (answer, spelled))
        if answer != another and not {(answer, another), (another, answer)} & SAME:
            wrong += verify(f"so \\boxed{{{another}}}.", answer, example.row) != 0.0
    assert right / len(pairs) >= 0.99
    assert wrong == 0


@pytest.fixture
def graded(tmp_path: Path) -> Path:
    """Five completions in four rows: two right, one of them against what the row expects."""
    path = tmp_path / "said.jsonl"
    rows = [
        {"gold": "5", "said": {"text": "\\boxed{5}"}, "ok": True},
        {"gold": "5", "said": {"text": "\\boxed{6}"}, "ok": False},
        {"gold": "1/2", "said": {"text": "\\boxed{0.5}"}, "ok": False},
        {"gold": "5", "said": {"text": ["5", "\\boxed{}"]}, "ok": False},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_graded(graded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns by name and path, several completions in a row, and verdicts to compare with."""
    out = graded.with_name("verdicts.jsonl")
    main([str(graded), "--completion", "said.text", "--answer", "gold", "--expected", "ok", "--out", str(out)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["2 of 5 right, 40.0%", "4 of 5 as expected, 80.00%"]
    assert shown[2] == f"  {graded}, line 3: right, expected the other"
    assert [json.loads(line)["value"] for line in out.read_text().splitlines()] == [1, 0, 1, 0, 0]


def test_what_cannot_be_graded_is_told(graded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong column, a verifier that does not exist, and an answer that no verifier reads."""
    with pytest.raises(SystemExit):
        main([str(graded)])
    assert "line 1: no column 'completion', got gold, said, ok" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown reward 'mth'; did you mean 'math'"):
        grade_file(str(graded), "mth", Columns())
    with pytest.raises(ValueError, match="ok is true, false, 1 or 0, got '5'"):
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"answer": "", "completion": "5", "ok": "5"}\n')
        grade_file(str(broken), "math", Columns(expected="ok"))
    with pytest.raises(ValueError, match="a finite deadline_s > 0, got 2 and nan"):
        grade_file(str(broken), "math", Columns(), deadline_s=float("nan"))
    grades = grade_file(str(broken), "math", Columns())
    assert summary(grades)[:2] == ["0 of 1 right, 0.0%", "1 answers that cannot be read"]


def test_verdicts_of_a_csv_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are texts there; none is no verdict. Where the verdicts cannot be written is said before any work."""
    path = tmp_path / "said.csv"
    path.write_text("answer,completion,ok\n5,5,True\n6,5,false\n7,7,1\n8,8,\n9,9,0\n")
    grades = grade_file(str(path), "exact", Columns(expected="ok"), workers=1)
    assert [grade.expected for grade in grades] == [True, False, True, None, False]
    assert "3 of 4 as expected, 75.00%" in summary(grades)
    with pytest.raises(SystemExit):
        main([str(path), "--kind", "exact", "--out", str(tmp_path / "none" / "out.jsonl")])
    assert f"there is no folder {tmp_path / 'none'}; make it first" in capsys.readouterr().err


def test_several_completions_of_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each column with the verdict of its own, and an answer that stands at the end of a worked one."""
    path = tmp_path / "said.jsonl"
    rows = [{"gold": "2 + 3\nA: 5", "a": {"text": "A: 5", "ok": 1}, "b": {"text": "A: 6", "ok": True}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(path), "--kind", "numeric", "--answer", "gold", "--answer-after", "A: ", "--workers", "1"]
    both = ["--completion", "a.text", "--expected", "a.ok", "--completion", "b.text"]
    main([*words, *both, "--expected", "b.ok"])
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2 right, 50.0%", "1 of 2 as expected, 50.00%", f"  {path}, line 1, b.text: wrong, expected the other"
    ]  # fmt: skip
    for wrong, message in (
        ([*words, *both], "give --expected as often as --completion, 2 times, got 1"),
        ([*words, "--answer-after", "A:: ", "--completion", "a.text"], "line 1: no 'A:: ' in column 'gold'"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def test_answers_of_a_set_against_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both figures; what is not right against itself, and what two texts are taken to be the same as, are named."""
    path = tmp_path / "own.jsonl"
    prose = "it depends on how one looks at the thing itself"
    answers = ["5", "30", prose, "x=5", "30^\\circ", "5", "-2,1", "(-2,1)"]
    path.write_text("".join(json.dumps({"problem": "?", "answer": answer}) + "\n" for answer in answers))
    main(["--gold", str(path), "--workers", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [f"{path}, math:", "7 of 8 right against themselves, 87.5%"]
    assert shown[2].startswith(f"  own.jsonl:2: `{prose}` bad_gold the answer cannot be read")
    assert shown[3:] == [
        "5 of 30 pairs of different texts earn a reward",
        "  own.jsonl:0 `5`, own.jsonl:3 `x=5`: both ways, read as 5 | x = 5",
        "  own.jsonl:1 `30`, own.jsonl:4 `30^\\circ`: both ways, read as 30 | 30 degree",
        "  own.jsonl:6 `-2,1`, own.jsonl:7 `(-2,1)`: where `-2,1` is asked for, read as bare {-2, 1} | (-2, 1)",
    ]


def test_a_demonstration_is_graded_where_more_than_the_answer_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of Countdown, whose answer is a target; the second row's does not reach its own."""
    path = tmp_path / "own.jsonl"
    rows = [{"nums": [2, 3], "target": 5, "answer": "2+3"}, {"nums": [4, 3], "target": 7, "answer": "4-3"}]
    path.write_text("".join(json.dumps(row | {"solution": "Take all."}) + "\n" for row in rows))
    main(["--gold", str(path), "--workers", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f"{path}, countdown:", "1 of 2 right against themselves, 50.0%", "  own.jsonl:1: `7` earns nothing",
        "0 of 2 pairs of different texts earn a reward",
    ]  # fmt: skip


def test_answers_of_a_file_without_a_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a column, what stands before the answer there, and a verifier."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"said": f"2+3 so A: {text}"}) + "\n" for text in ("1000", "1,000", "7")))
    words = ["--gold", str(path), "--answer", "said", "--workers", "1", "--kind", "numeric"]
    main([*words, "--answer-after", "A: "])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "3 of 3 right against themselves, 100.0%", "2 of 6 pairs of different texts earn a reward",
        f"  {path}, line 1 `1000`, {path}, line 2 `1,000`: both ways",
    ]  # fmt: skip
    main([*words, "--answer-after", "A: ", "--pairs", "5"])
    assert capsys.readouterr().out.splitlines()[2].endswith("of 5 pairs of different texts drawn from 6 earn a reward")
    for wrong, message in (
        (["--gold", str(path), "--kind", "numeric"], "for a file of your own give --answer, too"),
        ([*words, "--completion", "said"], "leave out --completion, --expected and --out"),
        ([*words, "--pairs", "-1"], "--pairs is 0 or more, got -1"),
        (["--gold", "math50"], "did you mean 'math500'"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def read(name: str) -> EvalSet:
    return read_set(f"{name}={file_of(FILES[name])}", load_config([]))


def test_every_named_set_is_looked_at() -> None:
    """But two whose files nobody may pass on."""
    assert SETS.keys() - FILES.keys() == {"minerva", "gpqa_d"}
