"""Rows in, prompts out: examples, and the prompts and demonstrations that they are to a policy."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srft.data.columns import merged
from srft.data.fields import map_columns, read_fields
from srft.data.files import is_local
from srft.data.messages import Message
from srft.data.prompts import PromptFormat, continue_prompt, opening
from srft.data.schemas import detect_schema, find_schema
from srft.data.sources import read_source
from srft.rewards.verifiers import VERIFIERS

if TYPE_CHECKING:
    from srft.rewards.pool import RewardPool

logger = logging.getLogger(__name__)

_ROWS_LOOKED_AT = 100  # to tell the columns of a source in which a row may lack one


@dataclass(frozen=True)
class Example:
    """One problem, its ground truth and its demonstrations.

    Args:
        id: "<source>:<row index>", of files their name without the folder; stable over runs.
        prompt: Text, or chat messages with "role" and "content".
        answer: Ground truth, handed to the verifier.
        demos: Demonstration texts without an end-of-sequence token.
        row: The source row, for verifiers that need more than the answer.
    """

    id: str
    prompt: str | list[Message]
    answer: Any
    demos: list[str]
    row: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Args:
        example: Where it comes from.
        prompt_ids: Tokens up to where the completion starts.
        demo_ids: Each of the example's demonstrations, ending in the token that ends a turn.
        opened: The "<think>" with which the prompt ends, which belongs to the completion's text; mostly empty.
    """

    example: Example
    prompt_ids: list[int]
    demo_ids: list[list[int]]
    opened: str = ""


def load_examples(
    source: str,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    task: dict[str, Any] | None = None,
    use_demo: bool = True,
    require_demo: bool = False,
    bad_rows: Literal["error", "skip"] = "error",
) -> list[Example]:
    """Read a data source into examples.

    Args:
        source: "chain"; "reasoning_gym:<task>"; a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, compressed or
            not; a folder or a glob of such files; or a hub data set, "owner/name" or "owner/name:config".
        split: Split of a hub data set, or of a folder whose files name theirs. For generated tasks "train" or
            anything else, which then means evaluation; the two never share a problem. A file is one split and
            ignores it.
        columns: Column or dotted path of "prompt", "answer" and "demo"; what is left out follows the
            schema of the rows. A prompt that is a conversation ends before the assistant's last turn, which is the
            demonstration where no other column is.
        limit: Number of rows taken from the start, >= 1; None takes all, and of a generated task 8192 to
            train and 256 to evaluate.
        seed: Stream of a generated task; not used elsewhere.
        task: Options of a generated task: min_ops and max_ops, or the reasoning-gym task's own fields.
        use_demo: Whether demonstrations are read; without it their column is not looked at.
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
    whole = merged(row for _, row in placed[:_ROWS_LOOKED_AT])
    schema = find_schema(source, whole)
    paths = map_columns(source, whole, schema, columns or {}, use_demo=use_demo, require_demo=require_demo)
    # files go by their name alone, so that seeds made from ids do not depend on where they lie
    name = Path(source).expanduser().absolute().name if is_local(source) else source
    examples: list[Example] = []
    bad: list[str] = []
    for index, (place, row) in enumerate(placed):
        try:
            prompt, answer, demos = read_fields(place, row, paths, schema)
            if require_demo and not demos:
                raise ValueError(f"{place}: no demonstration in column {paths['demo']!r}")
        except ValueError:
            if bad_rows == "error":
                raise
            bad.append(place)
        else:
            examples.append(Example(f"{name}:{index}", prompt, answer, demos, row))
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


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split off the last tenth of the problems, at least one: every row of theirs leaves the training set.

    Args:
        examples: Of two problems at least; several rows may be of one problem.

    Returns:
        (training examples, one held-out example of each problem), both in order.

    Raises:
        ValueError: When there is only one problem.
    """
    keys = [_problem_key(example) for example in examples]
    last = dict(zip(reversed(keys), reversed(examples), strict=True))
    if len(last) < 2:
        name = examples[0].id.rpartition(":")[0]
        raise ValueError(f"{name} has one problem, and needs one more to hold out; add rows or set data.eval")
    kept_out = dict(list(last.items())[: max(1, len(last) // 10)])
    training = [example for key, example in zip(keys, examples, strict=True) if key not in kept_out]
    return training, list(kept_out.values())[::-1]


def _problem_key(example: Example) -> str:
    """What makes two problems the same: what the layout says of it, else the prompt."""
    identity = detect_schema(example.row).identity
    return json.dumps(example.prompt if identity is None else identity(example.row), default=str)


def digests(examples: Iterable[Example], *, with_rows: bool) -> list[str]:
    """Return a short digest of each example: its id, prompt, answer and demonstrations.

    Args:
        examples: Any number.
        with_rows: Whether the whole row counts, as for a verifier that looks at it.
    """
    facts = ([e.id, e.prompt, e.answer, e.demos, e.row if with_rows else None] for e in examples)
    texts = (json.dumps(fact, default=str, sort_keys=True) for fact in facts)
    return [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]


def check_demos(examples: Sequence[Example], pool: RewardPool) -> list[tuple[str, int]]:
    """Return (example id, index) of every demonstration that the verifier does not accept.

    Args:
        examples: Those without a demonstration are passed over.
        pool: Grades each demonstration as if it were a completion.
    """
    shown = [(example, index) for example in examples for index in range(len(example.demos))]
    results = pool.score([(example.demos[index], example.answer, example.row) for example, index in shown])
    return [
        (example.id, index)
        for (example, index), result in zip(shown, results, strict=True)
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


def build_prompts(
    examples: Sequence[Example],
    prompts: PromptFormat,
    *,
    max_prompt_tokens: int,
    max_demo_tokens: int | None,
    overlong: Literal["error", "skip"] = "error",
) -> tuple[list[Prompt], Counter[str]]:
    """Encode examples; nothing is ever cut.

    Args:
        examples: At least one.
        prompts: How they are put to the policy.
        max_prompt_tokens: Longest prompt kept, in tokens.
        max_demo_tokens: Longest demonstration kept, in tokens, the end token included: the completion limit.
            None leaves demonstrations out.
        overlong: What an example over a limit does: "error" or "skip". Of several demonstrations those over the limit
            are skipped, and the example once none is left.

    Returns:
        (prompts, counts): counts has "overlong_prompts", examples left out; "overlong_demos", demonstrations left out,
        those of an overlong prompt aside; "closed_thoughts" and "dropped_thoughts", see ``prompts.continue_prompt``;
        "plain_messages", prompts of messages without a template to put them through.

    Raises:
        ValueError: With ``overlong="error"`` when any example is over a limit; when none is left; without an
            end token.
    """
    texts = [prompts.render(example.id, example.prompt) for example in examples]
    frames = [prompts.turn(example.prompt) for example in examples]
    counts: Counter[str] = Counter(overlong_prompts=0, overlong_demos=0)
    counts["plain_messages"] = sum(isinstance(e.prompt, list) and not prompts.uses_template(e.prompt) for e in examples)
    bodies: list[str] = []
    for example, text, frame in zip(examples, texts, frames, strict=True):
        for demo in example.demos if max_demo_tokens is not None else []:
            body, change = continue_prompt(text, demo)
            if change:
                counts[f"{change}_thoughts"] += 1
            bodies.append(f"{frame.head}{body}{frame.tail}")
    # one call, which fast tokenizers spread over the cores: these can be hundreds of millions of tokens
    encoded = iter(prompts.tokenizer(bodies, add_special_tokens=False)["input_ids"] if bodies else [])
    built: list[Prompt] = []
    longest = {"prompt": 0, "demo": 0}
    for example, text, frame in zip(examples, texts, frames, strict=True):
        prompt_ids = prompts.encode(text, example.prompt)
        shown = example.demos if max_demo_tokens is not None else []
        demo_ids = [_closed(next(encoded), frame.end) for _ in shown]
        longest["prompt"] = max(longest["prompt"], len(prompt_ids))
        longest["demo"] = max(longest["demo"], *map(len, demo_ids), 0)
        if len(prompt_ids) > max_prompt_tokens:
            counts["overlong_prompts"] += 1
            continue
        fits = [i for i, ids in enumerate(demo_ids) if max_demo_tokens is None or len(ids) <= max_demo_tokens]
        counts["overlong_demos"] += len(shown) - len(fits)
        if shown and not fits:
            continue
        kept = replace(example, demos=[shown[i] for i in fits]) if len(fits) < len(example.demos) else example
        built.append(Prompt(kept, prompt_ids, [demo_ids[i] for i in fits], opening(text)))
    too_long = counts["overlong_prompts"] + counts["overlong_demos"]
    if not built or (overlong == "error" and too_long):
        raise ValueError(
            f"{counts['overlong_prompts']} of {len(examples)} examples have a prompt over "
            f"{max_prompt_tokens} tokens (longest {longest['prompt']}) and {counts['overlong_demos']} a "
            f"demonstration over {max_demo_tokens} (longest {longest['demo']}); raise "
            "data.max_prompt_tokens or rollout.max_new_tokens, or set data.overlong=skip"
        )
    return built, counts


def _closed(ids: list[int], end: int) -> list[int]:
    """A demonstration's tokens with one end token, also where its text spells it out."""
    return ids if ids[-1:] == [end] else [*ids, end]
