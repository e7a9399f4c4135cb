"""Cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..formulas import TokenFormula, formula
from .record import NOT_NEGATIVE, SHARE, LossRecord

__all__ = ["CROSS_ENTROPY", "CrossEntropyArguments"]


@formula
def cross_entropy_token(logp, entropy, weight):
    return -weight * logp, -weight, 0.0, 1.0, False


class CrossEntropyArguments(NamedTuple):
    """The arguments of ``linear_cross_entropy`` of its own, which says what each means, in order.

    num_tokens, label_smoothing, z_loss_coef, token_weights, reduction.
    """

    num_tokens: int | Tensor | None
    label_smoothing: float
    z_loss_coef: float
    token_weights: Tensor | None
    reduction: str

    def check(self, labels: Tensor) -> None:
        """Raise ValueError unless the arguments fit together, and ``labels`` [N]."""
        CROSS_ENTROPY.check(labels, self._asdict())
        if self.reduction != "mean" and self.num_tokens is not None:
            raise ValueError(f'num_tokens is read only with reduction="mean", got {self.reduction!r}; drop one')


CROSS_ENTROPY = LossRecord(
    formulas={"": TokenFormula(cross_entropy_token)},
    terms=(),
    vectors=("token_weights",),
    choices={"reduction": ("mean", "sum", "none")},
    numbers={"label_smoothing": SHARE, "z_loss_coef": NOT_NEGATIVE},
    counts=("num_tokens",),
)
