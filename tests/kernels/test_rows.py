"""The row backends on scores of any dtype, with labels of every kind, against float64."""

import pytest
import torch

from srft_kernels.objectives import CROSS_ENTROPY
from srft_kernels.rows import cpu as row_cpu
from srft_kernels.rows import gpu as row_kernels
from srft_kernels.rows.types import RowArguments
from tests.kernels.cases import case_id
from tests.numerics import assert_accurate

BACKEND = row_kernels if row_kernels.INTERPRETED else row_cpu
# under the interpreter bf16 is truncated where hardware rounds, and there is no float64 on a GPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DTYPES = DTYPES[:2] if row_kernels.INTERPRETED else DTYPES
ROW_OPTIONS = {
    "plain": {},
    "entropy": {"entropy": True},
    "scaled": {"grad_scale": 37.0, "temperature": True},
    "all": {"entropy": True, "grad_scale": -0.3, "temperature": True, "bias": True, "softcap": 4.0},
}


def expected_rows(z, rows: RowArguments, dlogp, dentropy) -> list[torch.Tensor]:
    """Statistics and gradient of rows of scores from autograd, in the dtype of ``z``."""
    z = z.detach().requires_grad_()
    logits = z if rows.bias is None else z + rows.bias.to(z)
    if rows.softcap is not None:
        logits = rows.softcap * torch.tanh(logits / rows.softcap)
    if rows.inv_temperature is not None:
        logits = logits * rows.inv_temperature.to(z)[:, None]
    kept, absent = rows.labels != rows.ignore_index, rows.labels < 0
    logprobs = logits.log_softmax(1)
    label_logit = torch.where(absent, 0.0, logits.gather(1, rows.labels.clamp(min=0)[:, None])[:, 0])
    top = logits.amax(1)
    log_sum = (logits - top[:, None]).exp().sum(1).log()
    logp = label_logit - top - log_sum
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(1)
    loss = logp * dlogp.to(z) + (0.0 if dentropy is None else entropy * dentropy.to(z))
    (grad,) = torch.autograd.grad((loss * rows.grad_scale)[kept].sum(), z)
    return [*(torch.where(kept, x, 0.0).detach() for x in (logp, entropy, top, log_sum)), grad]


def random_rows(dtype, *, entropy=False, temperature=False, bias=False, grad_scale=1.0, softcap=None):
    """Scores [11, 201], labels of every kind, and upstream gradients, of both signs."""
    wide = torch.promote_types(dtype, torch.float32)
    z = (torch.randn(11, 201) * 3).to(dtype)
    labels = torch.randint(0, 201, (11,))
    # ends of the vocabulary, ignored rows at either end and within, labels of another shard
    labels[1], labels[2], labels[[0, 5, 6, 10]], labels[[3, 9]] = 0, 200, -100, -1
    inv_temperature = torch.rand(11, dtype=wide) + 0.5 if temperature else None
    bias = torch.randn(201, dtype=wide) if bias else None
    rows = RowArguments(labels, inv_temperature, bias, softcap, -100, dtype, grad_scale)
    return z, rows, torch.randn(11, dtype=wide), torch.randn(11, dtype=wide) if entropy else None


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("options", ROW_OPTIONS.values(), ids=ROW_OPTIONS)
@pytest.mark.parametrize("overwrite", [False, True], ids=["kept", "overwritten"])
@pytest.mark.parametrize("exp2_vocab", [0] if row_kernels.INTERPRETED else [0, 2**15], ids="exp2-from-{}".format)
def test_rows_match_float64(dtype, options, overwrite, exp2_vocab, monkeypatch):
    """Statistics and gradient of scores of any dtype, with absent and ignored labels, in several blocks."""
    monkeypatch.setattr(row_cpu, "BLOCK_BYTES", 4 * 201 * 4)
    monkeypatch.setattr(row_cpu, "EXP2_VOCAB", exp2_vocab)
    monkeypatch.setattr(row_kernels, "_MAX_BLOCK_V", 64)
    monkeypatch.setattr(row_kernels, "_lanes", lambda _: 16)
    z, rows, dlogp, dentropy = random_rows(dtype, **options)
    z[7, 50:] = -torch.inf if rows.softcap is None else -50.0
    if overwrite and (dentropy is not None or rows.softcap is not None):
        pytest.skip("the caller promises not to")
    gold = expected_rows(z.double(), rows, dlogp, dentropy)
    baseline = expected_rows(z.to(dlogp.dtype), rows, dlogp, dentropy)
    known = BACKEND.stats(z, rows, overwrite)
    dz = BACKEND.gradient(z, rows, known, dlogp, dentropy, overwrite)
    for name, actual, expected, base in zip(known._fields, known, gold, baseline, strict=False):
        assert_accurate(name, actual, expected, base)
    assert_accurate("dz", dz, gold[4], baseline[4].to(dtype), gradient=True)
    assert dz.data_ptr() == z.data_ptr() and not dz[rows.labels == -100].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("options", ROW_OPTIONS.values(), ids=ROW_OPTIONS)
def test_gradient_elsewhere_is_that_in_place(dtype, options):
    """With ``out`` the scores are kept and the bits are those of the gradient in place."""
    z, rows, dlogp, dentropy = random_rows(dtype, **options)
    known = BACKEND.stats(z, rows, False)
    out, kept = torch.empty_like(z), z.clone()
    dz = BACKEND.gradient(z, rows, known, dlogp, dentropy, False, out=out)
    assert dz.data_ptr() == out.data_ptr() and torch.equal(z, kept)
    assert torch.equal(dz, BACKEND.gradient(z, rows, known, dlogp, dentropy, False))


def test_16_bit_gradient_of_fp32_scores_elsewhere():
    """``out`` may have the dtype that the gradient is wanted in."""
    z, rows, dlogp, _ = random_rows(torch.float32)
    rows = rows._replace(grad_dtype=torch.float16)
    known = BACKEND.stats(z, rows, False)
    out = torch.empty(z.shape, dtype=torch.float16)
    BACKEND.gradient(z, rows, known, dlogp, None, False, out=out)
    gold = expected_rows(z.double(), rows, dlogp, None)[4]
    assert_accurate("dz", out, gold, gold.half(), gradient=True)


@pytest.mark.skipif(not row_kernels.INTERPRETED, reason="one launch is a Triton kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_one_launch_is_two_passes(dtype, monkeypatch):
    """Statistics and gradient of an objective in one launch, in place, are those of two passes."""
    monkeypatch.setattr(row_kernels, "_MAX_BLOCK_V", 64)
    z, rows, weight, _ = random_rows(dtype, grad_scale=3.0, temperature=True)
    expected = BACKEND.stats(z, rows, False)
    out = BACKEND.gradient(z, rows, expected, -weight, None, False, out=torch.empty_like(z))
    known, dz = row_kernels.objective_gradient(
        z, rows, CROSS_ENTROPY.formulas[""], weight[None], (), False
    )
    assert dz.data_ptr() == z.data_ptr() and torch.equal(dz, out)
    assert all(torch.equal(x, y) for x, y in zip(known, expected, strict=True))


@pytest.mark.skipif(row_kernels.INTERPRETED, reason="of the CPU path, at its full size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_long_rows_do_not_depend_on_each_other(dtype):
    """Rows that several threads share, of a length that fills no vector, have the same bits alone."""
    z, labels, dlogp = torch.randn(5, 70_001).mul(3).to(dtype), torch.randint(0, 70_001, (5,)), torch.randn(5)

    def compute(part):
        rows = RowArguments(labels[part], None, None, None, -100, dtype)
        known = row_cpu.stats(z[part], rows, False)
        return *known, row_cpu.gradient(z[part].clone(), rows, known, dlogp[part], dlogp[part], False)

    together = compute(slice(0, 5))
    for i in range(5):
        alone = compute(slice(i, i + 1))
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(together, alone, strict=True))
