"""A step's judged groups as they travel: made ahead, waiting, learned from, recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from srft.responses import Group


@dataclass(frozen=True)
class Sampled:
    """A step's judged groups.

    Args:
        step: The step that learns from them.
        groups: This rank's.
        gave_way: Those in whose place some of them came.
        seconds: What making them took beside training; None where training waited for all of it, or it is not known.
        ended: With ``rollout.partial_tokens``, how many groups of all ranks ended for this step, and how many go on.
    """

    step: int
    groups: list[Group]
    gave_way: list[Group]
    seconds: float | None = None
    ended: tuple[int, int] | None = None

    def copy(self) -> Sampled:
        """Return the same, to be learned from, which fills in responses."""
        return replace(self, groups=[g.copy() for g in self.groups], gave_way=[g.copy() for g in self.gave_way])

    def figures(self) -> dict[str, float]:
        """Return what a row tells of how they were made: seconds beside training, groups that ended and that go on."""
        names = ("time/ahead", "groups/ended", "groups/open")
        told = (self.seconds, *(self.ended or (None, None)))
        return {name: value for name, value in zip(names, told, strict=True) if value is not None}
