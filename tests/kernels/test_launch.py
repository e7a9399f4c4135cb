"""What Triton makes of the launches of the package, through its own argument binder, without a GPU."""

import inspect
import os
import re
import subprocess
import sys
import traceback
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import srft_kernels
from srft_kernels.formulas import TokenFormula
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import sweep
from srft_kernels.rows import gpu as row_kernels
from srft_kernels.rows.types import RowArguments
from tests.kernels.cases import cross_entropy, grpo, logprobs, make_case, policy, run, srft, token_loss
from tests.kernels.test_scopes import SCOPES, long_case, with_ref

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(row_kernels.INTERPRETED, reason="the interpreter binds no arguments")
if not row_kernels.INTERPRETED:
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from tests.kernels.launches import arguments_of, device_functions, recorded_launches, scalars_of, token_formulas

ROOT = Path(__file__).resolve().parents[2]
# what `make test` installs apart, from this lock
OTHER_TRITON = Path(sys.prefix) / "triton-gpu"
OTHER_LOCK = ROOT / "requirements" / "triton-gpu.txt"
OTHER_TESTS = "not sm_80 and not sm_100 and not gfx942"
TOKEN_FORMULAS = set() if row_kernels.INTERPRETED else set(token_formulas())
EVERY_CALL = [
    (cross_entropy, {}),
    (cross_entropy, {"temperature": 0.7, "logit_softcap": 3.0}),
    (cross_entropy, {"label_smoothing": 0.1, "z_loss_coef": 0.01}),
    (policy, {}),
    (logprobs, {"entropy_grad": False}),
    (logprobs, {"temperature": 1.3}),
    *((grpo, {"loss_type": name}) for name in srft_kernels.objectives.GRPO.formulas),
    (grpo, {"everything": True, "on_policy": True, "logit_softcap": 2.0}),
    (srft, {"self_rollout": "likelihood", "entropy_scope": "token"}),
    (srft, {"self_rollout": "ratio", "entropy_scope": "token", "off_policy": True}),
    (srft, {"preset": "official", "everything": True}),
    *((token_loss, {"policy": name, "everything": True}) for name in srft_kernels.objectives.STREAMS.formulas),
    (token_loss, {"entropy_scope": "sequence"}),
    *SCOPES,
]


def names_of_the_binder() -> set[str]:
    """Names that mean something in the function that Triton generates to bind a kernel's arguments, or at a launch."""

    def kernel(neutral_argument, neutral_constant: "triton.language.constexpr"):
        pass

    with recorded_launches() as _:
        target = triton.runtime.driver.active.get_current_target()
        backend = triton.compiler.make_backend(target)
        jitted = JITFunction(kernel)
        binder = create_function_from_signature(jitted.signature, jitted.params, backend)
        options = set(vars(backend.parse_options({})))
    code = binder.__code__
    names = {*code.co_varnames, *code.co_names, *code.co_freevars, *binder.__globals__, *options}
    return (names | set(inspect.signature(JITFunction.run).parameters)) - {"neutral_argument", "neutral_constant"}


def test_no_argument_has_a_name_of_the_binder():
    """No kernel has an argument that the generated binder, a launch or the compiler's options would shadow."""
    taken = names_of_the_binder()
    assert {"params", "specialization", "options", "backend", "grid", "num_warps"} <= taken
    kernels = device_functions()
    assert "srft_kernels.rows.gpu._row_kernel" in kernels
    shadowed = {name: taken & set(kernel.arg_names) for name, kernel in kernels.items()}
    assert not {name: names for name, names in shadowed.items() if names}


def test_the_binder_returns_what_it_was_given():
    """Every argument comes out of the generated binder as it went in, whatever its name."""
    with recorded_launches():
        for name, kernel in device_functions().items():
            binder = create_function_from_signature(
                kernel.signature, kernel.params, triton.compiler.make_backend(triton.runtime.driver.active.target)
            )
            given = {argument: 3.0 + i for i, argument in enumerate(kernel.arg_names)}
            bound, specialization, options = binder(**given)
            assert bound == given and len(specialization) == len(given) and not options, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_call_of_every_op_is_bound(dtype, monkeypatch):
    """All formulas and options, as the ops launch them: the binder takes them, with one type for every argument."""
    monkeypatch.setattr(sweep, "DEFERRED_CHUNKS", 3)
    with recorded_launches(compiled=False) as launches:
        for op, options in EVERY_CALL:
            for case in (long_case(dtype), make_case((37, 101, 53), dtype, bias=False)):
                run(op, srft_kernels, case, **with_ref(case, options))
        logits = torch.randn(7, 101).to(dtype).requires_grad_()
        logp, _ = srft_kernels.logprobs_from_logits(logits, torch.arange(7), temperature=0.7, entropy_grad=True)
        logp.sum().backward()
    seen = {name: {launch.constants[name] for launch in launches} for name in launches[0].constants}
    chosen = {(launch.constants["OBJECTIVE"], launch.constants["TERM"]) for launch in launches}
    assert chosen == {*token_formulas().values(), (None, None)}
    for name in ("STATS_KNOWN", "GRADIENT", "ENTROPY_GRAD", "HAS_BIAS", "HAS_SOFTCAP", "HAS_TEMPERATURE", "SMOOTHED"):
        assert seen[name] == {True, False}, name
    for launch in launches:
        scalars = launch.signature["scalars"]
        formula = TokenFormula(launch.constants["OBJECTIVE"], launch.constants["TERM"])
        # the empty tuple included; a number that is no float would compile a variant of its own
        count = 0 if formula.token is None else scalars_of(formula)
        assert scalars == ("fp32",) * count
        numbers = ("softcap", "grad_scale", "label_smoothing", "z_loss_coef")
        assert {launch.signature[name] for name in numbers} == {"fp32"}


@pytest.mark.parametrize("vocab", [64, 67])
@pytest.mark.parametrize(
    ("op", "options", "variants"),
    [
        (cross_entropy, {}, 1),
        (grpo, {"everything": True}, 1),
        (srft, {"entropy_scope": "sequence"}, 2),
        (token_loss, {"everything": True}, 1),
        (logprobs, {}, 2),
        (policy, {}, 2),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_call_compiles_no_variant_twice(op, options, variants, vocab, monkeypatch):
    """One kernel for statistics and gradient, or one for each, whatever the number of tokens and where chunks begin."""
    # 128 rows, and products of 512
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 128 * 67 * 12)
    with recorded_launches(compiled=False) as launches:
        for n in (1000, 1024, 77, 1, 531):
            case = make_case((n + 3, vocab, 16), torch.bfloat16, bias=False)
            for field in fields(case):
                x = getattr(case, field.name)
                if field.name not in ("weight", "bias", "cu_seqlens"):
                    # rows of a larger tensor, which begin anywhere
                    setattr(case, field.name, x[3:])
            case.cu_seqlens = torch.tensor([0, n // 7, n // 3, n], dtype=torch.int32)
            run(op, srft_kernels, case, temperature=case.temperature, **options)
    assert len({launch.variant for launch in launches}) == variants
    assert all({"z_ptr", "dz_ptr", "stride_z", "stride_dz"} <= launch.multiples for launch in launches)


@pytest.mark.parametrize(
    ("op", "options", "most"),
    [
        (cross_entropy, {}, 5),
        (grpo, {}, 5),
        (srft, {"entropy_scope": "token"}, 5),
        (srft, {"entropy_scope": "batch"}, 6),
        (token_loss, {"everything": True}, 5),
        (token_loss, {"policy": "gspo"}, 6),
        (policy, {}, 6),
        (logprobs, {}, 7),
    ],
    ids=lambda x: getattr(x, "__name__", None) or str(x),
)
def test_calls_from_an_op_to_a_launch(op, options, most, monkeypatch):
    """As CONTRIBUTING.md says; the last two are those of ``_launch`` and of the kernel."""
    package, launch, found = str(ROOT / "srft_kernels"), row_kernels._launch, []

    def watched(*args, **kwargs):
        names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(package)]
        # before the op there is its door alone; backward is called by autograd
        starts = [i for i, name in enumerate(names) if name.startswith("linear_")]
        assert starts == [1] if "once" not in names else not starts
        found.append(names[2:] if starts else names)
        return launch(*args, **kwargs)

    monkeypatch.setattr(row_kernels, "_launch", watched)
    with recorded_launches(compiled=False):
        run(op, srft_kernels, make_case((5, 33, 8)), **options)
    assert max(len(calls) for calls in found) + 2 == most, found


@pytest.mark.parametrize("formula", sorted(TOKEN_FORMULAS))
def test_every_formula_compiles_as_launched(formula):
    """A launch of each formula ends in machine code for the H100."""
    formula = token_formulas()[formula]
    rows = RowArguments(torch.zeros(6, dtype=torch.int64), None, None, None, -100, torch.bfloat16)
    with recorded_launches() as launches:
        for _ in range(2):
            row_kernels.objective_gradient(torch.randn(6, 512), rows, formula, *arguments_of(formula, 6), True)
    assert len(launches) == 1 and ".visible .entry" in launches[0].compiled.asm["ptx"]


@pytest.mark.skipif(
    triton is not None and f"=={triton.__version__}\n" in OTHER_LOCK.read_text(), reason="runs below that Triton"
)
def test_under_the_triton_of_gpu_machines():
    """The same launches and compilations under the Triton that GPU machines with torch 2.11 carry."""
    if not OTHER_TRITON.is_dir():
        pytest.skip(f"needs {OTHER_LOCK.name} in {OTHER_TRITON}, where `make test` installs it")
    version = re.search(r"^triton==(.+)$", OTHER_LOCK.read_text(), re.M)[1]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", OTHER_TESTS]
    path = os.pathsep.join([str(OTHER_TRITON), str(ROOT)])
    script = f"import triton; assert triton.__version__ == {version!r}, triton.__version__"
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    run = subprocess.run(
        [*command, "tests/kernels/test_launch.py", "tests/kernels/test_compile.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 30, run.stdout[-2000:]
