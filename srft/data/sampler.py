"""The order in which prompts are drawn and the seed of every sample: both a function of the run's seed and a count."""

from __future__ import annotations

import hashlib
import random
from typing import Any


class PromptSampler:
    """Epochs of seeded permutations; its whole state is how many indices it has given out.

    Args:
        num_prompts: Size of the data set, >= 1.
        seed: With the epoch's number it fixes the order of that epoch.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        if num_prompts < 1:
            raise ValueError(f"a sampler needs at least one prompt, got {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.drawn = 0
        self._epoch = -1
        self._order: list[int] = []

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_prompts)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(self.num_prompts))
            random.Random(f"{self.seed}:{epoch}").shuffle(self._order)
        return self._order[offset]

    def next(self, k: int) -> list[int]:
        """Return the next ``k`` indices, going on into the next epoch where one ends.

        Args:
            k: Prompts in a batch, in [1, num_prompts].

        Raises:
            ValueError: If the batch is larger than the data set.
        """
        if not 1 <= k <= self.num_prompts:
            raise ValueError(
                f"a batch of {k} prompts from {self.num_prompts}; lower prompts_per_step or give more data"
            )
        indices = [self._at(position) for position in range(self.drawn, self.drawn + k)]
        self.drawn += k
        return indices

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run needs."""
        return {"drawn": self.drawn, "seed": self.seed, "num_prompts": self.num_prompts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where another sampler stood.

        Args:
            state: From ``state_dict`` of a sampler over as many prompts with the same seed.

        Raises:
            ValueError: If the data set's size or the seed differ, since the order would not go on.
        """
        for name in ("num_prompts", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's sampler has {name}={state[name]}, this run {getattr(self, name)}"
                )
        self.drawn = state["drawn"]


class StepSampler:
    """The prompts of each step, and with them demonstrations of a set of their own, in orders that are independent.

    Args:
        num_prompts: Size of the data set, >= 1.
        num_demos: Size of the set of demonstrations; 0 where there is none.
        seed: Fixes both orders.
    """

    def __init__(self, num_prompts: int, num_demos: int, seed: int) -> None:
        self.prompts = PromptSampler(num_prompts, seed)
        self.demos = PromptSampler(num_demos, sample_seed(seed, 0, "data.demos", 0)) if num_demos else None

    def next(self, prompts: int, demos: int) -> tuple[list[int], list[int]]:
        """Return the indices of the next prompts and demonstrations.

        Args:
            prompts: How many, as in ``PromptSampler.next``.
            demos: How many; none are drawn where there is no set of them.
        """
        return self.prompts.next(prompts), self.demos.next(demos) if self.demos and demos else []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return self.prompts.state_dict() | ({"demos": self.demos.state_dict()} if self.demos else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another sampler stood.

        Args:
            state: From ``state_dict`` of a sampler over as many prompts and demonstrations with the same seed.

        Raises:
            ValueError: As ``PromptSampler.load_state_dict``.
        """
        self.prompts.load_state_dict(state)
        if self.demos:
            self.demos.load_state_dict(state["demos"])


def sample_seed(seed: int, step: int, prompt_uid: str, k: int) -> int:
    """Return the engine's seed of one sample, in [0, 2**63), the same on every machine.

    Args:
        seed: The run's seed.
        step: Training step.
        prompt_uid: Example id, with the place in the batch added where a batch may hold a prompt twice.
        k: Index of the sample within its group.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{k}:{prompt_uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
