"""The command line of the analyses."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srft.disk import WriteError, writing
from srft.record.files import strict, write_atomically

if TYPE_CHECKING:
    from srft.analysis.runs import Asked, Told
    from srft.analysis.stories import Story

_EPILOG = """\
One run: entropies, weights and gradients over its steps, problems won and forgotten, what the entropy weights did token
by token, and where its checkpoints lie. Several runs: the same side by side; "a+b" is b after a. With --prompts they
are models, or runs, which stand for what they have come to: how the probabilities of the tokens of each one's own
responses differ from those of the first. "label=a" calls a run or a model so; section.key=value changes how models are
asked, such as rollout.max_new_tokens=512."""


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse runs or models.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    given = _parser().parse_intermixed_args(argv)
    try:
        print(_analyse(given))
    except (ValueError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srft.analysis", description="Draw what runs and models have to tell beyond a run's own page.",
        epilog=_EPILOG,
    )  # fmt: skip
    parser.add_argument("words", nargs="+", metavar="run", help="runs/demo; with --prompts a model; an option")
    parser.add_argument("--prompts", metavar="SOURCE", help="a run, for its held-out problems, or a data source: "
                        "compares models, the base first, on these")  # fmt: skip
    parser.add_argument("--reference", action="append", default=[], metavar="MODEL",
                        help="a further model, or run, that the map has the distance to; may be repeated")  # fmt: skip
    parser.add_argument("--start", metavar="MODEL", help="what the first run began from, where its record cannot tell")
    parser.add_argument("--problems", type=_positive, default=64, help="problems that models are asked (default: 64)")
    parser.add_argument("--records", action="store_true", help="take what runs wrote alone, and load no model")
    parser.add_argument("--out", type=Path, help="folder of figures and page (default: analysis/ in the run; of "
                        "several runs or models runs/analysis/<names>)")  # fmt: skip
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _analyse(given: argparse.Namespace) -> str:
    """Analyse, write, and say where the page is."""
    # here, so that --help waits neither for torch nor for matplotlib
    import matplotlib
    import transformers

    from srft.analysis.curves import MOST
    from srft.analysis.models import tell_shift
    from srft.analysis.runs import Asked, tell_records
    from srft.analysis.stories import read_stories, split_label
    from srft.report.drawing import STYLE

    transformers.utils.logging.disable_progress_bar()
    # an option of the trainer has a section and a dot; a label of a run has none
    options = [word for word in given.words if "." in split_label(word)[0]]
    words = [word for word in given.words if word not in options]
    if not 1 <= len(words) <= MOST:
        raise ValueError(f"expected 1 to {MOST} runs or models, which figures can tell apart, got {len(words)}")
    asked = Asked(given.problems, given.reference, given.start, options)
    with matplotlib.rc_context(STYLE):
        if given.prompts:
            return _write(given, words, "Models beside their base", [], tell_shift(words, given.prompts, asked))
        stories = read_stories(words)
        told = tell_records(stories)
        if not given.records:
            _add_models(told, stories, asked)
        title = stories[0].last.title if len(stories) == 1 else "Runs side by side"
        return _write(given, words, title, [sentence for story in stories for sentence in story.warnings], told)


def _add_models(told: Told, stories: Sequence[Story], asked: Asked) -> None:
    """Add what needs models: the weights of tokens of one run, and the map."""
    from srft.analysis.runs import tell_map, tell_weights

    if len(stories) == 1 and (part := tell_weights(stories[0], asked)):
        told.parts.append(part)
    part, points = tell_map(stories, asked)
    told.parts.append(part)
    told.numbers["map"] = [vars(point) for point in points]


def _write(
    given: argparse.Namespace, words: Sequence[str], title: str, warnings: Sequence[str], told: Told
) -> str:
    from srft.analysis.page import Section, render
    from srft.analysis.pictures import save
    from srft.analysis.runs import folder_of

    out = given.out or folder_of(words)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        sections = [
            Section(part.title, part.sentences, save(part.pictures, out) + part.html) for part in told.parts
        ]
    write_atomically(out / "numbers.json", json.dumps(strict(told.numbers), indent=1) + "\n")
    subtitle = f"python -m srft.analysis {' '.join(words)}"
    write_atomically(out / "report.html", render(title, subtitle, warnings, sections))
    return str(out / "report.html")
