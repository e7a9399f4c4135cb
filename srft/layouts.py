"""The proof that a run's gradients do not depend on how its ranks and micro-batches share the work."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from srft.config import Config
from srft.data.examples import Example
from srft.data.prompts import Prompt
from srft.learning import accumulate
from srft.methods import assign_advantages
from srft.policy.learner import Learner
from srft.policy.parallel import World, whole
from srft.responses import Group, Response

# of the whole gradient's norm; rounding of fp32 sums in another order
ALLOWED = 2e-6
_GROUPS = 8
_MOST_TOKENS = 48


@dataclass(frozen=True)
class LayoutGap:
    """How far the gradient of one layout is from that of one process and one micro-batch.

    Args:
        name: Of the layout.
        micro_batches: Of each rank.
        difference: Norm of the difference over that of the gradient.
        worst: The same of the parameter that differs most, over its own norm or a thousandth of the whole's.
        parameter: That one's name.
    """

    name: str
    micro_batches: int
    difference: float
    worst: float
    parameter: str

    @property
    def passes(self) -> bool:
        """Whether it is rounding; False for NaN."""
        return self.difference <= ALLOWED


def compare_layouts(learner: Learner, make_gold: Callable[[], Learner]) -> list[LayoutGap]:
    """Compute the gradient of one update in several layouts, and compare each with that of a policy on one process.

    In fp32, whatever the run's precision: who computes what is the same in each.

    Args:
        learner: Of all ranks; its gradients are dropped.
        make_gold: Makes the same policy unsharded, on the first rank alone.

    Returns:
        One entry a layout on the first rank, an empty list on the others.
    """
    learner = replace(learner, config=_in_fp32(learner.config))
    world, every = learner.world, random_responses(learner)
    gold: dict[str, Tensor] = {}
    if world.is_first:
        alone = make_gold()
        alone = replace(alone, config=_in_fp32(alone.config, 10**9))
        accumulate(alone, every, 1)
        gold = {name: p.grad.cpu() for name, p in alone.model.named_parameters() if p.grad is not None}
        del alone
    longest = max(map(len, every))
    gaps = []
    for name, own, budget in (
        ("all on the first rank", every if world.is_first else [], 10**9),
        ("spread, one micro-batch", world.own(every), 10**9),
        ("spread, many micro-batches", world.own(every), longest),
        ("demonstrations on the last rank", _by_kind(every, world), longest),
    ):
        spread = replace(learner, config=_in_fp32(learner.config, budget))
        learner.optimizer.zero_grad(set_to_none=True)
        _, count = accumulate(spread, own, 1)
        gaps.append(_gap(name, count, spread, gold))
    learner.optimizer.zero_grad(set_to_none=True)
    return gaps if world.is_first else []


def table(gaps: list[LayoutGap], ranks: int) -> str:
    """Return the layouts as lines of text.

    Args:
        gaps: From ``compare_layouts``.
        ranks: How many took part.
    """
    lines = [f"gradients of {ranks} ranks against one process, fp32 (allowed: {ALLOWED:.0e} of the norm)"]
    for gap in gaps:
        lines.append(
            f"{gap.name:33}{gap.micro_batches:3} micro-batches each{gap.difference:10.1e}"
            f"   worst {gap.worst:.1e}, {gap.parameter}"
        )
    return "\n".join(lines)


def random_responses(learner: Learner) -> list[Response]:
    """Draw rollouts and demonstrations of uneven lengths with mixed rewards, the same on every rank.

    Args:
        learner: Its method gives them their advantages; its model's vocabulary they are of.
    """
    config, rng = learner.config, random.Random(0)
    vocab = learner.model.get_input_embeddings().num_embeddings
    most = min(_MOST_TOKENS, config.longest_sequence // 2)

    def tokens() -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randint(1, most))]

    def response(prompt: list[int], is_demo: bool, reward: float) -> Response:
        ids = tokens()
        logprobs = [] if is_demo else [-rng.random() for _ in ids]
        return Response(prompt, ids, is_demo, False, logprobs, "", reward=reward)

    groups = []
    for number in range(_GROUPS):
        group = Group(Prompt(Example(str(number), "", "", [], {}), tokens(), []))
        if config.method.needs_rollouts:
            count = max(2, config.train.rollouts_per_prompt)
            group.rollouts = [response(group.prompt.prompt_ids, False, float(k % 2)) for k in range(count)]
        if config.method.needs_demos:
            group.demos = [response(group.prompt.prompt_ids, True, 1.0)]
        groups.append(group)
    return assign_advantages(groups, config.method)


def _by_kind(every: list[Response], world: World) -> list[Response]:
    """Demonstrations on the last rank; rollouts on the others, all of them on the first."""
    first = [s for s in every if not s.is_demo] if world.is_first else []
    return first + ([s for s in every if s.is_demo] if world.rank == world.size - 1 else [])


def _in_fp32(config: Config, budget: int | None = None) -> Config:
    train = config.train if budget is None else config.train.model_copy(update={"tokens_per_microbatch": budget})
    model = config.model.model_copy(update={"compute_dtype": "float32"})
    # without weights of an older policy's tokens, which an earlier layout would have left on its responses
    rollout = config.rollout.model_copy(update={"max_lag": 0})
    return config.model_copy(update={"train": train, "model": model, "rollout": rollout})


def _gap(name: str, micro_batches: int, learner: Learner, gold: dict[str, Tensor]) -> LayoutGap:
    """Compare parameter by parameter: no rank holds more than one whole gradient at a time, but the first its gold."""
    squares, differences = {}, {}
    for parameter, p in learner.model.named_parameters():
        if p.grad is None:
            continue
        gradient = whole(p.grad).cpu()
        if learner.world.is_first:
            squares[parameter] = float(gold[parameter].double().square().sum())
            differences[parameter] = float((gradient.double() - gold[parameter].double()).square().sum())
    if not learner.world.is_first:
        return LayoutGap(name, micro_batches, 0.0, 0.0, "")
    assert set(squares) == set(gold), "a parameter has a gradient in one layout alone"
    norm = sum(squares.values()) ** 0.5
    relative = {n: d**0.5 / max(squares[n] ** 0.5, 1e-3 * norm) for n, d in differences.items()}
    worst = max(relative, key=lambda n: relative[n])
    return LayoutGap(name, micro_batches, sum(differences.values()) ** 0.5 / norm, relative[worst], worst)
