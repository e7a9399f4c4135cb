"""Models as analyses take them: loaded one at a time, asked for answers, and for what they make of given tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.batch import pack
from srft.config import Config
from srft.data.examples import Example
from srft.data.prompts import Prompt, build_prompts
from srft.data.sampler import sample_seed
from srft.data.templates import completion_text
from srft.dataset import make_prompts, read_problems, warm_starts
from srft.engine.hf import HfEngine
from srft.engine.sampling import make_sampling, prompt_format
from srft.models import with_local_model
from srft.policy.adapter import is_adapter
from srft.policy.checkpoint import newest_checkpoint
from srft.policy.forwards import packed_forward
from srft.policy.model import load_tokenizer
from srft.policy.parallel import World
from srft.prepare import choose_device, load_prepared
from srft.responses import Response
from srft.rewards.pool import RewardPool
from srft.warm_start import cached_start


@dataclass(frozen=True)
class Policy:
    """A model to ask.

    Args:
        label: A few words for figures.
        config: Of the run it is of, or of the command line, with this model's name: how it is asked.
        model: From ``prepare.load_prepared``.
        tokenizer: Its own.
    """

    label: str
    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """What a model makes of the tokens of a response.

    Args:
        logprobs: [n] float64, log-probability of each token, nats, at the temperature of the rollouts.
        entropy: [n] float64, of the distribution before each token, nats.
    """

    logprobs: np.ndarray
    entropy: np.ndarray


def model_of(word: str) -> str:
    """Return the model that a word stands for: of a run's folder what it has come to, else the word itself.

    Args:
        word: Folder of a run, folder of a model or of adapters, or hub id.

    Raises:
        ValueError: When a run has no model yet.
    """
    folder = Path(word)
    if not (folder / "metrics.jsonl").exists():
        return word
    if (folder / "model").is_dir():
        return str(folder / "model")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} has neither model/ nor a checkpoint yet; wait for its first one")
    return str(checkpoint)


def load_policy(source: str, label: str, config: Config) -> Policy:
    """Load a model.

    Args:
        source: Folder of a model, of adapters or of a checkpoint, a name of ``models.NAMES``, or a hub id.
        label: A few words for figures.
        config: How it is asked, in which precision and where.

    Raises:
        ValueError: When it cannot be read, or its run has conversations.
    """
    if config.env.name is not None or config.reads_turns:
        raise ValueError(
            f"{label} was trained in conversations (env.name={config.env.name}, data.turns={config.data.turns}), and "
            "an analysis looks at answers of one turn; leave it out"
        )
    other = {"name": source, "tokenizer": None, "reference": None}
    if source != config.model.name and not is_adapter(source):
        # a whole model has in its files what the run put in place of its checkpoint's
        other |= {"rope_theta": None, "max_position_embeddings": None, "chat_template": None}
    named = config.model.model_copy(update=other)
    config = with_local_model(config.model_copy(update={"model": named}))
    tokenizer = load_tokenizer(config.model)
    model = load_prepared(config, tokenizer, None, World(device=choose_device(config)))
    return Policy(label, config, model.requires_grad_(False), tokenizer)


def encode(policy: Policy, examples: Sequence[Example]) -> list[Prompt]:
    """Return the problems as a model reads them, with their demonstrations; those that are too long are left out.

    Args:
        policy: Its tokenizer and options encode.
        examples: The problems.

    Raises:
        ValueError: When every one is too long.
    """
    data = policy.config.data
    return build_prompts(
        list(examples), prompt_format(policy.config, policy.tokenizer), max_prompt_tokens=data.max_prompt_tokens,
        max_demo_tokens=policy.config.rollout.max_new_tokens, overlong="skip", needs_demo=False,
    )[0]  # fmt: skip


def sample(policy: Policy, prompts: Sequence[Prompt]) -> list[Response]:
    """Draw one answer to each prompt, at the temperature of the rollouts, always the same ones.

    Args:
        policy: Answers.
        prompts: From ``encode`` with the same tokenizer.
    """
    config, tokenizer = policy.config, policy.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    engine = HfEngine(
        policy.model, dtype=config.compute_dtype, pad_token_id=pad, max_batch=config.engine.max_batch,
        tokenizer=tokenizer,
    )  # fmt: skip
    sampling = make_sampling(config, tokenizer, policy.model)
    seeds = [[sample_seed(config.train.seed, 0, prompt.example.id, 0)] for prompt in prompts]
    drawn = [answers[0] for answers in engine.generate([p.prompt_ids for p in prompts], sampling, seeds)]
    return [
        Response(
            prompt.prompt_ids, each.token_ids, False, each.finish == "length", each.logprobs,
            completion_text(tokenizer, each.token_ids, prompt.opened, sampling.stop),
        )
        for prompt, each in zip(prompts, drawn, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def score(policy: Policy, responses: Sequence[Response]) -> list[Score]:
    """Return what a model makes of each response, teacher-forced, as training computes it.

    Args:
        policy: Reads.
        responses: Their tokens are of its vocabulary.
    """
    config, found = policy.config, {}
    device = policy.model.srft_traits.device
    for batch in pack(responses, config.microbatch_tokens, device):
        both = packed_forward(policy.model, batch, config.compute_dtype, config.rollout.temperature)
        logprobs, entropy = (x.double().cpu().numpy() for x in both)
        for response, place in batch.responses():
            found[id(response)] = Score(logprobs[place], entropy[place])
    return [found[id(response)] for response in responses]


def token_texts(policy: Policy, token_ids: Sequence[int]) -> list[str]:
    """Return each token as a person reads it, special ones by their names.

    Args:
        policy: Its tokenizer decodes.
        token_ids: Any.
    """
    texts = []
    for token in token_ids:
        text = str(policy.tokenizer.decode([token], skip_special_tokens=False))
        # a part of a character is no text
        texts.append(str(policy.tokenizer.convert_ids_to_tokens(token)) if not text or "\ufffd" in text else text)
    return texts


def mean_by_token(
    found: Iterable[tuple[Sequence[str], np.ndarray, np.ndarray]], least: int
) -> list[tuple[str, int, float, float]]:
    """Return (token, times, mean of the first number, mean of the second) of each frequent token, as they come.

    Args:
        found: Of each response its n tokens as texts, and two numbers of each, [n].
        least: Times that a token must come up.
    """
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for tokens, first, second in found:
        for token, x, y in zip(tokens, first, second, strict=True):
            pairs[token].append((float(x), float(y)))
    means = {token: np.mean(both, axis=0) for token, both in pairs.items() if len(both) >= least}
    return [(token, len(pairs[token]), float(x), float(y)) for token, (x, y) in means.items()]


def refuse_other_words(label: str, tokenizer: PreTrainedTokenizerBase, other: Policy) -> None:
    """Check that two models read tokens alike.

    Args:
        label: Of a model.
        tokenizer: Its own.
        other: Another model.

    Raises:
        ValueError: When their vocabularies differ.
    """
    if tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError(
            f"{label} and {other.label} have other tokenizers, so that one cannot read the tokens of the other; "
            "take models of one family"
        )


def start_of(config: Config) -> str | None:
    """Return the model that a run started from, None where it is built from scratch and its start is not kept any more.

    Args:
        config: Of the run.

    Raises:
        ValueError: When the run's data, by which a built model's start is known, cannot be read.
    """
    if config.model.name != "tiny" or not (warm_starts(config) or config.model.lora.rank):
        return config.model.name
    problems, tokenizer = read_problems(config), load_tokenizer(config.model)
    with RewardPool(problems.reward, config.reward.workers, config.reward.deadline_s) as pool:
        folder = cached_start(config, make_prompts(config, problems, tokenizer, pool), problems.reward)
    return str(folder) if (folder / "config.json").exists() else None
