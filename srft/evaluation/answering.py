"""The walk of an evaluation: batches of problems in a fixed order, drawn, judged, written, until none is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from srft.config import Config
from srft.conversation import Environment
from srft.data.judging import check_answers
from srft.data.prompts import Prompt, build_prompts
from srft.engine.base import Engine, Sampling
from srft.engine.sampling import prompt_format
from srft.evaluation.answers import draw_answers
from srft.evaluation.estimators import accuracy
from srft.evaluation.record import Answered, tally_of
from srft.evaluation.sets import EvalSet
from srft.rewards.pool import RewardPool
from srft.rollout import Actor

_ALL = 1_000_000_000


@dataclass(frozen=True)
class Drawing:
    """How the problems of a set are answered.

    Args:
        prompts: The problems, as tokens.
        samples: Answers to each.
        sampling: How they are drawn.
        seed: Of the sampling.
        batch: Answers drawn together. A batch is drawn whole, however much of it is written, so that what an answer
            shares its batch with, which decides its last bits, does not depend on when a process was killed.
        environment: What the policy talks to; None: it answers in one turn.
    """

    prompts: list[Prompt]
    samples: int
    sampling: Sampling
    seed: int
    batch: int
    environment: Environment | None = None


def as_prompts(chosen: EvalSet, config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Encode the problems of a set.

    Args:
        chosen: The set.
        config: Says how prompts are put.
        tokenizer: The policy's.
    """
    form = prompt_format(config, tokenizer)
    return build_prompts(chosen.examples, form, max_prompt_tokens=_ALL, max_demo_tokens=None)[0]


def room_for(prompts: Sequence[Prompt], title: str, positions: int | None, asked: int | None, usual: int) -> int:
    """Return how many tokens the answers to a set may have.

    Args:
        prompts: Its problems.
        title: What people call it.
        positions: Of the model; None where it knows no limit.
        asked: What the user wants; None takes ``usual``, or what the model has positions for where that is less.
        usual: As many.

    Raises:
        ValueError: When a prompt leaves no room, or less than ``asked``.
    """
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    room = _ALL if positions is None else positions - longest
    if room < (asked or 1):
        remedy = "lower --max-new-tokens, or give a model with more" if room > 0 else "give a model with more"
        raise ValueError(
            f"the longest prompt of {title} has {longest} tokens and the model {positions} positions, which leaves "
            f"{max(0, room)} for an answer; {remedy}"
        )
    return asked or min(usual, room)


def unreadable(chosen: EvalSet, pool: RewardPool) -> dict[str, str]:
    """Return by id why the answer of a problem cannot be read by its verifier, so that nobody can be right.

    Args:
        chosen: The set.
        pool: Its verifier.

    Raises:
        ValueError: When none can be read.
    """
    bad = check_answers(chosen.examples, pool)
    if len(bad) == len(chosen.examples):
        first = next(iter(bad))
        raise ValueError(f"{pool.kind!r} reads no answer of {chosen.title}, the first is {first}: {bad[first]}")
    return bad


def answer_all(
    drawing: Drawing,
    answered: Answered,
    engine: Callable[[], Engine],
    pool: RewardPool,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Answer every problem of a set that is not answered yet.

    Args:
        drawing: How.
        answered: What there is, and where more goes.
        engine: Returns what samples, started by the first call; not called where nothing is missing.
        pool: Judges.
        tokenizer: The policy's.
        say: Told after each batch what there is: "done", "of", "accuracy".

    Raises:
        EngineError: When the engine fails.
        WriteError: When the disk refuses; what was written stays.
    """
    answered.refuse_others(drawing.prompts)
    step = max(1, drawing.batch // drawing.samples)
    for first in range(0, len(drawing.prompts), step):
        part = drawing.prompts[first : first + step]
        if all(prompt.example.id in answered.rows for prompt in part):
            continue
        actor = Actor(engine(), drawing.sampling, tokenizer, pool, environment=drawing.environment, begin=pool.begin)
        answers = draw_answers(actor, part, drawing.samples, drawing.seed)
        answered.add(list(zip(part, answers, strict=True)))
        share = accuracy([tally_of(row) for row in answered.rows.values()])
        say({"done": len(answered.rows), "of": len(drawing.prompts), "accuracy": share.value if share else None})
