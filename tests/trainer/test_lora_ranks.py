"""Adapters of a policy sharded over two ranks: gradients, steps, engines and folders are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from srft.learning import update
from srft.methods import assign_advantages
from srft.policy import lora
from srft.policy.adapter import export_adapter, named_adapters, put_adapters
from srft.policy.forwards import sampler_logprobs
from srft.policy.learner import Learner
from srft.policy.model import byte_tokenizer
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import ALONE, World, whole
from srft.policy.weights import named_weights, own_part, whole_tensors
from srft.prepare import load_prepared
from tests.ranks import results_of_two_ranks
from tests.trainer.tiny import plain_model, random_groups, relative_error, sequence, tiny_config
from tests.trainer.worlds import world_of

pytest.importorskip("peft", reason="needs peft: pip install 'srft[lora]'")

WORDS = ["model.lora.rank=3", "model.lora.head=true", "train.lr=0.01", "train.weight_decay=0.1"]
# several micro-batches, of which one rank has more than the other
BUDGET = "train.tokens_per_microbatch=64"
PROBE = [sequence([5, 6, 7], [8, 9]), sequence([3], [4, 5, 6, 7])]


def write_sources(folder: Path) -> None:
    """A base, and adapters of it that have learned something."""
    plain_model().save_pretrained(folder / "base")
    model = plain_model()
    put_adapters(model, folder / "base", tiny_config(*WORDS))
    with torch.no_grad():
        for _, p in lora.adapters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    export_adapter(folder / "adapter", model, byte_tokenizer())


def trained(folder: Path, world: World) -> tuple[Learner, dict[str, torch.Tensor]]:
    """A policy after three updates, each rank giving every second sequence, and the gradients of the first of them."""
    config = tiny_config(*WORDS, BUDGET)
    model = load_prepared(config, byte_tokenizer(), folder / "adapter", world)
    learner = Learner(config, model, byte_tokenizer(), make_optimizer(model, config), world)
    gradients: dict[str, torch.Tensor] = {}
    for step in (1, 2, 3):
        update(learner, world.own(assign_advantages(random_groups(seed=step), config.method)), step)
        if step == 1:
            gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    return learner, gradients


def stored(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapters of a policy by the names that peft saves them under, whole."""
    return {name: whole(p.detach()).clone() for name, p in named_adapters(model)}


def report(learner: Learner, folder: Path) -> dict[str, Any]:
    model, world = learner.model, learner.world
    sampler = sampler_logprobs(model, PROBE, torch.bfloat16)
    names = [name for name, _ in named_weights(model)]
    export_adapter(folder / f"saved-{world.size}", model, learner.tokenizer, world)
    again = load_prepared(learner.config, learner.tokenizer, folder / f"saved-{world.size}", world)
    own = dict(again.named_parameters())
    return {
        "saved": stored(model),
        "reloaded": all(torch.equal(own_part(p), own_part(own[name])) for name, p in model.named_parameters()),
        "merged": {name: x.clone() for name, x in whole_tensors(model)},
        "rounded": {name: x.clone() for name, x in whole_tensors(model, torch.bfloat16)},
        "sampler": sampler,
        "names": names,
        "base": {name: whole(p.detach()).clone() for name, p in lora.of_base(model.named_parameters())},
        "moments": sum(len(state) > 0 for state in learner.optimizer.state.values()),
    }


def rank_main(rank: int, folder: Path) -> None:
    """Train, and say what came of it; new adapters, too."""
    world = world_of(rank, folder)
    learner, gradients = trained(folder, world)
    fresh = load_prepared(tiny_config(*WORDS), byte_tokenizer(), folder / "base", world)
    found = {"gradients": gradients, "fresh": stored(fresh), **report(learner, folder)}
    torch.save(found, folder / f"rank{rank}.pt")
    world.barrier()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process comes to, and each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_sources(folder)
    learner, gradients = trained(folder, ALONE)
    fresh = load_prepared(tiny_config(*WORDS), byte_tokenizer(), folder / "base", ALONE)
    alone = {"gradients": gradients, "fresh": stored(fresh), **report(learner, folder)}
    return alone, results_of_two_ranks("tests.trainer.test_lora_ranks", folder)


def test_gradients_of_adapters_are_those_of_one_process(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """A, B of every layer and of the head within 2e-6 of their norm; the base has no gradient and no moments."""
    alone, ranks = both
    for found in ranks:
        assert found["gradients"].keys() == alone["gradients"].keys()
        assert all(".lora_" in name for name in found["gradients"])
        for name, expected in alone["gradients"].items():
            assert relative_error(found["gradients"][name], expected) <= 2e-6, name
        assert found["moments"] == alone["moments"] == len(alone["gradients"])


def test_engines_get_whole_merged_weights(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """After three steps W + s B A under the base's names, rounded once, and a base that no step has moved."""
    alone, ranks = both
    base = plain_model().state_dict()
    assert alone["merged"].keys() == base.keys()
    assert max(relative_error(alone["merged"][name], x) for name, x in base.items()) > 0.05
    for found in ranks:
        assert found["merged"].keys() == base.keys()
        for name, expected in alone["merged"].items():
            assert relative_error(found["merged"][name], expected) <= 1e-4, name
            assert torch.equal(found["rounded"][name], found["merged"][name].bfloat16()), name
        assert all(torch.equal(found["base"][name], base[name]) for name in found["base"])
        # once each, also after a forward pass that FSDP2 leaves the root's gathered parameters of
        assert found["names"] == alone["names"]
        # what the canary measures noise by
        assert (found["sampler"] - alone["sampler"]).abs().max() < 0.2


def test_folders_hold_the_same_whatever_wrote_them(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """Ranks write what they have, load it again bit for bit, and start new adapters from the same numbers."""
    alone, ranks = both
    for found in ranks:
        assert found["reloaded"] and alone["reloaded"]
        assert found["saved"].keys() == alone["saved"].keys()
        for name, expected in alone["saved"].items():
            assert torch.equal(found["saved"][name], ranks[0]["saved"][name])
            assert relative_error(found["saved"][name], expected) <= 1e-3, name
        assert all(torch.equal(found["fresh"][name], x) for name, x in alone["fresh"].items())
