"""The canary: silent when the weights arrived, and right about the cause when they did not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from srft.engine.hf import HfEngine
from srft.policy.spread import Spread
from srft.sync import CanaryError, WeightSync, make_probe
from tests.trainer.many_syncs import hf_engine, many_syncs
from tests.trainer.tiny import plain_model, policy, random_groups, tiny_config

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
    return WeightSync(model, engine, PROBE, tiny_config())


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
        assert sync.push(version)["canary/max_abs_diff"] <= 1e-5
        assert engine.version == version
        move(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_many_syncs(tied: bool, dtype: str) -> None:
    """Twenty of unlike weights; each says how many bytes went, once for tied ones, and how long they took."""
    model = plain_model(tied=tied)
    engine = hf_engine(model, dtype)
    seen = many_syncs(20, model, engine, dtype)
    assert engine.version == 20
    assert seen.worst <= 1e-4 if dtype == "float32" else seen.worst_mean > 1e-4
    assert seen.bytes == sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    assert len(seen.seconds) == 20 and min(seen.seconds) > 0


@pytest.mark.parametrize(("servers", "prompts", "count"), [(1, 9, 4), (1, 2, 2), (6, 9, 6), (6, 2, 6)])
def test_the_probe_reaches_every_engine(servers: int, prompts: int, count: int) -> None:
    """Engines that share what is asked get a sequence each; prompts that are too few come again."""
    urls = [f"http://a:{port}" for port in range(1, servers + 1)]
    config = tiny_config("engine.kind=http", f"engine.urls={urls}", "engine.weights_dir=/w")
    drawn = [group.prompt for group in random_groups(prompts)]
    probe = make_probe(drawn, config)
    assert len(probe) == count and all(1 < len(sequence) < config.longest_sequence for sequence in probe)
    assert [sequence[0] for sequence in probe] == [drawn[i % prompts].prompt_ids[0] for i in range(count)]


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


LONG_PROBE = [[2 + (7 * i * k + i) % 35 for i in range(40)] for k in range(1, 5)]


def coarse_sync(model: torch.nn.Module, engine: HfEngine, *overrides: str) -> WeightSync:
    return WeightSync(model, engine, LONG_PROBE, tiny_config("model.compute_dtype=bfloat16", *overrides))


def coarse_engine(model: torch.nn.Module) -> HfEngine:
    return HfEngine(model, dtype=torch.bfloat16, pad_token_id=0, max_batch=8)


class Off(HfEngine):
    """A bf16 engine whose log-probabilities are changed after the first update."""

    def __init__(self, model: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, dtype=torch.bfloat16, pad_token_id=0, max_batch=8)
        self.change = change

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        rows = super().score(sequences)
        return [self.change(torch.tensor(row)).tolist() if self.version else row for row in rows]


@pytest.mark.parametrize(
    "words", [[], ["model.compute_dtype=float32", "engine.dtype=bfloat16"]], ids=["both", "engine"]
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bf16_passes_within_its_own_rounding(tied: bool, words: list[str]) -> None:
    """Whatever the weights become: a policy that grows sharp has more rounding, which is measured again."""
    model = policy(plain_model(tied=tied))
    sync = coarse_sync(model, coarse_engine(model), *words)
    first = sync.push(0)
    assert 1e-3 < first["canary/noise_mean"] < 0.1
    for version in range(1, 4):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.4)
        last = sync.push(version)
    assert last["canary/mean_abs_diff"] > 2 * first["canary/noise_mean"], "sharper, or the test shows nothing"
    assert last["canary/noise_mean"] > first["canary/noise_mean"]


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        # all of them within the 0.3 nats that a bound on the largest difference would have to allow
        (lambda row: row - 0.1, "mean"),
        (lambda row: torch.where(torch.arange(len(row)) % 5 == 0, row - 0.25, row), "p90"),
        (lambda row: torch.where(torch.arange(len(row)) == 7, row - 1.0, row), "largest"),
    ],
    ids=["every-token", "one-in-five", "one-a-sequence"],
)
def test_bf16_errors_beyond_its_own_rounding(change: Callable[[Tensor], Tensor], measure: str) -> None:
    """A shift of every token, of some, of one."""
    model = policy(plain_model())
    sync = coarse_sync(model, Off(model, change))
    sync.push(0)
    with pytest.raises(CanaryError, match="its own rounding: mean .*e-0.*changed but is not the new policy"):
        sync.push(1)
    engine = torch.cat([change(torch.zeros(39)) for _ in LONG_PROBE])
    assert measure in Spread.of(engine).beyond(sync._noise, 1e-4)


def test_bf16_stale_engine() -> None:
    """Weights that moved by less than the old bound on the largest difference."""
    model = policy(plain_model())
    engine = coarse_engine(model)
    sync = coarse_sync(model, engine)
    sync.push(0)
    before = sync._before["trainer"]
    engine.update_weights = lambda named_tensors, version: None  # type: ignore[method-assign]
    move(model, scale=0.002)
    assert 0.05 < float((sync._trainer_logprobs() - before).abs().max()) < 0.3
    with pytest.raises(CanaryError, match="the new weights never arrived"):
        sync.push(1)


def test_tolerance_overrides() -> None:
    """A number of the user's is the bound on the largest difference, and nothing is measured."""
    model = policy(plain_model())
    sync = coarse_sync(model, Off(model, lambda row: row - 0.25), "train.canary_tolerance=0.5")
    sync.push(0)
    assert 0.2 < sync.push(1)["canary/max_abs_diff"] < 0.5
    strict = coarse_sync(model, coarse_engine(model), "train.canary_tolerance=1e-4")
    with pytest.raises(CanaryError, match="allowed: 1e-04"):
        strict.push(0)
