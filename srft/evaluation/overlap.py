"""Contamination: how much of the problems of an evaluation stands, word for word, in a training set."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from srft.data.examples import load_examples
from srft.data.messages import Message
from srft.evaluation.sets import SETS, EvalSet

USUAL_N = 13
_FEWEST = 5  # words of a problem that can be told from others
_WORD = re.compile(r"[^\W\d_]+|\d+")
_Gram = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """A problem of which a training set has a part.

    Args:
        id: The problem's.
        share: Of its n-grams that stand in the training set, in (0, 1].
        row: The training example that has most of them.
        words: The first of them.
    """

    id: str
    share: float
    row: str
    words: str


def words_of(text: str) -> list[str]:
    """Return the words and whole numbers of a text in small letters; all else, white space and signs, parts them.

    Args:
        text: Any.
    """
    return _WORD.findall(text.lower())


def questions(chosen: EvalSet) -> list[tuple[str, str]]:
    """Return id and question of each problem of a set, without instruction and options.

    Args:
        chosen: The set.
    """
    known = SETS.get(chosen.name)
    return [(e.id, _text(e.prompt) if known is None else known.read(e.row).text) for e in chosen.examples]


def training_texts(source: str, split: str = "train") -> Iterator[tuple[str, str]]:
    """Yield id and text of every prompt and demonstration of a training set.

    Args:
        source: Any of ``data.train``.
        split: Of a hub data set or a folder.

    Raises:
        ValueError: When it cannot be read.
    """
    for example in load_examples(source, split=split, bad_rows="skip"):
        yield example.id, _text(example.prompt)
        yield from ((example.id, demo) for demo in example.demos)


def overlaps(problems: Sequence[tuple[str, str]], training: Iterable[tuple[str, str]], n: int) -> list[Overlap]:
    """Return the problems that share n words in a row with a training set, those with the largest share first.

    A problem of fewer than n words is one n-gram; one of fewer than five is passed over. What stands in more than two
    and a tenth of the problems, such as an instruction, is none of theirs.

    Args:
        problems: Id and text of each.
        training: Id and text of every prompt and demonstration.
        n: Words of an n-gram, >= 5.
    """
    assert n >= _FEWEST
    own = [_grams(words, min(n, len(words))) for words in (words_of(text) for _, text in problems)]
    common = {gram for gram, count in Counter(g for grams in own for g in grams).items() if count > _often(problems)}
    own = [[gram for gram in grams if gram not in common] for grams in own]
    wanted: dict[_Gram, list[int]] = defaultdict(list)
    for place, grams in enumerate(own):
        for gram in grams:
            wanted[gram].append(place)
    lengths = {len(gram) for gram in wanted}
    found: list[dict[_Gram, set[str]]] = [defaultdict(set) for _ in problems]
    for name, text in training:
        words = words_of(text)
        for length in lengths:
            for gram in zip(*(words[start:] for start in range(length)), strict=False):
                for place in wanted.get(gram, ()):
                    found[place][gram].add(name)
    shared = []
    for (name, _), grams, hits in zip(problems, own, found, strict=True):
        if hits:
            row = Counter(row for rows in hits.values() for row in sorted(rows)).most_common(1)[0][0]
            shared.append(Overlap(name, len(hits) / len(grams), row, " ".join(next(g for g in grams if g in hits))))
    return sorted(shared, key=lambda overlap: -overlap.share)


def _often(problems: Sequence[tuple[str, str]]) -> float:
    return max(2, len(problems) / 10)


def _grams(words: list[str], n: int) -> list[_Gram]:
    """The distinct n-grams, in order."""
    if len(words) < _FEWEST:
        return []
    return list(dict.fromkeys(zip(*(words[start:] for start in range(n)), strict=False)))


def _text(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn["content"] for turn in prompt if turn["role"] == "user")
