"""Faults to plant in the formulas of the losses, and the runs of ops that show them."""

from dataclasses import replace

from tests.kernels.cases import grpo, srft, token_loss


def out_of_bounds(module, case, **options):
    """grpo of tokens that a weight of 0 takes out, with rubbish beside it, and of live ones beyond the bound."""
    names = ("advantages", "old_logprobs", "ref_logprobs", "weights")
    case = replace(case, **{name: getattr(case, name).clone() for name in names})
    case.advantages[::5], case.old_logprobs[::5] = 0.0, -float("inf")
    case.weights[1::5], case.old_logprobs[1::5], case.advantages[1::5] = 0.0, float("nan"), float("nan")
    case.old_logprobs[2::5], case.ref_logprobs[3::5] = -1e4, 1e4
    given = {"ref_logprobs": case.ref_logprobs, "kl_coef": 0.3, "token_weights": case.weights, "num_tokens": 50}
    return grpo(module, case, **given, **options)


def unread(module, case, **options):
    """srft whose likelihood rollouts, which have no use for an advantage, hold NaN for one."""
    advantages = case.advantages.masked_fill(~case.is_demo, float("nan"))
    return srft(module, replace(case, advantages=advantages), **options)


def own_sft_weights(module, case, **options):
    """srft with weights of the log-likelihood that differ from those of the other terms."""
    return srft(module, case, sft_weights=case.weights, **options)


# name: (file, text, its replacement, op, options of the op that shows it)
FORMULA_FAULTS = {
    "swap the clip bounds": (
        "formulas.py",
        "low = 1.0 - clip_low",
        "low = 1.0 - clip_high",
        grpo,
        {"clip_low": 0.05},
    ),
    "flip the sign of an entropy weight": (
        "formulas.py",
        "-rl_coef * tl.exp(weight_entropy)",
        "-rl_coef * tl.exp(-weight_entropy)",
        srft,
        {},
    ),
    "lose the chain rule of f": (
        "formulas.py",
        "-advantage * p * gamma / (shape * shape)",
        "-advantage * p / shape",
        srft,
        {"preset": "upt"},
    ),
    "flip the sign of the entropy bonus": (
        "objectives/grpo.py",
        "return loss, dlogp, -weight * entropy_coef",
        "return loss, dlogp, weight * entropy_coef",
        grpo,
        {"entropy_coef": 0.5},
    ),
    "hear a log-ratio that multiplies nothing": (
        "formulas.py",
        "return (factor != 0) | (",
        "return (factor == factor) | (",
        out_of_bounds,
        {"loss_type": "gspo"},
    ),
    "multiply by 0 what is NaN": (
        "formulas.py",
        "return tl.where(weight != 0, weight * x, 0.0)",
        "return weight * x",
        unread,
        {},
    ),
    "forget that a weight of 0 ignores a token": (
        "head/chunks.py",
        "return torch.where(token_weights == 0, ignore_index, labels)",
        "return labels",
        out_of_bounds,
        {"entropy_coef": 0.1, "loss_type": "gspo"},
    ),
    "forget the bound of a log-ratio": (
        "formulas.py",
        "return tl.where(log_ratio > max_log_ratio, max_log_ratio, below)",
        "return below",
        out_of_bounds,
        {},
    ),
    "leave a gradient beyond the bound": (
        "formulas.py",
        "return beyond(log_ratio, max_log_ratio) | (logp < -1e30)",
        "return logp < -1e30",
        out_of_bounds,
        {},
    ),
    "take p for p (1 - p)": (
        "formulas.py",
        "(1.0 - by_rest * p)",
        "1.0",
        token_loss,
        {"sft_prob_factor": "p(1-p)"},
    ),
    "flip the sign of the entropy in a factor": (
        "formulas.py",
        "tl.exp(weighted(entropy_coef, weight_entropy))",
        "tl.exp(-weighted(entropy_coef, weight_entropy))",
        token_loss,
        {},
    ),
    "let a gradient through a factor": (
        "objectives/streams.py",
        "weighted(sft_scale, -logp), -sft_scale,",
        "weighted(sft_scale, -logp), -sft_scale * (1.0 + logp),",
        token_loss,
        {"sft_prob_factor": "p"},
    ),
    "leave a term out of the gradient": (
        "objectives/streams.py",
        "dpolicy + dsft + drl + dkl,",
        "dpolicy + dsft + drl,",
        token_loss,
        {"everything": True},
    ),
    "take the share of the log-likelihood out of its gradient": (
        "objectives/srft.py",
        "weighted(sft_share, dsft)",
        "dsft",
        own_sft_weights,
        {},
    ),
    "lose the constant of the KL gradient": (
        "formulas.py",
        "1.0 - ratio",
        "-ratio",
        grpo,
        {"everything": True},
    ),
}
