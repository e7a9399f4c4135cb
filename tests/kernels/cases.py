"""Random inputs, and runs of one op of the package and of the reference on them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import srft_kernels
from srft_kernels import reference
from srft_kernels.rows import gpu as row_kernels
from tests.numerics import assert_accurate

# a row of the interpreter takes milliseconds; more than one chunk of 16 rows, and a rest
ROWS, MANY_ROWS = (21, 21) if row_kernels.INTERPRETED else (37, 60)
SHAPES = [(1, 32, 16), (ROWS, 101, 53), (130, 257, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def case_id(value: object) -> str | None:
    """Pytest id: N37-V101-D53 for a shape, fp32 for a dtype."""
    if isinstance(value, tuple) and len(value) == 3 and all(isinstance(x, int) for x in value):
        return "N{}-V{}-D{}".format(*value)
    if isinstance(value, torch.dtype):
        return {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}[
            str(value).split(".")[1]
        ]
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items() if not isinstance(v, Tensor)) or "default"
    return None


@dataclass
class Case:
    """Inputs of an op: the head, and per-token vectors [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    weights: Tensor
    temperature: Tensor
    is_demo: Tensor
    is_correct: Tensor
    cu_seqlens: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        names = [f.name for f in fields(self)]
        values = {n: getattr(self, n) for n in names}
        return replace(
            self, **{n: x.to(dtype) for n, x in values.items() if x is not None and x.is_floating_point()}
        )


def make_case(shape=(37, 101, 53), dtype=torch.float32, *, bias=True, ignored=0.2, scale=1.0, seed=0) -> Case:
    """Random case; ``ignored`` is the share of ignored labels, ``scale`` the deviation of the logits.

    old_logprobs and ref_logprobs are near the log-probabilities of the case, so that ratios fall on both
    sides of a clip.
    """
    n, v, d = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g)

    hidden = normal(n, d).to(dtype)
    weight = (normal(v, d) * scale / d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    if n > 2:
        # both ends of the vocabulary are always hit
        labels[0], labels[1] = 0, v - 1
        labels[2:] = torch.where(torch.rand(n - 2, generator=g) < ignored, -100, labels[2:])
    bias = normal(v).to(dtype) if bias else None
    logp, _ = reference.linear_logprobs(
        hidden.float(), weight.float(), labels, bias=None if bias is None else bias.float()
    )
    cuts = (
        torch.randint(0, n + 1, (3,), generator=g).sort().values if n else torch.zeros(0, dtype=torch.int64)
    )
    return Case(
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        advantages=normal(n),
        old_logprobs=logp + 0.3 * normal(n),
        ref_logprobs=logp + 0.3 * normal(n),
        weights=torch.rand(n, generator=g) + 0.5,
        temperature=torch.rand(n, generator=g) + 0.5,
        is_demo=torch.rand(n, generator=g) < 0.4,
        is_correct=torch.rand(n, generator=g) < 0.5,
        cu_seqlens=torch.cat([torch.tensor([0]), cuts, torch.tensor([n])]).to(torch.int32),
    )


def grpo(module, case: Case, **options):
    """linear_grpo_loss of ``module`` with old_logprobs; pass ``on_policy=True`` to leave them out."""
    old = None if options.pop("on_policy", False) else case.old_logprobs
    if options.pop("everything", False):
        options = {
            "ref_logprobs": case.ref_logprobs,
            "kl_coef": 0.3,
            "entropy_coef": 0.05,
            "rollout_weights": 2.0 - case.weights,
            "token_weights": case.weights,
            "num_tokens": 23,
            **options,
        }
    if options.get("loss_type") == "gspo":
        options["cu_seqlens"] = case.cu_seqlens
    return module.linear_grpo_loss(
        case.hidden, case.weight, case.labels, case.advantages, old, bias=case.bias, **options
    )


def srft(module, case: Case, **options):
    """linear_srft_loss of ``module`` on-policy; pass ``off_policy=True`` for old_logprobs."""
    if options.pop("off_policy", False):
        options["old_logprobs"] = case.old_logprobs
    if options.pop("everything", False):
        options = {"token_weights": case.weights, "num_rollout_tokens": 31, "num_demo_tokens": 17, **options}
    return module.linear_srft_loss(
        case.hidden,
        case.weight,
        case.labels,
        case.advantages,
        is_demo=case.is_demo,
        is_correct=case.is_correct,
        cu_seqlens=case.cu_seqlens,
        bias=case.bias,
        **options,
    )


def token_loss(module, case: Case, **options):
    """linear_token_loss of ``module``: policy and log-likelihood with a factor; ``everything`` for all five terms.

    The weights have signs and zeros; ``on_policy`` leaves old_logprobs out.
    """
    old = None if options.pop("on_policy", False) else case.old_logprobs
    demo = case.is_demo
    options = {
        "policy_weights": torch.where(demo, 0.0, case.weights / 31),
        "sft_weights": torch.where(demo, case.weights / 17, torch.where(case.is_correct, 0.0, -0.02)),
        "sft_entropy_coefs": torch.where(demo, -1.0, 0.0),
        **options,
    }
    if options.pop("everything", False):
        options = {
            "shaped_weights": torch.where(demo, case.weights / 13, 0.0),
            "kl_weights": torch.where(demo, 0.0, 0.3 / 31),
            "entropy_weights": torch.where(case.is_correct, 0.05 * case.weights / 31, 0.0),
            "policy_entropy_coefs": torch.where(case.advantages > 0, 0.5, 0.0),
            "ref_logprobs": case.ref_logprobs,
            "shaping_gamma": 0.1,
            "policy_prob_factor": "p(1-p)",
            "sft_prob_factor": "p",
            **options,
        }
    if options.get("policy") == "gspo" or options.get("entropy_scope") == "sequence":
        options = {"cu_seqlens": case.cu_seqlens, **options}
    options = {"advantages": case.advantages, **options}
    return module.linear_token_loss(
        case.hidden, case.weight, case.labels, old_logprobs=old, bias=case.bias, **options
    )


def cross_entropy(module, case: Case, **options):
    """linear_cross_entropy of ``module``."""
    return module.linear_cross_entropy(case.hidden, case.weight, case.labels, bias=case.bias, **options)


def policy(module, case: Case, **options):
    """linear_policy_loss of ``module`` with a loss that is not linear in either vector and mixes tokens."""

    def objective(logprobs, entropy):
        return (
            case.advantages.to(logprobs) * logprobs.sin()
        ).sum() + entropy.square().mean() * logprobs.mean()

    return module.linear_policy_loss(
        case.hidden, case.weight, case.labels, objective, bias=case.bias, **options
    )


def logprobs(module, case: Case, **options):
    """A random signed linear function of linear_logprobs of ``module``."""
    options = {"entropy_grad": True, **options}
    logp, entropy = module.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias, **options)
    loss = (logp * case.advantages.to(logp)).sum() + (entropy * case.ref_logprobs.to(logp)).sum()
    return srft_kernels.PolicyLoss(loss, logp.detach(), entropy.detach(), torch.ones_like(logp), logp > 1, {})


def run(op, module, case: Case, **options) -> dict[str, Tensor]:
    """Values and gradients of ``op`` by name; the loss is multiplied by an upstream gradient of -1.7."""
    leaves = {name: getattr(case, name) for name in ("hidden", "weight", "bias")}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    result = op(module, replace(case, **leaves), **options)
    out = {}
    if isinstance(result, Tensor):
        out["loss"] = loss = result
    else:
        loss = result.loss
        out.update(loss=loss, logprobs=result.logprobs, entropy=result.entropy, ratio=result.ratio)
        out.update({f"terms/{name}": x for name, x in result.terms.items()})
        out["clipped"] = result.clipped
    (loss * -1.7).backward()
    out.update({f"d{name}": x.grad for name, x in leaves.items()})
    return out


class RoundedScoreGradient(TorchFunctionMode):
    """Rounds the gradient of a matrix product to ``dtype``, as a GPU must before a 16-bit product."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("__matmul__", "matmul") and out.requires_grad:
            out.register_hook(lambda grad: grad.to(self.dtype).to(grad.dtype))
        return out


def assert_matches_reference(op, case: Case, module=srft_kernels, **options) -> None:
    """Run ``op`` of ``module`` and compare all that it returns with float64, by the one rule."""

    def wide(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    gold = run(op, reference, case.to(torch.float64), **{k: wide(x) for k, x in options.items()})
    rounded = (row_kernels.INTERPRETED or case.hidden.is_cuda) and case.hidden.dtype in (
        torch.bfloat16,
        torch.float16,
    )
    with RoundedScoreGradient(case.hidden.dtype) if rounded else nullcontext():
        baseline = run(op, reference, case, **options)
    actual = run(op, module, case, **options)
    assert actual.keys() == baseline.keys()
    for name, x in actual.items():
        if name == "clipped":
            assert torch.equal(x, gold[name]), "clipped differs"
        else:
            assert_accurate(
                name, x, gold[name], baseline[name], gradient=name in ("dhidden", "dweight", "dbias")
            )


def grads_of(out: dict) -> list[Tensor]:
    """The gradients of a run."""
    return [out[name] for name in ("dhidden", "dweight", "dbias")]


def assert_close(actual, expected, tolerance=1e-6):
    """Relative RMS difference at most ``tolerance``; for tensors of many sums, of which some may cancel but not all."""
    assert actual.dim() > 0
    scale = expected.double().square().mean().sqrt().clamp(min=1e-30)
    assert (actual.double() - expected.double()).square().mean().sqrt() / scale <= tolerance


LOSSES = [cross_entropy, grpo, srft, token_loss, policy]
OPS = [*LOSSES, logprobs]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
