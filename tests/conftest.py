"""What every test gets: fixed seeds, no network, skips with a reason, no luck with uninitialised memory."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# read when the libraries are imported, so set before any test module is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import hypothesis
import numpy as np
import pytest
import torch

KERNEL_TESTS = Path(__file__).parent / "kernels"

hypothesis.settings.register_profile("srft", derandomize=True, deadline=None)
hypothesis.settings.load_profile("srft")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, before any fixture is built."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM, which `make test` installs")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator and return the seed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """In kernel tests, fill uninitialised floats with NaN, so that reading before writing shows."""
    if not request.path.is_relative_to(KERNEL_TESTS):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ]:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned
