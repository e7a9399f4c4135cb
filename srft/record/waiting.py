"""Rollouts that were made before the steps that learn from them: part of a checkpoint, as their policy is gone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from srft.data.prompts import Prompt
from srft.policy.parallel import ALONE, World
from srft.responses import SAMPLED, Group, Response
from srft.sampled import Sampled

_FIELDS = (*SAMPLED, "is_rewarded", "seed")


class Waiting:
    """Judged batches by step, groups that go on, and how they are written: a rank's own, one of every so many.

    Args:
        prompts: Those that are learned from, in the order of the sampler.
        demos: Those with demonstrations that are groups by themselves.
    """

    def __init__(self, prompts: Sequence[Prompt], demos: Sequence[Prompt]) -> None:
        self._sets = {"train": prompts, "demos": demos}
        self.batches: dict[int, Sampled] = {}
        """Nothing is learned from these; steps learn from copies."""
        self.going: list[Group] = []
        """Groups that are open after the newest batch, in order; the next one has others in their place."""

    def lines(self, batches: Iterable[Sampled], going: Sequence[Group] = ()) -> str:
        """Return batches as JSON Lines, one of its own each and one a group; numbers keep every bit.

        Args:
            batches: Of prompts of these sets.
            going: Groups of these that are open.
        """
        place = {id(prompt): (name, i) for name, prompts in self._sets.items() for i, prompt in enumerate(prompts)}
        batches = list(batches)
        rows: list[dict[str, Any]] = [{"step": batch.step, "in": "batch", "ended": batch.ended} for batch in batches]
        kinds = [(b.step, kind, getattr(b, kind)) for b in batches for kind in ("groups", "gave_way")]
        rows += [
            {"step": step, "in": kind, "prompt": place[id(group.prompt)], **_row(group)}
            for step, kind, groups in (*kinds, (None, "going", going))
            for group in groups
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def read(self, texts: Sequence[str], world: World = ALONE) -> None:
        """Take up this rank's share of the batches of a checkpoint.

        Args:
            texts: From ``lines``, with the same prompts: of each rank that there was, in order.
            world: The ranks that there are.

        Raises:
            ValueError: When an earlier version wrote them, which did not say when a group was drawn.
        """
        rows = [json.loads(line) for text in texts for line in text.splitlines()]
        if any(row["in"] != "batch" and "drawn" not in row for row in rows):
            raise ValueError(
                "the checkpoint's rollouts.jsonl is of an earlier version of srft; go on with that, or start anew by "
                "another name"
            )
        for row in rows:
            if row["in"] == "batch":
                ended = row["ended"] and (row["ended"][0], row["ended"][1])
                self.batches.setdefault(row["step"], Sampled(row["step"], [], [], ended=ended))
        # prompts, and demonstrations that are groups by themselves, are each dealt out in turn
        own = [row for row in rows if row["in"] != "batch" and row["drawn"][1] % world.size == world.rank]
        for row in own:
            if row["in"] == "gave_way":
                self.batches[row["step"]].gave_way.append(self._group(row))
        own.sort(key=lambda row: (not row["rollouts"], row["drawn"]))
        for row in own:
            if row["in"] != "gave_way":
                groups = self.going if row["in"] == "going" else self.batches[row["step"]].groups
                groups.append(self._group(row))

    def _group(self, row: dict[str, Any]) -> Group:
        name, i = row["prompt"]
        prompt = self._sets[name][i]
        members = {kind: [_response(prompt, s) for s in row[kind]] for kind in ("rollouts", "demos")}
        step, place = row["drawn"]
        return Group(prompt, max_new_tokens=row["max_new_tokens"], drawn=(step, place), **members)


def _response(prompt: Prompt, fields: dict[str, Any]) -> Response:
    # JSON has no tuples
    return Response(prompt.prompt_ids, **fields | {"versions": [(v, tokens) for v, tokens in fields["versions"]]})


def _row(group: Group) -> dict[str, Any]:
    members = {"rollouts": group.rollouts, "demos": group.demos}
    return {"max_new_tokens": group.max_new_tokens, "drawn": group.drawn} | {
        kind: [{name: getattr(s, name) for name in _FIELDS} for s in of_kind] for kind, of_kind in members.items()
    }
