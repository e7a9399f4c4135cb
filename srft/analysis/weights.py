"""What the entropy weights of SRFT did, token by token: s = sft_coef exp(sign H), c = rl_coef exp(H)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from srft.analysis.page import Token, legend, response, table
from srft.analysis.pictures import Picture
from srft.analysis.policies import Policy, encode, mean_by_token, score, token_texts
from srft.data.examples import Example
from srft.methods.srft import Method
from srft.report.drawing import BLUE, INK, VERMILLION
from srft.report.page import readable
from srft.responses import Response
from srft_kernels.presets import SRFT_PRESETS

_SHOWN = 6  # responses of each kind
_LEAST_TIMES = 5
# in the depth of a colour a factor of e² is all there is
_DEEPEST = 2.0


@dataclass(frozen=True)
class Weighed:
    """A response, and what its tokens' likelihood is multiplied by.

    Args:
        prompt: Its text.
        tokens: n texts.
        is_demo: Whether it is a demonstration, which has s; else a right rollout, which has c.
        entropy: [n] nats.
        own: [n] the weight by the entropy of the token itself.
        used: [n] the weight by the scope of the run.
    """

    prompt: str
    tokens: list[str]
    is_demo: bool
    entropy: np.ndarray
    own: np.ndarray
    used: np.ndarray


def weigh(
    method: Method, entropies: Sequence[np.ndarray], is_demo: Sequence[bool], logged: Mapping[str, float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the weights of each response's tokens: by the token's own entropy, and by the scope of the method.

    Args:
        method: Has coefficients, sign and scope.
        entropies: [n] nats of each response.
        is_demo: Whether each is a demonstration, with s; else a right rollout, with c.
        logged: ``weight/sft`` and ``weight/rl`` of a step, taken as they are where the weights go by averages over
            steps.
    """
    sign = method.sft_entropy_sign or SRFT_PRESETS[method.preset].sft_entropy_sign

    def factor(demo: bool, entropy: np.ndarray) -> np.ndarray:
        return method.sft_coef * np.exp(sign * entropy) if demo else method.rl_coef * np.exp(entropy)

    def over(kind: bool) -> float:
        """The mean entropy that a kind's weight goes by, in the scope of the update."""
        source = {"rollouts": False, "demos": True, "own": kind}.get(method.entropy_source)
        chosen = [h for h, demo in zip(entropies, is_demo, strict=True) if source is None or demo is source]
        return float(np.concatenate(chosen or list(entropies)).mean())

    weights = []
    for entropy, demo in zip(entropies, is_demo, strict=True):
        if method.weights == "fixed":
            used = factor(demo, np.zeros_like(entropy))
        elif method.weights != "entropy":
            used = np.full_like(entropy, logged["weight/sft" if demo else "weight/rl"])
        elif method.scope == "token":
            used = factor(demo, entropy)
        else:
            mean = entropy.mean() if method.scope == "sequence" else over(demo)
            used = factor(demo, np.full_like(entropy, mean))
        weights.append((factor(demo, entropy), used))
    return weights


def weigh_samples(
    policy: Policy, method: Method, rows: Sequence[Mapping[str, Any]], logged: Mapping[str, float], most: int
) -> list[Weighed]:
    """Weigh the demonstrations and the right rollouts among a run's last samples.

    Args:
        policy: Of the run, after these samples; its entropies are taken.
        method: Of the run.
        rows: Of ``samples.jsonl``, in order of step.
        logged: As for ``weigh``.
        most: Of each kind.

    Returns:
        Those of most ``most`` demonstrations and rollouts that the policy can read within its limits; rollouts that
        were cut are not among them.
    """
    chosen = [
        row for kind in (True, False)
        for row in [row for row in rows if row["demo"] is kind and (kind or float(row["reward"]) >= 0.5)][-most:]
    ]  # fmt: skip
    if not chosen:
        return []
    # a response is encoded as a demonstration is: with the token that ends it
    asked = [Example(str(i), row["prompt"], None, [row["completion"]], {}) for i, row in enumerate(chosen)]
    read = [
        (row := chosen[int(prompt.example.id)],
         Response(prompt.prompt_ids, prompt.demo_ids[0], row["demo"], False, [], row["completion"]))
        for prompt in encode(policy, asked) if prompt.demo_ids
    ]  # fmt: skip
    entropies = [each.entropy for each in score(policy, [one for _, one in read])]
    weights = weigh(method, entropies, [one.is_demo for _, one in read], logged)
    return [
        Weighed(readable(row["prompt"]), token_texts(policy, one.response_ids), one.is_demo, entropy, own, used)
        for (row, one), entropy, (own, used) in zip(read, entropies, weights, strict=True)
    ]


def by_token(weighed: Sequence[Weighed]) -> list[tuple[str, int, float, float]]:
    """Return (token, times, mean entropy, mean weight by its own entropy), least undecided first.

    Args:
        weighed: Of one kind.
    """
    rows = mean_by_token(((one.tokens, one.entropy, one.own) for one in weighed), _LEAST_TIMES)
    return sorted(rows, key=lambda row: row[2])


def summarise(weighed: Sequence[Weighed], coef: float) -> dict[str, float]:
    """Return what the weights of one kind are in numbers.

    Args:
        weighed: Of one kind, one token at least.
        coef: The weight of a token that the policy is sure of.

    Returns:
        "tokens"; "entropy", mean, nats; "own" and "used", means of the weights; "unmoved", the share of tokens whose
        own weight is within 5 % of ``coef``; "halved" and "doubled", shares whose own weight is at most half of it,
        or twice.
    """
    entropy, own, used = (
        np.concatenate([getattr(one, name) for one in weighed]) for name in ("entropy", "own", "used")
    )
    factor = own / coef
    return {
        "tokens": len(own), "entropy": float(entropy.mean()), "own": float(own.mean()), "used": float(used.mean()),
        "unmoved": float((np.abs(factor - 1) <= 0.05).mean()), "halved": float((factor <= 0.5).mean()),
        "doubled": float((factor >= 2).mean()),
    }  # fmt: skip


def draw_weights(weighed: Sequence[Weighed], method: Method) -> Picture:
    """Draw how the weights of tokens are spread, by their own entropy and as used.

    Args:
        weighed: Of both kinds, or of one.
        method: Has the coefficients.
    """
    kinds = [
        (title, coef, color, chosen)
        for title, coef, color, chosen in (
            ("demonstrations (w_SFT)", method.sft_coef, VERMILLION, [one for one in weighed if one.is_demo]),
            ("right rollouts (w_RL)", method.rl_coef, BLUE, [one for one in weighed if not one.is_demo]),
        )
        if chosen and coef
    ]  # fmt: skip
    figure = Figure(figsize=(max(5.6, 4.2 * len(kinds)), 3.2), layout="constrained")
    for ax, (title, coef, color, chosen) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own, used = (np.concatenate([getattr(one, name) for one in chosen]) for name in ("own", "used"))
        low, high = min(own.min(), used.min(), coef), max(np.quantile(own, 0.995), used.max(), coef)
        edges, own = np.linspace(low, high if high > low else low + 1e-6, 31), np.minimum(own, high)
        share = np.full(len(own), 1 / len(own))
        ax.hist(own, edges, weights=share, color=color, alpha=0.45, label="by the token's own entropy")
        ax.hist(used, edges, weights=share, histtype="step", color=INK, linewidth=1.4, label="as used")
        ax.set_title(title)
        ax.set(xlabel="weight of a token", ylabel="share of tokens")
        ax.legend(loc="best", fontsize=9, labelcolor=INK)
    return Picture(
        "token_weights", "Weights of the tokens",
        "Filled: what each token would weigh by its own entropy. Line: what it weighed, by the scope of the run. "
        "The last bar holds what lies beyond.",
        figure,
    )  # fmt: skip


def show(weighed: Sequence[Weighed], method: Method) -> str:
    """Return the page's part: numbers, the surest and the most undecided tokens, and coloured responses.

    Args:
        weighed: Of both kinds, or of one.
        method: Has the coefficients.
    """
    parts = []
    for is_demo, kind, letter, coef in (
        (True, "Demonstrations", "s", method.sft_coef), (False, "Right rollouts", "c", method.rl_coef),
    ):  # fmt: skip
        chosen = [one for one in weighed if one.is_demo is is_demo]
        if not chosen or not coef:
            continue
        found = summarise(chosen, coef)
        parts.append(
            f"<h3>{kind}</h3><p>{found['tokens']:,.0f} tokens with {found['entropy']:.3f} nats on average. By its own "
            f"entropy {found['unmoved']:.0%} of them have a weight within 5 % of {coef:g}, {found['halved']:.0%} at "
            f"most half of it and {found['doubled']:.0%} twice or more; the mean is {found['own']:.3f}, and "
            f"{found['used']:.3f} as used.</p>"
        )
        rows = by_token(chosen)
        rows = rows if len(rows) <= 16 else [*rows[:8], *rows[-8:]]
        cells = [[repr(token)[1:-1], f"{times:,}", f"{h:.3f}", f"{own:.3f}"] for token, times, h, own in rows]
        parts.append(table(["token", "times", "mean entropy", f"mean {letter} of its own"], cells) if cells else "")
        parts.append(legend(f"{letter} below {coef:g}", f"{letter} above", f"Uncoloured: the token has {coef:g}."))
        parts += [_response(one, letter, coef) for one in chosen[-_SHOWN:]]
    return "".join(parts)


def _response(one: Weighed, letter: str, coef: float) -> str:
    shades = np.log(one.own / coef) / _DEEPEST
    tokens = [
        Token(text, float(shade), f"H {entropy:.3f}, {letter} {own:.3f}, used {used:.3f}")
        for text, shade, entropy, own, used in zip(one.tokens, shades, one.entropy, one.own, one.used, strict=True)
    ]
    alike = bool(np.ptp(one.used) < 1e-9)
    note = f"used: {letter} = {one.used[0]:.3f} for every token" if alike else ""
    return response(one.prompt, tokens, note)
