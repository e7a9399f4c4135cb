"""Responses that the loss gives no gradient are in no forward pass, and the gradient of the others is what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from srft.config import Config
from srft.learning import learn
from srft.method import BaseMethod
from srft.methods import assign_advantages, dapo, find_method, grpo, method_names
from srft.policy.learner import with_gradient
from srft.policy.model import prepare_policy
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import ALONE, World, whole
from srft.responses import Group
from tests.ranks import results_of_two_ranks
from tests.trainer.architectures import build
from tests.trainer.layout_ranks import without_casts
from tests.trainer.runs import read_lines, train
from tests.trainer.tiny import flat_gradient, learner_of, plain_model, policy, random_groups, sequence, tiny_config
from tests.trainer.worlds import world_of

# with options under which rollouts without a contrast have no gradient
LEAVE_OUT = {
    **{name: [] for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rl_with_sft", "chord", "superrl")},
    "grpo, sequences": ["method.name=grpo", "method.aggregation=sequence-mean", "method.prob_clip=0.9"],
    "reinforce": ["method.name=grpo", "method.loss_type=reinforce", "method.aggregation=sum"],
    "sft_then_rl": ["method.switch_step=0"],
    **{name: ["method.entropy_coef=0"] for name in ("hpt", "relift", "luffy", "prefix_rft", "uft")},
}


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes in which nothing is rounded, however sequences are packed."""
    monkeypatch.setattr(Config, "compute_dtype", property(lambda _config: torch.float64))


def groups_of(seed: int = 0, *, begun: bool = False) -> list[Group]:
    """Two of ten without a contrast; with ``begun`` the last rollout of each begins with a demonstration of two."""
    groups = random_groups(seed=seed)
    for group in groups:
        group.max_new_tokens = 12
        for rollout in group.rollouts[-1:] if begun else []:
            rollout.response_ids, rollout.rollout_logprobs = [7, 8, 4, 5], [0.0, 0.0, -0.5, -0.5]
            rollout.prefix_tokens = 2
    return groups


def steps(
    options: list[str], groups: list[list[Group]], world: World = ALONE
) -> tuple[dict[str, float], Tensor, Tensor]:
    """The last row, the last gradient and the weights after a step of each."""
    config = tiny_config("train.lr=0.01", "train.tokens_per_microbatch=100", *options)
    trained = prepare_policy(without_casts(plain_model()).double(), config.model, 64, world)
    learner = replace(learner_of(config, trained, make_optimizer(trained, config)), world=world)
    for number, each in enumerate(groups, 1):
        row = learn(learner, world.own(each), number)
    gradient = flat_gradient(trained) if world.size == 1 else torch.empty(0)
    return row, gradient, torch.cat([whole(p).detach().flatten().clone() for p in trained.parameters()])


def options_of(name: str) -> list[str]:
    return [f"method.name={name}", *LEAVE_OUT[name]] if name in method_names() else LEAVE_OUT[name]


def assert_equal_without(options: list[str], groups: Callable[[], list[list[Group]]]) -> None:
    """Gradient, weights, losses and shares are those of the same steps with all in the forward passes."""
    found, gradient, weights = steps(options, groups())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny_config(*options).method), "has_gradient", BaseMethod.has_gradient)
        row, expected, moved = steps(options, groups())
    assert found["tokens/skipped"] > 0 == row["tokens/skipped"]
    assert found["tokens/trained"] < row["tokens/trained"]
    assert float((gradient - expected).norm()) <= 1e-11 * float(expected.norm())
    assert float((weights - moved).norm()) <= 1e-11 * float(moved.norm())
    same = [key for key in row if key.startswith(("loss/", "clip/", "grad", "weight/")) or key == "tokens/dead"]
    assert {key: found[key] for key in same} == pytest.approx({key: row[key] for key in same}, rel=1e-6, abs=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", LEAVE_OUT)
def test_leaving_them_out_changes_nothing(name: str) -> None:
    """Of every method, and each way to add up its tokens."""
    assert_equal_without(options_of(name), lambda: [groups_of(begun=name in ("uft", "prefix_rft"))])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["grpo", "gspo", "rl_with_sft"])
def test_several_updates_of_several_steps(name: str) -> None:
    """Ratios to the policy before a step, AdamW's moments, and the terms measured apart."""
    options = [*options_of(name), "train.updates_per_step=2", "train.grad_terms_every=2"]
    assert_equal_without(options, lambda: [groups_of(0), groups_of(3)])


@pytest.mark.usefixtures("in_float64")
def test_a_step_without_any_gradient_is_one_of_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW moves on by its moments as it did, the row says that nothing was trained, and no mean is of nothing."""

    def both() -> list[list[Group]]:
        return [groups_of(), [group for group in groups_of() if len({s.reward for s in group.rollouts}) == 1]]

    found, gradient, weights = steps(["method.name=grpo"], both())
    assert not gradient.any() and (found["tokens/skipped"], found["tokens/dead"]) == (1, 1)
    assert (found["tokens/trained"], found["updates/made"], found["loss/total"]) == (0, 1, 0)
    assert not {"entropy/rollout", "mismatch/mean", "logprob/right"} & found.keys()
    monkeypatch.setattr(grpo.Method, "has_gradient", BaseMethod.has_gradient)
    torch.testing.assert_close(weights, steps(["method.name=grpo"], both())[2], rtol=0, atol=1e-13)


def of_two_ranks() -> list[Group]:
    """The second rank's prompts are all without a contrast."""
    groups = groups_of()
    for group in groups[1::2]:
        for rollout in group.rollouts:
            rollout.reward = 1.0
    return groups


RANKS = {"one update": ["method.name=grpo"], "two": ["method.name=rl_with_sft", "train.updates_per_step=2"]}


def rank_main(rank: int, folder: Path) -> None:
    """Two steps of each of ``RANKS`` on one of two ranks: the last row and the weights."""
    torch.set_num_threads(1)
    world = world_of(rank, folder)
    Config.compute_dtype = property(lambda _config: torch.float64)  # type: ignore[assignment,method-assign]
    found = {name: steps(options, [of_two_ranks(), of_two_ranks()], world) for name, options in RANKS.items()}
    torch.save({name: (row, weights) for name, (row, _, weights) in found.items()}, folder / f"rank{rank}.pt")


@pytest.mark.usefixtures("in_float64")
def test_ranks_count_what_all_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denominators are those of the whole update, and the weights those of one process that leaves nothing out."""
    first, second = results_of_two_ranks("tests.trainer.test_without_gradient", tmp_path)
    own = {name: steps(options, [of_two_ranks(), of_two_ranks()])[0] for name, options in RANKS.items()}
    for name in ("grpo", "rl_with_sft"):
        monkeypatch.setattr(find_method(name), "has_gradient", BaseMethod.has_gradient)
    for name, options in RANKS.items():
        row, _, weights = steps(options, [of_two_ranks(), of_two_ranks()])
        figures, found = first[name]
        torch.testing.assert_close(found, weights, rtol=0, atol=1e-11)
        assert figures == second[name][0] == pytest.approx(own[name], rel=1e-6, abs=1e-9)
        assert figures["loss/total"] == pytest.approx(row["loss/total"], rel=1e-6, abs=1e-9)
        assert figures["tokens/skipped"] > 0.3


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"opd", "self_distill"}))
def test_whoever_is_left_out_has_no_gradient(name: str) -> None:
    """Of every built-in method with its own options, the gradient of what it would leave out is exactly 0."""
    config = tiny_config(f"method.name={name}")
    left_out = [s for s in assign_advantages(groups_of(), config.method) if not config.method.has_gradient(s)]
    assert bool(left_out) == (name in LEAVE_OUT and not LEAVE_OUT[name] or name in ("sft_then_rl", "superrl"))
    assert all(s.advantage == 0 and not s.is_demo for s in left_out)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "method.entropy_coef=0.1") for name in LEAVE_OUT if name in method_names()]
    + [(name, "method.kl_coef=0.1") for name in ("grpo", "dapo", "sft_then_rl")],
)
def test_a_term_of_all_tokens_leaves_none_out(name: str, option: str) -> None:
    """An entropy bonus or a KL gives every response a gradient; a hint or a demonstration has one of its own."""
    idle = sequence([1], [2, 3])
    assert tiny_config(f"method.name={name}", option).method.has_gradient(idle)
    shown = sequence([1], [2, 3], is_demo=True)
    if name in ("rl_with_sft", "chord", "superrl", "hpt", "relift", "sft_then_rl"):
        assert tiny_config(*options_of(name)).method.has_gradient(shown)


def test_what_every_token_takes_part_in_leaves_none_out() -> None:
    """The loss of a model's routers, or a mean entropy that the loss goes by."""
    groups = groups_of()
    config = tiny_config("method.name=grpo", "model.router_aux_coef=0.5")
    experts, plain = policy(build("qwen2-moe")), policy(plain_model())
    sequences = assign_advantages(groups, config.method)
    few = with_gradient(learner_of(config, plain, make_optimizer(plain, config)), sequences)
    assert 0 < len(few) < len(sequences)
    assert with_gradient(learner_of(config, experts, make_optimizer(experts, config)), sequences) == sequences

    class Weighed(grpo.Method):
        @property
        def needs_entropy(self) -> bool:
            return True

    weighed = config.model_copy(update={"method": Weighed(name="grpo")})
    assert with_gradient(learner_of(weighed, plain, make_optimizer(plain, config)), sequences) == sequences


def test_a_loss_of_ones_own_is_not_taken_for_the_one_that_it_replaces() -> None:
    """A subclass that overrides the loss of a built-in method learns from all, until it says otherwise."""

    class Own(dapo.Method):
        def loss(self, batch: object, update: object) -> object:
            return super().loss(batch, update)

    class Kept(Own):
        has_gradient = grpo.Method.has_gradient

    idle = sequence([1], [2, 3])
    assert [find_method("dapo")(name="dapo").has_gradient(idle)] == [False]
    assert Own(name="dapo").has_gradient(idle) and not Kept(name="dapo").has_gradient(idle)


def test_a_run_logs_the_share(tmp_path: Path) -> None:
    """Rewards are of all rollouts, tokens trained of those with a contrast; without any a row has no entropy."""
    reward = tmp_path / "alike.py"
    reward.write_text("def alike(completion, answer, row):\n    return 0.0\n")
    run = train(tmp_path, reward__kind=f"{reward}:alike", data__bad_demos="keep", method__name="grpo")
    rows = read_lines(run / "metrics.jsonl")[1:]
    assert len(rows) == 2
    for row in rows:
        assert (row["tokens/skipped"], row["tokens/trained"], row["groups/alike"]) == (1, 0, 1)
        assert row["reward/mean"] == 0 and row["tokens/step"] > 0 and "entropy/rollout" not in row
