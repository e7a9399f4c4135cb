"""Every variant of the row kernel compiles for the GPUs in use, without one: no spills, no float64."""

import os
import re
import subprocess

import pytest

from srft_kernels import formulas, row_kernels

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(row_kernels.INTERPRETED, reason="the interpreter does not compile")

# the registers of the H100, and the oldest, newest and AMD targets
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OPTIONS = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_TEMPERATURE": True}
PLAIN = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "HAS_TEMPERATURE": False}


def compile_row_kernel(
    target, formula=None, num_inputs=0, num_params=0, dtype="bf16", scores="fp32", aligned=True, **flags
):
    """Compile the row kernel for ``target`` as ``_launch`` would call it.

    ``dtype`` is that of the gradient, ``scores`` that of the scores. ``aligned`` stands for tensors as torch
    allocates them and a vocabulary that is a multiple of 16: loads and stores are then vectors.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = row_kernels._row_kernel
    constants = {
        "OBJECTIVE": formula,
        "NUM_INPUTS": num_inputs,
        "STATS_KNOWN": False,
        "GRADIENT": True,
        "ENTROPY_GRAD": True,
        "BLOCK_V": row_kernels._MAX_BLOCK_V,
        "LANES": row_kernels._NUM_WARPS * 32 * (4 if scores == "fp32" else 8),
        **flags,
    }
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types.update(
        {
            "labels_ptr": "*i64",
            "z_ptr": f"*{scores}",
            "dz_ptr": f"*{dtype}",
            "scalars": ("fp32",) * num_params,
            "softcap": "fp32",
            "grad_scale": "fp32",
        }
    )
    types.update(dict.fromkeys(constants, "constexpr"))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    multiples = [name for name in types if name.endswith("_ptr") or name in ("stride_z", "stride_dz", "vocab")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples if aligned}
    source = ASTSource(
        kernel, {name: types[name] for name in kernel.arg_names}, constexprs=places, attrs=attributes
    )
    options = {"num_warps": row_kernels._NUM_WARPS}
    return triton.compile(source, target=GPUTarget(*target), options=options)


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
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd-vocabulary"])
def test_srft_kernel_compiles(target, options, aligned, tmp_path):
    """The one-launch kernel with the largest objective, bf16 gradient in half a row."""
    formula = formulas.srft_likelihood_token
    kernel = compile_row_kernel(TARGETS[target], formula, 7, 8, aligned=aligned, **options)
    assert_clean(kernel, target, tmp_path)


@pytest.mark.parametrize(
    ("formula", "num_inputs", "num_params"),
    [
        (formulas.cross_entropy_token, 1, 0),
        (formulas.clip_token, 5, 8),
        (formulas.cispo_token, 5, 8),
        (formulas.reinforce_token, 5, 8),
        (formulas.srft_ratio_token, 7, 8),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_every_objective_compiles(formula, num_inputs, num_params, tmp_path):
    """Every objective inlined for sm_90."""
    kernel = compile_row_kernel(TARGETS["sm_90"], formula, num_inputs, num_params, **PLAIN)
    assert_clean(kernel, "sm_90", tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "flags", [{"GRADIENT": False}, {"STATS_KNOWN": True}], ids=["statistics", "known-coefficients"]
)
def test_passes_compile(dtype, flags, tmp_path):
    """The statistics pass and the pass with given coefficients, for sm_90."""
    assert_clean(compile_row_kernel(TARGETS["sm_90"], dtype=dtype, **OPTIONS, **flags), "sm_90", tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "flags",
    [{"GRADIENT": False}, {"STATS_KNOWN": True}, {"STATS_KNOWN": True, "ENTROPY_GRAD": False}, {}],
    ids=["statistics", "known-coefficients", "known-coefficients-no-entropy", "one-launch"],
)
def test_16_bit_scores_compile(target, dtype, flags, tmp_path):
    """Scores and gradient of 16 bits, with all options."""
    formula, sizes = (None, (0, 0)) if flags else (formulas.srft_likelihood_token, (7, 8))
    kernel = compile_row_kernel(TARGETS[target], formula, *sizes, dtype=dtype, scores=dtype, **OPTIONS, **flags)
    assert_clean(kernel, target, tmp_path)


def loops(ptx: str) -> list[str]:
    """Bodies of the loops of a kernel, in order: what lies between a label and the branch back to it."""
    return [body for _, body in re.findall(r"(\$L__BB\d+_\d+):(.*?)bra\s+\1;", ptx, re.S)]


@pytest.mark.parametrize("scores", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [OPTIONS, PLAIN], ids=["all-options", "plain"])
def test_statistics_stay_in_their_threads(scores, options):
    """Threads exchange nothing until a row has been read: per 16 logits vector loads and no shuffle or barrier."""
    ptx = compile_row_kernel(TARGETS["sm_90"], scores=scores, **options).asm["ptx"]
    statistics, gradient = [body for body in loops(ptx) if "ex2" in body]
    assert not re.search("bar|shfl|shared", statistics) and statistics.count("ld.global.v4") >= 2
    assert re.search("st.global.v4", gradient) and not re.search("shfl|shared", gradient)
    assert ptx.count("shfl") == 24


def test_in_place_gradient_waits_for_the_label():
    """Before the gradient is written over a row, every thread has read the score of the label."""
    formula = formulas.cross_entropy_token
    ptx = compile_row_kernel(TARGETS["sm_90"], formula, 1, scores="bf16", **PLAIN).asm["ptx"]
    before = ptx[: ptx.index(loops(ptx)[-1])]
    # the only load of a single 16-bit number
    assert before.count("ld.global.b16") == 1
    assert "bar.sync" in before[before.index("ld.global.b16") :]
