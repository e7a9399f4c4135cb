"""Contamination: how much of the problems of an evaluation stands, word for word, in a training set."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srft.data.examples import load_examples
from srft.data.files import find_files, is_local
from srft.data.messages import Message, texts_of
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


def contamination(
    sets: Sequence[EvalSet], sources: Sequence[str], before: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return by set what an evaluation keeps of its overlaps; a training set is read once, and only where it must be.

    "overlaps" has by training set the shares of the problems that have any, and "compared" a digest of problems and
    training set: its files by size and time, any other by its name alone.

    Args:
        sets: What is evaluated.
        sources: Training sets, as of ``data.train``.
        before: By set, what was returned for it before; a training set and problems that are the same are not compared
            again.

    Raises:
        ValueError: When a training set cannot be read.
    """
    kept: dict[str, dict[str, Any]] = {chosen.name: {"overlaps": {}, "compared": {}} for chosen in sets}
    for source in dict.fromkeys(sources):
        files = find_files(source, "train") if is_local(source) else []
        places = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        new: dict[str, list[tuple[str, str]]] = {}
        for chosen in sets:
            problems, old = questions(chosen), before.get(chosen.name, {})
            facts = json.dumps([USUAL_N, places, problems])
            compared = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
            kept[chosen.name]["compared"][source] = compared
            if old.get("compared", {}).get(source) == compared:
                kept[chosen.name]["overlaps"][source] = old["overlaps"][source]
            else:
                new[chosen.name] = problems
        shared = overlaps(list(new.values()), training_texts(source), USUAL_N) if new else []
        for name, found in zip(new, shared, strict=True):
            kept[name]["overlaps"][source] = {overlap.id: round(overlap.share, 4) for overlap in found}
    return kept


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
        yield from ((example.id, text) for demo in example.demos for text in texts_of(demo))


def overlaps(
    sets: Sequence[Sequence[tuple[str, str]]], training: Iterable[tuple[str, str]], n: int
) -> list[list[Overlap]]:
    """Return of each set the problems that share n words in a row with a training set, the largest share first.

    A problem of fewer than n words is one n-gram; one of fewer than five is passed over. What stands in more than two
    and a tenth of the problems of a set, such as an instruction, is none of theirs.

    Args:
        sets: Of each, id and text of its problems.
        training: Id and text of every prompt and demonstration, gone through once.
        n: Words of an n-gram, >= 5.
    """
    assert n >= _FEWEST
    own = [_own_grams(problems, n) for problems in sets]
    wanted: dict[_Gram, list[dict[_Gram, set[str]]]] = defaultdict(list)
    found: list[list[dict[_Gram, set[str]]]] = [[defaultdict(set) for _ in problems] for problems in sets]
    for many, hits in zip(own, found, strict=True):
        for grams, of_problem in zip(many, hits, strict=True):
            for gram in grams:
                wanted[gram].append(of_problem)
    lengths = {len(gram) for gram in wanted}
    for name, text in training:
        words = words_of(text)
        for length in lengths:
            for gram in zip(*(words[start:] for start in range(length)), strict=False):
                for of_problem in wanted.get(gram, ()):
                    of_problem[gram].add(name)
    return [_shared(*parts) for parts in zip(sets, own, found, strict=True)]


def _own_grams(problems: Sequence[tuple[str, str]], n: int) -> list[list[_Gram]]:
    """Of each problem the n-grams that are its own."""
    own = [_grams(words, min(n, len(words))) for words in (words_of(text) for _, text in problems)]
    common = {gram for gram, count in Counter(g for grams in own for g in grams).items() if count > _often(problems)}
    return [[gram for gram in grams if gram not in common] for grams in own]


def _shared(
    problems: Sequence[tuple[str, str]], own: list[list[_Gram]], found: list[dict[_Gram, set[str]]]
) -> list[Overlap]:
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
