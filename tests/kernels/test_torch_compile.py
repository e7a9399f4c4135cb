"""Under torch.compile each op is part of one graph, forward and backward, and gives what it gives in eager."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import srft_kernels
from srft_kernels import LoraDelta, VocabParallel
from tests.kernels.cases import (
    OPS,
    Case,
    case_id,
    cross_entropy,
    each_op,
    grpo,
    logprobs,
    make_case,
    policy,
    srft,
    token_loss,
)
from tests.kernels.compiled import assert_as_eager, body, leaves_of, named, outcome


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (cross_entropy, {}),
        (cross_entropy, {"num_tokens": 23, "temperature": 0.7, "logit_softcap": 5.0, "logit_scale": 0.3}),
        (grpo, {"everything": True}),
        (grpo, {"loss_type": "gspo", "clip_low": 0.1, "clip_high": 0.3}),
        (grpo, {"loss_type": "cispo", "on_policy": True, "dual_clip": 3.0}),
        (srft, {}),
        (srft, {"preset": "official", "off_policy": True, "everything": True}),
        (token_loss, {"everything": True, "entropy_scope": "sequence"}),
        (token_loss, {"policy": "gspo", "entropy_scope": "batch", "batch_entropy": 1.3, "dual_clip": 3.0}),
        (srft, {"preset": "upt", "demo_gamma": 0.0, "entropy_scope": "batch", "batch_entropy": 1.3}),
        (srft, {"sft_weights": torch.linspace(-1.0, 2.0, 37)}),
        (logprobs, {}),
        (logprobs, {"entropy_grad": False, "logit_softcap": 5.0}),
        (policy, {"temperature": 0.7, "logit_scale": 3.0}),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_equals_eager(op, options, dtype):
    """Values, terms and gradients, with a factor on the loss; fails if backward forgets the upstream gradient."""
    assert_as_eager(op, make_case(dtype=dtype), **options)


@each_op
def test_tensor_options(op):
    """A temperature for each token, no bias, and no ignored row."""
    case = make_case(bias=False, ignored=0.0)
    assert_as_eager(op, case, temperature=case.temperature)


def test_inductor():
    """The default backend, which takes long: a loss with its own gradient and statistics with one given, in a graph."""

    def both(module, case, **options):
        loss, stats = grpo(module, case, **options), logprobs(module, case, **options)
        return loss._replace(loss=loss.loss + stats.loss, entropy=stats.entropy, logprobs=stats.logprobs)

    assert_as_eager(both, make_case(dtype=torch.bfloat16), backend="inductor", temperature=0.7)


def test_denominator_tensor():
    """A 0-d tensor that another part of the graph computes, and one that has a gradient of its own, unused."""
    case = make_case()

    def model(hidden, weight, advantages):
        count = (case.labels >= 0).sum()
        result = srft_kernels.linear_grpo_loss(hidden, weight, case.labels, advantages.sin(), num_tokens=count)
        return result.loss

    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.advantages)]
        loss = run(*leaves)
        loss.backward()
        results.append((loss.detach(), leaves[0].grad, leaves[1].grad))
        assert leaves[2].grad is None or not leaves[2].grad.any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# graphs


@each_op
def test_lengths_share_a_graph(op):
    """A second number of tokens compiles once more, for any number; a third does not."""
    counter = CompileCounterWithBackend("aot_eager")
    options = {"loss_type": "gspo"} if op is grpo else {}

    def model(mixing, hidden, weight, bias, case_vectors):
        case = Case(hidden @ mixing, weight, bias, *case_vectors)
        result = op(srft_kernels, case, **options)
        return result if isinstance(result, Tensor) else result.loss

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n in (23, 37, 41, 58):
        case = make_case((n, 101, 53))
        vectors = [
            case.labels, case.advantages, case.old_logprobs, case.ref_logprobs, case.weights, case.temperature,
            case.is_demo, case.is_correct, case.cu_seqlens,
        ]  # fmt: skip
        grads = []
        for run in (model, compiled):
            leaves = leaves_of(case)
            run(*leaves, vectors).backward()
            grads.append([x.grad for x in leaves])
        exact = 0.0 if op is not policy else 2e-5
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=exact, atol=exact)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("op", "name", "values"),
    [
        (cross_entropy, "num_tokens", [20, 21, 22, 25]),
        (logprobs, "temperature", [1.0, 0.9, 0.8, 0.7]),
        (grpo, "entropy_coef", [0.1, 0.03, 0.02, 0.01]),
        (srft, "sft_coef", [0.5, 0.4, 0.3, 0.2]),
        (token_loss, "clip_low", [0.1, 0.03, 0.02, 0.01]),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_numbers_share_a_graph(op, name, values):
    """A number that changes from step to step compiles once more, and is not frozen into the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    case = make_case()

    def model(value):
        result = op(srft_kernels, case, **{name: value})
        return result if isinstance(result, Tensor) else result.loss

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = [float(compiled(value)) for value in values]
    assert losses == [float(model(value)) for value in values]
    assert len(set(losses)) == len(values)
    assert counter.frame_count <= 2


def test_function_itself_compiles():
    """An op may be what is compiled, called with positional and keyword arguments."""
    case = make_case()
    op = srft_kernels.linear_grpo_loss
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    result = compiled(case.hidden, case.weight, case.labels, case.advantages, case.old_logprobs, clip_high=0.3)
    eager = op(case.hidden, case.weight, case.labels, case.advantages, case.old_logprobs, clip_high=0.3)
    assert isinstance(result, srft_kernels.PolicyLoss) and list(result.terms) == list(eager.terms)
    assert torch.equal(result.loss, eager.loss)


# what is wanted


@each_op
def test_no_grad(op):
    """Without gradients nothing carries one."""
    case = make_case()
    model = torch.compile(body(op, case, {}), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        total, _ = model(*leaves_of(case))
        expected, _ = body(op, case, {})(*leaves_of(case))
    assert not total.requires_grad
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


@each_op
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("mixing", "hidden")], ids=["head", "body"])
def test_frozen(op, frozen):
    """A frozen head or body gets no gradient, and the rest the same as in eager."""
    case = make_case()
    options = {"entropy_grad": False} if op is logprobs else {}
    names = ("mixing", "hidden", "weight", "bias")
    grads = []
    for compiling in (False, True):
        model = body(op, case, options)
        model = torch.compile(model, fullgraph=True, backend="aot_eager") if compiling else model
        leaves = leaves_of(case)
        for name, x in zip(names, leaves, strict=True):
            x.requires_grad_(name not in frozen)
        model(*leaves)[0].backward()
        assert all((x.grad is None) == (name in frozen) for name, x in zip(names, leaves, strict=True))
        grads.append([x.grad for x in leaves if x.grad is not None])
    exact = 0.0 if op is not policy else 2e-5
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact)


@each_op
def test_autocast(op):
    """16-bit states from autocast beside a weight in fp32, whose gradient is fp32."""
    case = make_case()

    def model(*leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return body(op, case, {})(*leaves)

    eager = outcome(model, case)
    compiled = outcome(torch.compile(model, fullgraph=True, backend="aot_eager"), case)
    assert compiled["dweight"].dtype == torch.float32
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x, rtol=1e-5, atol=1e-5, msg=named(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number > 0, got -1.0"),
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"loss_type": "gspo", "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise from 0 to N=37"),
        ({"kl_coef": 0.1}, "ref_logprobs is required by kl_coef=0.1"),
        ({"ref_logprobs": torch.zeros(5)}, r"ref_logprobs must be \[N\]=\[37\], got \[5\]"),
        ({"labels": torch.zeros(4, 9, dtype=torch.int64)}, r"labels must be \[N\]=\[37\], got \[4, 9\]"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments(options, message):
    """The checks run with the graph, and say what they say in eager."""
    case = make_case()

    def model(hidden):
        given = {"labels": case.labels, "advantages": case.advantages} | options
        return srft_kernels.linear_grpo_loss(hidden, case.weight, **given).loss * 2

    with pytest.raises(ValueError, match=message):
        torch.compile(model, fullgraph=True, backend="aot_eager")(case.hidden.requires_grad_())


def test_user_loss_must_be_a_scalar():
    """A loss that is not reduced is refused where it is traced."""
    case = make_case()

    def model(hidden):
        return srft_kernels.linear_policy_loss(hidden, case.weight, case.labels, lambda logp, entropy: logp).loss

    with pytest.raises(Exception, match="objective must return a 0-d tensor"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(case.hidden)


# options of the head


@pytest.mark.parametrize("op", [grpo, logprobs], ids=lambda op: op.__name__)
def test_lora_and_rounded_logits(op):
    """A low-rank change with gradients of its own, in another dtype than the weight, and bf16 logits."""
    case = make_case(dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 53, generator=g), torch.randn(101, 4, generator=g)
    grads = []
    for compiling in (False, True):
        low = [x.clone().requires_grad_() for x in (a, b)]

        def model(hidden, weight, low_a, low_b):
            options = {"lora": LoraDelta(low_a, low_b, 0.25), "logits_dtype": torch.bfloat16}
            return op(srft_kernels, replace(case, hidden=hidden.tanh(), weight=weight), **options).loss * 3

        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiling else model
        leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight)] + low
        run(*leaves).backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, "aot_eager") for op in OPS] + [(logprobs, "inductor")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_weight_grad(op, backend):
    """The buffer takes the gradient of the weight, in its place among other uses, and autograd gives none."""
    case = make_case(dtype=torch.bfloat16)
    found = []
    for compiling in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight)]
        buffer = torch.full(case.weight.shape, 0.5)

        def model(hidden, weight, weight_grad):
            before = weight_grad.square().sum()
            result = op(srft_kernels, replace(case, hidden=hidden * 2, weight=weight), weight_grad=weight_grad)
            return result if isinstance(result, Tensor) else result.loss, weight_grad.square().sum() - before

        run = torch.compile(model, fullgraph=True, backend=backend) if compiling else model
        loss, added = run(*leaves, buffer)
        loss.backward()
        assert leaves[1].grad is None
        # a compiled policy loss is made of linear_logprobs, which fills the buffer in backward
        found.append((leaves[0].grad, buffer, None if op is policy else added))
    exact = op is not policy and backend == "aot_eager"
    for eager, compiled in zip(*found, strict=True):
        if eager is not None:
            torch.testing.assert_close(compiled, eager, rtol=0.0 if exact else 1e-2, atol=0.0 if exact else 1e-5)
    assert (found[1][1] != 0.5).any()


def test_weight_grad_refuses_a_factor():
    """The buffer was filled for a factor of 1."""
    case = make_case()

    def model(hidden, weight, weight_grad):
        return srft_kernels.linear_cross_entropy(hidden, weight, case.labels, weight_grad=weight_grad) * 2

    leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight)]
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(*leaves, torch.zeros(case.weight.shape))
    with pytest.raises(RuntimeError, match="put the factor into the weights of the tokens"):
        loss.backward()


@pytest.fixture
def process_group(tmp_path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("op", [srft, logprobs], ids=lambda op: op.__name__)
def test_vocab_parallel(op, process_group):
    """The group goes into the graph by its name."""
    assert_as_eager(op, make_case(), vocab_parallel=VocabParallel(process_group, 0, 101))


# beyond the first derivative, and beyond Python's numbers


@each_op
def test_second_derivative_raises(op):
    """Also in a graph that plain autograd runs, a gradient that is differentiated again is refused, not cut."""
    case = make_case((7, 11, 4))
    for name in ("hidden", "weight"):
        case = replace(case, **{name: getattr(case, name).requires_grad_()})
    for leaves in ([case.hidden, case.weight], [case.hidden]):
        case.weight.requires_grad_(len(leaves) > 1)
        options = {"entropy_grad": False} if op is logprobs else {}
        result = torch.compile(lambda given=options: op(srft_kernels, case, **given), backend="eager", fullgraph=True)()
        loss = result if isinstance(result, Tensor) else result.loss
        for grad in torch.autograd.grad(loss, leaves, create_graph=True):
            assert grad.requires_grad
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                torch.autograd.grad(grad.square().sum(), leaves, retain_graph=True, allow_unused=True)


def test_numbers_of_numpy():
    """numpy's scalars may enter a graph too, as Python's numbers do."""
    case = make_case((7, 11, 4))
    expected = grpo(srft_kernels, case, clip_low=0.25, num_tokens=3).loss

    def model(low, count):
        return grpo(srft_kernels, case, clip_low=low, num_tokens=count).loss

    assert torch.equal(torch.compile(model, backend="eager")(np.float32(0.25), np.int64(3)), expected)
