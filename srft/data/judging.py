"""Which verifier judges the rows of a source, whose answers it cannot read, and which demonstrations it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from srft.data.examples import Example
from srft.data.messages import Message, texts_of
from srft.data.schemas import find_schema
from srft.rewards.pool import RewardPool
from srft.rewards.verifiers import VERIFIERS

_NUMBER = re.compile(r"[-+$]*[\d,]*\.?\d+%?")


def fitting_reward(source: str, system: str | None, examples: Sequence[Example]) -> str:
    """Name the verifier that fits the rows of a source.

    Args:
        source: Where they come from; a task of reasoning-gym judges its own.
        system: System turn put before every prompt.
        examples: At least one; the columns of the first give the layout away.

    Raises:
        ValueError: When no verifier is known to fit, or when prompts ask for answers in different forms.
    """
    schema = find_schema(source, examples[0].row)
    asked = asked_reward(system, ((e.id, e.prompt, e.answer) for e in examples)) if schema.forms_differ else None
    reward = asked or schema.reward
    if reward is None:
        raise ValueError(
            f"no known verifier fits the columns of {source}; set reward.kind to {', '.join(VERIFIERS)} or "
            "path/to/file.py:function"
        )
    return reward


def asked_reward(system: str | None, rows: Iterable[tuple[str, str | list[Message], Any]]) -> str | None:
    r"""Name the verifier that reads what the prompts ask for, or None where they ask for no form.

    An answer in a \boxed{} is for "math"; one after "####" or "Answer:" for "numeric" where every such row's answer is
    a number, else one after "####" for "exact".

    Args:
        system: System turn put before every prompt.
        rows: Id, prompt and ground truth of each example.

    Raises:
        ValueError: When some prompts ask for a box and others for a mark, with an example of each.
    """
    boxed = hashes = marked = None
    numbers = True
    for name, prompt, answer in rows:
        text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
        text = f"{system or ''}\n{text}"
        if "\\boxed" in text:
            boxed = boxed or name
        elif "####" in text or re.search(r"\bAnswer:", text):
            hashes = hashes or (name if "####" in text else None)
            marked = marked or name
            numbers = numbers and _NUMBER.fullmatch(str(answer).strip()) is not None
    if boxed and marked:
        raise ValueError(
            f"{boxed} asks for the answer in a box and {marked} after a mark, which one verifier does not judge alike; "
            "set reward.kind"
        )
    if boxed:
        return "math"
    return None if not marked else "numeric" if numbers else "exact" if hashes else None


def check_demos(examples: Sequence[Example], pool: RewardPool) -> list[tuple[str, int]]:
    """Return (example id, index) of every demonstration that the verifier does not accept.

    Args:
        examples: Those without a demonstration are passed over.
        pool: Grades each demonstration, or the last turn of one that is a conversation, as if it were a completion.
    """
    shown = [(example, index) for example in examples for index in range(len(example.demos))]
    results = pool.score([(texts_of(one.demos[index])[-1], one.answer, one.row) for one, index in shown])
    return [
        (example.id, index)
        for (example, index), result in zip(shown, results, strict=True)
        if result.value < 0.5 and result.status != "unjudged"
    ]


def check_answers(examples: Sequence[Example], pool: RewardPool) -> dict[str, str]:
    """Return, by id, why the verifier cannot read the answer of an example; only those that it cannot read.

    Args:
        examples: Their demonstrations are not looked at.
        pool: A verifier of the user's own is not asked: what it makes of an empty completion is its own affair.
    """
    if pool.kind not in VERIFIERS:
        return {}
    results = pool.score([("", example.answer, example.row) for example in examples], may_fail=True)
    return {
        example.id: result.message
        for example, result in zip(examples, results, strict=True)
        if result.status == "bad_gold"
    }
