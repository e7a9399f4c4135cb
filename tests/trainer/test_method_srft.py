"""SRFT's weights that go by averages of the entropy or by nothing, its entropy target, and its terms left out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srft.batch import pack
from srft.config import Config
from srft.methods import StepInfo, UpdateInfo, assign_advantages
from srft.methods.srft import Method
from srft.options import load_config
from srft.responses import count
from tests.numerics import assert_sum
from tests.trainer.plain_step import (
    Expected,
    Scored,
    assert_as_expected,
    divisor,
    expected_step,
    of_its_kind,
    step,
)
from tests.trainer.runs import assert_same_run, read_lines, train
from tests.trainer.tiny import CPU, budget_for, members, plain_model, random_groups, sequence, tiny_config

TERMS = ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative")
EMA, TREND = "method.weights=ema", "method.weights=trend"


def averages(ema: float, slow: float | None = None) -> dict[str, float]:
    """A memory in which the averages of both weights are alike."""
    memory = {"entropy/ema_sft": ema, "entropy/ema_rl": ema}
    return memory if slow is None else memory | {"entropy/slow_sft": slow, "entropy/slow_rl": slow}


def now(memory: dict[str, Any]) -> StepInfo:
    return StepInfo(step=3, steps=10, max_new_tokens=8, memory=memory)


@pytest.mark.parametrize(
    ("options", "memory", "of_sft", "of_rl"),
    [
        ({"weights": "fixed"}, averages(0.2), 0.0, 0.0),
        ({"entropy_scope": "batch"}, averages(0.2), 0.8, 0.8),
        ({"entropy_scope": "batch", "entropy_source": "rollouts"}, {}, 0.4, 0.4),
        ({"entropy_scope": "batch", "entropy_source": "demos"}, {}, 1.0, 1.0),
        ({"entropy_scope": "batch", "entropy_source": "own"}, {}, 1.0, 0.4),
        ({"weights": "ema"}, {}, 0.8, 0.8),
        # 0.9 * 0.2 + 0.1 * 0.8
        ({"weights": "ema"}, averages(0.2), 0.26, 0.26),
        ({"weights": "ema", "entropy_decay": 0.5, "entropy_source": "own"}, averages(0.2), 0.6, 0.3),
        ({"weights": "ema", "entropy_decay": 0.0}, averages(0.2), 0.8, 0.8),
        ({"weights": "trend"}, {}, 0.0, 0.0),
        # the slow one: 0.99 * 0.6 + 0.01 * 0.8
        ({"weights": "trend"}, averages(0.2, 0.6), 0.26 - 0.602, 0.26 - 0.602),
        ({"weights": "trend", "slow_entropy_decay": 0.9}, averages(0.2, 0.2), 0.0, 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_by_hand(
    options: dict[str, Any], memory: dict[str, float], of_sft: float, of_rl: float, sign: int
) -> None:
    """A right and a wrong rollout of one token, a demonstration of four, entropies of 0.4 and 1.0; four words alike."""
    if options.get("weights") != "fixed":
        options = options | {"sft_entropy_sign": sign}
    method = Method(name="srft", **options)
    taught = [sequence([1], [2], reward=1.0), sequence([1], [2]), sequence([1], [3, 1, 2, 2], is_demo=True, reward=1.0)]
    (batch,) = pack(taught, 20, CPU)
    entropies = {"rollout": 0.4, "demo": 1.0}
    update = UpdateInfo(count(taught), step=1, max_new_tokens=8, memory=memory, entropies=entropies)
    out = method.loss(batch, update)(torch.zeros(6, 5), torch.zeros(4, 5), labels=batch.labels)
    s, c = 0.5 * math.exp(sign * of_sft), 0.1 * math.exp(of_rl)
    figures = method.figures({name: x.item() for name, x in out.terms.items()}, update)
    assert figures["weight/sft"].value == pytest.approx(s, rel=1e-6)
    assert figures["weight/rl"].value == pytest.approx(c, rel=1e-6)
    assert out.terms["demo_sft"].item() == pytest.approx(s * math.log(4), rel=1e-6)
    # the mean over two rollouts
    assert out.terms["rollout_positive"].item() == pytest.approx(c * math.log(4) / 2, rel=1e-6)
    assert out.terms["rollout_negative"].item() == pytest.approx(-math.log(4) / 2, rel=1e-6)


@pytest.mark.parametrize("source", ["both", "rollouts", "demos", "own"])
def test_an_update_of_one_kind_takes_the_entropy_it_has(source: str) -> None:
    """Whichever is asked for."""
    method = Method(name="srft", weights="ema", entropy_source=source)
    for kind in ("rollout", "demo"):
        taught = [sequence([1], [2], is_demo=kind == "demo")]
        update = UpdateInfo(count(taught), step=1, max_new_tokens=8, entropies={kind: 0.7})
        figures = method.figures({"sum_weight_sft": 0.0, "sum_weight_rl": 0.0}, update)
        assert figures["entropy/ema_sft"].value == figures["entropy/ema_rl"].value == pytest.approx(0.7)


def test_what_is_noted() -> None:
    """The averages as they are logged, but not in steps that learned nothing or whose numbers are not finite."""
    memory: dict[str, Any] = {}
    method = Method(name="srft", weights="trend")
    method.note(averages(0.5, 0.75) | {"entropy/rollout": 0.25}, now(memory))
    assert memory == averages(0.5, 0.75)
    method.note({"reward/mean": 0.0}, now(memory))
    method.note(averages(math.nan, math.inf), now(memory))
    assert memory == averages(0.5, 0.75)


def test_the_bonus_by_hand() -> None:
    """0.01 exp(0.5 (0.8 - H)) for H of 0.4 and 1.0 in turn, no further than a hundredfold, and at a rate of 0 never."""
    options = {"entropy_coef": 0.01, "target_entropy": 0.8}
    memory: dict[str, Any] = {}
    method = Method(name="srft", target_rate=0.5, **options)
    for entropy, coef in ((0.4, 0.01 * math.exp(0.2)), (1.0, 0.01 * math.exp(0.1)), (math.nan, 0.01 * math.exp(0.1))):
        method.note({"entropy/rollout": entropy}, now(memory))
        assert memory["entropy_coef"] == pytest.approx(coef, rel=1e-12)
    for entropy, coef in ((0.0, 1.0), (5.0, 0.0001)):
        for _ in range(100):
            method.note({"entropy/rollout": entropy}, now(memory))
        assert memory["entropy_coef"] == pytest.approx(coef, rel=1e-12)
    still: dict[str, Any] = {}
    Method(name="srft", target_rate=0.0, **options).note({"entropy/rollout": 0.1}, now(still))
    assert still == {"entropy_coef": 0.01}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.weights=fixed", "method.entropy_scope=token"], "method.entropy_scope: is not read"),
        (["method.weights=fixed", "method.sft_entropy_sign=1"], "method.sft_entropy_sign: is not read"),
        ([EMA, "method.entropy_scope=batch"], "is not read with method.weights=ema; leave it out"),
        (["method.entropy_source=own"], "method.entropy_source: is read with"),
        (["method.weights=fixed", "method.entropy_source=own"], "method.entropy_source: is read with"),
        (["method.target_entropy=0.5"], "method.target_entropy: moves method.entropy_coef by factors, which is 0"),
        (["method.preset=upt", "method.entropy_coef=0", "method.target_entropy=1"], "set it to 0.001"),
        ([EMA, "method.entropy_decay=1"], "method.entropy_decay"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(options: list[str], message: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=message):
        load_config(options)


def expected_of(config: Config, groups: Sequence[Any], s: Tensor, c: Tensor, bonus: float) -> Expected:
    """The paper's loss, or that of the official preset, with these weights, and an entropy bonus."""
    official = config.method.preset == "official"
    rl = "sum" if official else "sequence-mean"

    def terms(one: Scored, everyone: Sequence[Scored]) -> Tensor:
        kin, most = of_its_kind(one, everyone), config.rollout.max_new_tokens
        p, parts = one.logp.exp(), [-bonus * one.entropy / sum(len(each.logp) for each in everyone)]
        if one.response.is_demo:
            shaped = p / (p + 0.1) if official else p
            parts += [
                -s * one.logp / divisor("token-mean", one, kin, most),
                -one.advantage * shaped / divisor(rl, one, kin, most),
            ]
        elif official:
            weight = c if one.advantage > 0 else 1.0
            parts.append(-one.advantage * one.ratio * weight / divisor(rl, one, kin, most))
        else:
            parts.append((-c if one.response.reward == 1 else 1) * one.logp / divisor(rl, one, kin, most))
        return torch.cat(parts)

    taught = [(s, s.advantage) for s in assign_advantages(groups, config.method)]
    return expected_step(copy.deepcopy(plain_model()).double(), config.rollout.temperature, taught, terms)


CASES: dict[str, tuple[list[str], dict[str, float]]] = {
    "fixed": (["method.weights=fixed", "method.sft_coef=1", "method.rl_coef=1"], {}),
    "own": (["method.entropy_scope=batch", "method.entropy_source=own", "method.sft_entropy_sign=1"], {}),
    "ema": ([EMA, "method.entropy_source=rollouts"], averages(0.3)),
    "trend": ([TREND, "method.preset=official"], averages(0.3, 0.9)),
    "target": (["method.weights=fixed", "method.entropy_coef=0.01", "method.target_entropy=1"], {"entropy_coef": 0.02}),
}


@pytest.mark.parametrize("batches", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_plain_float64(case: str, batches: int) -> None:
    """Loss and gradient, with weights from the entropies of the whole update and a memory, however it is split."""
    options, memory = CASES[case]
    groups = random_groups(4, demos=2)
    budget = f"train.tokens_per_microbatch={budget_for(batches, members(groups))}"
    config = tiny_config("method.name=srft", budget, *options)
    metrics, gradient = step(config, plain_model(), groups, memory=memory)
    rollout, demo = metrics["entropy/rollout"], metrics["entropy/demo"]
    tokens = [sum(len(s.response_ids) for s in members(groups) if s.is_demo is kind) for kind in (False, True)]
    both = (tokens[0] * rollout + tokens[1] * demo) / sum(tokens)
    h = {
        "own": (demo, rollout),
        "ema": (-(0.27 + 0.1 * rollout), 0.27 + 0.1 * rollout),
        "trend": ((0.27 + 0.1 * both) - (0.891 + 0.01 * both),) * 2,
    }.get(case, (0.0, 0.0))
    s, c = (1.0, 1.0) if case == "fixed" else (0.5, 0.1)
    bonus = {"trend": 0.001, "target": 0.02}.get(case, 0.0)
    weights = torch.tensor([s * math.exp(h[0]), c * math.exp(h[1])], dtype=torch.float64)
    assert metrics["weight/sft"] == pytest.approx(weights[0].item(), rel=1e-5)
    assert metrics["weight/rl"] == pytest.approx(weights[1].item(), rel=1e-5)
    assert_as_expected(metrics, gradient, expected_of(config, groups, *weights, bonus))


def assert_same_step(options: Sequence[str], others: Sequence[str], memory: Mapping[str, float]) -> None:
    """The two have the same loss and gradient, to the last bit."""
    (metrics, gradient), (same, other) = (
        step(tiny_config("method.preset=upt", *chosen), plain_model(), random_groups(4), memory=memory)
        for chosen in (options, others)
    )
    assert torch.equal(gradient, other)
    assert metrics["loss/total"] == same["loss/total"]


def test_limits() -> None:
    """A decay of 0 is the scope "batch", equal decays are fixed weights, and a rate of 0 leaves the bonus alone."""
    assert_same_step([EMA, "method.entropy_decay=0"], ["method.entropy_scope=batch"], averages(0.2))
    equal = ["method.entropy_decay=0.5", "method.slow_entropy_decay=0.5"]
    assert_same_step([TREND, *equal], ["method.weights=fixed"], averages(0.2, 0.2))
    assert_same_step(["method.target_entropy=1", "method.target_rate=0"], [], {})


@pytest.mark.parametrize("preset", ["paper", "official", "upt"])
def test_a_term_left_out(preset: str) -> None:
    """Its value and gradient go, what is logged of the others and of the entropy stays to the last bit."""
    chosen, groups = f"method.preset={preset}", random_groups(4)

    def without(*terms: str) -> tuple[dict[str, float], Tensor]:
        scales = [f"train.term_scales.{term}=0" for term in terms]
        return step(tiny_config(chosen, "train.tokens_per_microbatch=60", *scales), plain_model(), groups)

    whole, gradient = without()
    alone = []
    for term in TERMS:
        metrics, found = without(term)
        assert metrics[f"loss/{term}"] == 0
        kept = {key for key in whole if key.startswith(("entropy/", "mismatch/"))} | {
            key for other in TERMS if other != term for key in (f"loss/{other}", f"loss/{other}_unweighted")
        }  # fmt: skip
        assert {key: metrics[key] for key in kept} == {key: whole[key] for key in kept}
        alone.append(gradient - found)
    _, bonus = without(*TERMS)
    size = sum(part.norm().item() for part in alone)
    assert all(part.norm() > 1e-4 * size for part in alone), [part.norm() / size for part in alone]
    assert_sum("gradient", sum(alone, bonus), gradient, size)


def test_memory_survives_a_resume(tmp_path: Path) -> None:
    """Two steps, then a resume to four, are four steps at once, averages and the moved bonus included."""
    options = {
        "method__weights": "trend", "method__entropy_coef": 0.01, "method__target_entropy": 1.0,
        "train__updates_per_step": 2, "data__bad_demos": "keep",
    }  # fmt: skip
    whole = train(tmp_path / "whole", train__steps=4, train__page=True, **options)
    train(tmp_path / "halves", train__steps=2, **options)
    assert_same_run(train(tmp_path / "halves", train__steps=4, train__resume=True, **options), whole)
    rows = read_lines(whole / "metrics.jsonl")[1:]
    for before, after in zip(rows[:-1], rows[1:], strict=True):
        moved = before["weight/entropy_bonus"] * math.exp(0.1 * (1.0 - before["entropy/rollout"]))
        assert after["weight/entropy_bonus"] == pytest.approx(moved, rel=1e-12)
        assert before["entropy/slow_sft"] != after["entropy/slow_sft"] == after["entropy/slow_rl"]
        # the same entropy moves both averages
        fast, slow = (after[f"entropy/{x}_rl"] - before[f"entropy/{x}_rl"] for x in ("ema", "slow"))
        gap = before["entropy/ema_rl"] - before["entropy/slow_rl"]
        assert fast / 0.1 - slow / 0.01 == pytest.approx(-gap, abs=1e-6)
    assert rows[0]["weight/entropy_bonus"] == 0.01
    assert (whole / "plots" / "entropy_averages.png").exists()
    assert (whole / "plots" / "entropy_bonus.png").exists()
