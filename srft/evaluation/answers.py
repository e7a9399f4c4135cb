"""Answers of a policy to problems: drawn, judged, and counted problem by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srft.conversation import Environment, converse
from srft.data.prompts import Prompt
from srft.data.sampler import sample_seed
from srft.data.templates import completion_text
from srft.evaluation.estimators import Tally
from srft.rewards.pool import RewardResult
from srft.rollout import Actor, judged_early


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        text: As it was judged, of a conversation the last turn.
        tokens: How many it has, of a conversation those of all turns of the policy.
        finish: "stop", or "length" where the limit cut it.
        result: What the verifier says.
    """

    text: str
    tokens: int
    finish: str
    result: RewardResult


def draw_answers(actor: Actor, prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[Answer]]:
    """Answer problems and judge the answers; each is a function of its problem's id, its number and the seed.

    Args:
        actor: Holds the policy; its sampling is taken as it is.
        prompts: The problems.
        samples: Answers to each, >= 1.
        seed: Of the sampling.
    """
    seeds = [[sample_seed(seed, 0, prompt.example.id, k) for k in range(samples)] for prompt in prompts]
    if actor.environment is not None:
        return _after_conversations(actor, actor.environment, prompts, seeds)
    drawn = actor.engine.generate(
        [p.prompt_ids for p in prompts], actor.sampling, seeds, judged_early(actor, [(p, []) for p in prompts])
    )
    texts = [
        [completion_text(actor.tokenizer, c.token_ids, p.opened, actor.sampling.stop) for c in completions]
        for completions, p in zip(drawn, prompts, strict=True)
    ]
    items = [(t, p.example.answer, p.example.row) for said, p in zip(texts, prompts, strict=True) for t in said]
    results = iter(actor.pool.score(items))
    return [
        [Answer(text, len(c.token_ids), c.finish, next(results)) for text, c in zip(said, completions, strict=True)]
        for said, completions in zip(texts, drawn, strict=True)
    ]


def _after_conversations(
    actor: Actor, environment: Environment, prompts: Sequence[Prompt], seeds: list[list[int]]
) -> list[list[Answer]]:
    """The last turns of conversations; where the environment hung or died nothing is judged."""
    talks = converse(environment, actor.engine, actor.sampling, actor.world, prompts, seeds)
    rows = [(s, p.example) for said, p in zip(talks, prompts, strict=True) for s in said]
    judged = iter(actor.pool.score([(s.text, e.answer, e.row) for s, e in rows if s.lacks_verdict]))
    failed = {"timeout": RewardResult(0.0, "timeout"), "error": RewardResult(0.0, "error")}
    results = iter(
        [next(judged) if s.lacks_verdict else failed.get(s.status) or RewardResult(s.reward, "ok") for s, _ in rows]
    )
    return [
        [Answer(s.text, s.num_own, "length" if s.truncated else "stop", next(results)) for s in said] for said in talks
    ]


def tally(answers: Sequence[Answer]) -> Tally:
    """Count the answers to one problem.

    Args:
        answers: All of them.
    """
    return Tally(
        drawn=len(answers),
        judged=sum(a.result.status != "unjudged" for a in answers),
        right=sum(a.result.value >= 0.5 for a in answers),
        cut=sum(a.finish == "length" for a in answers),
        timeouts=sum(a.result.status == "timeout" for a in answers),
        tokens=sum(a.tokens for a in answers),
    )
