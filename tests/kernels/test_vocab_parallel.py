"""A head whose rows are spread over two gloo ranks gives every rank the result of the whole head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import srft_kernels
from srft_kernels import LoraDelta, VocabParallel, reference
from srft_kernels.head import chunks as chunked_head
from tests.kernels.cases import cross_entropy, grpo, logprobs, make_case, policy, run, srft, token_loss
from tests.numerics import assert_accurate
from tests.ranks import results_of_two_ranks

N, V, D = 70, 101, 24
# uneven: the second rank has fewer rows, as where the padding of a vocabulary is cut off
CUT = 60


def plain_case(**options):
    """Labels on both sides of the cut, at it, and at both ends."""
    case = make_case((N, V, D), **{"ignored": 0.1, "seed": 2, **options})
    case.labels[2], case.labels[3] = CUT - 1, CUT
    case.cu_seqlens = torch.tensor([0, 50, 50, 70], dtype=torch.int32)
    return case


def masked_case():
    """Every word of the second rank is removed."""
    case = plain_case()
    case.bias[CUT:] = -torch.inf
    case.labels = torch.where(case.labels >= CUT, 7, case.labels)
    return case


def low_case():
    """Every logit lies below -88, where exp underflows."""
    case = plain_case()
    return replace(case, bias=torch.linspace(-300, -200, V), old_logprobs=case.old_logprobs.clamp(min=-3))


LORA = [torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((2, D), (V, 2))]
# name: (op, case, options, chunks of 16 rows)
RUNS = {
    "cross_entropy": (cross_entropy, plain_case, {}, False),
    "cross_entropy-chunks": (cross_entropy, plain_case, {"temperature": 0.7}, True),
    "smoothed": (cross_entropy, plain_case, {"label_smoothing": 0.3, "z_loss_coef": 0.1}, True),
    "smoothed-masked": (cross_entropy, lambda: masked_case(), {"label_smoothing": 1.0, "z_loss_coef": 0.1}, False),
    "grpo": (grpo, plain_case, {"everything": True, "logit_softcap": 3.0, "logit_scale": 0.6}, True),
    "gspo": (grpo, plain_case, {"loss_type": "gspo"}, True),
    "srft": (srft, plain_case, {}, True),
    "srft-batch": (srft, plain_case, {"entropy_scope": "batch", "preset": "upt"}, True),
    "token-loss": (token_loss, plain_case, {"everything": True, "entropy_scope": "batch"}, True),
    "policy": (policy, plain_case, {}, True),
    "logprobs": (logprobs, plain_case, {}, True),
    "ignore-minus-one": (grpo, lambda: minus_one(plain_case()), {"ignore_index": -1}, False),
    # the label CUT + 3 has this number on the second rank, and 0 is its own first row
    "ignore-three": (grpo, lambda: relabelled(3), {"ignore_index": 3}, True),
    "ignore-zero": (logprobs, lambda: relabelled(0), {"ignore_index": 0}, False),
    "bf16": (grpo, lambda: plain_case(dtype=torch.bfloat16), {"entropy_coef": 0.1}, True),
    "masked": (srft, masked_case, {"preset": "official", "off_policy": True}, False),
    "low": (logprobs, low_case, {}, False),
    "all-ignored": (grpo, lambda: replace(plain_case(), labels=torch.full((N,), -100)), {}, False),
    "lora": (grpo, plain_case, {"lora": True}, True),
}


def minus_one(case):
    """-1 as the label of ignored rows."""
    return replace(case, labels=torch.where(case.labels == -100, -1, case.labels))


def relabelled(index):
    """``index`` as the label of ignored rows, and labels that have this number among the second rank's rows."""
    case = plain_case()
    case.labels[4], case.labels[5] = CUT + index, index
    return replace(case, labels=torch.where(case.labels == -100, index, case.labels))


def results(module, name, shard=None):
    """One run of RUNS, on the whole head or on this rank's rows."""
    op, make, options, small = RUNS[name]
    case, options = make(), dict(options)
    a, b = LORA
    if shard is not None:
        rows = slice(shard.vocab_start, shard.vocab_start + (CUT if shard.vocab_start == 0 else V - CUT))
        case = replace(case, weight=case.weight[rows], bias=case.bias[rows])
        b = b[rows]
        options["vocab_parallel"] = shard
    if options.pop("lora", False):
        options["lora"] = LoraDelta(a, b, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
        return run(op, module, case, **options)


def rank_main(rank: int, folder: Path) -> None:
    """What each rank runs: every entry of RUNS, in order, and a frozen head; results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shard = VocabParallel(dist.group.WORLD, 0 if rank == 0 else CUT, V)
    out = {name: results(srft_kernels, name, shard) for name in RUNS}
    case = plain_case()
    rows = slice(0, CUT) if rank == 0 else slice(CUT, V)
    case.hidden.requires_grad_()
    logp, _ = srft_kernels.linear_logprobs(
        case.hidden, case.weight[rows], case.labels, bias=case.bias[rows], vocab_parallel=shard
    )
    (logp * case.advantages).sum().backward()
    out["frozen"] = {"dhidden": case.hidden.grad}
    a, b = LORA[0].clone().requires_grad_(), LORA[1][rows].clone().requires_grad_()
    case = plain_case()
    weight, bias, lora = case.weight[rows], case.bias[rows], LoraDelta(a, b, 0.3)
    grpo(srft_kernels, replace(case, weight=weight, bias=bias), lora=lora, vocab_parallel=shard).loss.backward()
    out["lora-gradients"] = {"a": a.grad, "b": b.grad}
    torch.save(out, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Results of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_two_ranks("tests.kernels.test_vocab_parallel", folder)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_agree_with_the_whole_head(name, ranks):
    """Results are the same bits on both ranks, and each rank's gradients are its part of the reference's."""
    op, make, options, _ = RUNS[name]
    plain = {key: value for key, value in options.items() if key != "lora"}
    if "lora" in options:
        plain["lora"] = LoraDelta(*LORA, 0.3)
    case = make()
    gold = run(op, reference, case.to(torch.float64), **plain)
    baseline = run(op, reference, case, **plain)
    rows = (slice(0, CUT), slice(CUT, V))
    for rank, out in enumerate(rank[name] for rank in ranks):
        assert out.keys() == baseline.keys()
        for key, x in out.items():
            if key == "clipped":
                assert torch.equal(x, gold[key])
                continue
            mine = slice(None) if key not in ("dweight", "dbias") else rows[rank]
            whole, base = (y[key][mine] if y[key].dim() else y[key] for y in (gold, baseline))
            assert_accurate(key, x, whole, base, gradient=key.startswith("d"))
            if key not in ("dweight", "dbias"):
                assert torch.equal(x, ranks[0][name][key])


def test_frozen_head(ranks):
    """linear_logprobs of a frozen head in parts."""
    case = plain_case()
    case.hidden.requires_grad_()
    logp, _ = reference.linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)
    (logp * case.advantages).sum().backward()
    for rank in ranks:
        torch.testing.assert_close(rank["frozen"]["dhidden"], case.hidden.grad)


def test_gradients_of_lora(ranks):
    """That of a is the sum over ranks, that of b each rank's rows."""
    a, b = (x.clone().requires_grad_() for x in LORA)
    grpo(reference, plain_case(), lora=LoraDelta(a, b, 0.3)).loss.backward()
    for rank, rows in zip(ranks, (slice(0, CUT), slice(CUT, V)), strict=True):
        torch.testing.assert_close(rank["lora-gradients"]["a"], a.grad)
        torch.testing.assert_close(rank["lora-gradients"]["b"], b.grad[rows])


def test_chunks_are_the_same_on_every_rank():
    """Ranks with different numbers of rows must run the same number of collectives."""

    class Group:
        def size(self):
            return 2

    chunks = []
    for start, count in ((0, 90), (90, 11)):
        shard = VocabParallel(Group(), start, 101)
        head = chunked_head.HeadRows(
            torch.zeros(900, 4), torch.zeros(count, 4), torch.zeros(900), None, None, None, -100, None, shard,
            torch.float32,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 2**14)
            chunks.append(chunked_head.chunking(head).split(0, 900))
    assert chunks[0] == chunks[1] and len(chunks[0]) > 1
