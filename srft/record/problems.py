"""Which problems were right at a step, by id: those that were learned from, and those held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srft.data.examples import Example
from srft.policy.parallel import ALONE, World
from srft.responses import Group, Response
from srft.rewards.pool import Item, Judge, RewardResult


class Verdicts:
    """Stands before a judge and counts how many answers to each problem were right.

    Args:
        judge: Gives the grades, which are passed on as they are.
        examples: The problems, told apart by their rows, which must be the very objects that come with the answers.
    """

    def __init__(self, judge: Judge, examples: Sequence[Example]) -> None:
        self._judge = judge
        self._id_of = {id(example.row): example.id for example in examples}
        self._counts: dict[str, list[int]] = {}

    def score(self, items: Sequence[Item]) -> list[RewardResult]:
        """Return the grade of each answer, in order.

        Args:
            items: (completion, answer, row) each.
        """
        results = self._judge.score(items)
        for (_, _, row), result in zip(items, results, strict=True):
            if (name := self._id_of.get(id(row))) is not None and result.status != "unjudged":
                _add(self._counts, name, [int(result.value >= 0.5), 1])
        return results

    def counts(self, world: World = ALONE) -> dict[str, list[int]]:
        """Return [right answers, judged answers] by problem, those of all ranks; nothing of what was not judged.

        Args:
            world: The ranks.
        """
        return _together(world.gather(self._counts))


def trained_on(groups: Sequence[Group], world: World = ALONE) -> dict[str, list[int]]:
    """Return what became of a step's prompts, by problem.

    Args:
        groups: This rank's, judged; those without rollouts are no problems that the policy was asked.
        world: The ranks.

    Returns:
        [right rollouts, judged rollouts, right demonstrations, judged demonstrations] each; a problem that a step has
        twice is counted together.
    """
    counts: dict[str, list[int]] = {}
    for group in groups:
        if group.rollouts:
            _add(counts, group.prompt.example.id, [*_right(group.rollouts), *_right(group.demos)])
    return _together(world.gather(counts))


def _right(responses: Sequence[Response]) -> tuple[int, int]:
    judged = [response.is_correct for response in responses if response.is_judged]
    return sum(judged), len(judged)


def _together(of_ranks: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for of_rank in of_ranks:
        for name, more in of_rank.items():
            _add(counts, name, more)
    return counts


def _add(counts: dict[str, list[int]], name: str, more: Sequence[int]) -> None:
    counts[name] = [x + y for x, y in zip(counts.get(name, [0] * len(more)), more, strict=True)]
