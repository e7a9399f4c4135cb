"""The data of a run: its problems, read, settled how they are judged, checked, and turned into prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from srft.config import Config
from srft.data.corruption import corrupted
from srft.data.examples import Example, load_examples
from srft.data.files import has_split, is_local
from srft.data.judging import check_answers, check_demos, fitting_reward
from srft.data.messages import texts_of
from srft.data.problems import Problems, drop_shared, hold_out
from srft.data.prompts import Prompt, build_prompts
from srft.data.turns import refuse_forgetful_template, refuse_other_roles
from srft.engine.sampling import prompt_format
from srft.policy.parallel import ALONE, World
from srft.rewards.pool import RewardPool


@dataclass(frozen=True)
class Prompts:
    """What a run asks.

    Args:
        train: Those that are learned from.
        start: Those of the warm start, whose demonstrations are as they were read; none where there is no such start.
        held_out: Those of the evaluations.
        note: What to tell the user about them.
        demos: Those with the demonstrations of data.demos, one each; empty where prompts have their own.
    """

    train: list[Prompt]
    start: list[Prompt]
    held_out: list[Prompt]
    note: str
    demos: list[Prompt] = field(default_factory=list)


def warm_starts(config: Config) -> bool:
    """Whether a run gives its model a short supervised start.

    Args:
        config: The whole configuration.
    """
    return config.model.name == "tiny" and config.model.warm_start.max_steps > 0


def read_problems(config: Config) -> Problems:
    """Read the training and held-out problems and settle how they are judged.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: Naming the file, line and column of what is wrong with the data.
    """
    data = config.data
    needs, talks = _needs_own_demos(config), config.reads_turns
    examples = load_examples(
        data.train, split=data.split, columns=data.columns, limit=data.limit, seed=config.train.seed,
        task=data.task, use_demo=needs or warm_starts(config), require_demo=needs, bad_rows=data.bad_rows,
        turns=talks,
    )  # fmt: skip
    if data.eval is None and is_local(data.train) and not has_split(data.train, data.eval_split):
        # one split: its end is held out
        examples, held_out = hold_out(examples)
        held_out = held_out[: data.eval_limit]
    else:
        held_out = load_examples(
            data.eval or data.train, split=data.eval_split, columns=data.columns, limit=data.eval_limit, seed=0,
            task=data.task, use_demo=config.method.needs_demos or warm_starts(config), welcome_demo=True,
            bad_rows=data.bad_rows, turns=talks,
        )  # fmt: skip
    distinct = drop_shared(held_out, examples)
    if not distinct:
        raise ValueError(
            f"every held-out problem is also in {data.train}; set data.eval to problems that are not trained on"
        )
    demos = _read_demos(config, distinct) if data.demos else []
    if config.reward.kind != "auto":
        return Problems(examples, distinct, config.reward.kind, demos)
    reward = fitting_reward(data.train, data.system, examples)
    if data.demos and (other := fitting_reward(data.demos, data.system, demos)) != reward:
        raise ValueError(
            f"{data.train} is judged by {reward!r} and data.demos={data.demos} by {other!r}; set reward.kind to one "
            "that judges both"
        )
    return Problems(examples, distinct, reward, demos)


def _read_demos(config: Config, held_out: list[Example]) -> list[Example]:
    """The demonstrations of a set of their own, without those of held-out problems."""
    data = config.data
    assert data.demos is not None
    # a generated task gives other problems than to data.train
    examples = load_examples(
        data.demos, split=data.split, columns=data.demo_columns, seed=config.train.seed + 1, task=data.demo_task,
        require_demo=True, bad_rows=data.bad_rows, turns=config.reads_turns,
    )  # fmt: skip
    demos = drop_shared(examples, held_out)
    if not demos:
        raise ValueError(f"every problem of data.demos={data.demos} is held out; set data.eval to others")
    return demos


def _needs_own_demos(config: Config) -> bool:
    """Whether every prompt must have demonstrations in its row."""
    return config.method.needs_demos and config.data.demos is None


def make_prompts(
    config: Config, problems: Problems, tokenizer: PreTrainedTokenizerBase, pool: RewardPool, world: World = ALONE
) -> Prompts:
    """Check and tokenize the problems.

    Args:
        config: The whole configuration.
        problems: From ``read_problems``.
        tokenizer: The policy's.
        pool: Checks that each demonstration ends in its own answer.
        world: The ranks, each of which checks a share.

    Raises:
        ValueError: For demonstrations that fail their verifier, overlong rows, or too few prompts, by the settings.
    """
    data, per_step = config.data, config.train.prompts_per_step
    notes = [f"{len(problems.train)} training and {len(problems.held_out)} held-out problems from {data.train}"]
    pool.prewarm()
    with_demos = _needs_own_demos(config) or warm_starts(config)
    # of two sets of demonstrations the one that is trained on is to be wrong, and not that of the warm start
    bad_demos = "keep" if data.demos and data.bad_demos == "only" else data.bad_demos
    examples, held_out, left_out = _judged(config, problems, pool, world, with_demos, bad_demos)
    prompts, held_out_prompts, changed = _encoded(config, examples, held_out, tokenizer)
    prompts, lacking = _with_enough_demos(config, prompts)
    notes += left_out + changed + lacking
    shown = prompts
    if data.demos:
        notes.append(f"{len(problems.demos)} problems with demonstrations from {data.demos}")
        alone = replace(problems, train=problems.demos, held_out=[])
        examples, _, left_out = _judged(config, alone, pool, world, True, data.bad_demos)
        shown, _, changed = _encoded(config, examples, [], tokenizer)
        notes += left_out + changed
    start = prompts if any(p.demo_ids for p in prompts) else shown
    if data.corrupt_demos:
        worse, corruption = _corrupted(config, [p.example for p in shown], pool, world)
        shown, lacking = _with_enough_demos(config, _builder(config, tokenizer)(worse)[0])
        notes += corruption + lacking
    demos = []
    if data.demos:
        demos = _one_each(shown)
    else:
        prompts = shown
    if config.method.needs_demo_loss and not any(p.demo_ids for p in held_out_prompts):
        raise ValueError(
            f"method.name={config.method.name} goes by the loss of held-out demonstrations, but no held-out problem "
            "has one; set data.eval to a source that has, or unset the method's option that waits for it"
        )
    if len(prompts) < per_step:
        raise ValueError(
            f"train.prompts_per_step={per_step}, but {data.train} gives only {len(prompts)} usable prompts; "
            f"set train.prompts_per_step={len(prompts)} or fewer"
        )
    a_prompt = config.train.demos_per_prompt
    if data.demos and len(demos) < per_step * a_prompt:
        raise ValueError(
            f"train.prompts_per_step={per_step} and train.demos_per_prompt={a_prompt} take {per_step * a_prompt} "
            f"demonstrations a step, but data.demos={data.demos} gives only {len(demos)}; lower one of them"
        )
    return Prompts(prompts, start if warm_starts(config) else [], held_out_prompts, ", ".join(notes), demos)


def _judged(
    config: Config, problems: Problems, pool: RewardPool, world: World, with_demos: bool, bad_demos: str
) -> tuple[list[Example], list[Example], list[str]]:
    """Training and held-out examples that can be judged, with the demonstrations in use, and what was left out."""
    notes, examples = [], problems.train
    checked = with_demos and bad_demos != "keep"
    # a demonstration that is accepted shows that the answer can be read
    shows = checked and bad_demos != "only"
    unreadable = _unreadable(config, [e for e in examples if not (shows and e.demos)], pool, world)
    unreadable_held_out = _unreadable(config, problems.held_out, pool, world)
    examples = [e for e in examples if e.id not in unreadable]
    held_out = [e for e in problems.held_out if e.id not in unreadable_held_out]
    if left_out := len(unreadable) + len(unreadable_held_out):
        notes.append(f"{left_out} rows skipped whose answer {pool.kind!r} cannot read")
    if checked:
        asked = examples
        examples, dropped = _accepted(examples, pool, bad_demos, world)
        if dropped:
            rows, does = len(asked) - len(examples), "passes" if bad_demos == "only" else "fails"
            notes.append(f"{rows} rows skipped whose demonstration {does} its verifier, of {dropped} demonstrations")
    if not with_demos:
        examples = [replace(e, demos=[]) for e in examples]
    return examples, held_out, notes


def _unreadable(config: Config, examples: list[Example], pool: RewardPool, world: World) -> set[str]:
    """Ids of the examples that cannot be judged, where they may be skipped."""
    # every rank has the verdicts of all: one that ran into a deadline must not leave a row out on one rank alone
    bad = {name: why for part in world.gather(check_answers(world.own(examples), pool)) for name, why in part.items()}
    if bad and (config.data.bad_rows == "error" or len(bad) == len(examples)):
        first, reason = next((e.id, bad[e.id]) for e in examples if e.id in bad)
        raise ValueError(
            f"{len(bad)} of {len(examples)} answers cannot be read by {pool.kind!r}, the first is {first}: {reason}; "
            "mend them, set data.columns.answer or reward.kind, or data.bad_rows=skip"
        )
    return set(bad)


def _accepted(
    examples: list[Example], pool: RewardPool, bad_demos: str, world: World
) -> tuple[list[Example], int]:
    """The examples with the demonstrations that ``bad_demos`` lets pass, and how many it does not."""
    bad = {demo for part in world.gather(check_demos(world.own(examples), pool)) for demo in part}
    if bad and bad_demos == "error":
        first, at = next((e, i) for e in examples for i in range(len(e.demos)) if (e.id, i) in bad)
        reason = pool.score([(texts_of(first.demos[at])[-1], first.answer, first.row)])[0]
        outcome = "judged wrong" if reason.status == "ok" else f"{reason.status} {reason.message}".strip()
        raise ValueError(
            f"{len(bad)} of {sum(len(e.demos) for e in examples)} demonstrations do not end in an answer that "
            f"{pool.kind!r} accepts, the first is "
            f"{first.id} (answer {first.answer!r}, {outcome}); "
            "fix them, or set data.bad_demos=skip (or keep), or another reward.kind"
        )
    if bad_demos == "only":
        every = {(e.id, i) for e in examples for i in range(len(e.demos))}
        if not bad:
            raise ValueError(
                f"data.bad_demos=only, but {pool.kind!r} accepts all {len(every)} demonstrations; set it to error"
            )
        bad = every - bad
    kept = [replace(e, demos=[d for i, d in enumerate(e.demos) if (e.id, i) not in bad]) for e in examples]
    usable = [new for new, old in zip(kept, examples, strict=True) if new.demos or not old.demos]
    if not usable:
        raise ValueError(
            f"data.bad_demos={bad_demos} leaves none of {len(bad)} demonstrations, none of which {pool.kind!r} "
            "accepts; mend them, or set data.bad_demos=keep, or another reward.kind"
        )
    return usable, len(bad)


def _corrupted(
    config: Config, examples: list[Example], pool: RewardPool, world: World
) -> tuple[list[Example], list[str]]:
    """The examples with a share of imperfect demonstrations, and how many there are, each counted by its verdict."""
    data, total = config.data, sum(len(e.demos) for e in examples)
    worse, changed, unchanged = corrupted(
        data.demos or data.train, examples, data.corrupt_demos, data.corrupt_kind, config.train.seed
    )
    touched = {name for name, _ in changed}
    refused = world.gather(check_demos(world.own([e for e in worse if e.id in touched]), pool))
    accepted = len(changed.difference(*refused))
    notes = [
        f"{len(changed)} of {total} demonstrations corrupted: {data.corrupt_kind}",
        f"of which the verifier accepts {accepted} all the same" if accepted else "",
        f"{unchanged} more could not be and stayed" if unchanged else "",
    ]
    return worse, [note for note in notes if note]


def _encoded(
    config: Config, examples: list[Example], held_out: list[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[Prompt], list[str]]:
    """Training and held-out prompts, and what was skipped or changed on the way."""
    build = _builder(config, tokenizer)
    if config.reads_turns and tokenizer.chat_template:
        form, demos = prompt_format(config, tokenizer), [(e.id, demo) for e in examples for demo in e.demos]
        if config.env.name is not None:
            refuse_other_roles(demos, config.env.role)
        for role in sorted({turn["role"] for _, demo in demos if isinstance(demo, list) for turn in demo}):
            if role != "assistant":
                refuse_forgetful_template(form, role)
    prompts, counts = build(examples)
    held_out_prompts, held_out_counts = build(held_out, needs_demo=False) if held_out else ([], Counter())
    notes = [
        f"{number} {what}"
        for number, what in (
            (len(examples) - len(prompts), "training rows skipped as too long"),
            (counts["overlong_demos"], "demonstrations skipped as too long"),
            (held_out_counts["overlong_prompts"], "held-out rows skipped as too long"),
            (counts["closed_thoughts"], "demonstrations without a thought, which the prompt opens: closed empty"),
            (counts["dropped_thoughts"], "demonstrations without their thought, which the prompt closes"),
            (counts["plain_messages"], "prompts of messages as plain text, since the tokenizer has no chat template"),
            (_past_stop(prompts, config.rollout.stop), "demonstrations that go on after a text of rollout.stop"),
        )
        if number
    ]
    return prompts, held_out_prompts, notes


def _builder(config: Config, tokenizer: PreTrainedTokenizerBase) -> partial[tuple[list[Prompt], Counter[str]]]:
    """What encodes examples as the options say."""
    return partial(
        build_prompts, form=prompt_format(config, tokenizer), overlong=config.data.overlong,
        max_prompt_tokens=config.data.max_prompt_tokens, max_demo_tokens=config.rollout.max_new_tokens,
    )  # fmt: skip


def _one_each(prompts: list[Prompt]) -> list[Prompt]:
    """The same with one demonstration each, a prompt as often as it has some."""
    return [
        replace(p, example=replace(p.example, demos=[demo]), demo_ids=[ids], demo_spans=p.demo_spans[i : i + 1])
        for p in prompts
        for i, (demo, ids) in enumerate(zip(p.example.demos, p.demo_ids, strict=True))
    ]


def _past_stop(prompts: list[Prompt], stop: list[str]) -> int:
    """How many demonstrations say something after the first text that would end a rollout."""
    demos = [texts_of(demo) for p in prompts for demo in p.example.demos]
    return sum(any(text.partition(words)[2].strip() for text in texts for words in stop) for texts in demos)


def _with_enough_demos(config: Config, prompts: list[Prompt]) -> tuple[list[Prompt], list[str]]:
    """The prompts that have as many demonstrations as the method takes of each, and how many have not."""
    least = config.train.demos_per_prompt if _needs_own_demos(config) else 0
    enough = [p for p in prompts if len(p.demo_ids) >= least]
    lacking = len(prompts) - len(enough)
    if lacking and (config.data.bad_rows == "error" or not enough):
        few = next(p for p in prompts if len(p.demo_ids) < least)
        raise ValueError(
            f"train.demos_per_prompt={least}, but {few.example.id} has only {len(few.demo_ids)} "
            f"demonstrations, as {lacking} of {len(prompts)} prompts do; lower it"
            + (", or set data.bad_rows=skip" if enough else "")
        )
    return enough, [f"{lacking} prompts skipped that have too few demonstrations"] if lacking else []
