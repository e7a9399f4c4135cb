"""The turns of a conversation as tokens: each goes on after the tokens of all before, none of which is written anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError

from srft.data.messages import Demo, Message
from srft.data.templates import PromptFormat, continue_prompt, opening

# stand for what is said while a template is asked what it puts between turns
_SAID, _THOUGHT, _HEARD = "srft-said", "srft-thought", "srft-heard"


@dataclass(frozen=True)
class Spoken:
    """A demonstration as tokens.

    Args:
        ids: All of them, up to the token that ends the last turn.
        spans: How many each turn has, as ``Response.spans``; empty: it is one turn.
    """

    ids: list[int]
    spans: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Heard:
    """What was said to the policy between two turns of its own.

    Args:
        ids: Tokens from the end of its turn to where the next one begins.
        text: The same as text.
    """

    ids: list[int]
    text: str


def heard(form: PromptFormat, prompt: str | list[Message], said: Sequence[Message], *, is_closed: bool) -> Heard:
    """Encode what follows a turn of the policy: what is said to it, in the chat template's frame, up to its next turn.

    Without a template what is said stands as it is.

    Args:
        form: How prompts are put to the policy.
        prompt: That of the conversation.
        said: Turns of others, at least one.
        is_closed: Whether the policy's turn has the token that ends it; else that comes first.

    Raises:
        ValueError: When the template refuses these turns, or a prompt without one has no end token.
    """
    frame = form.turn(prompt)
    end = str(form.tokenizer.convert_ids_to_tokens(frame.end))
    if form.uses_template(prompt):
        after = _rendered(form, [_SAID], [said]).partition(_SAID)[2]
        # of what a template puts behind a turn only the end itself is a token that the policy draws
        text = after.partition(end)[2] if is_closed else after
        return Heard(list(form.tokenizer.encode(text, add_special_tokens=False)), text)
    text = "\n".join(turn["content"] for turn in said)
    ids = list(form.tokenizer.encode(text, add_special_tokens=False)) if text else []
    return Heard(ids if is_closed else [frame.end, *ids], text)


def demonstrated(
    form: PromptFormat, prompt_text: str, prompt: str | list[Message], demo: Sequence[Message], counts: Counter[str]
) -> Spoken:
    """Encode a demonstration of several turns as a rollout would have them.

    Args:
        form: How prompts are put to the policy.
        prompt_text: From ``PromptFormat.render``.
        prompt: That of the conversation.
        demo: Its turns, the first and the last of which are the assistant's.
        counts: Takes "closed_thoughts" and "dropped_thoughts", see ``templates.continue_prompt``.

    Raises:
        ValueError: As ``heard``.
    """
    frame, before = form.turn(prompt), prompt_text
    ids: list[int] = []
    spans: list[int] = []
    said: list[Message] = []
    for turn in demo:
        if turn["role"] != "assistant":
            said.append(turn)
            continue
        if said:
            between = heard(form, prompt, said, is_closed=True)
            ids, spans, before, said = ids + between.ids, [*spans, len(between.ids)], between.text, []
        body, change = continue_prompt(before, turn["content"])
        counts.update([f"{change}_thoughts"] if change else [])
        text = f"{frame.head}{body}{frame.tail}"
        own = closed(list(form.tokenizer.encode(text, add_special_tokens=False)) if text else [], frame.end)
        ids, spans = ids + own, [*spans, len(own)]
    return Spoken(ids, spans)


def closed(ids: list[int], end: int) -> list[int]:
    """Return the tokens of a turn with one end token, also where its text spells it out.

    Args:
        ids: Its tokens.
        end: The one that ends a turn.
    """
    return ids if ids[-1:] == [end] else [*ids, end]


def transcript(turns: Sequence[Message]) -> str:
    """Return a conversation as people read it: every turn but the first begins with whose it is.

    Args:
        turns: The first is the policy's.
    """
    return "\n".join(f"[{turn['role']}] {turn['content']}" if i else turn["content"] for i, turn in enumerate(turns))


def refuse_other_roles(demos: Iterable[tuple[str, Demo]], role: str) -> None:
    """Check that demonstrations are answered by the one who answers rollouts, as a template tells these apart.

    Args:
        demos: With the id of their example.
        role: Whose turns answer the policy.

    Raises:
        ValueError: Naming the first that are not.
    """
    for name, demo in demos:
        if isinstance(demo, str):
            continue
        if other := {turn["role"] for turn in demo} - {"assistant", role}:
            raise ValueError(
                f"env.role={role}, but a demonstration of {name} has turns of {', '.join(sorted(other))} between those "
                "of the assistant; set env.role to that, or mend the rows"
            )


def refuse_forgetful_template(form: PromptFormat, role: str) -> None:
    """Check that a chat template shows every turn of a conversation as it was when it was the last one.

    A policy reads what it said, token by token, and would be trained on another conversation than it is asked to go on
    with where the template leaves out thoughts, or strips or moves what stands before.

    Args:
        form: How prompts are put to the policy.
        role: Whose turns answer it.

    Raises:
        ValueError: When it does not, when it refuses such turns, or when no token of its own ends a turn.
    """
    user: Message = {"role": "user", "content": "?"}
    if not form.uses_template([user]) or form.tokenizer.chat_template is None:
        return
    frame = form.chat_turn
    if frame is None:
        raise ValueError(
            "no token of its own ends an assistant's turn in the chat template, so that turns cannot be told "
            "apart; set model.chat_template to one that has such a token"
        )
    end = str(form.tokenizer.convert_ids_to_tokens(frame.end))
    prompt = form.render("env.name", [user])
    opened, answer = opening(prompt), [{"role": role, "content": _HEARD}]
    thinks = f"<think>\n{_THOUGHT}\n</think>\n\n{_SAID}"
    for text in [thinks] * ("think" in str(form.tokenizer.get_chat_template())) + [_SAID] * (not opened):
        body, _ = continue_prompt(prompt, text)
        so_far = f"{prompt}{frame.head}{body}{frame.tail}{end}"
        for turns in (1, 2):
            whole = _rendered(form, [text] * turns, [answer] * turns)
            if not whole.startswith(so_far):
                after = _common(whole, so_far)
                raise ValueError(
                    f"with turns of {role} the chat template does not leave earlier ones as they were: "
                    f"where it had {so_far[max(0, after - 20) : after + 40]!r} it has "
                    f"{whole[max(0, after - 20) : after + 40]!r} once the conversation goes on; take turns of "
                    f"{'tool' if role == 'user' else 'user'} (env.role), or set model.chat_template to another"
                )
            so_far = f"{whole}{frame.head}{continue_prompt(whole, text)[0]}{frame.tail}{end}"


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rendered(form: PromptFormat, own: Sequence[str], said: Sequence[Sequence[Message]]) -> str:
    """A conversation of these turns of the assistant, each followed by others, as text up to where the next begins."""
    turns: list[Message] = [{"role": "user", "content": "?"}]
    for text, others in zip(own, said, strict=True):
        turns += [{"role": "assistant", "content": text}, *others]
    try:
        return form.render("env.name", turns)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses turns of this role: {error}") from error
