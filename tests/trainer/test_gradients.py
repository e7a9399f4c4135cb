"""The gradient of each term apart from the others, which tokens have one, and that measuring changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from srft.config import Config
from srft.learning import accumulate, learn, measure_terms
from srft.methods import ambiguous_term, assign_advantages, find_method, method_names
from srft.policy.learner import Learner
from srft.policy.optimizer import make_optimizer
from srft.responses import Response
from tests.trainer.runs import read_lines, train
from tests.trainer.test_method_files import OWN
from tests.trainer.tiny import flat_gradient, learner_of, members, plain_model, policy, random_groups, tiny_config

METHODS = {
    "srft": (["method.name=srft"], {"demo_sft": "sft", "demo_rl": "rl", "rollout_positive": "rl",
                                    "rollout_negative": "rl"}),
    "chord": (["method.name=chord"], {"policy": "rl", "sft": "sft"}),
    "grpo": (["method.name=grpo"], {"policy": "rl"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    """A policy for what moves no weight."""
    return policy(plain_model())


def learner_for(config: Config, model: transformers.PreTrainedModel | None = None) -> Learner:
    model = policy(plain_model()) if model is None else model
    return learner_of(config, model, make_optimizer(model, config))


def gradient_of(
    model: transformers.PreTrainedModel, options: list[str], terms: dict[str, str], only: set[str]
) -> Tensor:
    """That of a whole update with no term but these."""
    zero = [f"train.term_scales.{term}=0" for term in terms if term not in only]
    learner = learner_for(tiny_config(*options, *zero), model)
    accumulate(learner, assign_advantages(random_groups(), learner.config.method), 1)
    return flat_gradient(learner.model)


@pytest.mark.parametrize("batches", ["", "train.tokens_per_microbatch=60"], ids=["one batch", "several"])
@pytest.mark.parametrize("name", METHODS)
def test_terms_are_measured_apart(model: transformers.PreTrainedModel, name: str, batches: str) -> None:
    """Norms and cosine are those of gradients from runs in which all other terms are left out."""
    options, terms = METHODS[name]
    learner = learner_for(tiny_config(*options, *filter(None, [batches])), model)
    found = measure_terms(learner, assign_advantages(random_groups(), learner.config.method), 1)
    assert all(p.grad is None for p in model.parameters())
    expected = {f"grad/{term}": gradient_of(model, options, terms, {term}).norm().item() for term in terms}
    kinds = {kind: gradient_of(model, options, terms, {t for t in terms if terms[t] == kind}) for kind in ("sft", "rl")}
    expected |= {f"grad/{kind}": kinds[kind].norm().item() for kind in set(terms.values())}
    if len(set(terms.values())) == 2:
        expected["grad/cosine"] = torch.cosine_similarity(kinds["sft"], kinds["rl"], dim=0).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_what_is_no_terms_is_in_none(model: transformers.PreTrainedModel) -> None:
    """An entropy bonus as large as the loss itself changes no figure."""
    groups = random_groups()

    def found(bonus: float) -> dict[str, float]:
        learner = learner_for(tiny_config("method.name=chord", f"method.entropy_coef={bonus}"), model)
        return measure_terms(learner, assign_advantages(groups, learner.config.method), 1)

    assert found(1.0) == pytest.approx(found(0.0), rel=1e-3)


def test_scales_of_the_options_are_in_the_measurement(model: transformers.PreTrainedModel) -> None:
    """A term has the factor that it has in the update."""
    groups, scaled = random_groups(), "train.term_scales.sft=3"
    plain, more = (learner_for(tiny_config("method.name=chord", *options), model) for options in ([], [scaled]))
    before, after = (measure_terms(each, assign_advantages(groups, each.config.method), 1) for each in (plain, more))
    assert after["grad/sft"] == pytest.approx(3 * before["grad/sft"], rel=1e-5)
    assert after["grad/policy"] == before["grad/policy"]


@pytest.mark.parametrize("options", [
    ["method.name=srft", "train.updates_per_step=2"], ["method.name=chord"],
], ids=["srft, two updates", "chord"])  # fmt: skip
def test_measuring_changes_nothing(options: list[str]) -> None:
    """Weights, figures, entropies and random numbers after two steps are those of a run that does not measure."""

    def after(every: int) -> tuple[list[Tensor], list[dict[str, float]], list[float | None], Tensor]:
        learner = learner_for(tiny_config(*options, "train.lr=0.01", f"train.grad_terms_every={every}"))
        torch.manual_seed(5)
        groups = random_groups()
        rows = [learn(learner, groups, step) for step in (1, 2)]
        weights = [p.detach().clone() for p in learner.model.parameters()]
        return weights, rows, [s.entropy for s in members(groups)], torch.get_rng_state()

    (weights, rows, entropies, rng), (own, plain, own_entropies, own_rng) = after(2), after(0)
    assert all(map(torch.equal, weights, own)) and torch.equal(rng, own_rng) and entropies == own_entropies
    assert [any(name.startswith("grad/") for name in row) for row in rows] == [False, True]
    assert [{k: v for k, v in row.items() if not k.startswith("grad/")} for row in rows] == plain


def test_kinds_without_a_gradient_have_no_cosine(model: transformers.PreTrainedModel) -> None:
    """Of groups that all agree there is nothing but likelihood to learn from."""
    groups = random_groups()
    for s in members(groups):
        s.reward = 1.0
    learner = learner_for(tiny_config("method.name=chord"), model)
    found = measure_terms(learner, assign_advantages(groups, learner.config.method), 1)
    assert found["grad/policy"] == found["grad/rl"] == 0 < found["grad/sft"] and "grad/cosine" not in found


def test_a_gradient_that_is_not_finite_stays_visible(model: transformers.PreTrainedModel) -> None:
    """NaN in one kind is NaN in its norm and in the cosine, and not in the other's norm."""
    learner = learner_for(tiny_config("method.name=chord"), model)
    taught = assign_advantages(random_groups(), learner.config.method)
    for s in taught:
        s.advantage = math.nan if not s.is_demo else 0.0
    found = measure_terms(learner, taught, 1)
    assert math.isnan(found["grad/policy"]) and math.isnan(found["grad/cosine"]) and found["grad/sft"] > 0


def tokens_of(responses: list[Response]) -> int:
    return sum(len(s.response_ids) for s in responses)


@pytest.mark.parametrize(("options", "dead_of"), [
    (["method.name=grpo"], "rollouts"), (["method.name=grpo", "train.tokens_per_microbatch=60"], "rollouts"),
    (["method.name=grpo", "method.entropy_coef=0.1"], None), (["method.name=sft"], None),
    (["method.name=chord"], "all"), (["method.name=srft"], None),
], ids=["grpo", "several batches", "bonus", "sft", "chord", "srft"])  # fmt: skip
def test_share_of_tokens_without_a_gradient(
    model: transformers.PreTrainedModel, options: list[str], dead_of: str | None
) -> None:
    """Rollouts that agree teach GRPO and CHORD nothing; a bonus, likelihood and SRFT leave no token without."""
    groups = random_groups()
    learner = learner_for(tiny_config(*options), model)
    figures, _ = accumulate(learner, assign_advantages(groups, learner.config.method), 1)
    agree = [g.rollouts for g in groups if len({s.reward for s in g.rollouts}) == 1]
    dead = tokens_of(sum(agree, []))
    counted = {"rollouts": tokens_of([s for g in groups for s in g.rollouts]), "all": tokens_of(members(groups))}
    assert figures["tokens/dead"].value == (dead / counted[dead_of] if dead_of else 0) and dead > 0


def test_no_term_hides_the_sum_of_a_kind(tmp_path: Path) -> None:
    """No built-in method has such a term, and a file with one is refused."""
    assert [name for name in method_names() if ambiguous_term(find_method(name).terms)] == []
    assert ambiguous_term({"sft": "sft", "rl": "rl"}) is None
    for terms in ({"sft": "sft", "demo": "sft"}, {"sft": "rl"}, {"cosine": "rl"}):
        file = tmp_path / "doubled.py"
        file.write_text(OWN.replace("    factor:", f"    terms = {terms}\n    factor:", 1))
        with pytest.raises(ValueError, match=f"terms of class Method of .* has {next(iter(terms))}, "):
            find_method(str(file))


def test_a_method_without_terms_is_not_measured(tmp_path: Path) -> None:
    """A user's file that names none trains as before."""
    file = tmp_path / "doubled.py"
    file.write_text(OWN)
    learner = learner_for(tiny_config(f"method.name={file}", "train.grad_terms_every=1"))
    row = learn(learner, random_groups(), 1)
    assert "tokens/dead" in row and not [name for name in row if name.startswith("grad/")]


def test_a_run_measures_at_its_steps(tmp_path: Path) -> None:
    """Every so many steps, the first not among them."""
    run = train(tmp_path, train__steps=3, train__grad_terms_every=2, train__eval_every=3)
    rows = read_lines(run / "metrics.jsonl")
    assert ["grad/sft" in row for row in rows] == [False, False, True, False]
