"""Which engine a rank gets: its own on its own GPU, or one with the ranks beside it."""

from __future__ import annotations

import pytest
import torch

from srft.engine import start
from srft.policy.parallel import World
from tests.trainer.tiny import learner_of, plain_model, tiny_config

GPU = torch.device("cuda", 1)
CPU = torch.device("cpu")


def sharing(world: World, kind: str, *options: str) -> int:
    """What ``start_engine`` makes of the options, without a process."""
    config = tiny_config(*options)
    model = plain_model()
    learner = learner_of(config, model, torch.optim.SGD(model.parameters()))
    object.__setattr__(learner, "world", world)
    return start._ranks_per_engine(learner, kind)


@pytest.mark.parametrize(
    ("world", "kind", "here", "expected"),
    [
        (World(0, 4, CPU), "vllm", None, 4), (World(0, 4, CPU), "vllm", "2", 2), (World(0, 4, CPU), "hf", None, 1),
        (World(1, 4, GPU), "vllm", None, 1), (World(0, 1, CPU), "vllm", None, 1), (World(0, 4, GPU), "http", "2", 4),
    ],
)  # fmt: skip
def test_ranks_without_gpus_share_an_engine(
    world: World, kind: str, here: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one machine; ranks on GPUs, and those that sample in their own process, do not; all of them, servers."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert sharing(world, kind) == expected


def test_groups_that_do_not_fit_are_refused() -> None:
    """Groups of three in four ranks, and a group of an engine that has no process of its own."""
    assert sharing(World(0, 4, GPU), "vllm", "engine.ranks_per_engine=2") == 2
    with pytest.raises(ValueError, match="engine.ranks_per_engine=3 must divide.*machine, 4; take 1 or 4"):
        sharing(World(0, 4, CPU), "vllm", "engine.ranks_per_engine=3")
    with pytest.raises(ValueError, match="engine.ranks_per_engine=2, but engine.kind=hf.*leave it unset"):
        sharing(World(0, 4, CPU), "hf", "engine.ranks_per_engine=2")


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [(None, GPU, "1"), ("3,5", GPU, "5"), ("GPU-a,GPU-b", torch.device("cuda", 0), "GPU-a"), ("3,5", CPU, None)],
)
def test_engine_sees_the_gpu_of_its_rank(
    visible: str | None, device: torch.device, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other, by the name that this machine's ranks may see it under."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert start._own_device(World(1, 2, device)) == expected


def test_shared_engine_has_the_threads_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait while it samples; where they train meanwhile, it has what each leaves it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert start._threads(4, None) == 12 and start._threads(4, 1) == 4
