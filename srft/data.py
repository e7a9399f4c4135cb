"""Rows in, prompts out: examples, chat template, tokens, and a sampler whose state is one counter."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srft.sources import FILE_SUFFIXES, Message, detect_schema, map_columns, read_fields, read_source
from srft.tasks import REASONING_GYM
from srft.verifiers import VERIFIERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srft.rewards import RewardPool

logger = logging.getLogger(__name__)

THINK = "<think>\n"


@dataclass(frozen=True)
class Example:
    """One problem, its ground truth and, where there is one, a demonstration.

    Args:
        id: "<source>:<row index>", of a file its name without the folder; stable over runs.
        prompt: Text, or chat messages with "role" and "content".
        answer: Ground truth, handed to the verifier.
        demo: Demonstration text without an end-of-sequence token, or None.
        row: The source row, for verifiers that need more than the answer.
    """

    id: str
    prompt: str | list[Message]
    answer: Any
    demo: str | None
    row: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Args:
        example: Where it comes from.
        prompt_ids: Tokens up to where the completion starts.
        demo_ids: Demonstrations, each ending in the end-of-sequence token; empty without one.
    """

    example: Example
    prompt_ids: list[int]
    demo_ids: list[list[int]]


def load_examples(
    source: str,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    task: dict[str, Any] | None = None,
    require_demo: bool = False,
    bad_rows: Literal["error", "skip"] = "error",
) -> list[Example]:
    """Read a data source into examples.

    Args:
        source: "chain"; "reasoning_gym:<task>"; a .jsonl, .json or .parquet file; or a hub data set,
            "owner/name" or "owner/name:config".
        split: Split of a hub data set. For generated tasks "train" or anything else, which then means
            evaluation; the two never share a problem. A file is one split and ignores it.
        columns: Column or dotted path of "prompt", "answer" and "demo"; what is left out follows the
            schema of the first row.
        limit: Number of rows taken from the start, >= 1; None takes all, and of a generated task 8192 to
            train and 256 to evaluate.
        seed: Stream of a generated task; not used elsewhere.
        task: Options of a generated task: min_ops and max_ops, or the reasoning-gym task's own fields.
        require_demo: Whether a row without a demonstration is an error.
        bad_rows: "error", or "skip" to drop rows without a prompt, an answer or a required demonstration, and
            log how many.

    Raises:
        ValueError: On a missing or unreadable source, an invalid line (named by its 1-based number), a
            missing column, a row without answer or required demonstration, or no rows at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1 or None, got {limit}")
    placed = read_source(source, split, limit, seed, task or {})
    if not placed:
        raise ValueError(f"{source} holds no rows")
    first = placed[0][1]
    schema = None if source.startswith(REASONING_GYM) else detect_schema(first)
    paths = map_columns(source, first, schema, columns or {}, require_demo)
    # a file goes by its name alone, so that seeds made from ids do not depend on where it lies
    name = Path(source).name if source.endswith(FILE_SUFFIXES) else source
    examples: list[Example] = []
    bad: list[str] = []
    for index, (place, row) in enumerate(placed):
        try:
            prompt, answer, demo = read_fields(place, row, paths, schema)
            if require_demo and demo is None:
                raise ValueError(f"{place}: no demonstration in column {paths['demo']!r}")
        except ValueError:
            if bad_rows == "error":
                raise
            bad.append(place)
        else:
            examples.append(Example(f"{name}:{index}", prompt, answer, demo, row))
    if bad:
        logger.warning("%s: dropped %d of %d rows, the first is %s", source, len(bad), len(placed), bad[0])
    if not examples:
        raise ValueError(f"{source}: none of the {len(placed)} rows is usable")
    return examples


def drop_shared(examples: Iterable[Example], seen: Iterable[Example]) -> list[Example]:
    """Return the examples whose problem is in no example of ``seen``.

    Args:
        examples: Usually the evaluation set.
        seen: Usually the training set.
    """
    known = {_problem_key(example) for example in seen}
    return [example for example in examples if _problem_key(example) not in known]


def _problem_key(example: Example) -> str:
    """What makes two problems the same; the order of Countdown numbers does not."""
    if detect_schema(example.row) == "countdown":
        return json.dumps([sorted(example.row["nums"]), example.row["target"]])
    return json.dumps(example.prompt)


def check_demos(examples: Sequence[Example], pool: RewardPool) -> list[str]:
    """Return the ids of examples whose demonstration the verifier does not accept.

    Args:
        examples: Those without a demonstration are passed over.
        pool: Grades each demonstration as if it were a completion.
    """
    shown = [example for example in examples if example.demo is not None]
    results = pool.score([(example.demo or "", example.answer, example.row) for example in shown])
    return [
        example.id
        for example, result in zip(shown, results, strict=True)
        if result.value < 0.5 and result.status != "unjudged"
    ]


def check_answers(examples: Sequence[Example], pool: RewardPool) -> dict[str, str]:
    """Return, by id, why the verifier cannot read the answer of an example; only those that it cannot read.

    Args:
        examples: Their demonstrations are not looked at.
        pool: A verifier of the user's own is not asked: what it makes of an empty completion is its own affair.
    """
    if pool.kind not in VERIFIERS:
        return {}
    results = pool.score([("", example.answer, example.row) for example in examples], may_fail=True)
    return {
        example.id: result.message
        for example, result in zip(examples, results, strict=True)
        if result.status == "bad_gold"
    }


def render_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, system: str | None, chat: bool
) -> str:
    """Return the text that a completion continues.

    Args:
        example: Its messages, or its text as one user turn when ``chat`` is set.
        tokenizer: Owner of the chat template.
        system: System turn, replacing one in the messages; plain text follows it after an empty line.
        chat: Whether to put text through the chat template, where there is one. Messages always are.

    Raises:
        ValueError: On messages when the tokenizer has no chat template.
    """
    turns = example.prompt
    if isinstance(turns, str):
        if not (chat and tokenizer.chat_template):
            return turns if system is None else f"{system}\n\n{turns}"
        turns = [{"role": "user", "content": turns.strip()}]
    elif not tokenizer.chat_template:
        raise ValueError(
            f"{example.id} is a list of messages and the tokenizer has no chat template; give it one, or map "
            "data.columns.prompt to a text column"
        )
    if system is not None:
        turns = [{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, chat: bool = False
) -> list[int]:
    """Return the prompt's token ids.

    Args:
        example: As in :func:`render_prompt`.
        tokenizer: Encodes a template's text as it stands; gives plain text its start token, if it has one.
        system: As in :func:`render_prompt`.
        chat: As in :func:`render_prompt`.
    """
    return _encode_text(render_prompt(example, tokenizer, system=system, chat=chat), example, tokenizer, chat)


def _encode_text(text: str, example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    if not isinstance(example.prompt, str) or (chat and tokenizer.chat_template):
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids = list(tokenizer.encode(text, add_special_tokens=True))
    # some tokenizers close every text with their end token; a prompt stays open
    bare = tokenizer.encode(text, add_special_tokens=False)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and bare[-1:] != ids[-1:] else ids


def encode_demo(
    example: Example, tokenizer: PreTrainedTokenizerBase, eos_id: int, *, prompt_text: str = ""
) -> list[int]:
    """Return the demonstration's token ids and ``eos_id``.

    Args:
        example: Must have a demonstration.
        tokenizer: Adds no special token here.
        eos_id: Token that ends a completion.
        prompt_text: The rendered prompt; when it ends in "<think>" and a newline, these are dropped from the
            start of the demonstration.
    """
    return [*tokenizer.encode(_demo_text(example, prompt_text), add_special_tokens=False), eos_id]


def _demo_text(example: Example, prompt_text: str) -> str:
    assert example.demo is not None
    return example.demo.removeprefix(THINK) if prompt_text.endswith(THINK) else example.demo


def build_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_demo_tokens: int | None,
    overlong: Literal["error", "skip"] = "error",
    system: str | None = None,
    chat: bool = False,
    eos_id: int | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """Encode examples; nothing is ever cut.

    Args:
        examples: At least one.
        tokenizer: As in :func:`encode_prompt`.
        max_prompt_tokens: Longest prompt kept, in tokens.
        max_demo_tokens: Longest demonstration kept, in tokens, the end token included: the completion limit.
            None leaves demonstrations out.
        overlong: What an example over a limit does: "error" or "skip".
        system: As in :func:`render_prompt`.
        chat: As in :func:`render_prompt`.
        eos_id: Token that ends a completion; None takes the tokenizer's.

    Returns:
        (prompts, counts): counts has "overlong_prompts" and "overlong_demos", the examples left out; one over
        both limits counts as an overlong prompt.

    Raises:
        ValueError: With ``overlong="error"`` when any example is over a limit; when none is left; without an
            end token.
    """
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
    if eos_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; give eos_id")
    texts = [render_prompt(example, tokenizer, system=system, chat=chat) for example in examples]
    shown = [max_demo_tokens is not None and example.demo is not None for example in examples]
    demo_texts = [_demo_text(e, text) for e, text, show in zip(examples, texts, shown, strict=True) if show]
    # one call, which fast tokenizers spread over the cores: these can be hundreds of millions of tokens
    encoded = iter(tokenizer(demo_texts, add_special_tokens=False)["input_ids"] if demo_texts else [])
    prompts: list[Prompt] = []
    counts = {"overlong_prompts": 0, "overlong_demos": 0}
    longest = {"prompt": 0, "demo": 0}
    for example, text, show in zip(examples, texts, shown, strict=True):
        prompt_ids = _encode_text(text, example, tokenizer, chat)
        demo_ids = [[*next(encoded), eos_id]] if show else []
        longest["prompt"] = max(longest["prompt"], len(prompt_ids))
        longest["demo"] = max(longest["demo"], *map(len, demo_ids), 0)
        if len(prompt_ids) > max_prompt_tokens:
            counts["overlong_prompts"] += 1
        elif max_demo_tokens is not None and any(len(ids) > max_demo_tokens for ids in demo_ids):
            counts["overlong_demos"] += 1
        else:
            prompts.append(Prompt(example, prompt_ids, demo_ids))
    if not prompts or (overlong == "error" and len(prompts) < len(examples)):
        raise ValueError(
            f"{counts['overlong_prompts']} of {len(examples)} examples have a prompt over "
            f"{max_prompt_tokens} tokens (longest {longest['prompt']}) and {counts['overlong_demos']} a "
            f"demonstration over {max_demo_tokens} (longest {longest['demo']}); raise "
            "data.max_prompt_tokens or rollout.max_new_tokens, or set data.overlong=skip"
        )
    return prompts, counts


class PromptSampler:
    """Epochs of seeded permutations; its whole state is how many indices it has given out.

    Args:
        num_prompts: Size of the data set, >= 1.
        seed: With the epoch's number it fixes the order of that epoch.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        if num_prompts < 1:
            raise ValueError(f"a sampler needs at least one prompt, got {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.drawn = 0
        self._epoch = -1
        self._order: list[int] = []

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_prompts)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(self.num_prompts))
            random.Random(f"{self.seed}:{epoch}").shuffle(self._order)
        return self._order[offset]

    def next(self, k: int) -> list[int]:
        """Return the next ``k`` indices, going on into the next epoch where one ends.

        Args:
            k: Prompts in a batch, in [1, num_prompts].

        Raises:
            ValueError: If the batch is larger than the data set.
        """
        if not 1 <= k <= self.num_prompts:
            raise ValueError(
                f"a batch of {k} prompts from {self.num_prompts}; lower prompts_per_step or give more data"
            )
        indices = [self._at(position) for position in range(self.drawn, self.drawn + k)]
        self.drawn += k
        return indices

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run needs."""
        return {"drawn": self.drawn, "seed": self.seed, "num_prompts": self.num_prompts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where another sampler stood.

        Args:
            state: From ``state_dict`` of a sampler over as many prompts with the same seed.

        Raises:
            ValueError: If the data set's size or the seed differ, since the order would not go on.
        """
        for name in ("num_prompts", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's sampler has {name}={state[name]}, this run {getattr(self, name)}"
                )
        self.drawn = state["drawn"]


def sample_seed(seed: int, step: int, prompt_uid: str, k: int) -> int:
    """Return the engine's seed of one sample, in [0, 2**63), the same on every machine.

    Args:
        seed: The run's seed.
        step: Training step.
        prompt_uid: Example id, with the place in the batch added where a batch may hold a prompt twice.
        k: Index of the sample within its group.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{k}:{prompt_uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
