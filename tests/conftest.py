"""What every test gets: fixed seeds, no network, skips with a reason, no luck with uninitialised memory."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# read when the libraries are imported, so set before any test module is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# a graph that another version, or a run for another processor, left in the cache would answer for this one
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # there is a worker a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import psutil
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
KERNEL_TESTS = TESTS / "kernels"
# of a worker together with what its tests start: two trainers, an engine, an inner pytest
WORKER_BYTES = 3 * 2**30

# torch looks once at what makes tensors, for `with torch.device(...)`: before a test stands in for some of it, or the
# meta device would have memory for the rest of the worker's life
with torch.device("cpu"):
    torch.empty(0)

hypothesis.settings.register_profile("srft", derandomize=True, deadline=None)
hypothesis.settings.load_profile("srft")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Say how many workers ``-n auto`` starts: one a core that this process may use, if the memory is there."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // WORKER_BYTES))


class ByWhatTheyShare(LoadScopeScheduling):
    """Hands out the tests one by one, except that some stay together in one worker.

    A module whose tests share a fixture is one unit, so that the fixture is made once, and all modules with a real
    vLLM are one, so that no two engines start at once. ``--dist loadgroup`` is meant for this, but pytest 9.2 does
    not show it the groups (pytest-xdist 3.8).
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        shared = _shared_by(module)
        return nodeid if shared == "nothing" else module if shared == "fixture" else shared


@functools.cache
def _text(module: str) -> str:
    return (TESTS.parent / module).read_text()


def _shared_by(module: str) -> str:
    text = _text(module)
    return "vllm" if "pytest.mark.vllm" in text else "fixture" if 'scope="module"' in text else "nothing"


def _starts_processes(item: pytest.Item) -> bool:
    text = _text(item.nodeid.partition("::")[0])
    return any(word in text for word in ("sys.executable", "Popen", "train_process", "kill_runs", "results_of_"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let workers begin with what starts processes, which takes longest: none waits for another in the end.

    Units of many tests are handed out before those of few as it is.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not _starts_processes(item))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Replace ``--dist load``, which ``-n`` asks for, by the above."""
    return ByWhatTheyShare(config, log) if config.getvalue("dist") == "load" else None


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: compressed ones hold a time, and workers must find the same tests."""
    return argname if isinstance(val, bytes) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, before any fixture is built."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM, which `make test` installs")


@pytest.fixture(autouse=True, scope="module")
def seed_of_what_tests_share() -> None:
    """Seed every generator before a module's fixtures, too, whatever ran before it."""
    _seed()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator and return the seed."""
    _seed()
    return 0


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
