"""The sets of an evaluation: their problems, how they are put and judged, and how often each is answered."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.config import Config
from srft.data.columns import Row
from srft.data.examples import Example, load_examples
from srft.data.files import is_local
from srft.data.judging import fitting_reward
from srft.data.messages import is_missing, split_conversation
from srft.data.sources import read_source
from srft.data.tasks import BUILTIN_TASKS
from srft.rewards.answers import last_boxed
from srft.rewards.gym import REASONING_GYM

BOX = "Reason step by step, and put your final answer within \\boxed{}."
LETTER_BOX = "Reason step by step, and put the letter of the right option, and nothing else, within \\boxed{}."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERED = re.compile(r"^[A-Z1-9]\) ", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """A problem of a named set as its row states it.

    Args:
        text: What is asked.
        answer: Ground truth; with options the right one's index.
        options: To choose from, in the order of the row; empty where an answer is written.
    """

    text: str
    answer: Any
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedSet:
    """A set that people know by its name.

    Args:
        title: As tables have it.
        source: Hub id, "owner/name" or "owner/name:config".
        split: Its split there.
        read: Makes a question of a row, of the hub or of a file that others pass on; KeyError names what it lacks.
        samples: Answers to each problem that the paper draws.
    """

    title: str
    source: str
    split: str
    read: Callable[[Row], Question]
    samples: int = 1


@dataclass(frozen=True)
class EvalSet:
    """A set, read.

    Args:
        name: Of its files and of its figures.
        title: As tables have it.
        source: Where it was read.
        examples: Its problems as they are put, with instruction and shuffled options.
        rows: Problems that it has, of which ``examples`` may be the first.
        reward: The verifier's kind.
        samples: Answers to each problem unless something else is asked for.
    """

    name: str
    title: str
    source: str
    examples: list[Example]
    rows: int
    reward: str
    samples: int


def _written(row: Row) -> Question:
    """A problem whose answer is written: columns as MATH, AIME, AMC and Minerva have them, or a box in a solution."""
    text = next((row[name] for name in ("problem", "question", "prompt") if not is_missing(row.get(name))), None)
    if text is None:
        raise KeyError("problem, question or prompt")
    halves = split_conversation(text, "its question")
    if halves is not None:
        # the question alone; how it is put is said by the run
        text = next((turn["content"] for turn in reversed(halves[0]) if turn["role"] == "user"), None)
    if not isinstance(text, str):
        raise ValueError(f"its question is a text, or messages with a user's turn, got {text!r:.80}")
    if "answer" not in row and (boxed := last_boxed(str(row.get("solution", "")))):
        return Question(text, boxed[1])
    return Question(text, row["answer"])


def _olympiad(row: Row) -> Question:
    """Several answers stand in one text, each between dollars of its own, which would be read as words."""
    answers = row["final_answer"]
    if is_missing(answers):
        return Question(str(row["question"]), None)
    # a file that others pass on may have one text
    answers = [answers] if isinstance(answers, str) else list(answers)
    if any(is_missing(part) or re.match(r"\s*\[\s*['\"]", str(part)) for part in answers):
        raise ValueError(f"final_answer is one text or a list, which a CSV file cannot hold, got {answers!r:.80}")
    parts = [str(part).strip().rstrip(".").replace("$", "") for part in answers]
    context = row.get("context")
    text = row["question"] if is_missing(context) else f"{context}\n\n{row['question']}"
    return Question(text, ", ".join(parts))


def _arc(row: Row) -> Question:
    """The hub's columns, or a question that lists its options, "A) ..." or "1) ...", one a line."""
    if "choices" in row:
        labels = list(row["choices"]["label"])
        return Question(row["question"], _place(row["answerKey"], labels), _options(row["choices"]["text"]))
    marks = list(_LETTERED.finditer(row["question"]))
    if not marks:
        raise KeyError("choices")
    ends = [mark.start() for mark in marks[1:]] + [len(row["question"])]
    options = [row["question"][mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    labels = [row["question"][mark.start()] for mark in marks]
    return Question(row["question"][: marks[0].start()].strip(), _place(str(row["answer"]), labels), tuple(options))


def _place(label: Any, labels: Sequence[Any]) -> int:
    """Where the right option stands."""
    if label not in labels:
        raise ValueError(f"the right option is {label!r}, which is none of {', '.join(map(str, labels))}")
    return labels.index(label)


def _options(value: Any) -> tuple[str, ...]:
    """The texts of options; a text in place of a list would be taken apart into its letters."""
    if not isinstance(value, list | tuple) or any(is_missing(option) for option in value):
        raise ValueError(f"options are a list of texts, which a CSV file cannot hold, got {value!r:.80}")
    return tuple(str(option).strip() for option in value)


def _gpqa(row: Row) -> Question:
    wrong = [row[f"Incorrect Answer {number}"] for number in (1, 2, 3)]
    return Question(row["Question"].strip(), 0, _options([row["Correct Answer"], *wrong]))


def _mmlu_pro(row: Row) -> Question:
    options, index = _options(row["options"]), row["answer_index"]
    if index not in range(len(options)):
        raise ValueError(f"answer_index is 0 to {len(options) - 1}, got {index!r}")
    if not is_missing(row.get("answer")) and row["answer"] != _LETTERS[int(index)]:
        raise ValueError(f"its answer is {row['answer']!r} and its answer_index {index}, another option")
    return Question(row["question"].strip(), int(index), options)


SETS = {
    "aime24": NamedSet("AIME24", "HuggingFaceH4/aime_2024", "train", _written, samples=32),
    "aime25": NamedSet("AIME25", "math-ai/aime25", "test", _written, samples=32),
    "amc": NamedSet("AMC", "AI-MO/aimo-validation-amc", "train", _written, samples=32),
    "math500": NamedSet("MATH500", "HuggingFaceH4/MATH-500", "test", _written),
    "minerva": NamedSet("Minerva", "math-ai/minervamath", "test", _written),
    "olympiadbench": NamedSet("OlympiadBench", "math-ai/olympiadbench", "test", _olympiad),
    "arc_c": NamedSet("ARC-C", "allenai/ai2_arc:ARC-Challenge", "test", _arc),
    "gpqa_d": NamedSet("GPQA-D", "Idavidrein/gpqa:gpqa_diamond", "train", _gpqa),
    "mmlu_pro": NamedSet("MMLU-Pro", "TIGER-Lab/MMLU-Pro", "test", _mmlu_pro),
}
"""The sets of the paper's Table 2, and AIME25; all are judged by "math"."""


def read_set(
    word: str, config: Config, *, seed: int = 0, limit: int | None = None, instruction: str | None = None,
    use_demo: bool = False,
) -> EvalSet:  # fmt: skip
    """Read a set.

    Args:
        word: A name of ``SETS``, read from the hub; "name=file" for one of them in a file; or any source of
            ``data.train``: a built-in task, "reasoning_gym:<task>", a file or a hub id.
        config: Its ``data`` says how prompts are put; ``data.task`` and ``reward.kind`` hold for the source that the
            run itself trains or evaluates on.
        seed: Of the order of options.
        limit: Most problems, from the start, or None; of a generated task, how many there are.
        instruction: What follows the question of a named set; None takes ``BOX`` or ``LETTER_BOX``, and nothing where
            ``data.system`` asks for a box already.
        use_demo: Whether demonstrations are read; named sets have none.

    Raises:
        ValueError: On an unknown name, a source that cannot be read, or a row that lacks something.
    """
    name, _, source = word.partition("=")
    if name in SETS:
        return _named(name, source, config, seed=seed, limit=limit, instruction=instruction)
    if source:
        raise ValueError(f"{word}: no set is called {name!r}; expected one of {', '.join(SETS)}, or the file alone")
    if not (is_local(word) or word in BUILTIN_TASKS or word.startswith(REASONING_GYM) or "/" in word):
        near = difflib.get_close_matches(word, [*SETS, *BUILTIN_TASKS], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no set is called {word!r}; {hint}expected one of {', '.join([*SETS, *BUILTIN_TASKS])}, "
            "reasoning_gym:<task>, a file or a hub id, owner/name"
        )
    return _other(word, config, limit, use_demo)


def _named(
    name: str, source: str, config: Config, *, seed: int, limit: int | None, instruction: str | None
) -> EvalSet:
    known = SETS[name]
    placed = read_source(source or known.source, known.split, None, 0, {})
    examples = []
    for index, (place, row) in enumerate(placed[:limit]):
        identity = f"{name}:{index}"
        try:
            question = known.read(row)
            if is_missing(question.answer) or not question.text.strip():
                raise ValueError("its question or its answer is empty")
            text, answer = _put(question, random.Random(f"options:{seed}:{identity}"))
        except KeyError as error:
            raise ValueError(f"{place}: {known.title} needs a column {error.args[0]!r}, got {', '.join(row)}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: not a row of {known.title}: {error}") from None
        asks = instruction
        if asks is None:
            asks = "" if "\\boxed" in (config.data.system or "") else LETTER_BOX if question.options else BOX
        examples.append(Example(identity, f"{text}\n\n{asks}\n" if asks else f"{text}\n", answer, [], row))
    if not examples:
        raise ValueError(f"{source or known.source} holds no rows")
    return EvalSet(name, known.title, source or known.source, examples, len(placed), "math", known.samples)


def _put(question: Question, rng: random.Random) -> tuple[str, Any]:
    """The text of a question and its answer, options in a random order under letters."""
    if not question.options:
        return question.text.strip(), question.answer
    if not 0 <= question.answer < len(question.options) <= len(_LETTERS):
        raise ValueError(f"option {question.answer} of {len(question.options)} is right")
    order = list(range(len(question.options)))
    rng.shuffle(order)
    lines = [f"({letter}) {question.options[place]}" for letter, place in zip(_LETTERS, order, strict=False)]
    return f"{question.text}\n\n" + "\n".join(lines), _LETTERS[order.index(question.answer)]


def _other(source: str, config: Config, limit: int | None, use_demo: bool) -> EvalSet:
    """Any source, read and judged as training would."""
    data = config.data
    own = source in (data.train, data.eval)
    is_generated = source in BUILTIN_TASKS or source.startswith(REASONING_GYM)
    examples = load_examples(
        source, split=data.eval_split, columns=data.columns if own else None, seed=0,
        limit=limit if is_generated else None, task=data.task if own else None, use_demo=use_demo,
        bad_rows=data.bad_rows, turns=config.reads_turns,
    )  # fmt: skip
    settled = own and config.reward.kind != "auto"
    reward = config.reward.kind if settled else fitting_reward(source, data.system, examples)
    name = Path(source).expanduser().name.partition(".")[0] if is_local(source) else source
    file = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    if file in SETS:
        raise ValueError(f"{source} has the name of a set; give {file}={source} if it is that, else rename it")
    return EvalSet(file, name, source, examples[:limit], len(examples), reward, 1)
