"""What a policy makes of held-out problems: its accuracy, with its uncertainty, and the loss of demonstrations."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from srft.config import Config
from srft.data.prompts import Prompt
from srft.evaluation.answering import as_prompts, unreadable
from srft.evaluation.answers import draw_answers, tally
from srft.evaluation.estimators import accuracy, pass_at
from srft.evaluation.sets import read_set
from srft.learning import micro_batches
from srft.policy.forwards import packed_forward
from srft.policy.learner import Learner
from srft.responses import Response, count
from srft.rewards.pool import RewardPool
from srft.rollout import Actor, demonstration


@dataclass(frozen=True)
class FurtherSet:
    """A set that is evaluated beside the run's own held-out problems.

    Args:
        name: Of its figures.
        prompts: Its problems.
        pool: Judges them.
    """

    name: str
    prompts: list[Prompt]
    pool: RewardPool


def further_sets(config: Config, tokenizer: PreTrainedTokenizerBase, stack: ExitStack) -> list[FurtherSet]:
    """Read the sets of ``data.eval_sets``, without the problems whose answer cannot be read.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
        stack: Closes their pools.

    Raises:
        ValueError: When one cannot be read, or has a prompt over ``data.max_prompt_tokens``.
    """
    data = config.data
    found: list[FurtherSet] = []
    for word in data.eval_sets:
        chosen = read_set(word, config, limit=data.eval_limit)
        pool = stack.enter_context(RewardPool(chosen.reward, config.reward.workers, config.reward.deadline_s))
        left_out = unreadable(chosen, pool)
        prompts = [p for p in as_prompts(chosen, config, tokenizer) if p.example.id not in left_out]
        if (longest := max(len(p.prompt_ids) for p in prompts)) > data.max_prompt_tokens:
            raise ValueError(
                f"data.eval_sets: the longest prompt of {chosen.title} has {longest} tokens; set "
                f"data.max_prompt_tokens to that or more, got {data.max_prompt_tokens}"
            )
        if chosen.name in [other.name for other in found]:
            raise ValueError(f"data.eval_sets has two sets of the name {chosen.name}; rename a file")
        found.append(FurtherSet(chosen.name, prompts, pool))
    return found


def evaluate(
    actor: Actor,
    prompts: list[Prompt],
    *,
    samples: int = 1,
    temperature: float = 0.6,
    seed: int = 0,
    prefix: str = "eval",
) -> dict[str, float]:
    """Answer every held-out problem and judge the answers: greedily, once, or several times by sampling.

    Args:
        actor: Holds the policy to evaluate; the temperature of its sampling is replaced, and answers end when they end.
        prompts: The problems.
        samples: Answers to each; a single one is the most likely one.
        temperature: At which several are drawn.
        seed: Of the sampling.
        prefix: Of the names of the figures.

    Returns:
        ``eval/accuracy``, of several answers their mean over problems, with the ends of its 95 % interval (Wilson's,
        of several answers that of resampled problems) and ``eval/pass@n``, over the answers that were judged and absent
        where none was; ``eval/truncated`` and ``eval/timeouts``, shares of the answers; all in [0, 1].
    """
    sampling = replace(actor.sampling, temperature=temperature if samples > 1 else 0.0, min_new_tokens=0)
    own = draw_answers(replace(actor, sampling=sampling), actor.world.own(prompts), samples, seed)
    tallies = [t for part in actor.world.gather([tally(answers) for answers in own]) for t in part]
    figures: dict[str, float] = {}
    if share := accuracy(tallies):
        low, high = share.low, share.high
        if samples == 1:
            low, high = wilson_interval(sum(t.right for t in tallies), sum(t.judged for t in tallies))
        figures = {f"{prefix}/accuracy": share.value, f"{prefix}/ci_low": low, f"{prefix}/ci_high": high}
        if samples > 1 and (solved := pass_at(tallies, samples)):
            figures[f"{prefix}/pass@{samples}"] = solved.value
    drawn = len(prompts) * samples
    return figures | {
        f"{prefix}/truncated": sum(t.cut for t in tallies) / drawn,
        f"{prefix}/timeouts": sum(t.timeouts for t in tallies) / drawn,
    }


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


@torch.no_grad()
def mean_logprob(learner: Learner, sequences: list[Response]) -> float:
    """Mean log-probability of every response token, nats, the same on every rank.

    Args:
        learner: Holds the policy.
        sequences: This rank's, perhaps none; those of all ranks have at least one.
    """
    batches = micro_batches(learner, sequences, count(sequences))
    config = learner.config
    logprobs = [
        packed_forward(learner.model, batch, config.compute_dtype, config.rollout.temperature)[0] for batch in batches
    ]
    own = sum(x.sum(dtype=torch.float64).item() for b, x in zip(batches, logprobs, strict=True) if not b.is_empty)
    total, tokens = learner.world.sum([own, count(sequences).tokens])
    return total / tokens


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
