"""Batches that were made before the steps that learn from them: part of a checkpoint, as their policy is gone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from srft.batch import SAMPLED, Group, Response, Sampled
from srft.data.prompts import Prompt
from srft.policy.parallel import ALONE, World


class Waiting:
    """Judged batches by step, and how they are written: a rank's own groups, of which it has one of every so many.

    Args:
        prompts: Those that are learned from, in the order of the sampler.
        demos: Those with demonstrations that are groups by themselves.
    """

    def __init__(self, prompts: Sequence[Prompt], demos: Sequence[Prompt]) -> None:
        self._sets = {"train": prompts, "demos": demos}
        self.batches: dict[int, Sampled] = {}
        """Nothing is learned from these; steps learn from copies."""

    def lines(self, batches: Iterable[Sampled]) -> str:
        """Return batches as JSON Lines, a group each; numbers keep every bit.

        Args:
            batches: Of prompts of these sets.
        """
        place = {id(prompt): (name, i) for name, prompts in self._sets.items() for i, prompt in enumerate(prompts)}
        return "".join(
            json.dumps({"step": batch.step, "in": kind, "prompt": place[id(group.prompt)], **_row(group)}) + "\n"
            for batch in batches
            for kind in ("groups", "gave_way")
            for group in getattr(batch, kind)
        )

    def read(self, texts: Sequence[str], world: World = ALONE) -> None:
        """Take up this rank's share of the batches of a checkpoint.

        Args:
            texts: From ``lines``, with the same prompts: of each rank that there was, in order.
            world: The ranks that there are.
        """
        own: list[tuple[bool, int, dict[str, Any]]] = []
        for rank, lines in enumerate(texts):
            seen = Counter[tuple[int, str, bool]]()
            for row in map(json.loads, lines.splitlines()):
                self.batches.setdefault(row["step"], Sampled(row["step"], [], []))
                # prompts, demonstrations that are groups by themselves, and what gave way are each dealt out in turn
                shown = not row["rollouts"]
                place = rank + len(texts) * seen[row["step"], row["in"], shown]
                seen[row["step"], row["in"], shown] += 1
                if place % world.size == world.rank:
                    own.append((shown, place, row))
        for _, _, row in sorted(own, key=lambda each: each[:2]):
            getattr(self.batches[row["step"]], row["in"]).append(self._group(row))

    def _group(self, row: dict[str, Any]) -> Group:
        name, i = row["prompt"]
        prompt = self._sets[name][i]
        members = {kind: [Response(prompt.prompt_ids, **s) for s in row[kind]] for kind in ("rollouts", "demos")}
        return Group(prompt, max_new_tokens=row["max_new_tokens"], **members)


def _row(group: Group) -> dict[str, Any]:
    members = {"rollouts": group.rollouts, "demos": group.demos}
    return {"max_new_tokens": group.max_new_tokens} | {
        kind: [{name: getattr(s, name) for name in SAMPLED} for s in of_kind] for kind, of_kind in members.items()
    }
