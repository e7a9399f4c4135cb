"""How much of an evaluation set stands in a training set: ``python -m srft.contamination train.jsonl math500=path``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from srft.disk import WriteError
from srft.evaluation.overlap import USUAL_N, overlaps, questions, training_texts
from srft.evaluation.sets import read_set
from srft.options import load_config
from srft.record.files import json_line, write_atomically

_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Compare an evaluation set with a training set and print which problems they share.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m srft.contamination",
        description="Find the problems of an evaluation set of which a training set has words in a row.",
    )
    parser.add_argument("train", help="training set, as data.train: its prompts and demonstrations are looked at")
    parser.add_argument("set", help="evaluation set, as of python -m srft.evaluate")
    parser.add_argument("--n", type=int, default=USUAL_N, help=f"words in a row (default: {USUAL_N})")
    parser.add_argument("--split", default="train", help="split of a hub data set or folder to train on")
    parser.add_argument("--out", type=Path, help="write each shared problem to this jsonl")
    given = parser.parse_args(argv)
    try:
        if given.n < 5:
            raise ValueError(f"--n is at least 5, got {given.n}: fewer words in a row are in any text")
        problems = questions(read_set(given.set, load_config([])))
        (shared,) = overlaps([problems], training_texts(given.train, given.split), given.n)
        if given.out is not None:
            write_atomically(given.out, "".join(json_line(asdict(overlap)) for overlap in shared))
    except (ValueError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    half = sum(overlap.share >= 0.5 for overlap in shared)
    print(
        f"{len(shared)} of {len(problems)} problems of {given.set} share {given.n} words in a row with {given.train}, "
        f"{half} of them at least half of theirs"
    )
    for overlap in shared[:_SHOWN]:
        print(f"  {overlap.share:4.0%}  {overlap.id}  {overlap.row}  {overlap.words}")
    if len(shared) > _SHOWN:
        print(f"  and {len(shared) - _SHOWN} more")


if __name__ == "__main__":
    main()
