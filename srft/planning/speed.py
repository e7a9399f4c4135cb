"""How fast a run is beside what its device and its plan allow: the figures ``speed/*`` of every row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from srft.config import Config
from srft.planning.devices import Device, known_gpu, product_rate, this_cpu
from srft.planning.memory import Layout
from srft.planning.models import ModelShape, measure_shape
from srft.planning.pace import Tokens, plan_pace, training_flops
from srft.planning.trace import BodyPasses, trace_body
from srft.policy.learner import Learner


class Speed:
    """Measures a run by its rows.

    Args:
        learner: The policy in training; every rank must make one.

    What is not known is left out of the rows: the work of a mixture of experts, the rates of a GPU that is not in
    ``devices``.
    """

    def __init__(self, learner: Learner) -> None:
        self._config, self._size = learner.config, learner.world.size
        self._device = _device_of(learner)
        self._shape, self._passes, self._teacher = _planned(learner)
        train = learner.config.train
        self._layout: Layout | None = None
        if self._device is not None:
            shard = train.shard_ranks or self._size
            checkpointing, tokens = learner.config.model.gradient_checkpointing, learner.config.microbatch_tokens
            self._layout = Layout(self._device, tokens, self._size, shard, checkpointing, train.cpu_offload)

    def with_figures(self, row: Mapping[str, float]) -> dict[str, float]:
        """Return a row with its speed.

        Args:
            row: All of a step, with its seconds by part and its tokens, over all ranks.

        Returns:
            The row, with ``speed/tokens_per_s`` of the step without evaluation, ``speed/mfu``, the share of the peak
            of all devices' products that training reached with what it took of these tokens, recomputation not
            counted, and ``speed/planned_s``, what the plan allows for ``time/train`` of them.
        """
        tokens, seconds = row.get("tokens/step", 0), row.get("time/train", 0.0)
        figures = dict(row)
        whole = row.get("time/step", 0.0) - row.get("time/eval", 0.0)
        if tokens and whole > 0:
            figures["speed/tokens_per_s"] = tokens / whole
        if self._shape is None or self._layout is None or not tokens or seconds <= 0:
            return figures
        if not (trained := row.get("tokens/trained", tokens)):
            return figures
        # a method may learn from a part of what was passed on, taken to be like the whole
        taken = {key: row[key] * trained / tokens for key in ("tokens/step", "tokens/counted", "tokens/squared")}
        # what a prompt's further sequences do not compute again, and the pairs among it, a little less than all of them
        shared = row.get("tokens/shared", 0.0)
        taken["tokens/step"] *= 1 - shared
        taken["tokens/squared"] *= 1 - shared**2
        flops = training_flops(self._shape, *taken.values())
        figures["speed/mfu"] = flops / seconds / (self._layout.device.flops * self._size)
        if self._passes is not None:
            figures["speed/planned_s"] = self._planned_seconds(self._shape, self._passes, self._layout, taken)
        return figures

    def _planned_seconds(
        self, shape: ModelShape, passes: BodyPasses, layout: Layout, row: Mapping[str, float]
    ) -> float:
        # sequences of the mean length that have as many tokens and squares
        length = max(1, round(row["tokens/squared"] / row["tokens/step"]))
        response = max(1, round(length * row["tokens/counted"] / row["tokens/step"]))
        lengths = Tokens(max(0, length - response), response)
        count = row["tokens/step"] / lengths.sequence
        return plan_pace(shape, passes, self._config, layout, lengths, 0, count, self._teacher).train


def _device_of(learner: Learner) -> Device | None:
    """What a rank computes on; of a CPU its share, for all ranks measure at once."""
    device = learner.world.device
    if device.type == "cuda":
        return known_gpu(torch.cuda.get_device_properties(device).name)
    rate = product_rate(device, learner.config.compute_dtype)
    mean = learner.world.sum([rate])[0] / learner.world.size
    return this_cpu(mean)


def _planned(learner: Learner) -> tuple[ModelShape | None, BodyPasses | None, ModelShape | None]:
    config, teacher = learner.config, learner.frozen.teacher
    try:
        shape = measure_shape(learner.model)
    except ValueError:  # a mixture of experts, whose work is not known from shapes
        return None, None, None
    tokens = config.microbatch_tokens
    try:
        return shape, _trace(learner, config, tokens), None if teacher is None else measure_shape(teacher)
    except ValueError:  # passes that cannot be traced, or a teacher's experts: the policy's products are known anyway
        return shape, None, None


# a process that trains several times, as a test does, traces a shape once
_traced: dict[tuple[object, ...], BodyPasses] = {}


def _trace(learner: Learner, config: Config, tokens: int) -> BodyPasses:
    shape, checkpointing = learner.model.config, config.model.gradient_checkpointing
    key = (shape.to_json_string(), str(config.model.lora), config.compute_dtype, tokens, checkpointing)
    if key not in _traced:
        _traced[key] = trace_body(shape, config, tokens, max(1, tokens // 2), checkpointing=checkpointing)
    return _traced[key]
