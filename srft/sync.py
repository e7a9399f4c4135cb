"""Weights to the engine, and the canary that proves they arrived."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.batch import Sequence, pack, unweighted
from srft.engine.base import Engine
from srft.model import final_hidden_states, head_arguments
from srft_kernels import linear_logprobs


class CanaryError(RuntimeError):
    """The engine samples from other weights than the trainer's."""


class WeightSync:
    """Pushes the policy to the engine and compares both on a fixed probe after every push.

    Args:
        model: The policy, from ``model.prepare_policy``.
        engine: Receives its weights.
        probe: Token sequences of at least two tokens, scored after every push.
        tolerance: Largest |log p| difference allowed on any probe token, nats.
        compute_dtype: Precision of the trainer's forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        probe: list[list[int]],
        tolerance: float,
        compute_dtype: torch.dtype,
    ) -> None:
        self._model, self._engine, self._tolerance, self._dtype = model, engine, tolerance, compute_dtype
        self._sequences = [
            Sequence(s[:1], s[1:], is_demo=False, truncated=False, rollout_logprobs=[], text="")
            for s in probe
        ]
        self._probe = probe
        self._batches = pack(self._sequences, 8192, unweighted, model.device)
        self._before: dict[str, Tensor] = {}

    def push(self, version: int) -> float:
        """Send every weight to the engine, then compare.

        Args:
            version: The engine's completions carry it from now on.

        Returns:
            Largest |log p| difference on the probe, nats.

        Raises:
            CanaryError: When the difference passes the tolerance, with what the numbers say about the cause.
        """
        self._engine.update_weights(self._model.state_dict().items(), version)
        trainer = self._trainer_logprobs()
        engine = torch.tensor([x for row in self._engine.score(self._probe) for x in row])
        difference = float((trainer - engine).abs().max())
        if not difference <= self._tolerance:
            raise CanaryError(self._diagnose(version, trainer, engine, difference))
        self._before = {"trainer": trainer, "engine": engine}
        return difference

    @torch.no_grad()
    def _trainer_logprobs(self) -> Tensor:
        by_sequence: dict[int, Tensor] = {}
        for batch in self._batches:
            logprobs, _ = linear_logprobs(
                final_hidden_states(self._model, batch, self._dtype),
                labels=batch.labels,
                **head_arguments(self._model, self._dtype),
            )
            for sequence, place in batch.responses():
                by_sequence[id(sequence)] = logprobs[place].cpu()
        return torch.cat([by_sequence[id(s)] for s in self._sequences])

    def _diagnose(self, version: int, trainer: Tensor, engine: Tensor, difference: float) -> str:
        mean = float((trainer - engine).abs().mean())
        lines = [
            f"after weight update {version} the engine's log-probabilities differ from the trainer's by "
            f"{difference:.2e} nats at most, {mean:.2e} on average (allowed: {self._tolerance:.0e})"
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
        elif self._before and (engine - self._before["trainer"]).abs().max() <= self._tolerance:
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
