"""A weight of 0 takes a token, or the term it multiplies, out of everything; a log-ratio is bounded."""

import math
from dataclasses import replace

import pytest
import torch

import srft_kernels
from srft_kernels import reference
from srft_kernels.rows import gpu as row_kernels
from tests.kernels.cases import Case, assert_matches_reference, case_id, grpo, make_case, run, srft

INF, NAN = float("inf"), float("nan")
OUT = torch.arange(14) % 5 == 2
LOSS_TYPES = ["grpo", "gspo", "cispo", "reinforce"]
SRFT = [
    {"preset": preset, "entropy_scope": scope, "off_policy": True}
    for preset in ("paper", "official", "upt")
    for scope in ("token", "sequence", "batch")
]
each_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
each_old = pytest.mark.parametrize("old", [-INF, INF, NAN, -1e4, 1e4], ids=str)


def small_case(**changes) -> Case:
    """14 tokens in three sequences, some of them ignored and none of those among OUT."""
    case = make_case((14, 33, 8), seed=2, ignored=0.1)
    case.labels = torch.where(OUT & (case.labels == -100), 3, case.labels)
    return replace(case, cu_seqlens=torch.tensor([0, 6, 7, 14], dtype=torch.int32), **changes)


def at_out(x: torch.Tensor, value: float) -> torch.Tensor:
    """``x`` with ``value`` at the tokens OUT."""
    return x.masked_fill(OUT if x.dim() == 1 else OUT[:, None], value)


def spoiled(case: Case, value: float) -> Case:
    """The case with ``value`` in all that the tokens OUT have, their hidden states included."""
    names = ("hidden", "advantages", "old_logprobs", "ref_logprobs", "temperature")
    return replace(case, **{name: at_out(getattr(case, name), value) for name in names})


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-6) -> None:
    """Finite, and the same loss, terms and gradients."""
    for name in expected:
        if name.startswith(("terms", "d")) or name == "loss":
            assert torch.isfinite(actual[name]).all(), f"{name} is not finite"
            scale = expected[name].abs().max().clamp(min=1e-6)
            assert (actual[name] - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("value", [INF, -INF, NAN, -1e4], ids=str)
@pytest.mark.parametrize(
    ("op", "options"),
    [(grpo, {"loss_type": x, "kl_coef": kl, "entropy_coef": 0.05}) for x in LOSS_TYPES for kl in (0.0, 0.3)]
    + [(srft, x) for x in SRFT],
    ids=lambda x: x.__name__ if callable(x) else case_id(x),
)
def test_token_weight_of_zero_is_an_ignored_label(op, options, value):
    """Whatever else the token has, loss, terms and gradients are those of a label of -100."""
    case = small_case()
    counts = {"num_tokens": 17} if op is grpo else {"num_demo_tokens": 11, "num_rollout_tokens": 9}
    if op is grpo:
        counts |= {"rollout_weights": case.weights}
    options = {**options, **counts, "token_weights": case.weights, "temperature": case.temperature}
    ignored = replace(case, labels=case.labels.masked_fill(OUT, -100))
    for module in (srft_kernels, reference):
        ref = {"ref_logprobs": case.ref_logprobs} if op is grpo else {}
        expected = run(op, module, ignored, **options, **ref)
        bad = spoiled(case, value)
        if row_kernels.INTERPRETED:
            bad.hidden = case.hidden
        bad_options = {**options, "token_weights": at_out(case.weights, 0.0), "temperature": bad.temperature}
        if op is grpo:
            bad_options |= {"ref_logprobs": bad.ref_logprobs, "rollout_weights": at_out(case.weights, value)}
        actual = run(op, module, bad, **bad_options)
        assert_same(actual, expected)
        assert (actual["ratio"][OUT] == 1).all() and not actual["clipped"][OUT].any()
        assert not actual["dhidden"][OUT].any()


def test_token_weight_of_zero_is_counted_where_no_count_is_given():
    """Without a denominator every label counts, so that a weight changes nothing but its own term."""
    case = small_case()
    labelled = int((case.labels != -100).sum())
    weights = at_out(case.weights, 0.0)
    assert_same(
        run(grpo, srft_kernels, case, token_weights=weights),
        run(grpo, srft_kernels, case, token_weights=weights, num_tokens=labelled),
    )
    valid = case.labels != -100
    counts = {
        "num_demo_tokens": int((valid & case.is_demo).sum()),
        "num_rollout_tokens": int((valid & ~case.is_demo).sum()),
    }
    for module in (srft_kernels, reference):
        assert_same(
            run(srft, module, case, token_weights=weights, preset="upt"),
            run(srft, module, case, token_weights=weights, preset="upt", **counts),
        )


@each_old
@each_loss_type
@pytest.mark.parametrize("by", ["advantages", "rollout_weights"])
def test_policy_term_of_weight_zero_is_out(by, loss_type, old):
    """An advantage or rollout weight of 0 beside any ratio: as an ignored label where nothing else is left."""
    case = small_case()
    options = {"loss_type": loss_type, "num_tokens": 17, "clip_low": INF, "clip_high": INF}
    ignored = replace(case, labels=case.labels.masked_fill(OUT, -100))
    bad = replace(case, old_logprobs=at_out(case.old_logprobs, old))
    weights = case.weights
    if by == "advantages":
        # the other factor may then be anything, too
        bad.advantages, weights = at_out(case.advantages, 0.0), at_out(weights, NAN)
    else:
        bad.advantages, weights = at_out(case.advantages, NAN), at_out(weights, 0.0)
    for module in (srft_kernels, reference):
        expected = run(grpo, module, ignored, **options, rollout_weights=case.weights)
        actual = run(grpo, module, bad, **options, rollout_weights=weights)
        # the entropy is still there to be seen
        expected["terms/sum_entropy"] = actual["terms/sum_entropy"]
        assert_same(actual, expected)
        assert (actual["ratio"][OUT] == 1).all() and not actual["clipped"][OUT].any()


@each_old
@each_loss_type
def test_kl_and_entropy_stay_without_a_policy_term(loss_type, old):
    """With an advantage of 0 the KL and the entropy bonus are what they are beside a sound ratio."""
    case = small_case(advantages=torch.zeros(14))
    bad = replace(case, old_logprobs=at_out(case.old_logprobs, old))
    options = {"loss_type": loss_type, "kl_coef": 0.3, "entropy_coef": 0.05, "ref_logprobs": case.ref_logprobs}
    expected = run(grpo, srft_kernels, case, **options)
    assert expected["terms/policy"] == 0 and expected["dhidden"][OUT].any(1).all()
    assert_same(run(grpo, srft_kernels, bad, **options), expected)
    assert_matches_reference(grpo, bad, **options)


def test_sound_ratio_of_weight_zero_stays_in_its_sequence():
    """GSPO's ratio is that of the whole sequence: tokens without an advantage of their own are in it."""
    case = small_case(advantages=at_out(make_case((14, 33, 8)).advantages, 0.0))
    moved = replace(case, old_logprobs=at_out(case.old_logprobs, -1.0))
    before, after = (run(grpo, srft_kernels, x, loss_type="gspo")["ratio"] for x in (case, moved))
    changed = before != after
    assert changed[:6].any() and changed[7:].any()
    assert_matches_reference(grpo, moved, loss_type="gspo")


@each_old
def test_srft_advantage_of_zero_takes_out_the_ratio(old):
    """Ratio rollouts without an advantage may have any ratio; likelihood rollouts read no advantage at all."""
    case = small_case()
    options = {"num_demo_tokens": 11, "num_rollout_tokens": 9, "entropy_coef": 0.01}
    rollout = OUT & ~case.is_demo
    assert rollout.any()
    sound = replace(case, advantages=case.advantages.masked_fill(rollout, 0.0))
    bad = replace(sound, old_logprobs=case.old_logprobs.masked_fill(rollout, old))
    for module in (srft_kernels, reference):
        for scope in ("token", "batch"):
            given = {**options, "preset": "official", "off_policy": True, "entropy_scope": scope}
            actual = run(srft, module, bad, **given)
            assert_same(actual, run(srft, module, sound, **given))
            assert torch.isfinite(actual["ratio"]).all()
        unread = replace(case, advantages=case.advantages.masked_fill(~case.is_demo, NAN))
        assert_same(run(srft, module, unread, **options), run(srft, module, case, **options))


def test_srft_coefficients_of_zero():
    """sft_coef=0, rl_coef=0 and negative_coef=0 keep out a label of probability 0."""
    case = small_case(bias=torch.zeros(33))
    case.bias[5] = -INF
    case.labels[3:6] = 5
    case.is_demo[3:6] = torch.tensor([True, False, False])
    case.is_correct[4:6] = torch.tensor([True, False])
    for options in ({}, {"preset": "official"}, {"entropy_scope": "batch"}):
        for module in (srft_kernels, reference):
            out = run(srft, module, case, sft_coef=0.0, rl_coef=0.0, negative_coef=0.0, **options)
            finite = [x for name, x in out.items() if name == "loss" or name[0] == "d"]
            assert all(torch.isfinite(x).all() for x in finite)


def test_srft_log_likelihood_of_weight_zero_is_out():
    """sft_weights of 0 keep out a label of probability 0; beside a token_weights of 0 they may be anything."""
    case = small_case(bias=torch.zeros(33))
    case.bias[5] = -INF
    case.labels[3], case.is_demo[3] = 5, True
    sft_weights = case.weights.clone()
    for options in ({}, {"entropy_scope": "token", "preset": "upt"}, {"entropy_scope": "batch"}):
        for module in (srft_kernels, reference):
            assert torch.isinf(run(srft, module, case, sft_weights=sft_weights, **options)["loss"])
            sft_weights[3] = 0.0
            out = run(srft, module, case, sft_weights=sft_weights, **options)
            assert all(torch.isfinite(x).all() for name, x in out.items() if name == "loss" or name[0] == "d")
            token_weights = at_out(case.weights, 0.0)
            given = {"token_weights": token_weights, "num_demo_tokens": 11, "num_rollout_tokens": 9, **options}
            expected = run(srft, module, case, sft_weights=sft_weights, **given)
            actual = run(srft, module, case, sft_weights=at_out(sft_weights, NAN), **given)
            assert all(torch.equal(actual[name], x) for name, x in expected.items())
            sft_weights[3] = 1.0


@pytest.mark.parametrize("old", [-INF, -1e4, 1e4], ids=str)
@each_loss_type
def test_ratio_of_a_live_token_is_bounded(loss_type, old):
    """Beyond the bound a ratio is that of the bound; its gradient is 0, and everything is finite."""
    case = small_case(old_logprobs=at_out(small_case().old_logprobs, old))
    for options in ({}, {"clip_low": INF, "clip_high": INF}, {"max_log_ratio": 3.0}):
        assert_matches_reference(grpo, case, loss_type=loss_type, **options)
    out = run(grpo, srft_kernels, case, loss_type=loss_type)
    assert torch.isfinite(out["dweight"]).all()
    assert out["ratio"].log().abs().max() <= 20.0001
    if loss_type == "grpo":
        assert out["clipped"][OUT].all() and not out["dhidden"][OUT].any()


def test_bound_is_that_of_the_argument():
    """max_log_ratio says where the ratio stops; inside it changes no bit, and inf takes the bound away."""
    case = small_case(old_logprobs=at_out(small_case().old_logprobs, -40.0))
    unclipped = {"clip_low": INF, "clip_high": INF}
    for bound in (2.0, 30.0):
        ratio = run(grpo, srft_kernels, case, max_log_ratio=bound, **unclipped)["ratio"]
        assert ratio.max().log().item() == pytest.approx(bound, rel=1e-6)
    assert run(grpo, srft_kernels, case, max_log_ratio=INF, **unclipped)["ratio"].max() > math.exp(30)
    case = small_case()
    for op, options in ((grpo, {"everything": True}), (srft, {"preset": "official", "off_policy": True})):
        loose, default = (run(op, srft_kernels, case, **options, **x) for x in ({"max_log_ratio": INF}, {}))
        assert all(torch.equal(loose[name], default[name]) for name in loose)


@pytest.mark.parametrize("ref", [-INF, INF, -1e4, 1e4], ids=str)
@each_loss_type
def test_kl_of_a_live_token_is_bounded(loss_type, ref):
    """k3 of a reference far away, or without the word, is that of the bound, with no gradient."""
    case = small_case(ref_logprobs=at_out(small_case().ref_logprobs, ref))
    options = {"loss_type": loss_type, "kl_coef": 0.3, "ref_logprobs": case.ref_logprobs}
    assert_matches_reference(grpo, case, **options)
    zero = replace(case, advantages=torch.zeros(14))
    out = run(grpo, srft_kernels, zero, **options)
    assert torch.isfinite(out["loss"]) and not out["dhidden"][OUT].any()
    assert (out["dhidden"][~OUT & (case.labels != -100)] != 0).any(1).all()


@each_loss_type
def test_two_log_probabilities_of_minus_infinity(loss_type):
    """A label that the policy, the sampler and the reference all rule out has ratio 1 and KL 0."""
    case = small_case(bias=torch.zeros(33))
    case.bias[5] = -INF
    case.labels = torch.where(OUT, 5, torch.where(case.labels == 5, 6, case.labels))
    case.old_logprobs, case.ref_logprobs = (at_out(x, -INF) for x in (case.old_logprobs, case.ref_logprobs))
    options = {"loss_type": loss_type, "kl_coef": 0.3, "ref_logprobs": case.ref_logprobs}
    for module in (srft_kernels, reference):
        out = run(grpo, module, case, **options)
        assert torch.isfinite(out["ratio"]).all() and torch.isfinite(out["terms/kl"])
        assert loss_type == "gspo" or (out["ratio"][OUT] == 1).all()
        assert torch.isfinite(out["dweight"]).all()
        # the loss of cispo and reinforce has the log-probability itself
        assert torch.isfinite(out["loss"]) == (loss_type in ("grpo", "gspo"))
    if loss_type in ("grpo", "gspo"):
        assert_matches_reference(grpo, case, **options)


@pytest.mark.parametrize("old", [-INF, -1e4, 1e4], ids=str)
def test_srft_ratio_is_bounded(old):
    """The ratio form of SRFT stops at the same bound."""
    case = small_case(old_logprobs=at_out(small_case().old_logprobs, old))
    for options in ({}, {"max_log_ratio": 2.0}, {"entropy_scope": "batch"}):
        assert_matches_reference(srft, case, preset="official", off_policy=True, **options)
        out = run(srft, srft_kernels, case, preset="official", off_policy=True, **options)
        assert torch.isfinite(out["loss"]) and torch.isfinite(out["dweight"]).all()


def test_nan_of_a_live_token_is_seen():
    """What counts and is NaN makes the loss NaN: it is not put aside without a word."""
    case = small_case(old_logprobs=at_out(small_case().old_logprobs, NAN))
    for loss_type in ("grpo", "gspo", "cispo"):
        assert torch.isnan(run(grpo, srft_kernels, case, loss_type=loss_type)["loss"])
    assert torch.isnan(run(srft, srft_kernels, case, preset="official", off_policy=True)["loss"])
