"""The general token loss: fillings that are other losses, and weights of 0 beside anything."""

from dataclasses import replace

import pytest
import torch

import srft_kernels
from srft_kernels import reference
from srft_kernels.head import chunks as chunked_head
from tests.kernels.cases import Case, case_id, cross_entropy, grpo, make_case, run, srft
from tests.numerics import assert_sum

INF, NAN = float("inf"), float("nan")
MODULES = pytest.mark.parametrize("module", [srft_kernels, reference], ids=["op", "reference"])
WEIGHTS = ("policy_weights", "sft_weights", "shaped_weights", "kl_weights", "entropy_weights")


def filled(module, case: Case, **options):
    """linear_token_loss of nothing but ``options``."""
    return module.linear_token_loss(case.hidden, case.weight, case.labels, bias=case.bias, **options)


def assert_same(actual: dict, expected: dict, size: float | torch.Tensor, terms: dict[str, tuple[str, ...]]) -> None:
    """The same log-probabilities and gradients; the same loss, and ``terms`` as sums of the other's.

    ``size`` is that of what these add up.
    """
    for name in ("logprobs", "entropy"):
        assert name not in expected or torch.equal(actual[name], expected[name])
    for name, parts in {"loss": (), **terms}.items():
        found = actual[name].detach() if name == "loss" else actual["terms/" + name]
        wanted = expected["loss"].detach() if name == "loss" else sum(expected["terms/" + part] for part in parts)
        assert_sum(name, found, wanted, float(size))
    for name in ("dhidden", "dweight", "dbias"):
        error = (actual[name] - expected[name]).square().mean().sqrt()
        assert expected[name].any() and error <= 1e-5 * expected[name].square().mean().sqrt(), name


@MODULES
@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "cispo", "reinforce"])
def test_grpo_is_a_filling(module, loss_type, on_policy):
    """The GRPO family: weights are those of tokens and rollouts, over the denominator."""
    case = make_case((60, 97, 24), seed=5)
    w = case.weights / 23
    actual = run(
        filled, module, case, advantages=case.advantages, policy="clip" if loss_type == "grpo" else loss_type,
        old_logprobs=None if on_policy else case.old_logprobs, ref_logprobs=case.ref_logprobs, dual_clip=1.3,
        policy_weights=(2.0 - case.weights) * w, kl_weights=0.3 * w, entropy_weights=0.05 * w,
        cu_seqlens=case.cu_seqlens,
    )  # fmt: skip
    options = {"loss_type": loss_type, "on_policy": on_policy, "everything": True, "dual_clip": 1.3}
    expected = run(grpo, module, case, **options)
    assert_same(actual, expected, 5 * w.sum(), {name: (name,) for name in ("policy", "kl", "entropy_bonus")})
    assert torch.equal(actual["clipped"], expected["clipped"]) and torch.equal(actual["ratio"], expected["ratio"])


@MODULES
@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
@pytest.mark.parametrize("preset", ["paper", "official", "upt"])
def test_srft_is_a_filling(module, preset, scope, monkeypatch):
    """SRFT: each token chooses the sign of its entropy, "exp(H) where A > 0" included."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    case = make_case((60, 97, 24), seed=7)
    demo, ratio = case.is_demo, preset == "official"
    demo_w, rollout_w = (torch.where(x, case.weights / n, 0.0) for x, n in ((demo, 17), (~demo, 31)))
    likelihood = torch.where(case.is_correct, 0.1, -1.0) * rollout_w
    positive = case.advantages > 0 if ratio else case.is_correct
    u = torch.where(positive & ~demo, 1.0, 0.0)
    given = {
        "sft_weights": 0.5 * demo_w + (0.0 if ratio else likelihood),
        "sft_entropy_coefs": torch.where(demo, 1.0 if ratio else -1.0, 0.0 if ratio else u),
        "shaped_weights": demo_w,
        "shaping_gamma": None if preset == "paper" else 0.1,
    }
    if ratio:
        given |= {
            "policy_weights": torch.where(positive, 0.1, 1.0) * rollout_w, "policy_entropy_coefs": u,
            "old_logprobs": case.old_logprobs, "clip_low": INF, "clip_high": INF,
        }  # fmt: skip
    if preset != "paper":
        given["entropy_weights"] = torch.full((60,), 0.001 / 48)
    actual = run(
        filled, module, case, advantages=case.advantages, entropy_scope=scope, cu_seqlens=case.cu_seqlens, **given
    )
    expected = run(srft, module, case, preset=preset, entropy_scope=scope, off_policy=True, everything=True)
    rollouts = ("rollout_positive", "rollout_negative")
    sft = {"sft": ("demo_sft",), "policy": rollouts} if ratio else {"sft": ("demo_sft", *rollouts), "policy": ()}
    size = 5 * (demo_w + rollout_w).sum()
    assert_same(actual, expected, size, {**sft, "shaped": ("demo_rl",), "entropy_bonus": ("entropy_bonus",)})


@MODULES
def test_cross_entropy_is_a_filling(module):
    """Weights of one over the number of tokens, and nothing else."""
    case = make_case()
    count = (case.labels != -100).sum()
    actual = run(filled, module, case, sft_weights=torch.full((37,), 1.0) / count)
    assert_same(actual, run(cross_entropy, module, case), 5, {})


@MODULES
@pytest.mark.parametrize("factor", ["p", "p(1-p)"])
def test_factors_of_probabilities_are_fixed(module, factor):
    """DFT, -sg(p) log p, and CHORD-phi, -sg(p (1 - p)) log p, as a user would write them."""
    case = make_case()

    def objective(logprobs, entropy):
        p = logprobs.detach().exp()
        return -(case.weights * (p if factor == "p" else p * (1 - p)) * logprobs).sum()

    def written(module, case):
        return module.linear_policy_loss(case.hidden, case.weight, case.labels, objective, bias=case.bias)

    actual = run(filled, module, case, sft_weights=case.weights, sft_prob_factor=factor)
    assert_same(actual, run(written, module, case), 5 * case.weights.sum(), {})


OUT = torch.arange(14) % 5 == 2


def everything(case: Case) -> dict:
    """Every vector of the loss, none of it 0."""
    g = torch.Generator().manual_seed(3)
    names = (*WEIGHTS, "policy_entropy_coefs", "sft_entropy_coefs")
    return {name: torch.rand(14, generator=g) + 0.2 for name in names} | {
        "advantages": case.advantages, "old_logprobs": case.old_logprobs, "ref_logprobs": case.ref_logprobs,
    }  # fmt: skip


@MODULES
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1e4], ids=str)
@pytest.mark.parametrize("name", ["clip", "cispo", "reinforce", "gspo"])
def test_weights_of_zero_take_out_their_terms(module, name, value):
    """Beside a weight of 0 anything may stand; the token keeps its log-probability, its entropy, and no gradient."""
    case = make_case((14, 33, 8), seed=2, ignored=0.0)
    case.cu_seqlens = torch.tensor([0, 6, 7, 14], dtype=torch.int32)
    given = everything(case)
    live = {"policy": name, "cu_seqlens": case.cu_seqlens, "shaping_gamma": 0.1}

    def at_out(names, x):
        return {n: given[n].masked_fill(OUT, x) for n in names}

    others = [n for n in given if n not in WEIGHTS]
    actual = run(filled, module, case, **live, **{**given, **at_out(WEIGHTS, 0.0), **at_out(others, value)})
    labels = case.labels.masked_fill(OUT, -100)
    expected = run(filled, module, replace(case, labels=labels), **live, **given)
    expected["terms/sum_entropy"] = actual["entropy"].sum()
    assert torch.isfinite(actual["loss"]) and not actual["dhidden"][OUT].any()
    assert (actual["logprobs"][OUT] < 0).all() and (actual["entropy"][OUT] > 0).all()
    assert (actual["ratio"][OUT] == 1).all() and not actual["clipped"][OUT].any()
    for key in ("loss", "dhidden", "dweight", "dbias", *(k for k in actual if k.startswith("terms"))):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@MODULES
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("zero", "spoiled"),
    [
        (("advantages",), ("policy_weights", "shaped_weights", "policy_entropy_coefs", "old_logprobs")),
        (("policy_weights",), ("old_logprobs", "policy_entropy_coefs")),
        (("policy_weights", "shaped_weights"), ("advantages",)),
        (("sft_weights",), ("sft_entropy_coefs",)),
        (("kl_weights",), ("ref_logprobs",)),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, tuple) else None,
)
def test_a_zero_takes_out_what_it_multiplies_alone(module, zero, spoiled, value):
    """The other terms of the token stay as they are beside sound vectors."""
    case = make_case((14, 33, 8), seed=2, ignored=0.0)
    given = everything(case)
    given |= {n: given[n].masked_fill(OUT, 0.0) for n in zero}
    bad = given | {n: given[n].masked_fill(OUT, value) for n in spoiled}
    expected, actual = (run(filled, module, case, shaping_gamma=0.1, **x) for x in (given, bad))
    for name, x in expected.items():
        assert name == "ratio" or torch.equal(actual[name], x), name
    assert expected["dhidden"][OUT].any(1).all() and torch.isfinite(actual["ratio"]).all()


@MODULES
@pytest.mark.parametrize("factor", ["p", "p(1-p)"])
def test_factors_take_out_what_cannot_be(module, factor):
    """A label that a bias of -inf removes has p = 0, and p log p is 0, with no gradient."""
    case = make_case((14, 33, 8), seed=2, ignored=0.0)
    case.bias[case.labels[3]] = -INF
    out = run(filled, module, case, sft_weights=case.weights, sft_prob_factor=factor)
    gone = out["logprobs"] == -INF
    assert gone[3] and torch.isfinite(out["loss"]) and not out["dhidden"][gone].any()
    assert all(torch.isfinite(out[name]).all() for name in ("dhidden", "dweight"))


@pytest.mark.parametrize("name", ["policy_weights", "sft_weights", "shaped_weights", "kl_weights", "old_logprobs"])
def test_nan_of_a_live_token_is_seen(name):
    """What counts and is NaN makes the loss NaN."""
    case = make_case((14, 33, 8), seed=2, ignored=0.0)
    given = everything(case)
    given[name] = given[name].masked_fill(OUT, NAN)
    assert torch.isnan(run(filled, srft_kernels, case, **given)["loss"])


@pytest.mark.parametrize("options", [{}, {"policy": "gspo"}, {"entropy_scope": "batch"}], ids=case_id)
def test_a_mean_of_entropies_has_tokens_without_weight(options):
    """Tokens all of whose weights are 0 are in the means of H; those without a label are not."""
    case = make_case((14, 33, 8), seed=2, ignored=0.0)
    case.cu_seqlens = torch.tensor([0, 6, 7, 14], dtype=torch.int32)
    weights = {"sft_weights": case.weights.masked_fill(OUT, 0.0), "sft_entropy_coefs": torch.ones(14)}
    options = {"entropy_scope": "sequence", "cu_seqlens": case.cu_seqlens, **options}
    if options.get("policy") == "gspo":
        weights |= {"policy_weights": case.weights, "advantages": case.advantages}
    kept, left = (
        run(filled, srft_kernels, replace(case, labels=labels), **weights, **options)
        for labels in (case.labels, case.labels.masked_fill(OUT, -100))
    )
    assert kept["terms/sft"] != left["terms/sft"]


def test_absent_terms_are_zero():
    """Terms without weights are exactly 0, and a token loss of one term is that term."""
    case = make_case()
    out = run(filled, srft_kernels, case, shaped_weights=case.weights, advantages=case.advantages)
    assert {name: bool(out["terms/" + name]) for name in ("policy", "sft", "shaped", "kl", "entropy_bonus")} == {
        "policy": False, "sft": False, "shaped": True, "kl": False, "entropy_bonus": False
    }  # fmt: skip
    assert out["loss"] == out["terms/shaped"]
