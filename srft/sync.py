"""Weights to the engine, and the canary that proves they arrived."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.batch import pack
from srft.config import Config
from srft.data.prompts import Prompt
from srft.engine.base import Engine
from srft.engine.placement import place_engines
from srft.policy.forwards import packed_forward, sampler_logprobs
from srft.policy.model import device_of
from srft.policy.parallel import ALONE, World
from srft.policy.spread import Spread
from srft.policy.weights import whole_tensors
from srft.responses import Response

# Of two computations in fp32 that are the same but for the order of sums, nats.
FP32_TOLERANCE = 1e-4


class CanaryError(RuntimeError):
    """The engine samples from other weights than the trainer's."""


class WeightSync:
    """Pushes the policy to the engine and compares both on a fixed probe after every push.

    In fp32 no token may differ by more than 1e-4 nats. Where one of the two rounds to 16 bits, the differences are
    judged as a distribution, against those between the trainer and the same model with the engine's rounding: measured
    at the first push, and once more before a run is stopped, since a policy that grows sharper rounds more coarsely.

    Args:
        model: The policy, from ``model.prepare_policy``.
        engine: Receives its weights.
        probe: Token sequences of at least two tokens, scored after every push.
        config: The whole configuration: both dtypes, and ``train.canary_tolerance``, which overrides all this.
        world: The ranks, each of which has an engine to compare with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        probe: list[list[int]],
        config: Config,
        world: World = ALONE,
    ) -> None:
        self._model, self._engine, self._world = model, engine, world
        self._dtype, self._engine_dtype = config.compute_dtype, config.engine_dtype
        self._tolerance = config.train.canary_tolerance
        if self._tolerance is None and self._dtype == self._engine_dtype == torch.float32:
            self._tolerance = FP32_TOLERANCE
        self._sequences = [
            Response(s[:1], s[1:], is_demo=False, truncated=False, rollout_logprobs=[], text="")
            for s in probe
        ]
        self._probe = probe
        self._batches = pack(self._sequences, 8192, device_of(model))
        self._noise: Spread | None = None
        self._before: dict[str, Tensor] = {}

    def push(self, version: int) -> dict[str, float]:
        """Send every weight to the engine, then compare.

        Args:
            version: The engine's completions carry it from now on.

        Returns:
            Mean and largest |log p| difference on the probe, nats, and the noise they were judged against; the bytes
            that each engine was given (``sync/bytes``), and the seconds until it had them, without those of comparing
            (``time/weights``).

        Raises:
            CanaryError: When the differences are more than that, with what the numbers say about the cause.
        """
        sizes: list[int] = []
        start = time.perf_counter()
        self._engine.update_weights(_counted(whole_tensors(self._model, self._engine_dtype), sizes), version)
        seconds = time.perf_counter() - start
        trainer = self._trainer_logprobs()
        engine = torch.tensor([x for row in self._engine.score(self._probe) for x in row])
        if not self._all_agree(engine, trainer):
            self._noise = None
            if not self._all_agree(engine, trainer):
                own = "" if self._agree(engine, trainer) else self._diagnose(version, trainer, engine)
                raise CanaryError(next(filter(None, self._world.gather(own))))
        self._before = {"trainer": trainer, "engine": engine}
        spread = Spread.of(engine - trainer)
        metrics = {
            "canary/max_abs_diff": spread.largest, "canary/mean_abs_diff": spread.mean,
            "sync/bytes": sum(sizes), "time/weights": seconds,
        }  # fmt: skip
        return metrics if self._noise is None else metrics | {"canary/noise_mean": self._noise.mean}

    def _all_agree(self, engine: Tensor, trainer: Tensor) -> bool:
        """Whether every rank's engine has the weights; a rank that found out alone would leave the others waiting."""
        return all(self._world.gather(self._agree(engine, trainer)))

    def _agree(self, engine: Tensor, trainer: Tensor) -> bool:
        if self._tolerance is not None:
            return bool((engine - trainer).abs().max() <= self._tolerance)
        if self._noise is None:
            self._noise = self._measure_noise()
        return not Spread.of(engine - trainer).beyond(self._noise, FP32_TOLERANCE)

    def _measure_noise(self) -> Spread:
        """Between the trainer's precision and a sampler of the engine's, on the trainer's own weights."""
        rounded = sampler_logprobs(self._model, self._sequences, self._engine_dtype)
        return Spread.of(self._trainer_logprobs() - rounded)

    @torch.no_grad()
    def _trainer_logprobs(self) -> Tensor:
        by_sequence: dict[int, Tensor] = {}
        for batch in self._batches:
            logprobs, _ = packed_forward(self._model, batch, self._dtype)
            for sequence, place in batch.responses():
                by_sequence[id(sequence)] = logprobs[place].cpu()
        return torch.cat([by_sequence[id(s)] for s in self._sequences])

    def _diagnose(self, version: int, trainer: Tensor, engine: Tensor) -> str:
        spread, noise = Spread.of(engine - trainer), self._noise
        allowed = f"allowed: {self._tolerance:.0e}" if noise is None else f"its own rounding: {noise}"
        lines = [
            f"after weight update {version} the engine's log-probabilities differ from the trainer's by {spread} nats "
            f"({allowed})"
        ]
        tied = bool(self._model.config.get_text_config().tie_word_embeddings)
        if not torch.isfinite(trainer).all():
            lines.append(
                "the trainer's own log-probabilities are not finite: the policy diverged; lower train.lr"
            )
        elif not torch.isfinite(engine).all():
            lines.append(
                "the engine's log-probabilities are not finite: look for overflow in its precision, engine.dtype"
            )
        elif self._before and (engine - self._before["engine"]).abs().max() <= 1e-7:
            lines.append("the engine answers exactly as before the update: the new weights never arrived")
        elif self._before and self._agree(engine, self._before["trainer"]):
            lines.append(
                "the engine still answers as the previous version: it serves old weights or a cache of theirs"
            )
        elif self._before:
            cause = "a head that is a stale copy of tied embeddings, " if tied else ""
            lines.append(
                f"the engine changed but is not the new policy: suspect {cause}missing weights, or a cache"
            )
        else:
            lines.append(
                "they differ from the first update on: suspect its precision (engine.dtype) or model definition"
            )
        return "; ".join(lines)


def make_probe(prompts: list[Prompt], config: Config, world: World = ALONE) -> list[list[int]]:
    """Return a few prompts, with their demonstrations where they have some, cut to what an engine can score.

    Args:
        prompts: Those of training, one or more.
        config: The whole configuration.
        world: The ranks.

    Returns:
        As many as reach every engine that is asked in turn; prompts that are too few come again.
    """
    most, engines = min(256, config.longest_sequence - 1), place_engines(config, world).engines
    chosen = [prompts[i % len(prompts)] for i in range(max(min(4, len(prompts)), engines))]
    whole = [p.prompt_ids + (p.demo_ids[0] if p.demo_ids else []) for p in chosen]
    return [(ids if len(ids) > 1 else ids * 2)[:most] for ids in whole]


def _counted(named_tensors: Iterable[tuple[str, Tensor]], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; the bytes of those that were taken are in ``sizes``."""
    for name, tensor in named_tensors:
        sizes.append(tensor.nbytes)
        yield name, tensor
