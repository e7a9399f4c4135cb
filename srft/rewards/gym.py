"""The data sets of reasoning-gym, which pose problems and judge answers to them."""

from __future__ import annotations

import difflib
from typing import Any

REASONING_GYM = "reasoning_gym:"


def reasoning_gym_dataset(name: str, **config: Any) -> Any:
    """Build a reasoning-gym data set by name.

    Args:
        name: Task name, e.g. "chain_sum".
        **config: Fields of that task's own configuration, ``size`` and ``seed`` among them.

    Raises:
        ValueError: If reasoning-gym is not installed, the task is unknown, or an option does not exist.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError("reasoning_gym tasks need the extra srft[gym]: pip install 'srft[gym]'") from error
    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)) or "none close"
        raise ValueError(f"reasoning_gym has no task {name!r}; nearest: {near} ({len(DATASETS)} tasks)")
    try:
        return create_dataset(name, **config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning_gym task {name!r} refuses the options {config}: {error}") from error
