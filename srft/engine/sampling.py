"""How a run puts prompts to its policy, draws completions, and ends them; the same for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srft.config import Config
from srft.data.templates import PromptFormat, stop_token_ids
from srft.engine.base import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompt_format(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return how a run puts prompts to its policy.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
    """
    data = config.data
    return PromptFormat(tokenizer, data.system, data.chat, data.chat_template_kwargs)


def make_sampling(config: Config, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Sampling:
    """Return how a run draws completions.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
        model: The policy, whose generation_config may name end tokens that the tokenizer does not.
    """
    rollout = config.rollout
    # code shipped with a checkpoint may build a model without a generation_config
    eos = getattr(model.generation_config, "eos_token_id", None)
    ends = stop_token_ids(prompt_format(config, tokenizer), eos, rollout.stop)
    return Sampling(rollout.temperature, rollout.max_new_tokens, ends, tuple(rollout.stop), rollout.min_new_tokens)


def describe_ends(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say in one sentence what ends a completion.

    Args:
        sampling: From ``make_sampling``.
        tokenizer: The policy's.
    """
    tokens = [str(tokenizer.convert_ids_to_tokens(i)) for i in sampling.stop_token_ids]
    least = f", after {sampling.min_new_tokens} others at least" if sampling.min_new_tokens else ""
    return f"A completion ends with {' or '.join([*tokens, *map(repr, sampling.stop)])}{least}."
