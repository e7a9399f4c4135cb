"""Prompts: examples as the tokens that a policy reads, and their demonstrations as the tokens that it would write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from srft.data.examples import Example
from srft.data.messages import Message
from srft.data.templates import PromptFormat, continue_prompt, opening
from srft.data.turns import Spoken, closed, demonstrated


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Args:
        example: Where it comes from.
        prompt_ids: Tokens up to where the completion starts.
        demo_ids: Each of the example's demonstrations, ending in the token that ends a turn.
        opened: The "<think>" with which the prompt ends, which belongs to the completion's text; mostly empty.
        demo_spans: Of each demonstration, tokens of its turns as ``Response.spans`` has them; empty where none is
            a conversation.
    """

    example: Example
    prompt_ids: list[int]
    demo_ids: list[list[int]]
    opened: str = ""
    demo_spans: list[list[int]] = field(default_factory=list)

    def spans_of(self, place: int) -> list[int]:
        """Return the tokens of each turn of a demonstration, empty where it is no conversation.

        Args:
            place: Which of them, from 0.
        """
        return self.demo_spans[place] if self.demo_spans else []


def build_prompts(
    examples: Sequence[Example],
    form: PromptFormat,
    *,
    max_prompt_tokens: int,
    max_demo_tokens: int | None,
    overlong: Literal["error", "skip"] = "error",
    needs_demo: bool = True,
) -> tuple[list[Prompt], Counter[str]]:
    """Encode examples; nothing is ever cut.

    Args:
        examples: At least one.
        form: How they are put to the policy.
        max_prompt_tokens: Longest prompt kept, in tokens.
        max_demo_tokens: Longest demonstration kept, in tokens, the end token included: the completion limit.
            None leaves demonstrations out.
        overlong: What an example over a limit does: "error" or "skip". Of several demonstrations those over the limit
            are skipped, and the example once none is left.
        needs_demo: Whether an example is overlong once none of its demonstrations is left; else it is kept without.

    Returns:
        (prompts, counts): counts has "overlong_prompts", examples left out; "overlong_demos", demonstrations left out,
        those of an overlong prompt aside; "closed_thoughts" and "dropped_thoughts", see ``templates.continue_prompt``;
        "plain_messages", prompts of messages without a template to put them through.

    Raises:
        ValueError: With ``overlong="error"`` when any example is over a limit; when none is left; without an
            end token.
    """
    texts = [form.render(example.id, example.prompt) for example in examples]
    frames = [form.turn(example.prompt) for example in examples]
    counts: Counter[str] = Counter(overlong_prompts=0, overlong_demos=0)
    counts["plain_messages"] = sum(isinstance(e.prompt, list) and not form.uses_template(e.prompt) for e in examples)
    bodies: list[str] = []
    for example, text, frame in zip(examples, texts, frames, strict=True):
        for demo in example.demos if max_demo_tokens is not None else []:
            if not isinstance(demo, str):
                continue
            body, change = continue_prompt(text, demo)
            if change:
                counts[f"{change}_thoughts"] += 1
            bodies.append(f"{frame.head}{body}{frame.tail}")
    # one call, which fast tokenizers spread over the cores: these can be hundreds of millions of tokens
    encoded = iter(form.tokenizer(bodies, add_special_tokens=False)["input_ids"] if bodies else [])
    built: list[Prompt] = []
    longest = {"prompt": 0, "demo": 0}
    for example, text, frame in zip(examples, texts, frames, strict=True):
        prompt_ids = form.encode(text, example.prompt)
        shown = example.demos if max_demo_tokens is not None else []
        spoken = [
            Spoken(closed(next(encoded), frame.end)) if isinstance(demo, str)
            else demonstrated(form, text, example.prompt, demo, counts) for demo in shown
        ]  # fmt: skip
        demo_ids = [one.ids for one in spoken]
        longest["prompt"] = max(longest["prompt"], len(prompt_ids))
        longest["demo"] = max(longest["demo"], *map(len, demo_ids), 0)
        if len(prompt_ids) > max_prompt_tokens:
            counts["overlong_prompts"] += 1
            continue
        fits = [i for i, ids in enumerate(demo_ids) if max_demo_tokens is None or len(ids) <= max_demo_tokens]
        counts["overlong_demos"] += len(shown) - len(fits)
        if shown and not fits and needs_demo:
            continue
        kept = replace(example, demos=[shown[i] for i in fits]) if len(fits) < len(example.demos) else example
        spans = [spoken[i].spans for i in fits]
        built.append(Prompt(kept, prompt_ids, [demo_ids[i] for i in fits], opening(text), spans if any(spans) else []))
    too_long = counts["overlong_prompts"] + needs_demo * counts["overlong_demos"]
    if not built or (overlong == "error" and too_long):
        raise ValueError(
            f"{counts['overlong_prompts']} of {len(examples)} examples have a prompt over "
            f"{max_prompt_tokens} tokens (longest {longest['prompt']}) and {counts['overlong_demos']} a "
            f"demonstration over {max_demo_tokens} (longest {longest['demo']}); raise "
            "data.max_prompt_tokens or rollout.max_new_tokens, or set data.overlong=skip"
        )
    return built, counts


def with_demo(
    prompt: Prompt, place: int, form: PromptFormat, show: Callable[[str, str, bool], str]
) -> list[int]:
    """Return the tokens of a prompt into which one of its demonstrations is put.

    Args:
        prompt: Has more than ``place`` demonstrations.
        place: Which of them, from 0.
        form: How it is put to the policy.
        show: Called as show(text, demonstration, is_chat) with the text of the prompt, of a conversation that of the
            user's last turn; returns what stands in its place.
    """
    example, demo = prompt.example, prompt.example.demos[place]
    assert isinstance(demo, str), "options refuse conversations"
    words, is_chat = example.prompt, form.uses_template(example.prompt)
    if isinstance(words, str):
        # a template strips what stands around the user's words
        changed: str | list[Message] = show(words.strip() if is_chat else words, demo, is_chat)
    else:
        last = max(i for i, turn in enumerate(words) if turn["role"] == "user")
        changed = [*words]
        changed[last] = {**words[last], "content": show(words[last]["content"], demo, is_chat)}
    return form.encode(form.render(example.id, changed), changed)
