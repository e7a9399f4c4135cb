"""The reference is right: gradients against finite differences, values against hand-written formulas."""

import math

import pytest
import torch

from srft_kernels import reference
from tests.kernels.cases import case_id, cross_entropy, grpo, logprobs, make_case, policy, srft, token_loss

# p = (1/4, 3/4): hidden 1, weights 0 and log 3
LOG_P = (math.log(0.25), math.log(0.75))
ENTROPY = -0.25 * LOG_P[0] - 0.75 * LOG_P[1]
HELD = {"entropy_scope": "batch", "batch_entropy": 0.8}
FACTORS = {"everything": True, "policy_prob_factor": "one", "sft_prob_factor": "one", **HELD}


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (cross_entropy, {"temperature": 0.7}),
        (logprobs, {"logit_softcap": 2.0}),
        (policy, {}),
        (grpo, {"everything": True}),
        (grpo, {"loss_type": "gspo", "everything": True}),
        (grpo, {"loss_type": "reinforce"}),
        (grpo, {"dual_clip": 1.2}),
        # the weights s and c are held by passing their entropy, since finite differences see through detach
        (srft, {"entropy_scope": "batch", "batch_entropy": 0.8, "preset": "paper"}),
        (srft, {"entropy_scope": "batch", "batch_entropy": 0.8, "preset": "official", "off_policy": True}),
        (srft, {"entropy_scope": "batch", "batch_entropy": 0.8, "preset": "upt"}),
        (srft, {"preset": "upt", "sft_weights": torch.linspace(-1.0, 2.0, 6).double(), **HELD}),
        # the factors p and p (1 - p) cannot be held
        *((token_loss, {"policy": x, **FACTORS}) for x in ("clip", "gspo", "reinforce")),
        (token_loss, {"shaping_gamma": None, "clip_low": 9.0, "clip_high": 9.0, **FACTORS}),
    ],
    ids=lambda x: x.__name__ if callable(x) else case_id(x),
)
def test_gradcheck(op, options):
    """Autograd of the reference agrees with finite differences, away from the corners of the clip."""
    case = make_case((6, 7, 4), torch.float64, seed=1).to(torch.float64)

    def loss(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        result = op(reference, case, **options)
        return result if isinstance(result, torch.Tensor) else result.loss

    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    torch.autograd.gradcheck(loss, leaves)


def two_tokens(labels=(0, 1)) -> tuple:
    """Hidden states, weight and labels of tokens with p = (1/4, 3/4)."""
    hidden = torch.ones(len(labels), 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    return hidden, weight, torch.tensor(labels)


def test_logprobs_by_hand():
    """Log-probabilities and entropy of a two-word vocabulary."""
    logp, entropy = reference.linear_logprobs(*two_tokens())
    assert logp.tolist() == pytest.approx(LOG_P, abs=1e-12)
    assert entropy.tolist() == pytest.approx([ENTROPY] * 2, abs=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # ratios 1.5 and 0.5; advantages 2 and -1; clip to [0.8, 1.2]
        ("grpo", (-1.2 * 2 + 0.8) / 2),
        ("cispo", (-1.2 * 2 * LOG_P[0] + 0.8 * LOG_P[1]) / 2),
        ("reinforce", (-2 * LOG_P[0] + LOG_P[1]) / 2),
        # one sequence: ratio sqrt(0.75)
        ("gspo", (-math.sqrt(0.75) * 2 + math.sqrt(0.75)) / 2),
    ],
)
def test_grpo_by_hand(loss_type, expected):
    """Each loss type on two tokens, with both sides of the clip."""
    old = torch.tensor([LOG_P[0] - math.log(1.5), LOG_P[1] - math.log(0.5)], dtype=torch.float64)
    advantages, cu_seqlens = torch.tensor([2.0, -1.0]), torch.tensor([0, 2])
    result = reference.linear_grpo_loss(
        *two_tokens(), advantages, old, loss_type=loss_type, cu_seqlens=cu_seqlens
    )
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert result.clipped.tolist() == [loss_type in ("grpo", "cispo")] * 2


def test_kl_dual_clip_and_entropy_by_hand():
    """k3, the dual clip of a negative advantage, and the entropy bonus, weighted and divided."""
    old = torch.tensor([LOG_P[0] - math.log(5.0)], dtype=torch.float64)
    ref = torch.tensor([LOG_P[0] + math.log(2.0)], dtype=torch.float64)
    result = reference.linear_grpo_loss(
        *two_tokens([0]),
        torch.tensor([-1.0]),
        old,
        dual_clip=3.0,
        ref_logprobs=ref,
        kl_coef=0.1,
        entropy_coef=0.01,
        token_weights=torch.tensor([0.5], dtype=torch.float64),
        rollout_weights=torch.tensor([2.0]),
        num_tokens=4,
    )
    expected = 0.5 / 4 * (2.0 * 3.0 + 0.1 * (2.0 - math.log(2.0) - 1.0) - 0.01 * ENTROPY)
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert result.clipped.item() and result.terms["clip_high_sum"] == 1


@pytest.mark.parametrize(
    ("entropy", "sft", "rl"),
    [(0.0, 0.5, 0.1), (0.2, 0.4094, 0.1221), (0.5, 0.3033, 0.1649), (1.0, 0.1839, 0.2718)],
)
def test_srft_weights_by_hand(entropy, sft, rl):
    """s and c of the paper at four entropies, read off the loss of one token."""

    def loss(**options):
        return reference.linear_srft_loss(
            *two_tokens([0]),
            torch.zeros(1),
            cu_seqlens=None,
            entropy_scope="batch",
            batch_entropy=entropy,
            **options,
        )

    true, false = torch.tensor([True]), torch.tensor([False])
    assert loss(is_demo=true, is_correct=false).loss.item() == pytest.approx(-sft * LOG_P[0], abs=1e-4)
    assert loss(is_demo=false, is_correct=true).loss.item() == pytest.approx(-rl * LOG_P[0], abs=1e-4)
    assert loss(is_demo=false, is_correct=false).loss.item() == pytest.approx(LOG_P[0], abs=1e-12)
    assert loss(is_demo=true, is_correct=false).terms["sum_weight_sft"].item() == pytest.approx(sft, abs=1e-4)
    assert loss(is_demo=false, is_correct=false).terms["sum_weight_rl"].item() == pytest.approx(rl, abs=1e-4)


@pytest.mark.parametrize("preset", ["paper", "official", "upt"])
def test_srft_presets_by_hand(preset):
    """Every preset on a demonstration, a correct and an incorrect rollout of one token each."""
    advantages = [0.7, 0.4, -0.3]
    result = reference.linear_srft_loss(
        *two_tokens([1, 0, 1]),
        torch.tensor(advantages, dtype=torch.float64),
        is_demo=torch.tensor([True, False, False]),
        is_correct=torch.tensor([False, True, False]),
        cu_seqlens=torch.tensor([0, 1, 2, 3]),
        preset=preset,
        num_demo_tokens=2,
        num_rollout_tokens=5,
    )
    sign = 1 if preset == "official" else -1
    demo_sft = -0.5 * math.exp(sign * ENTROPY) * LOG_P[1]
    demo_rl = -advantages[0] * (0.75 if preset == "paper" else 0.75 / 0.85)
    c = 0.1 * math.exp(ENTROPY)
    if preset == "official":
        positive, negative = -advantages[1] * c, -advantages[2]
    else:
        positive, negative = -c * LOG_P[0], LOG_P[1]
    bonus = 0.0 if preset == "paper" else -0.001 * 3 * ENTROPY / 7
    expected = (demo_sft + demo_rl) / 2 + (positive + negative) / 5 + bonus
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    terms = {name: x.item() for name, x in result.terms.items()}
    assert terms["demo_sft"] == pytest.approx(demo_sft / 2, abs=1e-12)
    assert terms["demo_rl"] == terms["demo_rl_unweighted"] == pytest.approx(demo_rl / 2, abs=1e-12)
    assert terms["rollout_positive"] == pytest.approx(positive / 5, abs=1e-12)
    assert terms["rollout_negative"] == pytest.approx(negative / 5, abs=1e-12)
    assert terms["demo_sft_unweighted"] == pytest.approx(-LOG_P[1] / 2, abs=1e-12)
    assert terms["rollout_positive_unweighted"] == pytest.approx(positive / c / 5, abs=1e-12)
    assert terms["sum_entropy_demo"] == pytest.approx(ENTROPY, abs=1e-12)
    assert terms["sum_entropy_rollout"] == pytest.approx(2 * ENTROPY, abs=1e-12)


@pytest.mark.parametrize(
    ("preset", "gamma", "shaped"),
    [("paper", None, 0.25), ("upt", None, 0.25 / 0.35), ("upt", 0.0, 0.25), ("paper", 0.3, 0.25 / 0.55)],
)
def test_demo_gamma_by_hand(preset, gamma, shaped):
    """None is the value of the preset, 0 no shaping, and anything else is in its place."""
    true, false = torch.tensor([True]), torch.tensor([False])
    result = reference.linear_srft_loss(
        *two_tokens([0]), torch.tensor([0.7], dtype=torch.float64), is_demo=true, is_correct=false, cu_seqlens=None,
        entropy_scope="token", preset=preset, demo_gamma=gamma, token_weights=torch.tensor([0.5]).double(),
        sft_weights=torch.tensor([-3.0]).double(), num_demo_tokens=2, num_rollout_tokens=1,
    )  # fmt: skip
    assert result.terms["demo_rl"].item() == pytest.approx(-0.7 * shaped * 0.5 / 2, abs=1e-12)
    # weights of its own in place of those of the token
    assert result.terms["demo_sft"].item() == pytest.approx(-3.0 * 0.5 * math.exp(-ENTROPY) * -LOG_P[0] / 2, abs=1e-12)


@pytest.mark.parametrize("factor", ["one", "p", "p(1-p)"])
def test_token_loss_by_hand(factor):
    """Every term of a token with p = 1/4, an advantage of -0.6 and a ratio of 1.1."""
    p, advantage = 0.25, -0.6
    q = {"one": 1.0, "p": p, "p(1-p)": p * (1 - p)}[factor]
    vectors = {
        "advantages": advantage, "old_logprobs": LOG_P[0] - math.log(1.1), "ref_logprobs": LOG_P[0] + math.log(2.0),
        "policy_weights": 0.5, "sft_weights": -0.7, "shaped_weights": 0.9, "kl_weights": 0.3, "entropy_weights": 0.2,
        "policy_entropy_coefs": 2.0, "sft_entropy_coefs": -1.0,
    }  # fmt: skip
    result = reference.linear_token_loss(
        *two_tokens([0]), policy_prob_factor=factor, sft_prob_factor=factor, shaping_gamma=0.1,
        **{name: torch.tensor([x], dtype=torch.float64) for name, x in vectors.items()},
    )  # fmt: skip
    expected = {
        "policy": 0.5 * math.exp(2 * ENTROPY) * q * -1.1 * advantage,
        "sft": -0.7 * math.exp(-ENTROPY) * q * -LOG_P[0],
        "shaped": -0.9 * advantage * p / (p + 0.1),
        "kl": 0.3 * (2.0 - math.log(2.0) - 1.0),
        "entropy_bonus": -0.2 * ENTROPY,
    }
    assert {name: result.terms[name].item() for name in expected} == pytest.approx(expected, abs=1e-12)
    assert result.loss.item() == pytest.approx(sum(expected.values()), abs=1e-12)
    assert result.ratio.item() == pytest.approx(1.1) and not result.clipped.item()
