"""What a call costs in matrix products, counted, and that rows without a gradient are left out exactly."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import srft_kernels
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import loss as known_loss
from srft_kernels.head import sweep
from srft_kernels.rows.types import Coefficients
from tests.kernels.cases import LOSSES, grpo, logprobs, make_case, run, srft, token_loss

N, V, D = SHAPE = (320, 257, 64)


def products(call) -> float:
    """Floating-point operations of the matrix products of ``call``, in units of N D V."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (N * V * D)


def case_with(*leaves: str, **options):
    """A case without ignored tokens, in which ``leaves`` need a gradient."""
    case = make_case(SHAPE, ignored=0.0, bias=False, **options)
    case.cu_seqlens = torch.tensor([0, 100, 320], dtype=torch.int32)
    for name in leaves:
        getattr(case, name).requires_grad_()
    return case


def loss_of(result):
    """The scalar of a result."""
    return result if isinstance(result, torch.Tensor) else result.loss


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("leaves", "cost"), [(("hidden", "weight"), 6), (("hidden",), 4), (("weight",), 4), ((), 2)], ids=str
)
def test_known_objective(op, leaves, cost):
    """Logits once, and one product for each input that is trained."""
    case = case_with(*leaves)
    # an infinite clip: a clipped token would cost nothing
    options = {"clip_low": float("inf"), "clip_high": float("inf")} if op in (grpo, token_loss) else {}
    if op is token_loss:
        options["everything"] = True
    assert products(lambda: op(srft_kernels, case, **options)) == cost
    loss = loss_of(op(srft_kernels, case, **options))
    if leaves:
        assert products(loss.backward) == 0


def test_any_loss():
    """linear_logprobs: 8 in all, and 4 with nothing in backward where only the hidden states are trained."""
    for leaves, entropy_grad, forward, backward in (
        (("hidden", "weight"), False, 2, 6),
        (("weight",), True, 2, 4),
        (("hidden",), True, 2, 4),
        (("hidden",), False, 4, 0),
    ):
        case, out = case_with(*leaves), []

        def call(case=case, out=out, entropy_grad=entropy_grad):
            out.append(logprobs(srft_kernels, case, entropy_grad=entropy_grad).loss)

        assert products(call) == forward
        assert products(out[0].backward) == backward
    with torch.no_grad():
        case = case_with("hidden", "weight")
        assert products(lambda: logprobs(srft_kernels, case)) == 2


def test_scopes_without_a_second_projection(monkeypatch):
    """With chunks of 16 rows a batch of one kind of rollouts costs 6; demonstrations add a product of theirs."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(sweep, "DEFERRED_CHUNKS", 3)
    case = case_with("hidden", "weight")
    case.is_demo, case.is_correct = torch.arange(N) < 64, torch.arange(N) < 192
    case.cu_seqlens = torch.tensor([0, 64, 192, 320], dtype=torch.int32)
    for scope in ("batch", "sequence"):
        cost = products(lambda s=scope: srft(srft_kernels, case, entropy_scope=s))
        assert cost == pytest.approx(6 + 2 * 64 / N)
    case.is_demo[:] = False
    assert products(lambda: srft(srft_kernels, case, entropy_scope="batch")) == 6
    assert products(lambda: grpo(srft_kernels, case, loss_type="gspo", clip_low=1e9, clip_high=1e9)) == 6
    unclipped = {"policy": "gspo", "clip_low": 1e9, "clip_high": 1e9}
    alone = {"sft_weights": None, "sft_entropy_coefs": None, "policy_weights": case.weights}
    assert products(lambda: token_loss(srft_kernels, case, **unclipped, **alone)) == 6
    # the log-likelihood of every token has a product of its own
    beside = {**alone, "sft_weights": case.weights}
    assert products(lambda: token_loss(srft_kernels, case, **unclipped, **beside)) == 8
    # factors of an entropy that is given do not wait
    few = {"sft_weights": case.weights * (torch.arange(N) < 64), "entropy_scope": "batch", "batch_entropy": 0.7}
    assert products(lambda: token_loss(srft_kernels, case, **unclipped, **few)) == pytest.approx(6 + 2 * 64 / N)
    monkeypatch.setattr(known_loss, "CPU_DEFERRED_BYTES", 0)
    # the last chunk is still there when the scalars are known
    assert products(lambda: srft(srft_kernels, case, entropy_scope="batch")) == 8 - 2 * 16 / N
    assert products(lambda: token_loss(srft_kernels, case, entropy_scope="batch", **unclipped)) == 8 - 2 * 16 / N
    given = {"entropy_scope": "batch", "batch_entropy": 0.7, "clip_low": 1e9, "clip_high": 1e9}
    assert products(lambda: token_loss(srft_kernels, case, everything=True, **given)) == 6


@pytest.mark.parametrize("op", [grpo, logprobs], ids=lambda op: op.__name__)
def test_dead_rows_cost_no_gradient_product(op):
    """Rows with advantage 0 are left out of both gradient products, and of backward's projection."""
    case = case_with("hidden", "weight")
    case.old_logprobs = None
    case.advantages = torch.where(torch.arange(N) % 5 < 3, 0.0, 1.0)
    live = (2 * N // 5) / N
    options = {"entropy_grad": False} if op is logprobs else {"on_policy": True}
    forward = products(lambda: op(srft_kernels, case, **options))
    backward = products(loss_of(op(srft_kernels, case, **options)).backward)
    assert [forward, backward] == pytest.approx([2, 6 * live] if op is logprobs else [2 + 4 * live, 0])
    case.advantages = torch.zeros(N)
    assert products(lambda: op(srft_kernels, case, **options)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", [grpo, logprobs], ids=lambda op: op.__name__)
@pytest.mark.parametrize("live", [0.02, 0.3, 0.97])
def test_gradients_are_bitwise_those_with_dead_rows(op, dtype, live, monkeypatch):
    """Leaving rows out changes no bit of any gradient, in one chunk of several blocks and in many chunks."""
    case = make_case(SHAPE, dtype, ignored=0.0)
    keep = torch.rand(N, generator=torch.Generator().manual_seed(1)) < live
    case = replace(case, advantages=torch.where(keep, case.advantages, 0.0))
    options = {"entropy_grad": False} if op is logprobs else {}
    for workspace in (2**20, 48 * V * 4):
        monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", workspace)
        without = run(op, srft_kernels, case, **options)
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "live_rows", lambda count, *_: chunked_head.live_rows(count, None, True))
            whole = run(op, srft_kernels, case, **options)
        for name in ("dhidden", "dweight", "dbias"):
            assert torch.equal(without[name], whole[name]), name
        assert not without["dhidden"][~keep].any()



def test_no_block_has_one_live_row_alone():
    """A library may compute a product of one row otherwise: another row of its block stays, and no more than that."""
    dlogp = torch.zeros(320)
    dlogp[[3, 200, 201, 319]] = 1.0
    live = chunked_head.live_rows(320, Coefficients(dlogp), True)
    assert live.positions is not None and {3, 200, 201, 319} <= set(live.positions.tolist())
    assert len(live.positions) == 16 and [block.stop - block.start for block in live.blocks] == [12, 2, 2]
