"""The gradient of an update and two AdamW steps on however many ranks: what ``test_layouts`` compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from srft.config import Config
from srft.learning import accumulate, learn
from srft.methods import assign_advantages
from srft.policy.exchange import Exchange
from srft.policy.learner import Learner
from srft.policy.model import allow_sharing, byte_tokenizer, prepare_policy
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import World, whole
from srft.responses import Group, Response
from tests.trainer.architectures import build
from tests.trainer.tiny import plain_model, random_groups, tiny_config
from tests.trainer.worlds import world_of

# options, and the model: with its embedding tied to its head or not, or with experts
CASES: dict[str, tuple[list[str], str]] = {
    "token": (["method.entropy_scope=token", "train.grad_terms_every=2"], "untied"),
    "sequence": (["method.preset=official", "method.entropy_scope=sequence"], "untied"),
    "batch-two-updates": (
        ["method.entropy_scope=batch", "method.entropy_source=own", "train.updates_per_step=2"], "untied"
    ),
    "upt": (["method.preset=upt"], "tied"),
    "grpo": (["method.name=grpo"], "untied"),
    "chord": (["method.name=chord"], "untied"),
    "hpt": (["method.name=hpt"], "untied"),
    "sft": (["method.name=sft"], "tied"),
    "experts": (["model.router_aux_coef=0.5"], "experts"),
}
# of each case; experts choose in fp32 whatever they are given
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in ((torch.float32,) if case == "experts" else (torch.float32, torch.float64))
    if dtype == torch.float64 or case in ("token", "upt", "experts")
]
# layouts of a world of so many ranks: tokens of a micro-batch, ranks that share the parameters, who holds what
LAYOUTS: dict[int, dict[str, tuple[int, int, str]]] = {
    1: {"1x1": (10_000, 1, "spread"), "1x4": (70, 1, "spread")},
    2: {
        "2x3": (48, 2, "spread"), "one rank has nothing": (100, 2, "first"), "kinds apart": (60, 2, "kinds"),
        "split head, 2x3": (56, 2, "spread"), "split head, one rank has nothing": (100, 2, "first"),
        "shared prompts": (48, 2, "spread"),
    },
    4: {
        "4x2": (40, 4, "spread"), "2x2 replicas, 4x2": (40, 2, "spread"), "2x2 replicas, kinds": (60, 2, "kinds"),
        "split head, kinds apart": (60, 4, "kinds"),
    },
}  # fmt: skip
STEPS = 2
# one of them all wrong, one all right; every collective of a micro-batch costs more than its tokens do
GROUPS = 6
# what a split head is tried on: one that is tied to the embedding is not split
SPLIT = {
    "split head, 2x3": ("token", "sequence", "batch-two-updates", "grpo", "chord", "experts"),
    "split head, one rank has nothing": ("token", "batch-two-updates"),
    "split head, kinds apart": ("sequence", "grpo"),
}
# what else is not tried on every case: a method is told as much of a world of two as of one of four
SOME = SPLIT | {
    "shared prompts": ("token", "batch-two-updates", "grpo", "experts"),
    "4x2": ("token", "sequence", "batch-two-updates", "upt", "experts"),
    "2x2 replicas, 4x2": ("token", "batch-two-updates", "upt", "experts"),
    "2x2 replicas, kinds": ("token", "sequence", "batch-two-updates"),
}


def is_run(layout: str, case: str, dtype: torch.dtype) -> bool:
    """Whether a layout has this case; what fp32 adds up in another order is seen where all is spread."""
    spread = layout in ("1x1", "1x4", "2x3", "4x2")
    return case in SOME.get(layout, CASES) and (spread or case == "experts" or dtype == torch.float64)


def without_casts(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with norms that compute in the dtype they are given: Qwen2's own cast to fp32."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm):
                setattr(parent, name, torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
                getattr(parent, name).weight = norm.weight
    return model


def learner_for(case: str, dtype: torch.dtype, world: World, budget: int) -> Learner:
    """A small policy that computes in ``dtype`` from end to end."""
    options, kind = CASES[case]
    Config.compute_dtype = property(lambda _config: dtype)  # type: ignore[assignment,method-assign]
    config = tiny_config("train.lr=0.01", f"train.tokens_per_microbatch={budget}", *options)
    model = without_casts(build("qwen2-moe") if kind == "experts" else plain_model(tied=kind == "tied"))
    prepare_policy(model.to(dtype), config.model, 64, world)
    return Learner(config, model, byte_tokenizer(), make_optimizer(model, config), world)


def held(learner: Learner, groups: list[Group], how: str) -> list[Response]:
    """What this rank learns from: a fair share, nothing but on the first rank, or kinds apart."""
    world = learner.world
    if how == "spread":
        own, traits = assign_advantages(world.own(groups), learner.config.method), learner.model.srft_traits
        return Exchange(world, own, share_prompts=traits.shares_prompts).held
    every = assign_advantages(groups, learner.config.method)
    if how == "first":
        return every if world.is_first else []
    last = world.rank == world.size - 1
    return [s for s in every if (last if s.is_demo else world.is_first)]


def run(world: World, budget: int, how: str, case: str, dtype: torch.dtype, shares: bool) -> dict[str, Any]:
    """Gradient of an update, weights after ``STEPS`` steps, figures of the last, entropies of its responses."""
    learner, groups = learner_for(case, dtype, world, budget), random_groups(GROUPS)
    allow_sharing(learner.model, shares)
    found, micro_batches = accumulate(learner, held(learner, groups, how), 1)
    parameters = dict(learner.model.named_parameters())
    gradients = {n: whole(torch.zeros_like(p) if p.grad is None else p.grad).clone() for n, p in parameters.items()}
    figures: dict[str, float] = {}
    for step in range(1, STEPS + 1):
        own = world.own(groups)
        # those of responses that a step has no use for would be left from before
        for group in own:
            for response in (*group.rollouts, *group.demos):
                response.entropy = None
        figures = learn(learner, own, step)
    weights = {name: whole(p).detach().clone() for name, p in parameters.items()}
    entropies = [[s.entropy for s in (*g.rollouts, *g.demos)] for of_rank in world.gather(own) for g in of_rank]
    return {
        "gradients": gradients, "weights": weights, "micro_batches": micro_batches, "figures": figures,
        "loss": found["loss/total"].value, "entropies": sorted(e for each in entropies for e in each if e is not None),
    }  # fmt: skip


def every_run(worlds: dict[int, World], layouts: dict[str, tuple[int, int, str]]) -> Iterator[tuple[str, Any]]:
    """Each case, dtype and layout of a world, by name."""
    for case, dtype in RUNS:
        for layout, (budget, shards, how) in layouts.items():
            if is_run(layout, case, dtype):
                world = replace(worlds[shards], vocab_parallel=layout in SPLIT)
                yield f"{layout}/{case}/{dtype}", run(world, budget, how, case, dtype, layout == "shared prompts")


def rank_main(rank: int, folder: Path) -> None:
    """All runs of one of several ranks; the first keeps them."""
    torch.set_num_threads(1)
    whole_world = world_of(rank, folder)
    layouts = LAYOUTS[whole_world.size]
    worlds = {shards: world_of(rank, folder, shards) for shards in {shards for _, shards, _ in layouts.values()}}
    found = dict(every_run(worlds, layouts))
    torch.save(found if rank == 0 else {}, folder / f"rank{rank}.pt")
