"""What an evaluation set shares with a training set, word for word."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from srft.contamination import main
from srft.evaluation import overlap
from srft.evaluation.overlap import Overlap, overlaps, questions, words_of
from srft.evaluation.sets import read_set
from srft.options import load_config

VOCABULARY = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "ino", "uth", "oral")]


def sentence(seed: int, count: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(VOCABULARY) for _ in range(count)]


def test_shares_are_those_of_a_search_in_plain_text() -> None:
    """Every n-gram of every problem looked up in every training text, one by one."""
    problems = [(f"p{i}", " ".join(sentence(i))) for i in range(6)]
    training = [("t0", "Oh " + " ".join(sentence(1)[4:25])), ("t1", " ".join(sentence(2) + sentence(9))),
                ("t1", " ".join(sentence(1)[:12])), ("t2", " ".join(sentence(3)[:7]))]  # fmt: skip
    found = {o.id: o for o in overlaps([problems], training, 8)[0]}
    texts = [f" {text.lower()} " for _, text in training]
    for name, text in problems:
        words = text.split()
        grams = [" ".join(words[i : i + 8]) for i in range(len(words) - 7)]
        hits = [gram for gram in grams if any(f" {gram} " in other for other in texts)]
        assert (name in found) == bool(hits)
        if hits:
            assert found[name].share == pytest.approx(len(hits) / len(grams)) and found[name].words == hits[0]
    assert found.keys() == {"p1", "p2"}
    assert (found["p2"].share, found["p1"].row, found["p2"].row) == (1.0, "t0", "t1")
    assert next(iter(found)) == "p2"


def test_signs_and_capitals_part_no_words() -> None:
    """Nor does LaTeX around them; digits stand apart from letters."""
    assert words_of("What's $\\frac{12}{x_3}$, Émile?") == ["what", "s", "frac", "12", "x", "3", "émile"]


def test_short_problems_and_instructions() -> None:
    """A short one counts as a whole, one of four words not at all, and what many problems have is nobody's."""
    training = [("t", "so one two three four five six, and seven eight nine ten")]
    whole, part, tiny = "One two, three four five six!", "two three four nine five", "one two three four"
    short = [("whole", whole), ("part", part), ("tiny", tiny)]
    assert overlaps([short], training, 13) == [[Overlap("whole", 1.0, "t", "one two three four five six")]]
    asked = "one two three four five six"
    many = [(f"p{i}", f"{asked} {' '.join(sentence(i, 9))}") for i in range(4)]
    none, two = overlaps([many, many[:2]], training, 6)
    assert none == [] and [o.id for o in two] == ["p0", "p1"]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_training_set_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all sets of an evaluation, and not again until it or the problems are others."""
    known, other = " ".join(sentence(1)), " ".join(sentence(2))
    rows = [{"problem": known, "answer": "1"}, {"problem": other, "answer": "2"}]
    file, train = write(tmp_path / "eval.jsonl", rows), tmp_path / "train.jsonl"
    write(train, [{"problem": known, "answer": "1"}])
    sets = [read_set(f"math500={file}", load_config([]), limit=1), read_set(f"amc={file}", load_config([]))]
    read: list[str] = []
    load = overlap.load_examples

    def counted(source: str, **options: Any) -> Any:
        read.append(source)
        return load(source, **options)

    monkeypatch.setattr(overlap, "load_examples", counted)
    sources = [str(train), str(train)]
    first = overlap.contamination(sets, sources, {})
    assert {name: kept["overlaps"] for name, kept in first.items()} == {
        "math500": {str(train): {"math500:0": 1.0}}, "amc": {str(train): {"amc:0": 1.0}}
    }  # fmt: skip
    assert read == [str(train)]
    as_written = json.loads(json.dumps(first))
    assert overlap.contamination(sets, sources, as_written) == first and len(read) == 1
    grown = [read_set(f"math500={file}", load_config([])), sets[1]]
    assert overlap.contamination(grown, sources, as_written)["amc"] == first["amc"] and len(read) == 2
    write(train, [{"problem": f"{known} {other}", "answer": "1"}])
    changed = overlap.contamination(grown, sources, as_written)
    assert changed["math500"]["overlaps"] == {str(train): {"math500:0": 1.0, "math500:1": 1.0}} and len(read) == 3


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts and demonstrations are looked at, instructions of the evaluation are not."""
    known, other = " ".join(sentence(1)), " ".join(sentence(2))
    rows = [{"problem": known, "answer": "1"}, {"problem": other, "answer": "2"}]
    word = f"math500={write(tmp_path / 'eval.jsonl', rows)}"
    assert questions(read_set(word, load_config([]))) == [("math500:0", known), ("math500:1", other)]
    box = "Reason step by step, and put your final answer within \\boxed{}."
    train = write(tmp_path / "train.jsonl", [
        {"problem": f"What? {box}", "answer": "1", "solution": f"As in: {known}"},
        {"problem": "And this?", "answer": "2", "solution": "No."},
    ])  # fmt: skip
    main([train, word, "--n", "8", "--out", str(tmp_path / "shared.jsonl")])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 of 2 problems of math500=") and first.endswith("1 of them at least half of theirs")
    assert second == f"  100%  math500:0  train.jsonl:0  {' '.join(sentence(1)[:8])}"
    (shared,) = [json.loads(line) for line in (tmp_path / "shared.jsonl").read_text().splitlines()]
    assert (shared["id"], shared["share"]) == ("math500:0", 1.0)
    for words, message in (
        ([train, word, "--n", "3"], "--n is at least 5, got 3"),
        ([str(tmp_path / "none.jsonl"), word], "no such data file"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err
