"""Each op and its reference have one signature, every argument is documented, and only torch is needed."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import srft_kernels
from srft_kernels import objectives, reference
from srft_kernels.objectives import grpo, srft, streams
from srft_kernels.objectives.cross_entropy import CrossEntropyArguments
from srft_kernels.objectives.grpo import GrpoArguments, GrpoInputs, GrpoNumbers
from srft_kernels.objectives.srft import SrftArguments, SrftInputs, SrftNumbers
from srft_kernels.objectives.streams import StreamArguments, StreamInputs, StreamNumbers
from srft_kernels.types import HeadOptions

ROOT = Path(__file__).resolve().parents[2]
OPS = [name for name in srft_kernels.__all__ if name.startswith("linear_")]


def test_every_op_is_exported():
    """The six ops, the one for logits, what they take and give, the head and the reference."""
    assert set(OPS) == {
        "linear_logprobs",
        "linear_cross_entropy",
        "linear_grpo_loss",
        "linear_srft_loss",
        "linear_token_loss",
        "linear_policy_loss",
    }
    others = {"FusedLMHead", "LoraDelta", "PolicyLoss", "VocabParallel", "logprobs_from_logits", "reference"}
    assert set(srft_kernels.__all__) == {*OPS, *others}


@pytest.mark.parametrize("name", OPS)
def test_reference_has_the_same_signature(name):
    """Names, order, kinds, defaults and annotations, but for two arguments that say where things are kept."""
    op, twin = (inspect.signature(getattr(module, name)) for module in (srft_kernels, reference))
    kept = [p for p in op.parameters.values() if p.name not in ("vocab_parallel", "weight_grad")]
    assert op.replace(parameters=kept) == twin


@pytest.mark.parametrize("name", OPS)
def test_every_op_ends_with_the_options_of_the_head(name):
    """Names, order, defaults and types of HeadOptions, which is filled by position."""
    signature = inspect.signature(getattr(srft_kernels, name))
    own = [p for p in signature.parameters.values() if p.name != "entropy_grad"]
    fields = HeadOptions._fields
    given = {p.name: (p.default, p.annotation) for p in own[-len(fields) :]}
    defaults, hints = HeadOptions._field_defaults, HeadOptions.__annotations__
    expected = {field: (defaults[field], hints[field].__forward_arg__) for field in fields}
    assert list(given) == list(fields) and given == expected


RECORDS = {
    "linear_cross_entropy": (objectives.CROSS_ENTROPY, CrossEntropyArguments),
    "linear_grpo_loss": (objectives.GRPO, GrpoArguments),
    "linear_srft_loss": (objectives.SRFT, SrftArguments),
    "linear_token_loss": (objectives.STREAMS, StreamArguments),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_loss_is_its_record(name):
    """The arguments between labels and those of the head, each looked at; formulas that take what they are given."""
    record, arguments = RECORDS[name]
    parameters = list(inspect.signature(getattr(srft_kernels, name)).parameters.values())
    own = parameters[3 : -len(HeadOptions._fields)]
    hints = {field: hint.__forward_arg__ for field, hint in arguments.__annotations__.items()}
    assert {p.name: p.annotation for p in own} == hints and [p.name for p in own] == list(arguments._fields)
    looked_at = (*record.vectors, *record.choices, *record.numbers, *record.counts, *record.others)
    assert sorted(looked_at) == sorted(arguments._fields)
    assert {*record.required, *record.flags} <= set(record.vectors) and set(record.optional) <= set(record.numbers)
    assert {p.name for p in own if p.default is None} >= set(record.optional)


@pytest.mark.parametrize(
    ("formula", "inputs", "numbers"),
    [(grpo.grpo_token, GrpoInputs, GrpoNumbers), (srft.srft_token, SrftInputs, SrftNumbers),
     (streams.stream_token, StreamInputs, StreamNumbers)],
    ids=["grpo", "srft", "streams"],
)  # fmt: skip
def test_formulas_take_their_inputs_and_numbers_by_name(formula, inputs, numbers):
    """In the order in which they are passed, between logp and entropy and the term that is compiled in."""
    names = list(inspect.signature(getattr(formula, "fn", formula)).parameters)
    assert names[:2] == ["logp", "entropy"] and names[-1].isupper()
    assert tuple(names[2:-1]) == inputs._fields + numbers._fields


@pytest.mark.parametrize("name", OPS)
def test_every_argument_is_described(name):
    """Each argument has its line in the Args block."""
    op = getattr(srft_kernels, name)
    block = op.__doc__.split("Args:\n")[1].split("Returns:")[0]
    described = re.findall(r"^        (\w+): ", block, re.MULTILINE)
    assert described == list(inspect.signature(op).parameters)


@pytest.mark.parametrize("name", OPS)
def test_first_line_is_one_sentence(name):
    """The docstring starts with one sentence on one line."""
    first = getattr(srft_kernels, name).__doc__.split("\n")[0]
    assert first.endswith(".") and first.count(". ") == 0


def test_policy_loss_fields():
    """The order in which a PolicyLoss unpacks."""
    expected = ("loss", "logprobs", "entropy", "ratio", "clipped", "terms")
    assert srft_kernels.PolicyLoss._fields == expected


def test_works_without_triton():
    """Importing and using the ops needs no triton."""
    code = """
import sys
sys.modules["triton"] = None
import torch, srft_kernels
torch.manual_seed(0)
hidden = torch.randn(5, 4, requires_grad=True)
loss = srft_kernels.linear_grpo_loss(hidden, torch.randn(7, 4), torch.arange(5), torch.ones(5)).loss
loss.backward()
assert hidden.grad.any()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_torch_and_triton_are_imported():
    """No module of the package imports anything else that has to be installed."""
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    package = ROOT / "srft_kernels"
    for path in set(package.rglob("*.py")) - set((package / "integrations").rglob("*.py")):
        for name in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE):
            assert name in allowed, f"{path.name} imports {name}"
