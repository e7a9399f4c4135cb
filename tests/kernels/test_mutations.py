"""The accuracy check is sharp: each small fault, planted in a copy of the package, must make it fail.

Under the interpreter the faults go into the Triton kernels; without it, into the CPU twin and the formulas.
"""

import functools
import importlib.util
import itertools
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srft_kernels.rows import gpu as row_kernels
from tests.kernels.cases import assert_matches_reference, cross_entropy, grpo, make_case, srft, token_loss
from tests.kernels.formula_faults import FORMULA_FAULTS

_COPIES = itertools.count()
PACKAGE = Path(__file__).resolve().parents[2] / "srft_kernels"


def long_sequence(module, case, **options):
    """token_loss with the ratio of one sequence of all tokens."""
    cu_seqlens = torch.tensor([0, case.labels.numel()])
    return token_loss(module, case, policy="gspo", cu_seqlens=cu_seqlens, **options)


def padded(module, case, **options):
    """cross_entropy of a vocabulary whose last words a bias of -inf removes, under a softcap."""
    bias = torch.cat([case.bias[:-9], torch.full((9,), -float("inf"))])
    labels = case.labels.clamp(max=87)
    return cross_entropy(module, replace(case, bias=bias, labels=labels), logit_softcap=2.0, **options)


# name: (file, text, its replacement, op, options of the op that shows it)
CPU_FAULTS = {
    "drop the last column": (
        "rows/cpu.py",
        "total = _row_sums(exp)",
        "total = _row_sums(exp[:, :-1])",
        cross_entropy,
        {},
    ),
    "forget the temperature in the gradient": (
        "rows/cpu.py",
        "scale = scale * rows.inv_temperature",
        "pass",
        cross_entropy,
        {"temperature": 0.7},
    ),
    "forget the slope of the softcap": (
        "rows/cpu.py",
        "grad.mul_(tanh.square_().neg_().add_(1.0))",
        "pass",
        cross_entropy,
        {"logit_softcap": 2.0},
    ),
    "smooth over words that are not possible": (
        "rows/cpu.py",
        "_row_sums(torch.where(possible, logits, 0.0)) / count, count",
        "_row_sums(torch.where(possible, logits, 0.0)) / count, count + 1",
        cross_entropy,
        {"label_smoothing": 0.3},
    ),
    "lose the slope of the z-loss": (
        "rows/cpu.py",
        "1.0 + 2.0 * rows.smoothing.z_loss_coef",
        "1.0 + rows.smoothing.z_loss_coef",
        cross_entropy,
        {"z_loss_coef": 0.1},
    ),
    "leave the label all of its gradient": (
        "rows/cpu.py",
        "label_grad = label_grad * (1.0 - rows.smoothing.label_smoothing)",
        "pass",
        cross_entropy,
        {"label_smoothing": 0.3},
    ),
    "flip the sign of the entropy": (
        "rows/cpu.py",
        "log_sum - weighted / total",
        "log_sum + weighted / total",
        srft,
        {},
    ),
    "leave the entropy out of its gradient": (
        "rows/cpu.py",
        "(known.entropy - known.log_sum)",
        "(-known.log_sum)",
        grpo,
        {"entropy_coef": 0.5},
    ),
    "let a removed word back in": (
        "rows/cpu.py",
        "source.masked_fill_(removed, -math.inf)",
        "pass",
        padded,
        {},
    ),
    "take the slope of a softcap at a removed word": (
        "rows/cpu.py",
        ".clamp_(min=-1.0)",
        "",
        padded,
        {},
    ),
    "drop the first chunk of the weight gradient": (
        "head/gradients.py",
        "beta = 0.0 if first else 1.0",
        "beta = 0.0",
        cross_entropy,
        {},
    ),
}
SWEEP_FAULTS = {
    "forget the scale in the softcap": (
        "head/arguments.py",
        "logit_softcap / logit_scale",
        "logit_softcap",
        cross_entropy,
        {"logit_softcap": 2.0, "logit_scale": 1.5},
    ),
    "forget the scale beside the temperature": (
        "head/arguments.py",
        "temperature != logit_scale",
        "temperature != 1.0",
        cross_entropy,
        {"logit_scale": 1.5},
    ),
    "accumulate in bf16": (
        "head/gradients.py",
        "torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)",
        "torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total).copy_(total.bfloat16())",
        cross_entropy,
        {},
    ),
    "take a row with only an entropy gradient for dead": (
        "head/chunks.py",
        "live |= dentropy != 0",
        "pass",
        grpo,
        {"entropy_coef": 0.5, "clip_low": 0.01, "clip_high": 0.01},
    ),
    "put live rows in the wrong place": (
        "head/gradients.py",
        "out.index_copy_(0, positions, product)",
        "out[: len(positions)] = product",
        grpo,
        {"clip_low": 0.01, "clip_high": 0.01},
    ),
    "lose the part of a coefficient that waits for no scalar": (
        "head/gradients.py",
        "if parts.fixed is not None:",
        "if False:",
        srft,
        {"entropy_scope": "batch"},
    ),
    "forget to scale the directions": (
        "head/gradients.py",
        "self._dhidden[rows] *= dlogp[:, None]",
        "pass",
        srft,
        {"entropy_scope": "batch"},
    ),
    "lose what stands beside the term of a sequence": (
        "objectives/streams.py",
        "fixed = found.dsft + found.dshaped + found.dkl",
        "fixed = found.dsft + found.dshaped",
        long_sequence,
        {"everything": True, "sft_entropy_coefs": None, "entropy_weights": None},
    ),
    "give a token the gradient of its own ratio for that of its sequence": (
        "objectives/streams.py",
        "found._replace(dpolicy=shared)",
        "found",
        token_loss,
        {"policy": "gspo"},
    ),
    "mix up two chunks of a unit": (
        "head/sweep.py",
        "slice(rows.start - whole.start, rows.stop - whole.start)",
        "slice(0, rows.stop - rows.start)",
        srft,
        {"entropy_scope": "batch", "preset": "upt"},
    ),
    "forget the second projection": (
        "head/sweep.py",
        "again = [(rows, False, True) for rows in reversed(others)]",
        "again = []",
        srft,
        {"entropy_scope": "batch", "preset": "upt"},
    ),
    "take what the statistics left for scores": (
        "head/sweep.py",
        "is_new and overwrite,",
        "False,",
        cross_entropy,
        {},
    ),
    "take the scores of the first rows for those of live ones": (
        "head/sweep.py",
        "live.scores(scores)",
        "scores[: live.of(part).labels.numel()]",
        grpo,
        {"clip_low": 0.01, "clip_high": 0.01},
    ),
}
KERNEL_FAULTS = {
    "let a removed word back in": (
        "rows/gpu.py",
        " + tl.minimum(z + 3e38, 0.0)",
        "",
        padded,
        {},
    ),
    "take the slope of a softcap at a removed word": (
        "rows/gpu.py",
        "tl.maximum(z / (softcap * inv_temperature), -1.0)",
        "z / (softcap * inv_temperature)",
        padded,
        {},
    ),
    "drop the last column": (
        "rows/gpu.py",
        "mask = cols < vocab\n",
        "mask = cols < vocab - 1\n",
        cross_entropy,
        {},
    ),
    "forget the temperature in the gradient": (
        "rows/gpu.py",
        "dz *= inv_temperature",
        "dz *= 1.0",
        cross_entropy,
        {"temperature": 0.7},
    ),
    "forget the slope of the softcap": (
        "rows/gpu.py",
        "dz *= 1.0 - tanh * tanh",
        "dz *= 1.0",
        cross_entropy,
        {"logit_softcap": 2.0},
    ),
    "lose the mean of the logits": (
        "rows/gpu.py",
        "(lse - tl.sum(sum_lane, 0) / entropy)",
        "(lse)",
        cross_entropy,
        {"label_smoothing": 0.3},
    ),
    "lose the slope of the z-loss": (
        "rows/gpu.py",
        "1.0 + 2.0 * z_loss_coef",
        "1.0 + z_loss_coef",
        cross_entropy,
        {"z_loss_coef": 0.1},
    ),
    "leave the label all of its gradient": (
        "rows/gpu.py",
        "a_label = a * (1.0 - label_smoothing)",
        "a_label = a",
        cross_entropy,
        {"label_smoothing": 0.3},
    ),
    "flip the sign of the entropy": (
        "rows/gpu.py",
        "log_sum - s_i / l_i",
        "log_sum + s_i / l_i",
        srft,
        {},
    ),
    "forget to rescale the running sum": (
        "rows/gpu.py",
        "l_lane = rescale * l_lane",
        "l_lane = l_lane",
        cross_entropy,
        {},
    ),
    "forget to rescale the lanes when they are added up": (
        "rows/gpu.py",
        "l_i = tl.sum(rescale * l_lane, 0)",
        "l_i = tl.sum(l_lane, 0)",
        cross_entropy,
        {},
    ),
    "lose the shift of the lanes in the entropy": (
        "rows/gpu.py",
        "s_i = tl.sum(rescale * (s_lane + l_lane * dropped), 0)",
        "s_i = tl.sum(rescale * s_lane, 0)",
        srft,
        {"preset": "upt"},
    ),
    "leave the entropy out of its gradient": (
        "rows/gpu.py",
        "_LOWEST_LOGPROB) + entropy)",
        "_LOWEST_LOGPROB))",
        grpo,
        {"entropy_coef": 0.5},
    ),
    "swap the clip bounds": FORMULA_FAULTS["swap the clip bounds"],
}
# a row of the interpreter takes milliseconds
CHUNK_ROWS = 8 if row_kernels.INTERPRETED else 32
FAULTS = KERNEL_FAULTS if row_kernels.INTERPRETED else CPU_FAULTS | FORMULA_FAULTS | SWEEP_FAULTS


def faulty_package(folder: Path, file: str, text: str, replacement: str):
    """Import a copy of the package in which ``text`` of ``file`` is replaced."""
    # no two copies may share a name: the second would be given the modules of the first
    name = f"srft_kernels_copy_{next(_COPIES)}"
    copy = shutil.copytree(PACKAGE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / file).read_text()
    assert text in source, f"{file} no longer holds {text!r}"
    (copy / file).write_text(source.replace(text, replacement))
    spec = importlib.util.spec_from_file_location(
        name, copy / "__init__.py", submodule_search_locations=[str(copy)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    # small chunks and blocks, so that every loop runs more than once
    sys.modules[f"{name}.head.chunks"].CPU_WORKSPACE_BYTES = CHUNK_ROWS * 97 * 4
    sys.modules[f"{name}.head.sweep"].DEFERRED_CHUNKS = 3
    sys.modules[f"{name}.rows.gpu"]._MAX_BLOCK_V = 32
    sys.modules[f"{name}.rows.gpu"]._lanes = lambda _: 8
    return module


def check(module, op, options) -> None:
    """Compare ``op`` of ``module`` with the reference, over three chunks of rows and more blocks of words."""
    case = make_case((2 * CHUNK_ROWS + 6, 97, 16), torch.float32, seed=6, ignored=0.0, scale=3.0)
    assert_matches_reference(op, case, module=module, **options)


@functools.cache
def check_sound(op, options) -> None:
    """The check passes on an unchanged copy; once for the faults that share it."""
    with tempfile.TemporaryDirectory() as folder:
        check(faulty_package(Path(folder), "__init__.py", "", ""), op, dict(options))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault, tmp_path):
    """The check passes on an unchanged copy of the package and fails on the faulty one."""
    file, text, replacement, op, options = FAULTS[fault]
    check_sound(op, tuple(options.items()))
    faulty = faulty_package(tmp_path / "faulty", file, text, replacement)
    with pytest.raises(AssertionError, match="error|differs|non-finite"):
        check(faulty, op, options)
