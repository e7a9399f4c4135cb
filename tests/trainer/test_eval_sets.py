"""Sets in the layouts of the hub, by rows made up here: nobody may pass on all of their files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from srft.evaluation.sets import BOX, LETTER_BOX, read_set
from srft.options import load_config
from srft.rewards.kinds import load_verifier

CONFIG = load_config([])

GPQA = [
    {
        "Pre-Revision Question": "Before it was revised", "Pre-Revision Correct Answer": "no longer",
        "Question": f"Which of these\nis hot, the {number}. time?\n", "Correct Answer": f"fire {number}\n",
        "Incorrect Answer 1": " ice", "Incorrect Answer 2": "snow, and hail", "Incorrect Answer 3": '"fire" it is not',
        "Explanation": "It burns.", "Record ID": f"rec{number}", "Subdomain": "Physics (general)",
    }
    for number in range(3)
]  # fmt: skip
MMLU_PRO = [
    {
        "question_id": 70 + number, "question": f" Which number is {number}? ", "answer": "ABCDEFGHIJ"[place],
        "options": [str(number if index == place else 100 + index) for index in range(count)], "answer_index": place,
        "cot_content": "", "category": "math", "src": "ori_mmlu",
    }
    for number, (place, count) in enumerate([(9, 10), (0, 4), (2, 3)])
]  # fmt: skip
MINERVA = [
    {"question": "How many ergs per second, to two figures?", "answer": "4.5e33"},
    {"question": "Express x(t) in terms of $t$.", "answer": "x_{0} \\cos (\\omega t)+$ $\\dot{x}_{0} \\sin (t)"},
    {"question": "What is the slope?", "answer": "\\frac{1}{2}"},
]


def in_file(folder: Path, name: str, rows: list[dict[str, Any]], suffix: str) -> str:
    """A set in the kind of file that its hub repository holds."""
    path = folder / f"{name}{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={path}"


@pytest.mark.parametrize(
    ("name", "rows", "suffix"), [("gpqa_d", GPQA, ".csv"), ("mmlu_pro", MMLU_PRO, ".parquet")], ids=["gpqa", "mmlu"]
)
def test_options_of_the_hub(tmp_path: Path, name: str, rows: list[dict[str, Any]], suffix: str) -> None:
    """All stand there once, the right one under the letter that earns the reward, which moves with the seed."""
    word, verify, letters = in_file(tmp_path, name, rows, suffix), load_verifier("math"), set()
    for seed in range(4):
        read = read_set(word, CONFIG, seed=seed)
        assert (read.reward, read.samples, read.rows) == ("math", 1, 3)
        for example, row in zip(read.examples, rows, strict=True):
            question, listed, asks = str(example.prompt).rsplit("\n\n", 2)
            if name == "gpqa_d":
                keys = ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
                expected, options = row["Question"].strip(), [row[key].strip() for key in keys]
                right = options[0]
            else:
                expected, options = row["question"].strip(), row["options"]
                right = options[row["answer_index"]]
            lines = listed.splitlines()
            assert question == expected and asks == f"{LETTER_BOX}\n"
            assert sorted(line[4:] for line in lines) == sorted(options)
            assert [line[1] for line in lines] == list("ABCDEFGHIJ"[: len(options)])
            rewarded = [line[4:] for line in lines if verify(f"\\boxed{{{line[1]}}}", example.answer, example.row)]
            assert rewarded == [right]
            letters.add((example.id, example.answer))
    assert len(letters) > 6


@pytest.mark.parametrize("layout", ["hub", "solutions"])
def test_minerva_of_the_hub(tmp_path: Path, layout: str) -> None:
    """An answer of its own, or in the box of a solution, as the file that evaluations pass on has it."""
    rows: list[dict[str, Any]] = MINERVA
    if layout == "solutions":
        rows = [
            {"problem": r["question"], "solution": f"First \\boxed{{0}}, so \\boxed{{{r['answer']}}}.", "idx": i}
            for i, r in enumerate(MINERVA)
        ]
    read = read_set(in_file(tmp_path, "minerva", rows, ".parquet" if layout == "hub" else ".jsonl"), CONFIG)
    assert [e.prompt for e in read.examples] == [f"{row['question']}\n\n{BOX}\n" for row in MINERVA]
    assert [e.answer for e in read.examples] == [row["answer"] for row in MINERVA]
    verify = load_verifier(read.reward)
    for example in read.examples:
        assert verify(f"\\boxed{{{example.answer}}}", example.answer, example.row) == 1
    assert verify("\\boxed{4.5 \\times 10^{33}}", read.examples[0].answer, {}) == 1
    assert verify("\\boxed{4.5 \\times 10^{32}}", read.examples[0].answer, {}) == 0
