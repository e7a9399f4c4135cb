"""Where the engines of a rank are: on its own GPU, with the ranks beside it, on GPUs of their own; how they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from srft import prepare
from srft.engine import start
from srft.engine import vllm as client
from srft.engine.placement import Placement, place_engines
from srft.policy.parallel import World
from tests.trainer import runs
from tests.trainer.tiny import learner_of, plain_model, tiny_config

CPU = torch.device("cpu")


def gpu(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cuda", rank))


GPU = gpu(1, 4)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs, all of them visible, and no launcher."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def placed(world: World, kind: str, *options: str) -> Placement:
    servers = ["engine.urls=http://a:1", "engine.weights_dir=/w"] if kind == "http" else []
    return place_engines(tiny_config(f"engine.kind={kind}", *servers, *options), world)


@pytest.mark.parametrize(
    ("world", "kind", "here", "expected"),
    [
        (World(0, 4, CPU), "vllm", None, 4), (World(0, 4, CPU), "vllm", "2", 2), (World(0, 4, CPU), "hf", None, 1),
        (GPU, "vllm", None, 1), (World(0, 1, CPU), "vllm", None, 1), (gpu(0, 4), "http", "2", 4),
    ],
)  # fmt: skip
def test_ranks_without_gpus_share_an_engine(
    world: World, kind: str, here: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one machine; ranks on GPUs, and those that sample in their own process, do not; all of them, servers."""
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert placed(world, kind).ranks_per_engine == expected


@pytest.mark.parametrize(
    ("visible", "world", "options", "expected"),
    [
        (None, GPU, [], ("1",)), ("3,5", gpu(1, 2), [], ("5",)), ("GPU-a,GPU-b", gpu(0, 2), [], ("GPU-a",)),
        ("3,5", World(0, 2, CPU), [], (None,)), (None, gpu(0, 1), [], (None,)),
        (None, gpu(3, 4), ["engine.tensor_parallel=2"], ("2,3",)),
        (None, gpu(3, 4), ["engine.ranks_per_engine=2"], ("2",)),
        (None, gpu(0, 1), ["engine.devices=[1]"], ("1",)),
        ("a,b,c,d,e", gpu(0, 1), ["engine.devices=[1,3,4,2]", "engine.tensor_parallel=2"], ("b,d", "e,c")),
        (None, gpu(1, 2), ["engine.devices=[4,5,6,7]"], ("6", "7")),
        (None, gpu(3, 4), ["engine.devices=[4,5,6,7]", "engine.tensor_parallel=2"], ("6,7",)),
        (None, World(0, 1, CPU), ["engine.devices=[0,1]"], ("0", "1")),
    ],
)  # fmt: skip
def test_engines_see_their_gpus(
    visible: str | None, world: World, options: list[str], expected: tuple[str | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And no others, by the names that this machine's ranks may see them under."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = placed(world, "vllm", *options)
    assert found.visible == expected
    assert found.shares_device == (world.device.type == "cuda" and not any("devices" in word for word in options))


def test_ranks_share_what_is_less_than_one_each() -> None:
    """Two engines of four ranks have two each, and engines of two GPUs the ranks that have these."""
    assert placed(gpu(0, 4), "vllm", "engine.devices=[4,5]").ranks_per_engine == 2
    assert placed(gpu(0, 4), "vllm", "engine.tensor_parallel=2").ranks_per_engine == 2
    assert placed(World(0, 4, CPU), "vllm", "engine.tensor_parallel=2").ranks_per_engine == 4


@pytest.mark.parametrize(
    ("world", "options", "expected"),
    [
        (gpu(0, 1), [], True), (gpu(0, 1), ["rollout.max_lag=1"], False), (gpu(0, 1), ["engine.sleep=false"], False),
        (gpu(0, 1), ["engine.devices=[1]"], False), (World(0, 1, CPU), [], False),
    ],
)  # fmt: skip
def test_engines_sleep_where_training_takes_turns_with_them(world: World, options: list[str], expected: bool) -> None:
    """On the GPU that both have, unless they work at once or it is not wanted."""
    assert placed(world, "vllm", *options).sleeps is expected


@pytest.mark.parametrize(
    ("world", "kind", "options", "message"),
    [
        (World(0, 4, CPU), "vllm", ["engine.ranks_per_engine=3"], "per_engine=3 must divide.*machine, 4; take 1 or 4$"),
        (World(0, 4, CPU), "hf", ["engine.ranks_per_engine=2"], "per_engine=2, but engine.kind=hf.*leave it unset"),
        (gpu(0, 4), "vllm", ["engine.tensor_parallel=4", "engine.ranks_per_engine=2"], "the 2 ranks .* a GPU each"),
        (gpu(0, 4), "vllm", ["engine.tensor_parallel=3"], "must divide.*set engine.tensor_parallel lower"),
        (gpu(0, 1), "vllm", ["engine.devices=[7,8]"], r"devices=\[7, 8\] has 8, but torch sees 8 GPUs, from 0; name"),
        (gpu(0, 4), "vllm", ["engine.devices=[3,4]"], "has 3, but training computes on the first 4, .* from 4 on"),
        (gpu(0, 2), "vllm", ["engine.devices=[2,3,4]"], "makes 3 engines of 1 for 2 ranks.*must divide the other"),
        (World(0, 1, CPU), "auto", ["engine.devices=[0]"], r"devices=\[0\] is for engine.kind=vllm, got hf"),
        (World(0, 1, CPU), "auto", ["engine.tensor_parallel=2"], "tensor_parallel=2 is for engine.kind=vllm, got hf"),
        (World(0, 1, CPU), "vllm", ["engine.sleep=true"], "sleep=true is for an engine on the GPU that training"),
        (gpu(0, 1), "vllm", ["engine.sleep=true", "rollout.max_lag=1"], "the two in turn"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(world: World, kind: str, options: list[str], message: str) -> None:
    """By the ranks, the GPUs that are there, those that train, and the engine's kind."""
    with pytest.raises(ValueError, match=message):
        placed(world, kind, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["engine.kind=hf", "engine.devices=[1]"], r"devices=\[1\] is for engine.kind=vllm, got hf"),
        (["engine.devices=[1,1]"], "names a GPU twice"),
        (["engine.devices=[1,2,3]", "engine.tensor_parallel=2"], "are 3 GPUs, which engine.tensor_parallel=2 does not"),
        (["engine.devices=[1,2]", "engine.ranks_per_engine=2"], "says how many engines there are; leave it unset"),
    ],
)
def test_options_that_contradict_are_refused(options: list[str], message: str) -> None:
    """Before anybody has looked at the machine."""
    with pytest.raises(ValueError, match=message):
        tiny_config(*options)


def test_shared_engine_has_the_threads_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait while it samples; where they train meanwhile, it has what each leaves it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert start._threads(4, None) == 12 and start._threads(4, 1) == 4


class Recorded:
    """In place of vLLM: remembers how it was started."""

    all: list[Recorded] = []

    def __init__(self, model_dir: Path, **settings: Any) -> None:
        self.settings, self.version, self.folders = settings, 0, []
        self.all.append(self)

    def close(self) -> None:
        pass


def test_engines_are_started_as_they_are_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of two GPUs each for one process, each with its log, awake, on the threads that two processes share."""
    monkeypatch.setattr(client, "VllmEngine", Recorded)
    monkeypatch.setattr(start, "export_model", lambda *_: None)
    monkeypatch.setattr(Recorded, "all", [])
    model = plain_model()
    config = tiny_config("engine.kind=vllm", "engine.devices=[2,3,4,5]", "engine.tensor_parallel=2")
    learner = learner_of(config, model, torch.optim.SGD(model.parameters()))
    start.start_engine(learner, tmp_path, threads=6).close()
    started = sorted((engine.settings for engine in Recorded.all), key=lambda settings: settings["visible_devices"])
    assert [(s["visible_devices"], s["log_path"].name) for s in started] == [
        ("2,3", "vllm-0-0.log"), ("4,5", "vllm-0-1.log"),
    ]  # fmt: skip
    assert all((s["tensor_parallel"], s["num_threads"], s["sleeps"]) == (2, 3, False) for s in started)


def test_a_run_is_refused_before_its_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that names the option."""

    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(prepare, "load_policy", never)
    with pytest.raises(ValueError, match="engine.tensor_parallel=2 is for engine.kind=vllm, got hf"):
        runs.train(tmp_path, engine__tensor_parallel=2)
