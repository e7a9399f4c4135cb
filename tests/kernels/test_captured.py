"""linear_policy_loss: what else the caller's loss reads gets its gradient too, eager and compiled alike."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import srft_kernels
from srft_kernels import reference
from srft_kernels.head import chunks as chunked_head
from tests.kernels.cases import make_case

SHAPE = (37, 31, 8)


class Critic(nn.Module):
    """Parameters that a loss of the caller reads: a partition function, a value head, a scale of another part."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.log_z = nn.Parameter(torch.tensor(1.3, dtype=dtype))
        self.value = nn.Linear(SHAPE[2], 1, dtype=dtype)
        self.early = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def objective(self, hidden, advantages, rows):
        """Trajectory balance with values; ``early`` and ``hidden`` come to it through the graph outside."""
        baseline = self.early.exp() * hidden.square().mean(-1)

        def loss(logprobs, entropy):
            balance = self.log_z + logprobs - advantages + self.value(hidden)[:, 0]
            return (balance.square() * baseline).sum() / SHAPE[0] + (entropy * baseline).mean() * rows

        return loss


def gradients(module, case, *, factor=-1.7, parts=1, trained=("hidden", "weight", "bias"), compiled=False):
    """Gradients of the trained inputs of the head and of the critic, over micro-batches of rows."""
    torch.manual_seed(1)
    critic = Critic(case.hidden.dtype)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in trained}
    used = replace(case, **leaves)

    def run(hidden, weight, bias, labels, advantages):
        objective = critic.objective(hidden, advantages, labels.numel())
        return module.linear_policy_loss(hidden, weight, labels, objective, bias=bias).loss

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in torch.arange(SHAPE[0]).chunk(parts):
        loss = run(
            used.hidden[rows], used.weight, used.bias, case.labels[rows], case.advantages[rows].to(case.hidden.dtype)
        )
        (loss * factor).backward()
    return {name: x.grad for name, x in leaves.items()} | {name: p.grad for name, p in critic.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ()], ids=lambda x: "+".join(x) or "-")
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_of_what_the_loss_reads(trained, parts, compiled, monkeypatch):
    """Of parameters, of a module and of tensors that other parts of the graph made; also with the head frozen."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    case = make_case(SHAPE, torch.float64)
    gold = gradients(reference, case, parts=parts, trained=trained)
    actual = gradients(srft_kernels, case, parts=parts, trained=trained, compiled=compiled)
    assert actual.keys() == gold.keys() and len(gold) == len(trained) + 4
    for name, x in gold.items():
        assert x.any() and (actual[name] - x).norm() <= 1e-10 * x.norm(), name


def test_a_learned_partition_function():
    """d/dz of sum((z + logp)^2) by hand."""
    case = make_case(SHAPE, torch.float64, ignored=0.0)
    log_z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    out = srft_kernels.linear_policy_loss(
        case.hidden.requires_grad_(), case.weight, case.labels, lambda logp, _: (log_z + logp).square().sum()
    )
    (3 * out.loss).backward()
    torch.testing.assert_close(log_z.grad, 6 * (0.4 + out.logprobs).sum())


def test_a_loss_that_reads_nothing_of_the_head():
    """The loss may be a parameter itself, or there may be no token; the head's gradients are then zeros."""
    case = make_case(SHAPE)
    parameter = nn.Parameter(torch.tensor(2.0))
    for count in (SHAPE[0], 0):
        for loss_of in (lambda logp, _: parameter, lambda logp, _: parameter.square() + logp.sum() * 0):
            parameter.grad = None
            hidden = case.hidden[:count].clone().requires_grad_()
            out = srft_kernels.linear_policy_loss(hidden, case.weight, case.labels[:count], loss_of)
            assert out.loss is not parameter
            out.loss.backward()
            assert parameter.grad is not None and parameter.grad != 0
            assert hidden.grad is not None and not hidden.grad.any()


def test_without_gradients_there_is_none():
    """Neither a graph nor a gradient under no_grad, nor for tensors that need none."""
    case = make_case(SHAPE)
    log_z = torch.tensor(0.4, requires_grad=True)
    hidden = case.hidden.clone().requires_grad_()
    with torch.no_grad():
        out = srft_kernels.linear_policy_loss(hidden, case.weight, case.labels, lambda logp, _: (log_z * logp).sum())
    assert not out.loss.requires_grad and out.loss.grad_fn is None
    out = srft_kernels.linear_policy_loss(
        case.hidden, case.weight, case.labels, lambda logp, _: (log_z.detach() * logp).sum()
    )
    assert not out.loss.requires_grad


def test_backward_runs_once():
    """The second backward says so, and leaves no gradient of what was captured twice."""
    case = make_case(SHAPE)
    log_z = torch.tensor(0.4, requires_grad=True)
    loss = srft_kernels.linear_policy_loss(
        case.hidden.requires_grad_(), case.weight, case.labels, lambda logp, _: (log_z * logp).sum()
    ).loss
    loss.backward(retain_graph=True)
    once = log_z.grad.clone()
    with pytest.raises(RuntimeError, match="already differentiated"):
        loss.backward()
    assert torch.equal(log_z.grad, once)
