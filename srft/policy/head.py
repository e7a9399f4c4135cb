"""The head of a policy as the trainer calls it: ``head(hidden_states, op)``, for every loss and every score."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from srft_kernels import FusedLMHead

_T = TypeVar("_T")


class PolicyHead(FusedLMHead):
    """A ``FusedLMHead`` whose bias is rounded to the precision of the hidden states, as its weight is.

    So autocast and an engine in that precision have it, from whose log-probabilities training must not differ.
    """

    def forward(self, hidden_states: Tensor, op: Callable[..., _T]) -> _T:
        """As ``FusedLMHead.forward``.

        Args:
            hidden_states: [N, D]; their dtype is that of the computation.
            op: A fused op with its other arguments bound by ``functools.partial``, or ``no_head``.
        """
        if op is no_head:
            return op(hidden_states, self.weight)
        return super().forward(hidden_states, partial(_with_rounded_bias, op))


def no_head(hidden_states: Tensor, _weight: Tensor) -> Tensor:
    """Compute nothing: an op for whoever asks for what a policy computes before its head.

    Args:
        hidden_states: [N, D].

    Returns:
        A 0-d zero.
    """
    return hidden_states.new_zeros(())


def make_head(model: PreTrainedModel) -> PolicyHead:
    """Return a head that shares the parameters of a model's lm_head and follows it, with its scale and softcap.

    Args:
        model: A causal LM.

    Raises:
        ValueError: When its lm_head is not a linear layer.
    """
    try:
        return PolicyHead.from_model(model)
    except ValueError as error:
        raise ValueError(
            f"{model.config.get_text_config().model_type} has a head that the fused losses do not compute: {error}"
        ) from error


def _with_rounded_bias(op: Callable[..., _T], hidden_states: Tensor, weight: Tensor, **options: Any) -> _T:
    if (bias := options.get("bias")) is not None:
        options["bias"] = bias.to(hidden_states.dtype)
    return op(hidden_states, weight, **options)
