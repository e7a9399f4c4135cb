"""What is told of fine-tuned models beside their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from srft.analysis import shift
from srft.analysis.policies import (
    encode,
    load_policy,
    model_of,
    refuse_other_words,
    sample,
    score,
    token_texts,
)
from srft.analysis.runs import Asked, Part, Told
from srft.analysis.stories import short_names, split_label
from srft.config import Config
from srft.data.examples import Example, load_examples
from srft.dataset import read_problems
from srft.options import load_config
from srft.report.page import readable
from srft.responses import Response


@dataclass(frozen=True)
class _Answers:
    """What a fine-tuned model says, and what it makes of that itself."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    responses: list[Response]
    tokens: list[list[str]]
    logprobs: list[np.ndarray]


def read_prompts(prompts: str, asked: Asked) -> tuple[Config, list[Example]]:
    """Read the problems that models are asked, and how.

    Args:
        prompts: A run, for its held-out problems and its options, or a data source.
        asked: Options of the command line, which win.

    Raises:
        ValueError: When they cannot be read.
    """
    if (recorded := Path(prompts) / "config.toml").is_file():
        config = load_config([str(recorded), *asked.options])
        return config, read_problems(config).held_out[: asked.problems]
    config = load_config(list(asked.options))
    data = config.data
    examples = load_examples(
        prompts, split=data.eval_split, columns=data.columns, limit=asked.problems, task=data.task, use_demo=False,
        bad_rows=data.bad_rows,
    )  # fmt: skip
    return config, examples


def _own(word: str, label: str, config: Config, examples: Sequence[Example]) -> _Answers:
    policy = load_policy(model_of(word), label, config)
    prompts = encode(policy, examples)
    responses = sample(policy, prompts)
    return _Answers(
        policy.tokenizer, [readable(prompt.example.prompt) for prompt in prompts], responses,
        [token_texts(policy, one.response_ids) for one in responses],
        [each.logprobs for each in score(policy, responses)],
    )  # fmt: skip


def tell_shift(words: Sequence[str], prompts: str, asked: Asked) -> Told:
    """Tell how the probabilities of fine-tuned models' own tokens differ from those of their base.

    Args:
        words: Models, or runs, the base first.
        prompts: A run, or a data source.
        asked: The options.

    Raises:
        ValueError: When there is no fine-tuned model, or one or the problems cannot be read.
    """
    if len(words) < 2:
        raise ValueError(f"--prompts compares models, the base first and then others; got {' '.join(words) or 'none'}")
    config, examples = read_prompts(prompts, asked)
    labels, sources = zip(*map(split_label, words), strict=True)
    short = short_names(sources)
    base, *tuned = [label or short[source] for label, source in zip(labels, sources, strict=True)]
    own = [_own(source, label, config, examples) for source, label in zip(sources[1:], tuned, strict=True)]
    judge = load_policy(model_of(sources[0]), base, config)
    by_model: dict[str, list[shift.Shift]] = {}
    for label, answers in zip(tuned, own, strict=True):
        refuse_other_words(label, answers.tokenizer, judge)
        before = [each.logprobs for each in score(judge, answers.responses)]
        by_model[label] = shift.make_shifts(
            answers.prompts, answers.responses, answers.tokens, before, answers.logprobs
        )
    told = Told(numbers={"shift": {label: shift.summarise(shifts) for label, shifts in by_model.items()}})
    sentences = [f"{len(examples)} problems of {prompts}, one sampled answer each, at temperature "
                 f"{config.rollout.temperature:g} and of at most {config.rollout.max_new_tokens} tokens."]  # fmt: skip
    told.parts.append(Part("Shift of token probabilities", sentences, [shift.draw_histograms(by_model, base)]))
    told.parts += [
        Part(f"{label} beside {base}", [], [], shift.show(shifts, base))
        for label, shifts in by_model.items()
    ]
    return told
