"""The tolerance rules of the tests: as accurate as plain PyTorch in the same dtype, or as the size of what is summed.

No bound is relative to a sum whose terms may cancel: how much of it is left is chance, while its error is that of its
terms, and differs with the instructions of the processor.
"""

from __future__ import annotations

import torch
from torch import Tensor

# fp32 accumulation-order noise of O(1) results; measured on CPU at D <= 512
FORWARD_FLOOR = 1e-5
GRADIENT_FLOOR = 1e-4
GRADIENT_CAP = 5e-3
# A row of a gradient whose terms cancel keeps the noise of the terms: one unit in the last place of a log-probability
# beyond 8 nats, 1e-6, moves a coefficient by 1e-6 of a weight, however little is left of it. Of the size of a typical
# row this much is therefore the least that an error is compared with, and with GRADIENT_FLOOR the noise of a forward
# value, FORWARD_FLOOR, of that size.
SMALL_ROW = 0.1
# of the absolute values of what a sum adds up: a few roundings of each in fp32, the forward passes before it included
SUM_NOISE = 2e-6


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def assert_accurate(
    name: str, actual: Tensor, gold: Tensor, baseline: Tensor, *, gradient: bool = False
) -> None:
    """Fail unless ``actual`` is about as close to ``gold`` as ``baseline`` is.

    Forward values: max error at most twice the baseline's, plus 1e-5 and two roundings of the largest value; of a
    scalar, which is a sum over tokens whose terms are together no smaller than it, the noise of a sum of its size.
    Gradients: relative RMS error at most twice the baseline's plus 1e-4, and at most 5e-3; for a matrix also
    row by row, where a row below a tenth of a typical one is held to the noise of a tenth.

    Args:
        name: Shown on failure.
        actual: Result under test.
        gold: The same from the reference in float64, on the same rounded inputs.
        baseline: The same from the reference in the dtype under test.
        gradient: Apply the rule for gradients.
    """
    assert actual.shape == gold.shape, f"{name}: shape {list(actual.shape)}, expected {list(gold.shape)}"
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, expected {baseline.dtype}"
    epsilon = torch.finfo(actual.dtype).eps
    actual, gold, baseline = (x.detach().double().cpu() for x in (actual, gold, baseline))
    if actual.numel() == 0:
        return
    assert torch.equal(torch.isfinite(actual), torch.isfinite(gold)), (
        f"{name}: non-finite where gold is finite, or reverse"
    )
    finite = torch.isfinite(gold)
    assert torch.equal(actual[~finite], gold[~finite]), f"{name}: infinities differ"
    actual, gold, baseline = (torch.where(finite, x, 0.0) for x in (actual, gold, baseline))
    error, base_error = actual - gold, baseline - gold
    if not gradient:
        rounding = max(2 * epsilon, SUM_NOISE if gold.dim() == 0 else 0.0) * gold.abs().max()
        bound = 2 * base_error.abs().max() + FORWARD_FLOOR + rounding
        worst = error.abs().argmax()
        found = error.abs().max()
        where = [int(i) for i in torch.unravel_index(worst, error.shape)]
        assert found <= bound, (
            f"{name}: max error {found:.3e} > {bound:.3e} at {where}: "
            f"{actual.flatten()[worst]:.9g}, gold {gold.flatten()[worst]:.9g}"
        )
        return
    scale = _rms(gold)
    if scale == 0:
        assert not error.any(), f"{name}: expected exactly 0, got up to {error.abs().max():.3e}"
        return
    bound = min(2 * _rms(base_error) / scale + GRADIENT_FLOOR, GRADIENT_CAP)
    assert _rms(error) / scale <= bound, f"{name}: relative RMS error {_rms(error) / scale:.3e} > {bound:.3e}"
    if gold.dim() == 2:
        row_scale = gold.square().mean(1).sqrt().clamp(min=SMALL_ROW * scale)
        row_error = error.square().mean(1).sqrt() / row_scale
        row_base = base_error.square().mean(1).sqrt() / row_scale
        worst = row_error.argmax()
        bound = 2 * row_base.max() + GRADIENT_FLOOR
        assert row_error[worst] <= bound, (
            f"{name}: relative RMS error of row {worst} {row_error[worst]:.3e} > {bound:.3e}"
        )


def assert_sum(
    name: str, actual: float | Tensor, expected: float | Tensor, size: float, *, noise: float = SUM_NOISE
) -> None:
    """Fail unless a sum, or the norm of a difference of sums, is right for the size of what it adds up.

    Args:
        name: Shown on failure.
        actual: Result under test, a number or a tensor.
        expected: What it should be.
        size: Sum of the absolute values, or of the norms, of the terms.
        noise: Error allowed, as a share of ``size``.
    """
    error = torch.as_tensor(actual).double() - torch.as_tensor(expected).double()
    found = float(error.norm())
    assert found <= noise * size, (
        f"{name}: error {found:.3e} > {noise:g} of {size:.6g}; got {actual!r}, expected {expected!r}"
    )
