"""What a policy makes of held-out problems: its accuracy, with its uncertainty, and the loss of demonstrations."""

from __future__ import annotations

import math
from dataclasses import replace

from srft.data.prompts import Prompt
from srft.evaluation.answers import draw_answers, tally
from srft.learning import mean_logprob
from srft.policy.learner import Learner
from srft.rollout import Actor, demonstration


def evaluate(actor: Actor, prompts: list[Prompt]) -> dict[str, float]:
    """Answer every held-out problem greedily, once, and judge the answers.

    Args:
        actor: Holds the policy to evaluate; the temperature of its sampling is replaced by 0.
        prompts: The problems.

    Returns:
        ``eval/accuracy`` and the ends of its 95 % interval, over the answers that were judged and absent where none
        was; ``eval/truncated`` and ``eval/timeouts``; all in [0, 1].
    """
    world, greedy = actor.world, replace(actor, sampling=replace(actor.sampling, temperature=0.0))
    tallies = [tally(answers) for answers in draw_answers(greedy, world.own(prompts), 1, 0)]
    correct, judged, truncated, timeouts = map(
        int,
        world.sum([sum(getattr(t, field) for t in tallies) for field in ("right", "judged", "cut", "timeouts")]),
    )
    accuracy: dict[str, float] = {}
    if judged:
        low, high = wilson_interval(correct, judged)
        accuracy = {"eval/accuracy": correct / judged, "eval/ci_low": low, "eval/ci_high": high}
    return accuracy | {"eval/truncated": truncated / len(prompts), "eval/timeouts": timeouts / len(prompts)}


def demo_loss(learner: Learner, prompts: list[Prompt]) -> dict[str, float]:
    """Measure how likely the policy finds the first demonstration of each held-out problem, right or wrong.

    Args:
        learner: Holds the policy, whose log-probabilities are those of its training, at the temperature of rollouts.
        prompts: The problems; those without a demonstration are passed over.

    Returns:
        ``eval/demo_loss``, nats per token, the same on every rank; nothing where no problem has a demonstration.
    """
    shown = [prompt for prompt in prompts if prompt.demo_ids]
    if not shown:
        return {}
    return {"eval/demo_loss": -mean_logprob(learner, [demonstration(p, 0) for p in learner.world.own(shown)])}


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927).

    Args:
        successes: Out of ``trials``.
        trials: > 0.
        z: Normal quantile; the default gives 95 %.
    """
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
