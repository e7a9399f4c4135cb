"""The recipes that come with the project: they parse, name what a user can reach, and say what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_the_papers_setting() -> None:
    """The 7B recipe is the paper's: 128 prompts, 7 rollouts and a demonstration, 8192 tokens, learning rate 1e-6."""
    config = load_config([str(ROOT / "recipes" / "qwen2.5-math-7b.toml")])
    train = config.train
    assert (train.prompts_per_step, train.rollouts_per_prompt, train.demos_per_prompt) == (128, 7, 1)
    assert (config.rollout.max_new_tokens, train.lr, train.betas) == (8192, 1e-6, (0.9, 0.999))
    assert (config.model.name, config.model.compute_dtype) == ("Qwen/Qwen2.5-Math-7B", "bfloat16")
    assert (config.data.train, config.reward.kind) == ("Elliott/Openr1-Math-46k-8192", "math")
    assert (config.method.name, config.method.preset) == ("srft", "paper")
