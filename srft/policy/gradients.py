"""The gradient of each term of a loss: how large it is, and whether likelihood and rewards pull the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.methods import Kind
from srft.policy.parallel import World
from srft.policy.weights import own_part


class TermGradients:
    """Compares gradients that a policy has one after another; sums of a kind wait in the CPU's memory.

    Args:
        model: The policy, whose every rank calls the same.
        world: The ranks.
    """

    def __init__(self, model: PreTrainedModel, world: World) -> None:
        self._model, self._world = model, world
        self._rest: list[Tensor] | None = None
        self._sums: dict[Kind, list[Tensor]] = {}
        self._norms: dict[str, float] = {}

    def set_apart(self) -> None:
        """Take the gradient that the policy has now out of all that follow: what is no term's, such as a bonus."""
        rest = self._now()
        self._rest = rest if self._dot(rest, rest) else None

    def add(self, term: str, kind: Kind) -> None:
        """Note the gradient that the policy has now.

        Args:
            term: Its name.
            kind: What it learns from.
        """
        own = self._now()
        if self._rest is not None:
            own = [x - rest for x, rest in zip(own, self._rest, strict=True)]
        self._norms[term] = self._dot(own, own) ** 0.5
        before = self._sums.get(kind)
        self._sums[kind] = own if before is None else [x + y for x, y in zip(before, own, strict=True)]

    def figures(self) -> dict[str, float]:
        """Return what was found, the same on every rank.

        Returns:
            ``grad/<term>`` and, of the sum of the terms of a kind, ``grad/sft`` and ``grad/rl``: norms over all
            parameters. ``grad/cosine`` between the two kinds, where both have a gradient.
        """
        norms = {kind: self._dot(x, x) ** 0.5 for kind, x in self._sums.items()}
        found = {f"grad/{name}": norm for name, norm in (self._norms | norms).items()}
        if norms.get("sft") and norms.get("rl"):
            found["grad/cosine"] = self._dot(self._sums["sft"], self._sums["rl"]) / (norms["sft"] * norms["rl"])
        return found

    def _now(self) -> list[Tensor]:
        """This rank's part of the gradient, on the CPU; the trainer drops gradients and does not overwrite them."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        return [own_part(torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu() for p in trained]

    def _dot(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
        own = sum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(x, y, strict=True))
        # every replica holds the whole, in parts over its own ranks
        replicas = 1 if self._world.mesh is None else self._world.mesh.size(0)
        return self._world.sum([own])[0] / replicas
