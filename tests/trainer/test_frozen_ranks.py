"""Models beside a policy that is sharded over two ranks: steps and scores are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from srft.learning import learn
from srft.policy.learner import Learner
from srft.policy.model import byte_tokenizer
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import ALONE, World, is_sharded, whole
from srft.prepare import frozen_models, load_prepared
from tests.ranks import results_of_two_ranks
from tests.trainer.test_frozen import saved
from tests.trainer.tiny import random_groups, relative_error, tiny_config
from tests.trainer.worlds import world_of

CASES = {
    "start": ["method.name=grpo", "method.kl_coef=0.3"],
    "teacher": ["method.name=opd", "method.teacher={teacher}", "method.sft_coef=0.5", "method.rl_coef=0.3"],
    "itself": ["method.name=self_distill", "train.updates_per_step=2"],
    "itself at the start": ["method.name=self_distill", "method.teacher_weights=start"],
}
STEPS = 2


def trained(folder: Path, world: World, case: str) -> dict[str, Any]:
    """Weights and figures after two steps, each rank giving every second group."""
    words = [word.format(teacher=folder / "teacher") for word in CASES[case]]
    config = tiny_config(*words, f"model.name={folder / 'base'}", "train.lr=0.01", "train.tokens_per_microbatch=120")
    model = load_prepared(config, byte_tokenizer(), None, world)
    frozen = frozen_models(config, byte_tokenizer(), None, world)
    learner = Learner(config, model, byte_tokenizer(), make_optimizer(model, config), world, frozen=frozen)
    figures: dict[str, float] = {}
    for step in range(1, STEPS + 1):
        groups = random_groups(6, seed=step, vocab=258)
        for s in (s for g in groups for s in g.rollouts):
            s.teacher_prompt_ids = [*s.prompt_ids, *s.response_ids[::-1], *s.prompt_ids]
        figures = learn(learner, world.own(groups), step)
    beside = [each for each in (frozen.reference, frozen.teacher) if each is not None]
    return {
        "weights": {name: whole(p.detach()).clone() for name, p in model.named_parameters()},
        "figures": figures,
        "sharded": [is_sharded(each) for each in beside],
        "frozen": not any(p.requires_grad for each in beside for p in each.parameters()),
    }


def rank_main(rank: int, folder: Path) -> None:
    """Every case."""
    world = world_of(rank, folder)
    torch.save({case: trained(folder, world, case) for case in CASES}, folder / f"rank{rank}.pt")
    world.barrier()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process comes to, and each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    saved(folder / "base")
    saved(folder / "teacher", seed=1)
    alone = {case: trained(folder, ALONE, case) for case in CASES}
    return alone, results_of_two_ranks("tests.trainer.test_frozen_ranks", folder)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one(both: tuple[dict[str, Any], list[dict[str, Any]]], case: str) -> None:
    """Weights within 1e-3 of what two steps moved them by, and the same figures; what is frozen is sharded, too."""
    alone, ranks = both
    for found in ranks:
        assert found[case]["sharded"] == [True] * len(alone[case]["sharded"])
        assert found[case]["frozen"] and alone[case]["frozen"]
        for name in ("loss/total", "kl/reference", "kl/teacher"):
            assert (name in found[case]["figures"]) == (name in alone[case]["figures"])
            if name in alone[case]["figures"]:
                assert found[case]["figures"][name] == pytest.approx(alone[case]["figures"][name], rel=1e-3, abs=1e-5)
        for name, expected in alone[case]["weights"].items():
            assert relative_error(found[case]["weights"][name], expected) <= 1e-3, name


def test_the_cases_have_the_models_they_ask_for(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """One beside the policy, none where it is its own teacher as it is now."""
    assert {case: len(found["sharded"]) for case, found in both[0].items()} == {
        "start": 1, "teacher": 1, "itself": 0, "itself at the start": 1
    }  # fmt: skip
