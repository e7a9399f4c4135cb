"""An engine sleeps while training has its GPU: the order of calls, with a stand-in for vLLM in the worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srft import learning, prepare, train
from srft.engine.base import EngineLost
from srft.engine.hf import HfEngine
from srft.engine.placement import place_engines
from srft.engine.shared import SharedEngine
from srft.engine.vllm import VllmEngine
from srft.evaluate import _Starting
from srft.policy.parallel import World
from tests.trainer import runs
from tests.trainer.tiny import tiny_config

# what the worker imports, each of it no more than it takes to write down what is called
STAND_INS = {
    "torch/__init__.py": "",
    "torch/_dynamo.py": "",
    "safetensors/__init__.py": """
class safe_open:
    def __init__(self, path, framework): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def keys(self): return ["a"]
    def get_tensor(self, name): return name
""",
    "vllm/platforms.py": """
class current_platform:
    is_cpu = staticmethod(lambda: False)
""",
    "vllm/__init__.py": """
import os
from types import SimpleNamespace

def note(*words):
    with open(os.environ["CALLS"], "a") as file:
        print(*words, file=file)

class LLM:
    def __init__(self, **settings):
        note("start", settings["enable_sleep_mode"])
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 10)
        executor = SimpleNamespace(is_failed=False)
        self.llm_engine = SimpleNamespace(
            step=None, engine_core=SimpleNamespace(engine_core=SimpleNamespace(model_executor=executor))
        )
    def sleep(self, level): note("sleep", level)
    def wake_up(self, tags): note("wake", *tags)
    def reset_prefix_cache(self): note("reset"); return True
    def collective_rpc(self, method, args):
        note(method.__name__, *(name for name, _ in args[0]))
        if os.path.exists(os.environ["CALLS"] + ".fails"):
            raise RuntimeError("out of memory")
""",
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the worker's vLLM was asked for since the last look."""
    for name, text in STAND_INS.items():
        (path := tmp_path / "stand-ins" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (written := tmp_path / "calls").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-ins"))
    monkeypatch.setenv("CALLS", str(written))

    def new() -> list[str]:
        lines = written.read_text().splitlines()
        written.write_text("")
        return lines

    return new


def started(folder: Path, *, sleeps: bool) -> VllmEngine:
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    log = folder / "engine.log"
    return VllmEngine(folder, dtype="float32", max_model_len=8, log_path=log, sleeps=sleeps, start_timeout_s=60)


def test_an_engine_wakes_for_its_weights_and_then_for_its_cache(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    """Asleep, it has room for the weights first; the cache of the old ones is dropped before there is a new one."""
    weights = [("a", torch.ones(2))]
    engine = started(tmp_path, sleeps=True)
    engine.update_weights(weights, 1)
    assert calls() == ["start True", "replace_weights a", "reset"]
    engine.sleep()
    engine.sleep()
    assert calls() == ["sleep 2"]
    engine.update_weights(weights, 2)
    assert calls() == ["wake weights", "replace_weights a", "reset", "wake kv_cache"]
    engine.update_weights(weights, 3)
    assert calls() == ["replace_weights a", "reset"] and engine.version == 3
    engine.close()


def test_an_engine_that_has_its_memory_does_not_sleep(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    """Nor is vLLM told that it could."""
    engine = started(tmp_path, sleeps=False)
    engine.sleep()
    assert calls() == ["start False"]
    engine.close()


def test_an_engine_that_wakes_in_vain_is_closed(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    """It has neither the old weights nor the new ones."""
    engine = started(tmp_path, sleeps=True)
    engine.sleep()
    (tmp_path / "calls.fails").touch()
    with pytest.raises(RuntimeError, match="vLLM failed in update.*out of memory"):
        engine.update_weights([("a", torch.ones(2))], 1)
    with pytest.raises(RuntimeError, match="is closed"):
        engine.score([[1, 2]])


class Sleeper:
    """Writes down what it is asked for, and dies of its first sleep."""

    def __init__(self, said: list[str], dies: bool) -> None:
        self.said, self.dies, self.version, self.restarts = said, dies, 0, 0

    def update_weights(self, named_tensors: Any, version: int) -> None:
        self.said.append(f"weights {len(list(named_tensors))}")

    def sleep(self) -> None:
        self.said.append("sleep")
        if self.dies:
            raise EngineLost("it died")

    def close(self) -> None:
        self.said.append("close")


@pytest.mark.parametrize("sleeps", [True, False])
def test_training_leaves_no_memory_to_itself_before_an_engine_wakes(
    sleeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its allocator gives back what it keeps; an engine lost in its sleep is replaced by one that sleeps."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: said.append("empty"))
    plan = [Sleeper(said, dies=True), Sleeper(said, dies=False)]
    shared = SharedEngine(lambda: plan.pop(0), lambda: [("a", torch.ones(1))], World(), 1, 3, sleeps=sleeps)
    shared.sleep()
    shared.update_weights([("a", torch.ones(1))], 1)
    again = ["sleep", "close", "weights 1", "sleep", "empty"] if sleeps else []
    assert said == [*again, "weights 1"] and shared.restarts == sleeps


def test_a_step_lets_the_engine_sleep_from_its_rollouts_to_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the largest micro-batches, computed before the first step, find it asleep."""
    said: list[str] = []

    def noted(owner: Any, name: str, word: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **named: Any) -> Any:
            said.append(word)
            return real(*args, **named)

        monkeypatch.setattr(owner, name, call)

    for name in ("sleep", "generate", "update_weights"):
        noted(HfEngine, name, name)
    noted(train, "learn", "learn")
    noted(learning, "accumulate", "compute")
    noted(prepare, "worst_case", "worst")
    runs.train(tmp_path, train__steps=1, train__eval_every=1, train__page=False)
    kept = [word for i, word in enumerate(said) if word != "compute" and said[i - 1 : i] != [word]]
    assert kept == [
        "sleep", "worst", "update_weights", "generate", "sleep", "learn", "update_weights", "generate",
    ]  # fmt: skip


def test_an_evaluation_has_nothing_to_sleep_beside(tmp_path: Path) -> None:
    """The options of a run whose engine slept are no error of who evaluates it."""
    asked = SimpleNamespace(prompts=[SimpleNamespace(prompt_ids=[1, 2])], sampling=SimpleNamespace(max_new_tokens=4))
    config = tiny_config("engine.kind=vllm", "engine.sleep=true")
    starting = _Starting(config, None, [SimpleNamespace(drawing=asked)], tmp_path, ExitStack())
    assert place_engines(starting._config, World()).sleeps is False
