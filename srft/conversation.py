"""Conversations: the engine samples a turn of each that goes on, the environment answers, until none does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from srft.config import Config
from srft.data.messages import Message
from srft.data.prompts import Prompt
from srft.data.sampler import sample_seed
from srft.data.templates import PromptFormat, completion_text, opening
from srft.data.turns import heard, refuse_forgetful_template, transcript
from srft.engine.base import Completion, Engine, Sampling
from srft.engine.sampling import prompt_format
from srft.environments.pool import Asked, EnvironmentPool
from srft.policy.parallel import World
from srft.responses import Response


@dataclass(frozen=True)
class Environment:
    """What answers a policy, and how that is put to it.

    Args:
        pool: Answers.
        form: How prompts are put to the policy.
        role: Whose turn it is that answers.
        max_turns: Turns of the policy after which a conversation is cut.
    """

    pool: EnvironmentPool
    form: PromptFormat
    role: str
    max_turns: int


@contextmanager
def environment_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[Environment | None]:
    """Start what answers the policy, or nothing, and yield None, where its rollouts are one turn.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.

    Raises:
        ValueError: On an environment that cannot be loaded, with file and line of what it raises, or a chat template
            that does not keep what was said.
    """
    env = config.env
    if env.name is None:
        yield None
        return
    form = prompt_format(config, tokenizer)
    refuse_forgetful_template(form, env.role)
    with EnvironmentPool(env.name, env.workers, env.deadline_s) as pool:
        pool.prewarm()
        yield Environment(pool, form, env.role, env.max_turns)


@dataclass
class _Talk:
    """A conversation as far as it has come.

    Args:
        key: Tells it from the others.
        prompt: What it is about.
        seed: Of the next turn.
        opened: The thought in which that begins, mostly none.
        response: What has become of it.
        turns: The policy's and the environment's.
        heard: Turns of the policy that the environment was asked about.
    """

    key: int
    prompt: Prompt
    seed: int
    opened: str
    response: Response
    turns: list[Message] = field(default_factory=list)
    heard: int = 0

    @property
    def ids(self) -> list[int]:
        """What the policy reads before its next turn."""
        return self.response.prompt_ids + self.response.response_ids


def converse(
    environment: Environment, engine: Engine, sampling: Sampling, world: World, prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
) -> list[list[Response]]:  # fmt: skip
    """Let the policy answer prompts in as many turns as the environment asks of it; one call of the engine a turn.

    A conversation depends on its seed alone, from which that of every turn is made. It is cut when it is not over with
    ``max_turns``, or with ``sampling.max_new_tokens`` after the prompt, what was said to the policy included.

    Args:
        environment: Answers.
        engine: Holds the policy.
        sampling: How every turn is drawn.
        world: The ranks, which all call this together.
        prompts: This rank's.
        seeds: One list per prompt, a seed for each conversation, in [0, 2**63).

    Returns:
        The conversations of each prompt, with their rewards where the environment judges; those whose environment hung
        or died have its status, and are not judged.

    Raises:
        EngineError: As ``Engine.generate``.
        ValueError: When the environment raises.
    """
    rows = [(prompt, seed) for prompt, of_prompt in zip(prompts, seeds, strict=True) for seed in of_prompt]
    talks = [_Talk(key, prompt, seed, prompt.opened, _nothing_yet(prompt)) for key, (prompt, seed) in enumerate(rows)]
    environment.pool.begin()
    going, limit = talks, sampling.max_new_tokens
    # the ranks may share an engine: each asks it as often as that with the longest conversation
    while room := world.largest(max((limit - len(talk.response.response_ids) for talk in going), default=0)):
        now = replace(sampling, max_new_tokens=room, min_new_tokens=min(room, sampling.min_new_tokens))
        drawn = engine.generate([talk.ids for talk in going], now, [[talk.seed] for talk in going])
        for talk, (completion,) in zip(going, drawn, strict=True):
            _speak(talk, completion, environment, sampling)
        going = _listen([talk for talk in going if not talk.response.truncated], environment, limit)
    for talk in talks:
        _close(talk)
    if environment.pool.judges:
        _judge([talk for talk in talks if talk.response.status == "ok"], environment)
    answers = iter(talk.response for talk in talks)
    return [[next(answers) for _ in of_prompt] for of_prompt in seeds]


def _nothing_yet(prompt: Prompt) -> Response:
    return Response(prompt.prompt_ids, [], is_demo=False, truncated=False, rollout_logprobs=[], text="")


def _speak(talk: _Talk, completion: Completion, environment: Environment, sampling: Sampling) -> None:
    """Add a turn of the policy, as far as there is room for it."""
    s = talk.response
    room = sampling.max_new_tokens - len(s.response_ids)
    said = completion.token_ids[:room]
    s.extend(said, completion.logprobs[:room], completion.version)
    s.spans.append(len(said))
    s.truncated = completion.finish == "length" or len(completion.token_ids) > room
    s.text = completion_text(environment.form.tokenizer, said, talk.opened, sampling.stop)
    talk.turns.append({"role": "assistant", "content": s.text})


def _listen(talks: Sequence[_Talk], environment: Environment, limit: int) -> list[_Talk]:
    """Add what the environment says; the conversations that go on are left."""
    left = []
    for talk in talks:
        talk.heard = len(talk.turns[::2])
    asked = [_asked(talk) for talk in talks]
    for talk, reply in zip(talks, environment.pool.answer(asked), strict=True):
        s, words = talk.response, talk.prompt.example.prompt
        s.status, s.message = reply.status, reply.message
        if reply.said is None:
            continue
        turn: Message = {"role": environment.role, "content": reply.said}
        is_closed = s.response_ids[-1] == environment.form.turn(words).end
        between = heard(environment.form, words, [turn], is_closed=is_closed)
        if len(asked[0].texts) == environment.max_turns or len(s.response_ids) + len(between.ids) >= limit:
            s.truncated = True
            continue
        s.response_ids = s.response_ids + between.ids
        s.spans.append(len(between.ids))
        talk.opened, talk.seed = opening(between.text), sample_seed(talk.seed, len(talk.turns), "turn", 0)
        talk.turns.append(turn)
        left.append(talk)
    return left


def _asked(talk: _Talk) -> Asked:
    example, texts = talk.prompt.example, [turn["content"] for turn in talk.turns[::2]]
    return Asked(talk.key, texts[: talk.heard], example.answer, example.row)


def _judge(talks: Sequence[_Talk], environment: Environment) -> None:
    """Give conversations the reward of their environment, which has heard all turns but one that was cut."""
    for talk, reply in zip(talks, environment.pool.judge([_asked(talk) for talk in talks]), strict=True):
        s = talk.response
        s.status, s.message, s.reward, s.is_rewarded = reply.status, reply.message, reply.reward, True


def _close(talk: _Talk) -> None:
    if len(talk.turns) > 1:
        talk.response.transcript = transcript(talk.turns)
    else:
        talk.response.spans = []
