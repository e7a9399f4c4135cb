"""The canary: silent when the weights arrived, and right about the cause when they did not."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from srft.engine.hf import HfEngine
from srft.sync import CanaryError, WeightSync
from tests.trainer.tiny import plain_model, policy

PROBE = [[5, 6, 7, 8], [9, 10], [3, 4, 5, 6, 7, 8, 9]]


class FaultyEngine(HfEngine):
    """Takes the first update; of later ones only tensors whose name ``takes`` accepts."""

    def __init__(self, model: torch.nn.Module, takes: str) -> None:
        super().__init__(model, dtype=torch.float32, pad_token_id=0, max_batch=8)
        self.takes = takes

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        kept = [(n, t) for n, t in named_tensors if version == 0 or self.takes in n]
        super().update_weights(kept, version)


class Noisy(FaultyEngine):
    """Scores differ in the sixth place from call to call, as those of a batched engine do."""

    calls = 0

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        self.calls += 1
        return [[x + 2e-6 * self.calls for x in row] for row in super().score(sequences)]


class Broken(HfEngine):
    """Scores NaN from version 1 on."""

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        rows = super().score(sequences)
        return [[float("nan") for _ in row] for row in rows] if self.version else rows


def sync_of(model: torch.nn.Module, engine: HfEngine) -> WeightSync:
    return WeightSync(model, engine, PROBE, 1e-4, torch.float32)


def move(model: torch.nn.Module, scale: float = 0.05) -> None:
    """What an optimizer step does to the weights."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_true_sync_passes(tied: bool) -> None:
    """Three versions in a row agree to rounding."""
    model = policy(plain_model(tied=tied))
    engine = HfEngine(model, dtype=torch.float32, pad_token_id=0, max_batch=8)
    sync = sync_of(model, engine)
    for version in range(3):
        assert sync.push(version) <= 1e-5
        assert engine.version == version
        move(model)


def test_stale_engine() -> None:
    """An engine that ignores an update is said to have got nothing."""
    model = policy(plain_model())
    sync = sync_of(model, FaultyEngine(model, takes="nothing"))
    sync.push(0)
    move(model)
    with pytest.raises(CanaryError, match="after weight update 1 .*the new weights never arrived"):
        sync.push(1)


def test_engine_on_the_previous_version() -> None:
    """Old weights are recognised through an engine's rounding noise."""
    model = policy(plain_model())
    sync = sync_of(model, Noisy(model, takes="nothing"))
    sync.push(0)
    move(model)
    with pytest.raises(CanaryError, match="still answers as the previous version"):
        sync.push(1)


@pytest.mark.parametrize(("tied", "takes"), [(True, "layers"), (False, "layers"), (False, "lm_head")])
def test_half_updated_engine(tied: bool, takes: str) -> None:
    """A part that is missing is suspected; a stale head only where embeddings are tied."""
    model = policy(plain_model(tied=tied))
    sync = sync_of(model, FaultyEngine(model, takes=takes))
    sync.push(0)
    move(model)
    with pytest.raises(CanaryError, match="changed but is not the new policy.*missing weights") as caught:
        sync.push(1)
    assert ("tied embeddings" in str(caught.value)) is tied


def test_trainer_with_nan_weights() -> None:
    """The policy is blamed, not the engine."""
    model = policy(plain_model())
    sync = sync_of(model, HfEngine(model, dtype=torch.float32, pad_token_id=0, max_batch=8))
    sync.push(0)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(CanaryError, match="trainer's own log-probabilities are not finite"):
        sync.push(1)


def test_engine_that_answers_nan() -> None:
    """The engine is blamed."""
    model = policy(plain_model())
    sync = sync_of(model, Broken(model, dtype=torch.float32, pad_token_id=0, max_batch=8))
    sync.push(0)
    with pytest.raises(CanaryError, match="engine's log-probabilities are not finite"):
        sync.push(1)


def test_difference_from_the_first_update_on() -> None:
    """Nothing to compare with: precision or model definition is suspected."""
    engine = FaultyEngine(policy(plain_model(seed=1)), takes="")
    sync = sync_of(policy(plain_model(seed=0)), engine)
    engine.update_weights = lambda named_tensors, version: None  # type: ignore[method-assign]
    with pytest.raises(CanaryError, match="from the first update on"):
        sync.push(0)
