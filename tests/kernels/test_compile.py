"""Every variant of the row kernel compiles for the GPUs in use, without one: no spills, no float64."""

import os
import re
import subprocess

import pytest
import torch

from srft_kernels.objectives import CROSS_ENTROPY, GRPO
from srft_kernels.rows import gpu as row_kernels
from srft_kernels.rows import rounding
from srft_kernels.rows.types import RowArguments, Smoothing, Stats
from tests.kernels.cases import case_id

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(row_kernels.INTERPRETED, reason="the interpreter does not compile")

if row_kernels.INTERPRETED:
    TARGETS, TOKEN_FORMULAS, LARGEST, name_of = [], [], None, str
else:
    from tests.kernels.launches import TARGETS, arguments_of, name_of, recorded_launches, token_formulas

    TOKEN_FORMULAS = list(token_formulas().values())
    LARGEST = max(TOKEN_FORMULAS, key=lambda formula: len(formula.token.arg_names))
OPTIONS = {"bias": True, "softcap": 30.0, "temperature": True, "entropy": True}
PLAIN: dict = {}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def compile_rows(
    target, formula=None, part="gradient", scores=FP32, grads=BF16, vocab=8192, *,
    bias=False, softcap=None, temperature=False, entropy=False, smoothing=None,
):  # fmt: skip
    """Compile the row kernel for ``target`` as a launch of it would: with ``formula``, or of one ``part`` of the work.

    Rows of an odd ``vocab`` begin anywhere, as in logits that a caller holds: no load or store is then a vector.
    """
    z, vector = torch.empty(3, vocab, dtype=scores), torch.ones(3)
    out = None if grads == scores else torch.empty(3, vocab, dtype=grads)
    rows = RowArguments(
        torch.arange(3), vector if temperature else None, torch.zeros(vocab) if bias else None, softcap, -100, grads,
        smoothing=smoothing,
    )  # fmt: skip
    with recorded_launches(target) as launches:
        if formula is not None:
            row_kernels.objective_gradient(z, rows, formula, *arguments_of(formula, 3), entropy, out)
        elif part == "statistics":
            row_kernels.stats(z, rows, False)
        else:
            known = Stats(vector, vector, vector, vector)
            row_kernels.gradient(z, rows, known, vector, vector if entropy else None, False, out)
    (launch,) = launches
    return launch.compiled


def ptxas_report(ptx: str, tmp_path) -> str:
    """What the assembler bundled with Triton says about registers and spills."""
    import triton.backends.nvidia

    folder = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")
    arch = re.search(r"\.target (\w+)", ptx)[1]
    # the newer assembler, where there are two, reads the PTX that Triton writes for sm_90 and later
    newer = os.path.join(folder, "ptxas-blackwell")
    ptxas = newer if os.path.exists(newer) else os.path.join(folder, "ptxas")
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", "--gpu-name", arch, "kernel.ptx", "-o", "kernel.cubin"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr


def assert_clean(kernel, target: str, tmp_path) -> None:
    """No spill, no float64 arithmetic."""
    if target == "gfx942":
        amdgcn = kernel.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s*0\b", amdgcn)
        assert re.search(r"\.private_segment_fixed_size:\s*0\b", amdgcn)
        return
    assert ".f64" not in kernel.asm["ptx"]
    report = ptxas_report(kernel.asm["ptx"], tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    # two programs of 256 threads share the 65,536 registers of a multiprocessor, whatever the options
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 128


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [OPTIONS, PLAIN], ids=["all-options", "plain"])
@pytest.mark.parametrize("vocab", [8192, 8191], ids=["aligned", "odd-vocabulary"])
def test_largest_objective_compiles(target, options, vocab, tmp_path):
    """The one-launch kernel with the largest objective, fp32 scores and a bf16 gradient."""
    assert_clean(compile_rows(target, LARGEST, vocab=vocab, **options), target, tmp_path)


@pytest.mark.parametrize("formula", TOKEN_FORMULAS, ids=name_of)
def test_every_objective_compiles(formula, tmp_path):
    """Every objective inlined for sm_90."""
    assert_clean(compile_rows("sm_90", formula), "sm_90", tmp_path)


def in_turn(names, choices):
    """Each target with each of these names, and the choices by turns, so that each meets all targets and all names."""
    return [(t, n, choices[(i + j) % len(choices)]) for i, t in enumerate(TARGETS) for j, n in enumerate(names)]


@pytest.mark.parametrize(
    ("target", "part", "options"),
    in_turn(["statistics", "gradient", "one-launch"], [OPTIONS, PLAIN]),
    ids=lambda x: ("all-options" if x else "plain") if isinstance(x, dict) else x,
)
def test_smoothed_rows_compile(target, options, part, tmp_path):
    """Label smoothing and z-loss, in one launch and in two."""
    formula = CROSS_ENTROPY.formulas[""] if part == "one-launch" else None
    options = {**options, "entropy": False, "smoothing": Smoothing(0.1, 0.01)}
    assert_clean(compile_rows(target, formula, part, **options), target, tmp_path)


@pytest.mark.parametrize("grads", [FP32, BF16, FP16], ids=case_id)
@pytest.mark.parametrize("part", ["statistics", "gradient"])
def test_parts_compile(grads, part, tmp_path):
    """The statistics pass and the pass with given coefficients, for sm_90."""
    assert_clean(compile_rows("sm_90", part=part, grads=grads, **OPTIONS), "sm_90", tmp_path)


@pytest.mark.parametrize(
    ("target", "work", "dtype"),
    in_turn(["statistics", "gradient", "gradient-no-entropy", "one-launch"], [BF16, FP16]),
    ids=case_id,
)
def test_16_bit_scores_compile(target, dtype, work, tmp_path):
    """Scores and gradient of 16 bits, with all options."""
    options = {**OPTIONS, "entropy": work != "gradient-no-entropy"}
    formula, part = LARGEST if work == "one-launch" else None, work.removesuffix("-no-entropy")
    assert_clean(compile_rows(target, formula, part, dtype, dtype, **options), target, tmp_path)


def loops(ptx: str) -> list[str]:
    """Bodies of the loops of a kernel, in order: what lies between a label and the branch back to it."""
    return [body for _, body in re.findall(r"(\$L__BB\d+_\d+):(.*?)bra(?:\.uni)?\s+\1;", ptx, re.S)]


@pytest.mark.parametrize("scores", [FP32, BF16], ids=case_id)
@pytest.mark.parametrize(
    ("options", "registers"),
    [(PLAIN, {FP32: 48, BF16: 64}), (OPTIONS, {FP32: 80, BF16: 80})],
    ids=["plain", "all-options"],
)
def test_statistics_stay_in_their_threads(scores, options, registers, tmp_path):
    """Threads exchange nothing until a row has been read: vector loads, and no shuffle or barrier in either loop."""
    formula = GRPO.formulas["grpo"]
    ptx = compile_rows("sm_90", formula, scores=scores, **options).asm["ptx"]
    statistics, gradient = [body for body in loops(ptx) if "ex2" in body]
    for body in (statistics, gradient):
        assert not re.search("bar|shfl|shared", body) and body.count("ld.global.v4") >= 2
    assert "st.global.v4" in gradient and "st.global" not in statistics
    assert ptx.count("shfl") == 24
    # five, four or three programs of 256 threads then share a multiprocessor
    assert int(re.search(r"Used (\d+) registers", ptxas_report(ptx, tmp_path))[1]) <= registers[scores]


def test_in_place_gradient_waits_for_the_label():
    """Before the gradient is written over a row, every thread has read the score of the label."""
    ptx = compile_rows("sm_90", CROSS_ENTROPY.formulas[""], scores=BF16).asm["ptx"]
    before = ptx[: ptx.index(loops(ptx)[-1])]
    # the only load of a single 16-bit number
    assert before.count("ld.global.b16") == 1
    assert "bar.sync" in before[before.index("ld.global.b16") :]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=case_id)
def test_scaled_rounding_compiles(target, dtype, tmp_path):
    """A gradient is read and written in vectors, and rounded to nearest; where its factor lies is no matter."""
    factors, x = torch.ones(9), torch.empty(2**16)
    with recorded_launches(target) as launches:
        for i in range(3):
            rounding.scaled(x, factors[i], torch.empty(2**16, dtype=dtype))
    (launch,) = launches
    assert_clean(launch.compiled, target, tmp_path)
    if target != "gfx942":
        ptx = launch.compiled.asm["ptx"]
        assert ptx.count("ld.global.v4") == 4 and ptx.count("st.global.v4") == 2 and "cvt.rn." in ptx
