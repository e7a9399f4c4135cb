"""Prompts to judged groups: the engine samples, demonstrations join, verifiers give every response its reward."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from srft.config import Config
from srft.conversation import Environment, converse
from srft.data.messages import texts_of
from srft.data.prompts import Prompt, with_demo
from srft.data.sampler import sample_seed
from srft.data.templates import completion_text
from srft.data.turns import transcript
from srft.engine.base import Completion, Ended, Engine, Sampling
from srft.engine.sampling import prompt_format
from srft.engine.stops import StopTexts
from srft.methods import StepInfo
from srft.policy.learner import Learner
from srft.policy.parallel import ALONE, World
from srft.responses import Group, Response
from srft.rewards.pool import Item, Judge

# prompts with their demonstrations whose length is looked at, those of most tokens first
_LESSONS = 64


@dataclass(frozen=True)
class Actor:
    """The rollouts' side of a run: what answers prompts, and what judges the answers.

    Args:
        engine: Holds the current policy.
        sampling: How it draws.
        tokenizer: Turns completions back to text.
        pool: The verifiers.
        world: The ranks, each of which answers and judges its own prompts.
        environment: What the policy talks to; None: it answers in one turn.
        begin: Has the pool judge an answer that it will be asked for, while others are sampled; None: it is asked for
            all of them at once.
    """

    engine: Engine
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    pool: Judge
    world: World = ALONE
    environment: Environment | None = None
    begin: Callable[[Item], None] | None = None


def roll_out(
    config: Config, actor: Actor, prompts: list[Prompt], now: StepInfo, shown: Sequence[Prompt] = (),
    going: Sequence[Group] = (),
) -> list[Group]:  # fmt: skip
    """Sample completions and join demonstrations to them: each prompt's own, or others as groups by themselves.

    Args:
        config: The whole configuration.
        actor: Holds the current policy.
        prompts: Those of all ranks; one group is made of each that is this rank's.
        now: The step, whose number is part of every sample's seed.
        shown: Those with the step's demonstrations, one each, where these are a set of their own: all ranks', too.
        going: This rank's groups of earlier steps that are open; they stay as they are.

    Returns:
        Those that were open, as far as they are now, and the new ones, which are open themselves where
        ``rollout.partial_tokens`` has not let all their completions end.
    """
    own = actor.world.own(list(enumerate(prompts)))
    of_demos = [
        Group(p, demos=[demonstration(p, 0)], max_new_tokens=config.rollout.max_new_tokens, drawn=(now.step, place))
        for place, p in actor.world.own(list(enumerate(shown)))
    ]
    _begin_demos(actor, of_demos)
    groups = _answered(config, actor, own, now, [group.copy() for group in going])
    for group, (place, _) in zip(groups[len(going) :], own, strict=True):
        group.drawn = (now.step, place)
    return [group for group in groups if group.rollouts] + of_demos if config.data.demos else groups


def resample(
    config: Config, actor: Actor, groups: list[Group], draw: Callable[[int], list[Prompt]], now: StepInfo
) -> list[Group]:
    """Put judged groups of new prompts in the place of those that the method wants others for.

    Args:
        config: The whole configuration.
        actor: Holds the current policy.
        groups: This rank's, from ``roll_out``, judged; modified in place.
        draw: Returns as many new prompts as it is asked for, the same on every rank.
        now: The step.

    Returns:
        This rank's groups that gave way.
    """
    world, method, gave_way = actor.world, config.method, []
    for tried in itertools.count():
        # demonstrations that are groups by themselves come last
        given = [i for i, group in enumerate(groups) if group.rollouts and method.wants_another(group, tried)]
        # in the whole batch, of which this rank has one of every ``size``
        own = [world.rank + i * world.size for i in given]
        places = sorted(place for of_rank in world.gather(own) for place in of_rank)
        if not places:
            break
        asked = [(place, prompt) for place, prompt in zip(places, draw(len(places)), strict=True) if place in own]
        later = (tried + 1) * config.train.prompts_per_step
        fresh = _answered(config, actor, [(place + later, prompt) for place, prompt in asked], now)
        judge(fresh, actor.pool)
        for (place, _), group in zip(asked, fresh, strict=True):
            gave_way.append(groups[place // world.size])
            group.drawn = gave_way[-1].drawn
            groups[place // world.size] = group
    return gave_way


def _answered(
    config: Config, actor: Actor, own: list[tuple[int, Prompt]], now: StepInfo, going: Sequence[Group] = ()
) -> list[Group]:
    """Groups that go on, modified in place, and this rank's of the prompts at these places."""
    groups = [Group(p, max_new_tokens=config.rollout.max_new_tokens) for _, p in own]
    # the place in the batch tells two copies of a prompt apart where a batch crosses into the next epoch
    uids = [f"{p.example.id}@{place}" for place, p in own]

    def seed(uid: str, sample: int) -> int:
        return sample_seed(config.train.seed, now.step, uid, sample)

    wants_rollouts, wants_demos = config.method.asks(now)
    chosen: list[list[int]] = []
    if wants_demos and not config.data.demos:
        for group, uid in zip(groups, uids, strict=True):
            places, most = range(len(group.prompt.demo_ids)), config.train.demos_per_prompt
            # of more demonstrations than are joined, others at every visit
            chosen.append(sorted(random.Random(seed(uid, -1)).sample(places, most)))
            group.demos = [demonstration(group.prompt, place) for place in chosen[-1]]
        _begin_demos(actor, groups)
    if wants_rollouts and actor.environment is not None:
        many = range(config.train.rollouts_per_prompt)
        talks = converse(
            actor.environment, actor.engine, actor.sampling, actor.world, [p for _, p in own],
            [[seed(uid, k) for k in many] for uid in uids],
        )  # fmt: skip
        for group, rollouts in zip(groups, talks, strict=True):
            group.rollouts += rollouts
    elif wants_rollouts:
        for group, uid in zip(groups, uids, strict=True):
            for begin, samples in _beginnings(config, group.prompt, now, random.Random(seed(uid, -1))):
                group.rollouts += [_begun(group.prompt, begin, seed(uid, k)) for k in samples]
    if actor.environment is None and (wants_rollouts or config.rollout.segments > 1):
        _go_on(config, actor, [*going, *groups])
    if chosen and config.method.shows_demos:
        form = prompt_format(config, actor.tokenizer)
        for group, of_group in zip(groups, chosen, strict=True):
            shown_ids = [with_demo(group.prompt, place, form, config.method.show) for place in of_group]
            for k, rollout in enumerate(group.rollouts):
                rollout.teacher_prompt_ids = shown_ids[k % len(shown_ids)]
    return [*going, *groups]


def _begin_demos(actor: Actor, groups: list[Group]) -> None:
    if actor.begin is not None:
        for group in groups:
            for demo in group.demos:
                actor.begin((demo.text, group.prompt.example.answer, group.prompt.example.row))


def judged_early(actor: Actor, begun: list[tuple[Prompt, list[int]]]) -> Ended | None:
    """Return what has an answer judged as soon as it ends; None where the actor's pool is asked for all at once.

    Args:
        actor: Whose pool judges.
        begun: The prompts that are answered, each with what its answers begin with.
    """
    if (begin_judging := actor.begin) is None:
        return None

    def ended(place: int, _sample: int, token_ids: list[int]) -> None:
        prompt, begin = begun[place]
        text = completion_text(actor.tokenizer, _within(actor, begin, token_ids), prompt.opened, actor.sampling.stop)
        begin_judging((text, prompt.example.answer, prompt.example.row))

    return ended


def _within(actor: Actor, begin: list[int], token_ids: list[int]) -> list[int]:
    """An answer up to the limit, which is that of prefix and completion together; the engine knows of the latter."""
    return begin + token_ids[: actor.sampling.max_new_tokens - len(begin)]


def refuse_long_lessons(config: Config, learner: Learner, prompts: list[Prompt]) -> None:
    """Check that a teacher can read the prompts with their demonstrations: those of most tokens.

    Args:
        config: The whole configuration.
        learner: Holds the policy.
        prompts: Those that are learned from.

    Raises:
        ValueError: When one with a completion is longer than the model's positions or a micro-batch.
    """
    form = prompt_format(config, learner.tokenizer)
    pairs = [(p, i) for p in prompts for i in range(len(p.demo_ids))]
    pairs.sort(key=lambda pair: len(pair[0].prompt_ids) + len(pair[0].demo_ids[pair[1]]), reverse=True)
    lengths = [len(with_demo(p, i, form, config.method.show)) for p, i in pairs[:_LESSONS]]
    longest = max(lengths) + config.rollout.max_new_tokens
    # rotary positions of a model built from scratch go on beyond what its configuration was given
    positions = getattr(learner.model.config.get_text_config(), "max_position_embeddings", None)
    if config.model.name != "tiny" and positions is not None and longest > positions:
        raise ValueError(
            f"the teacher reads up to {longest} tokens, a prompt with its demonstration and a completion, and its "
            f"model has positions for {positions}; set data.max_prompt_tokens or rollout.max_new_tokens lower with "
            "data.overlong=skip, or method.teacher_prompt shorter"
        )
    if longest > config.microbatch_tokens:
        raise ValueError(
            f"the teacher reads up to {longest} tokens, a prompt with its demonstration and a completion; set "
            f"train.tokens_per_microbatch to at least that, got {config.microbatch_tokens}"
        )


def _beginnings(
    config: Config, prompt: Prompt, now: StepInfo, rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """With which tokens of a demonstration a prompt's rollouts begin, mostly none, and which of them do."""
    rollouts = config.train.rollouts_per_prompt
    demo = rng.choice(prompt.demo_ids) if prompt.demo_ids else []
    lengths = config.method.prefixes(demo, rollouts, now, rng) if demo else [0] * rollouts
    if len(lengths) != rollouts or not all(0 <= n < max(1, len(demo)) for n in lengths):
        raise ValueError(
            f"prefixes of method.name={config.method.name} must return {rollouts} numbers of tokens from 0 to "
            f"{len(demo) - 1}, all but the last of the demonstration, got {lengths}"
        )
    return [(demo[:n], [k for k in range(rollouts) if lengths[k] == n]) for n in dict.fromkeys(lengths)]


def _begun(prompt: Prompt, begin: list[int], seed: int) -> Response:
    """A rollout before its first token, with those of a demonstration with which it begins."""
    return Response(
        prompt.prompt_ids, begin, is_demo=False, truncated=False, rollout_logprobs=[0.0] * len(begin), text="",
        prefix_tokens=len(begin), seed=seed,
    )  # fmt: skip


def _go_on(config: Config, actor: Actor, groups: Sequence[Group]) -> None:
    """Sample the next tokens of every open rollout: all that it may have, or ``rollout.partial_tokens``."""
    limit, least = actor.sampling.max_new_tokens, actor.sampling.min_new_tokens
    most = config.rollout.partial_tokens or limit
    rows = [(number, group.prompt, s) for number, group in enumerate(groups) for s in group.rollouts]
    calls: dict[Sampling, list[tuple[int, Prompt, Response]]] = {}
    # the ranks may share an engine: each asks it as often as the others, whatever it has
    for had in range(0, limit, most):
        room = min(most, limit - had)
        sampling = replace(actor.sampling, max_new_tokens=room, min_new_tokens=min(room, max(0, least - had)))
        calls.setdefault(sampling, []).extend(row for row in rows if row[2].is_open and row[2].num_sampled == had)
    for sampling, members in calls.items():
        # rollouts of a prompt that have the same tokens so far are samples of one
        alike = [list(same) for _, same in groupby(members, key=lambda row: (row[0], row[2].response_ids))]
        asked = [(same[0][1], [s for _, _, s in same]) for same in alike]
        answers = actor.engine.generate(
            [prompt.prompt_ids + of[0].response_ids for prompt, of in asked], sampling,
            [[s.seed for s in of if s.seed is not None] for _, of in asked], _told_of_whole(actor, sampling, asked),
        )  # fmt: skip
        for (prompt, of), completions in zip(asked, answers, strict=True):
            for s, completion in zip(of, completions, strict=True):
                _add(actor, sampling, prompt, s, completion)


def _add(actor: Actor, sampling: Sampling, prompt: Prompt, s: Response, completion: Completion) -> None:
    """Add what was sampled to an open rollout, and end it unless it goes on."""
    assert s.seed is not None
    drawn, room = len(completion.token_ids), actor.sampling.max_new_tokens - len(s.response_ids)
    new, by_text = _kept(actor, s, completion.token_ids)
    s.extend(new, completion.logprobs[: len(new)], completion.version)
    stopped = by_text or (completion.finish == "stop" and drawn <= room)
    if not stopped and drawn == sampling.max_new_tokens < room:
        s.seed = sample_seed(s.seed, s.num_sampled, "segment", 0)
        return
    s.seed, s.truncated = None, not stopped
    s.text = completion_text(actor.tokenizer, s.response_ids, prompt.opened, actor.sampling.stop)


def _kept(actor: Actor, s: Response, token_ids: list[int]) -> tuple[list[int], bool]:
    """What a rollout takes of new tokens, and whether a stop text ends it that began in those it had."""
    new = _within(actor, s.response_ids, token_ids)[len(s.response_ids) :]
    if not actor.sampling.stop or not s.num_sampled:
        return new, False
    texts = StopTexts(actor.tokenizer, actor.sampling.stop, actor.sampling.min_new_tokens)
    count = texts.cut(s.response_ids[s.prefix_tokens :] + new)
    return (new, False) if count is None else (new[: count - s.num_sampled], True)


def _told_of_whole(actor: Actor, sampling: Sampling, asked: list[tuple[Prompt, list[Response]]]) -> Ended | None:
    """What judges rollouts as they end; not those that a call has only brought to the end of its tokens."""
    judging = judged_early(actor, [(prompt, of[0].response_ids) for prompt, of in asked])
    if judging is None:
        return None

    def ended(place: int, sample: int, token_ids: list[int]) -> None:
        s = asked[place][1][sample]
        new, by_text = _kept(actor, s, token_ids)
        is_full = len(s.response_ids) + len(new) == actor.sampling.max_new_tokens
        if by_text or is_full or len(token_ids) < sampling.max_new_tokens:
            judging(place, sample, new)

    return ended


def demonstration(prompt: Prompt, place: int) -> Response:
    """Return a demonstration of a prompt as a response to it.

    Args:
        prompt: Has more than ``place`` demonstrations.
        place: Which of them, from 0.
    """
    demo = prompt.example.demos[place]
    whole = "" if isinstance(demo, str) else transcript(demo)
    return Response(
        prompt.prompt_ids, prompt.demo_ids[place], is_demo=True, truncated=False, rollout_logprobs=[],
        text=texts_of(demo)[-1], spans=prompt.spans_of(place), transcript=whole,
    )  # fmt: skip


def judge(groups: list[Group], pool: Judge) -> None:
    """Give every rollout that has ended and every demonstration its reward.

    Args:
        groups: Modified in place; what has its reward keeps it, and conversations whose environment hung or died their
            status, with a reward of 0.
        pool: The verifiers; demonstrations are judged like rollouts, so a bad one earns nothing.
    """
    members = [(s, g.prompt.example) for g in groups for s in (*g.rollouts, *g.demos) if s.lacks_verdict]
    results = pool.score([(response.text, example.answer, example.row) for response, example in members])
    for (response, _), result in zip(members, results, strict=True):
        response.reward, response.status, response.message = result.value, result.status, result.message
        response.is_rewarded = True
