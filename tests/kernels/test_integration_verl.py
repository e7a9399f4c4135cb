"""The heads named after verl's equal verl's own code in fp32, and plain PyTorch in float64."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from srft_kernels.integrations.liger import LigerFusedLinearScaledCrossEntropyTPFunction
from srft_kernels.integrations.verl import FusedLinearForPPO, linear_cross_entropy
from tests.numerics import assert_accurate
from tests.ranks import results_of_two_ranks

needs_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason="needs the files of verl: pip install --no-deps verl==0.9.1"
)
H, V = 24, 53


def load_verl(path):
    """A module of verl from its file: importing the package would need ray."""
    root = Path(importlib.util.find_spec("verl").origin).parent
    spec = importlib.util.spec_from_file_location("_verl_" + Path(path).stem, root / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_case(shape, dtype=torch.float64, seed=0):
    """hidden [*shape, H], weight [V, H], ids [*shape] int32 and upstream gradients of log-probabilities and entropy."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, dlogp, dentropy = (
        torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in ((*shape, H), (V, H), shape, shape)
    )
    return hidden, weight, torch.randint(V, shape, generator=g, dtype=torch.int32), dlogp, dentropy


def plain(hidden, weight, ids, temperature=1.0):
    """Log-probabilities and entropy from materialised logits."""
    logits = hidden @ weight.T / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids.long()[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def run(head, hidden, weight, ids, upstream, *args):
    """Outputs and gradients by name; an upstream gradient of None is not sent."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    outputs = head(*leaves, ids, *args)
    sent = [(x, d) for x, d in zip(outputs, upstream, strict=True) if d is not None]
    torch.autograd.backward([x for x, _ in sent], [d for _, d in sent])
    return {
        "logprobs": outputs[0].detach(), "entropy": outputs[1].detach(),
        "dhidden": leaves[0].grad, "dweight": leaves[1].grad,
    }  # fmt: skip


@needs_verl
@pytest.mark.parametrize("outputs", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(19,), (2, 7)], ids=str)
def test_fused_linear_for_ppo_equals_verl(shape, temperature, outputs):
    """Outputs and gradients in fp32 are as close to float64 as verl's, in any shape and for either output alone."""
    verl = load_verl("utils/experimental/torch_functional.py")
    *case, dlogp, dentropy = make_case(shape, torch.float32)
    upstream = (dlogp if outputs != "entropy" else None, dentropy if outputs != "logprobs" else None)
    theirs = run(verl.FusedLinearForPPO(chunk_size=5), *case, upstream, temperature)
    ours = run(FusedLinearForPPO(), *case, upstream, temperature)
    hidden, weight, ids = case
    gold = run(
        plain, hidden.double(), weight.double(), ids, [None if d is None else d.double() for d in upstream], temperature
    )
    for name in gold:
        assert_accurate(name, ours[name], gold[name], theirs[name], gradient=name[0] == "d")
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5)


@needs_verl
def test_bf16_is_at_least_as_accurate_as_verl():
    """In bf16 every result is closer to float64 than verl's, whose logits are rounded to bf16."""
    verl = load_verl("utils/experimental/torch_functional.py")
    hidden, weight, ids, dlogp, dentropy = make_case((64,), torch.bfloat16)
    upstream = (dlogp.float(), dentropy.float())
    theirs = run(verl.FusedLinearForPPO(), hidden, weight, ids, (dlogp.float(), dentropy))
    ours = run(FusedLinearForPPO(), hidden, weight, ids, upstream)
    gold = run(plain, hidden.double(), weight.double(), ids, (dlogp.double(), dentropy.double()))
    for name in gold:
        assert (ours[name] - gold[name]).norm() <= (theirs[name] - gold[name]).norm(), name
    assert ours["entropy"].dtype == ours["logprobs"].dtype == torch.float32


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(19,), (2, 7)], ids=str)
def test_heads_are_exact(shape, per_token):
    """In float64 both heads equal plain PyTorch, with one temperature or one per token."""
    hidden, weight, ids, *upstream = make_case(shape)
    temperature = torch.linspace(0.5, 1.5, ids.numel()).double().view(shape) if per_token else 0.7
    gold = run(
        lambda h, w, i: plain(h, w, i, temperature[..., None] if per_token else temperature),
        hidden, weight, ids, upstream,
    )  # fmt: skip
    for head in (FusedLinearForPPO(), linear_cross_entropy):
        flat = [d.flatten() for d in upstream] if head is linear_cross_entropy else upstream
        for name, x in run(head, hidden, weight, ids, flat, temperature).items():
            expected = gold[name].flatten() if head is linear_cross_entropy and name[0] != "d" else gold[name]
            torch.testing.assert_close(x, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("reduction", ["sum", "mean", "MEAN"])
def test_reduced_logprobs(reduction):
    """A reduction applies to the log-probabilities, and leaves the entropy per token."""
    hidden, weight, ids, _, dentropy = make_case((11,))
    upstream = torch.tensor(1.7, dtype=torch.float64)
    actual = run(linear_cross_entropy, hidden, weight, ids, (upstream, dentropy), 0.9, reduction)

    def reduced(h, w, i):
        logprobs, entropy = plain(h, w, i, 0.9)
        return logprobs.sum() if reduction == "sum" else logprobs.mean(), entropy

    for name, x in run(reduced, hidden, weight, ids, (upstream, dentropy)).items():
        torch.testing.assert_close(actual[name], x)


def test_hidden_and_labels_are_flattened_apart():
    """Megatron's hidden states [T, 1, D] go with labels [1, T]."""
    hidden, weight, ids, *_ = make_case((9,))
    expected, _ = linear_cross_entropy(hidden, weight, ids)
    actual, _ = linear_cross_entropy(hidden[:, None], weight, ids[None])
    assert torch.equal(actual, expected)


def test_labels_of_minus_100_are_skipped():
    """They give 0 and no gradient, and leave the other rows as they are."""
    hidden, weight, ids, *upstream = make_case((2, 7))
    labels = ids.clone()
    labels[0, 2:5] = -100
    keep = labels != -100
    actual = run(FusedLinearForPPO(), hidden, weight, labels, upstream)
    rest = run(FusedLinearForPPO(), hidden[keep], weight, ids[keep], [d[keep] for d in upstream])
    for name in ("logprobs", "entropy", "dhidden"):
        assert not actual[name][~keep].any()
        assert torch.equal(actual[name][keep], rest[name])
    assert torch.equal(actual["dweight"], rest["dweight"])


@needs_verl
def test_signatures_are_those_of_verl():
    """Every argument has the name, place and default that verl gives it."""
    heads = load_verl("utils/experimental/torch_functional.py")
    kernel = load_verl("utils/kernel/linear_cross_entropy.py")

    def arguments(function, skip=()):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name not in skip]

    for ours, theirs in (
        (FusedLinearForPPO.__init__, heads.FusedLinearForPPO.__init__),
        (FusedLinearForPPO.forward, heads.FusedLinearForPPO.forward),
        (linear_cross_entropy, kernel.LinearCrossEntropy.forward),
    ):
        assert arguments(ours) == arguments(theirs, skip=("ctx",))


def test_group_of_one_rank_changes_nothing(tmp_path):
    """A tensor-parallel group of a single rank holds the whole head."""
    hidden, weight, ids, *_ = make_case((5,))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone, _ = linear_cross_entropy(hidden, weight, ids, dist_process_group=dist.group.WORLD)
        assert torch.equal(alone, linear_cross_entropy(hidden, weight, ids)[0])
    finally:
        dist.destroy_process_group()


def rank_main(rank: int, folder: Path) -> None:
    """What each of two ranks runs: verl's and Liger's tensor-parallel heads on its half of the vocabulary."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    hidden, weight, ids, *upstream = make_case((3, 5))
    weight, upstream = weight[:52].chunk(2)[rank], [d.flatten() for d in upstream]
    ids = ids.clamp(max=51)
    verl = run(linear_cross_entropy, hidden, weight, ids, upstream, 0.7, "none", dist.group.WORLD)
    liger = run(
        lambda h, w, i: LigerFusedLinearScaledCrossEntropyTPFunction.apply(h, w, i, None, 0.7, return_entropy=True),
        hidden.flatten(0, 1), weight, ids.flatten().long(), [-upstream[0], upstream[1]],
    )  # fmt: skip
    torch.save({"verl": verl, "liger": liger}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_vocabulary(tmp_path):
    """Both ranks get the whole head's results; verl's gradients of hidden sum to it, Liger's are summed already."""
    ranks = results_of_two_ranks("tests.kernels.test_integration_verl", tmp_path)
    hidden, weight, ids, *upstream = make_case((3, 5))
    weight, ids = weight[:52], ids.clamp(max=51)
    gold = run(lambda h, w, i: plain(h, w, i, 0.7), hidden, weight, ids, upstream)
    for rank, dweight in enumerate(gold["dweight"].chunk(2)):
        for peer in ("verl", "liger"):
            out = ranks[rank][peer]
            sign = -1 if peer == "liger" else 1
            torch.testing.assert_close(sign * out["logprobs"], gold["logprobs"].flatten())
            torch.testing.assert_close(out["entropy"], gold["entropy"].flatten())
            torch.testing.assert_close(out["dweight"], dweight)
        torch.testing.assert_close(ranks[rank]["liger"]["dhidden"], gold["dhidden"].flatten(0, 1))
    torch.testing.assert_close(ranks[0]["verl"]["dhidden"] + ranks[1]["verl"]["dhidden"], gold["dhidden"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w, i: linear_cross_entropy(h, w, i, reduction="median"), "reduction must be one of 'none'"),
        (lambda h, w, i: linear_cross_entropy(h, w, i[:-1]), r"labels must be \[N\]=\[6\], got \[5\]"),
        (lambda h, w, i: linear_cross_entropy(h, w, i, 0.0), "temperature must be a number > 0"),
        (lambda h, w, i: FusedLinearForPPO(impl_backend="triton"), "impl_backend must be one of 'torch', 'liger'"),
        (lambda h, w, i: FusedLinearForPPO()(h, w, i[:, None]), r"input_ids must be \[6\], as hidden_states \[6, 24\]"),
        (lambda h, w, i: FusedLinearForPPO()(h, w.float(), i), "lm_head_weight must have the dtype of hidden_states"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    """A ValueError says what was expected and what came."""
    hidden, weight, ids, *_ = make_case((6,))
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, ids)
