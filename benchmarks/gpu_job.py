"""What a step of gpu_sweep was asked for, and what it has found."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import device as devices
from benchmarks import table
from benchmarks.heads import DTYPES, HeadShape, Inputs, make_inputs
from benchmarks.variants import variants


class Job:
    """What a step was asked for, and what it has found; ``found`` is on disk after each ``save``."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = torch.device(arguments.device)
        self.dtype_name: str = arguments.dtype
        self.dtype = DTYPES[arguments.dtype]
        self.names: list[str] = arguments.names.split(",")
        self.tokens: int = arguments.tokens
        self.sequence: int = arguments.sequence
        self.peer: str = arguments.peer
        self.rounds: int = arguments.rounds
        self.without_ours: bool = arguments.without_ours
        self.out: Path = arguments.out
        self.found: dict[str, Any] = {"headline": ""}

    def save(self, **found: Any) -> None:
        """Add to the result."""
        self.found |= found
        table.write(self.found, self.out)

    def inputs(self, head: HeadShape) -> Inputs:
        """Inputs of the size asked for."""
        return make_inputs(head, self.dtype, self.tokens, self.sequence, self.device)

    def ours(self, name: str) -> Callable[[Inputs], Any]:
        """GRPO by the variant ``name``, ours or ours-16bit-logits."""
        run = variants("grpo", self.dtype, self.device, frozenset([name]))[name].run
        assert run is not None
        return run

    def own_names(self) -> list[str]:
        """Our variants at this dtype."""
        return ["ours", "ours-16bit-logits"] if self.dtype.itemsize == 2 else ["ours"]

    def median(self, call: Callable[[], Any]) -> float:
        """Seconds of a call: median of some, on a GPU after two that are not counted."""
        for _ in range(2 if self.device.type == "cuda" else 0):
            call()
        return statistics.median(devices.seconds(call, self.device) for _ in range(self.rounds))
