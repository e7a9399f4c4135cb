"""The Triton kernels on CPU, under the interpreter, which must be chosen before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# modules, what of them to run, and how many of the tests pass at least; in pieces that can run side by side.
# bf16 is left out: the interpreter truncates where hardware rounds; so are names of one formula, and options of the
# logits but for the three ways to a gradient: a formula with a term, one without, and statistics first
PIECES = {
    "losses": (
        ["losses", "token_loss", "zero_weights", "rows", "mutations", "properties", "cross_entropy"],
        "(test_losses and chunks16 and (fp32 or fp16) and not N130)"
        " or (test_losses and chunks16 and plain and (token or grpo or gspo)"
        " and not (sequence or batch or bnpo or dr_grpo or dapo))"
        " or (test_token_loss and weights_of_zero and op and nan and not reinforce)"
        " or (test_losses and chunks16 and (logit_options or per_token) and (logprobs or token_loss or cross_entropy))"
        " or (test_zero_weights and (nan or minus_infinity or (live and 10000))"
        " and not (gspo or reinforce or token_weight))"
        " or test_rows or test_mutations or row_is_independent or (test_cross_entropy"
        " and (((against_float64 or vocabulary) and (both or softcap)) or (weight_of_0 and smoothed)))",
        102,
    ),
    "logits": (
        ["logits", "hard_inputs", "device_path", "head_options", "validation"],
        "test_logits or test_hard_inputs or test_device_path or rows_are_checked",
        90,
    ),
}


@pytest.mark.parametrize("piece", PIECES)
def test_kernels_under_the_interpreter(piece):
    """The tests of ops, hard inputs and mutations pass with the Triton kernels for the CPU twin."""
    pytest.importorskip("triton")
    modules, selected, count = PIECES[piece]
    files = [f"tests/kernels/test_{module}.py" for module in modules]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", selected],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= count, run.stdout[-2000:]
