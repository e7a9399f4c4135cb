"""The recipes that come with the project: they parse, name what a user can reach, and say what they promise."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from srft.experiments.suite import plan_runs, read_suite
from srft.models import NAMES
from srft.options import load_config
from srft.rewards.kinds import check_kind
from tests.trainer.runs import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"), key=lambda path: path.name)


def test_recipes_are_found() -> None:
    """An empty folder would pass every other test here."""
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(recipe: Path) -> None:
    """It is a configuration, under the file's own name, with a verifier that exists and paths that stay inside."""
    config = load_config([str(recipe)])
    assert config.name == recipe.stem
    if config.reward.kind != "auto":
        check_kind(config.reward.kind)
    for source in filter(None, (config.data.train, config.data.eval)):
        assert not source.startswith(("/", "..", "~"))
    assert load_config([str(recipe), "train.steps=3"]).train.steps == 3


def test_the_pretrained_models_setting() -> None:
    """The recipe for two cores asks for what needs no hub, and its rows fit its limits; its suite is that recipe."""
    recipe, path = ROOT / "recipes" / "smollm2-arithmetic.toml", ROOT / "recipes" / "suites" / "smollm2-entropy.toml"
    config = load_config([str(recipe)])
    assert config.model.name in NAMES and config.data.train == "sums" and config.data.eval_limit >= 256
    assert config.data.task["largest"] < 100
    # "50+50=100" is a token a character, and the turn's end
    assert config.rollout.max_new_tokens >= len("99+99=198") + 1
    runs = plan_runs(read_suite(path), path, [], [0], Path("out"))
    assert len(runs) == len({run.identity for run in runs}) >= 4
    assert all((run.config.model, run.config.train.lr) == (config.model, config.train.lr) for run in runs)


def test_the_papers_setting() -> None:
    """The 7B recipe has the numbers of the paper, or of its authors' script where the paper has none."""
    config = load_config([str(ROOT / "recipes" / "qwen2.5-math-7b.toml")])
    train, model, data = config.train, config.model, config.data
    assert (train.steps, train.prompts_per_step, train.updates_per_step) == (500, 128, 2)
    assert (train.rollouts_per_prompt, train.demos_per_prompt) == (7, 1)
    assert (train.lr, train.lr_warmup_steps, train.betas, train.grad_clip) == (1e-6, 0, (0.9, 0.999), 1)
    assert (data.max_prompt_tokens, config.rollout.max_new_tokens, config.rollout.temperature) == (1024, 8192, 1)
    assert (model.name, model.compute_dtype) == ("Qwen/Qwen2.5-Math-7B", "bfloat16")
    assert (model.rope_theta, model.max_position_embeddings) == (40000, 16384)
    assert (data.train, config.reward.kind) == ("Elliott/Openr1-Math-46k-8192", "math")
    assert (config.method.name, config.method.preset) == ("srft", "paper")
    # of the system turn in LUFFY's published rows
    digest = "a8747f1674d341836ab8fae3c29263fee4dd555f07259cdbc6dadf4104ea8926"
    assert hashlib.sha256(data.system.encode()).hexdigest() == digest
