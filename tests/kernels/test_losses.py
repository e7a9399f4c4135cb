"""Every op against the float64 reference: values, terms and gradients, by option, dtype and chunk size."""

import pytest
import torch

import srft_kernels
from srft_kernels.head import chunks as chunked_head
from tests.kernels.cases import (
    DTYPES,
    MANY_ROWS,
    ROWS,
    SHAPES,
    assert_matches_reference,
    case_id,
    cross_entropy,
    each_op,
    grpo,
    make_case,
    run,
    srft,
    token_loss,
)

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce"]


@pytest.fixture(params=[0, 2**30], ids=["chunks16", "one-chunk"], autouse=True)
def workspace_bytes(request, monkeypatch):
    """Run with many chunks of 16 rows, the fewest there are, and with one."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", request.param)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("shape", SHAPES, ids=case_id)
def test_shapes_and_dtypes(op, shape, dtype):
    """Each op at shapes that fill no block, in every dtype."""
    assert_matches_reference(op, make_case(shape, dtype))


@each_op
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"logit_softcap": 2.0},
        {"logit_scale": 0.3},
        {"temperature": 1.3, "logit_softcap": 1.5, "logit_scale": 2.5},
    ],
    ids=case_id,
)
def test_logit_options(op, options):
    """Temperature, softcap and scale, with their chain rule, on every op."""
    assert_matches_reference(op, make_case((ROWS, 101, 53), seed=3), **options)


@each_op
def test_temperature_per_token(op):
    """One temperature per token."""
    case = make_case((ROWS, 101, 53), seed=4)
    assert_matches_reference(op, case, temperature=case.temperature)
    assert_matches_reference(op, case, temperature=case.temperature, logit_softcap=3.0, logit_scale=0.7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_grpo_options(loss_type, on_policy, everything):
    """Every loss type, alone and with KL, weights, denominators and entropy bonus."""
    case = make_case((MANY_ROWS, 97, 24), seed=5)
    assert_matches_reference(grpo, case, loss_type=loss_type, on_policy=on_policy, everything=everything)


@pytest.mark.parametrize("options", [{"dual_clip": 1.1}, {"clip_low": 0.05, "clip_high": 0.4}], ids=case_id)
@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "cispo"])
def test_grpo_clips(loss_type, options):
    """Asymmetric and dual clips; both kinds of clip are present."""
    case = make_case((80, 97, 24), seed=6)
    assert_matches_reference(grpo, case, loss_type=loss_type, **options)


@pytest.mark.parametrize("preset", ["paper", "official", "upt"])
@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_srft_presets(preset, scope, everything):
    """Every preset at every entropy scope."""
    case = make_case((MANY_ROWS, 97, 24), seed=7)
    assert_matches_reference(srft, case, preset=preset, entropy_scope=scope, everything=everything)


@pytest.mark.parametrize(
    "options",
    [
        {"self_rollout": "ratio", "off_policy": True},
        {"self_rollout": "likelihood", "off_policy": True, "entropy_coef": 0.02},
        {"sft_entropy_sign": 1},
        {"sft_entropy_sign": 0, "rl_coef": 0.0},
        {"demo_gamma": 0.3},
        {"preset": "upt", "demo_gamma": 0.0},
        {"entropy_scope": "batch", "batch_entropy": 0.8},
        {"sft_coef": 0.2, "rl_coef": 0.4, "negative_coef": 0.3},
        {"self_rollout": "ratio", "negative_coef": 0.3, "entropy_scope": "sequence"},
    ],
    ids=case_id,
)
def test_srft_switches(options):
    """Each switch overrides its preset."""
    assert_matches_reference(srft, make_case((60, 97, 24), seed=8), **options)


def test_srft_weights_of_the_log_likelihood():
    """Weights of their own, of any sign and 0, for the log-likelihood of demonstrations; rollouts read none."""
    case = make_case((60, 97, 24), seed=8)
    sft_weights = (case.advantages / 3).masked_fill(torch.arange(60) % 4 == 1, 0.0)
    spoiled = sft_weights.masked_fill(~case.is_demo, float("nan"))
    for options in ({"preset": "upt"}, {"entropy_scope": "token", "everything": True}, {"entropy_scope": "batch"}):
        assert_matches_reference(srft, case, sft_weights=sft_weights, **options)
        expected = run(srft, srft_kernels, case, sft_weights=sft_weights, **options)
        actual = run(srft, srft_kernels, case, sft_weights=spoiled, **options)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
        without = run(srft, srft_kernels, case, **options)
        moved = {name for name, x in without.items() if x.dim() == 0 and not torch.equal(x, actual[name])}
        assert moved == {"loss", "terms/demo_sft", "terms/demo_sft_unweighted"}


@pytest.mark.parametrize("policy", ["clip", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_token_loss_policies(policy, scope, everything):
    """Every policy term at every scope of the factors, with two terms and with all."""
    case = make_case((MANY_ROWS, 97, 24), seed=5)
    assert_matches_reference(token_loss, case, policy=policy, entropy_scope=scope, everything=everything)


@pytest.mark.parametrize(
    "options",
    [
        {"on_policy": True},
        {"clip_low": 0.05, "clip_high": 0.4, "dual_clip": 1.1},
        {"policy": "gspo", "clip_low": 0.05, "clip_high": 0.02, "policy_prob_factor": "p"},
        {"entropy_scope": "batch", "batch_entropy": 0.8},
        {"entropy_scope": "batch", "batch_entropy": torch.tensor(0.8), "policy": "gspo"},
        {"policy_prob_factor": "p", "sft_prob_factor": "p(1-p)", "on_policy": True},
        {"shaping_gamma": None},
        {"max_log_ratio": 0.2},
        {"policy_weights": None, "policy_entropy_coefs": None, "policy_prob_factor": "one"},
        {"sft_weights": None, "sft_entropy_coefs": None, "sft_prob_factor": "one", "policy": "gspo"},
        {"kl_weights": None, "entropy_weights": None},
        {"shaped_weights": None, "shaping_gamma": None},
    ],
    ids=case_id,
)
def test_token_loss_options(options):
    """Each option of the general loss, beside all terms that it leaves."""
    assert_matches_reference(token_loss, make_case((60, 97, 24), seed=8), everything=True, **options)


def test_denominators_may_be_tensors():
    """A 0-d tensor denominator gives what the int gives."""
    case = make_case(seed=9)
    assert_matches_reference(
        srft, case, num_demo_tokens=torch.tensor(19), num_rollout_tokens=torch.tensor(33.0)
    )
    assert_matches_reference(grpo, case, num_tokens=torch.tensor(19))
    assert_matches_reference(cross_entropy, case, num_tokens=torch.tensor(19))
