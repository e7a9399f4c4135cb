"""Examples as text and tokens: chat templates, thoughts that a template opens, and what ends a completion."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from srft.data.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "<think>", "</think>"
_ENDS_OPEN = re.compile(rf"{_OPEN}(\s*)\Z")
_ENDS_CLOSED = re.compile(rf"{_OPEN}\s*{_CLOSE}\s*\Z")
# stands for the assistant's text while a template is asked what it puts around it
_PROBE = "srft-probe"


@dataclass(frozen=True)
class Turn:
    """What surrounds the text of an assistant's turn after a prompt.

    Args:
        head: Text before it, such as a space or a channel's name; mostly empty.
        tail: White space between it and the end token; mostly empty.
        end: The token that ends the turn.
    """

    head: str
    tail: str
    end: int


@dataclass(frozen=True)
class PromptFormat:
    """How prompts and demonstrations are put to a policy.

    Args:
        tokenizer: Owner of the chat template; encodes a template's text as it stands, gives plain text its start
            token, if it has one.
        system: System turn, replacing one in the messages; plain text follows it after an empty line.
        chat: Whether to put text through the chat template, where there is one. Messages always are; without a
            template those of one user turn are taken as plain text.
        template_kwargs: What the template takes beside the messages, such as {"enable_thinking": False}.

    Raises:
        ValueError: For a name in ``template_kwargs`` that the template does not use.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    chat: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.template_kwargs:
            return
        if self._template is None:
            raise ValueError(
                f"data.chat_template_kwargs={self.template_kwargs}, but the tokenizer has no chat template; unset it"
            )
        taken = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        for name in self.template_kwargs:
            if name in taken:
                raise ValueError(f"data.chat_template_kwargs.{name} is set by the trainer; unset it")
            if not re.search(rf"\b{re.escape(name)}\b", self._template):
                raise ValueError(f"the chat template does not use data.chat_template_kwargs.{name}; check its name")

    @cached_property
    def _template(self) -> str | None:
        return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None

    def uses_template(self, prompt: str | list[Message]) -> bool:
        """Whether a prompt goes through the chat template.

        Args:
            prompt: Text or messages.
        """
        return self._template is not None and (self.chat or not isinstance(prompt, str))

    def render(self, name: str, prompt: str | list[Message]) -> str:
        """Return the text that a completion continues.

        Args:
            name: The example's id, for errors.
            prompt: Text or messages.

        Raises:
            ValueError: When the template refuses the messages, or several turns meet a tokenizer without template.
        """
        if self.uses_template(prompt):
            turns = [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt
            if self.system is not None:
                turns = [{"role": "system", "content": self.system}, *(t for t in turns if t["role"] != "system")]
            try:
                return self._apply(turns, True)
            except (TemplateError, TypeError) as error:
                roles = ", ".join(turn["role"] for turn in turns)
                raise ValueError(f"{name}: the chat template refuses turns of {roles}: {error}") from error
        system, text = self.system, prompt
        if not isinstance(prompt, str):
            spoken = [turn for turn in prompt if turn["role"] != "system"]
            if [turn["role"] for turn in spoken] != ["user"]:
                raise ValueError(
                    f"{name} is a conversation of several turns and the tokenizer has no chat template; give it one, "
                    "or map data.columns.prompt to a text column"
                )
            own = [turn["content"] for turn in prompt if turn["role"] == "system"]
            system = "\n\n".join(own) if system is None and own else system
            # a turn needs an end before plain text can go on with the answer
            text = spoken[0]["content"].rstrip() + "\n"
        return str(text) if system is None else f"{system}\n\n{text}"

    def encode(self, text: str, prompt: str | list[Message]) -> list[int]:
        """Return the token ids of a rendered prompt.

        Args:
            text: From :meth:`render`.
            prompt: What was rendered.
        """
        tokenizer = self.tokenizer
        if self.uses_template(prompt):
            return list(tokenizer.encode(text, add_special_tokens=False))
        ids = list(tokenizer.encode(text, add_special_tokens=True))
        # some tokenizers close every text with their end token; a prompt stays open
        bare = tokenizer.encode(text, add_special_tokens=False)
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id and bare[-1:] != ids[-1:] else ids

    def turn(self, prompt: str | list[Message]) -> Turn:
        """Return what surrounds a demonstration after a prompt.

        Args:
            prompt: Text or messages.

        Raises:
            ValueError: When neither the template nor the tokenizer names an end token.
        """
        turn = self.chat_turn if self.uses_template(prompt) else None
        if turn is None and self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        return turn or Turn("", "", self.tokenizer.eos_token_id)

    @cached_property
    def chat_turn(self) -> Turn | None:
        """What the chat template puts around an assistant's text; None if no token of its own ends the turn."""
        if self._template is None:
            return None
        user = {"role": "user", "content": "?"}
        try:
            opened = self._apply([user], True)
            whole = self._apply([user, {"role": "assistant", "content": _PROBE}], False)
        except (TemplateError, TypeError):
            # some templates hold a single user turn
            return None
        before, found, after = whole.rpartition(_PROBE)
        added = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        end = next((i for i in self.tokenizer.encode(after, add_special_tokens=False) if i in added), None)
        if not found or end is None:
            return None
        tail = after.partition(str(self.tokenizer.convert_ids_to_tokens(end)))[0]
        head = before.removeprefix(opened) if before.startswith(opened) else ""
        # a thought belongs to the demonstration, not to the frame around it
        return Turn("" if _CLOSE in head else head, "" if tail.strip() else tail, end)

    def _apply(self, turns: list[Message], open_next: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=open_next, tokenize=False, **self.template_kwargs
            )
        )


def opening(prompt_text: str) -> str:
    """Return the "<think>" with which a prompt ends and the white space after it, else nothing.

    A completion goes on inside the thought, so that whoever judges it must see it opened.

    Args:
        prompt_text: From ``PromptFormat.render``.
    """
    found = _ENDS_OPEN.search(prompt_text)
    return found[0] if found else ""


def continue_prompt(prompt_text: str, demo: str) -> tuple[str, Literal["", "closed", "dropped"]]:
    """Return a demonstration as it goes on after a prompt, and what became of its thought.

    Args:
        prompt_text: From ``PromptFormat.render``.
        demo: The demonstration; a thought in it stands between "<think>" and "</think>".

    Returns:
        (text, change). After a prompt that opens a thought, the demonstration's own is not opened again; one without
        a thought closes it empty ("closed"). After a prompt with a closed thought, the demonstration's is left out
        ("dropped").
    """
    bare = demo.lstrip()
    thinks = bare.startswith(_OPEN)
    if found := _ENDS_OPEN.search(prompt_text):
        if thinks:
            return bare.removeprefix(_OPEN).removeprefix(found[1]), ""
        if _CLOSE in demo:
            return demo, ""
        return f"{'' if found[1].endswith(chr(10)) else chr(10)}\n{_CLOSE}\n\n{demo}", "closed"
    if thinks and _CLOSE in bare and _ENDS_CLOSED.search(prompt_text):
        return bare.rpartition(_CLOSE)[2].lstrip(), "dropped"
    return demo, ""


@lru_cache(maxsize=8)
def hidden_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], bool]:
    """Return the special tokens that are no part of a text, and whether there are others: those of a thought.

    Args:
        tokenizer: Any.
    """
    special = {i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids}
    hidden = frozenset(i for i, token in special.items() if token not in (_OPEN, _CLOSE))
    return hidden, len(hidden) < len(special)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of a completion without special tokens, "<think>" and "</think>" kept even where they are such.

    Args:
        tokenizer: The policy's.
        token_ids: Its tokens.
    """
    hidden, some_kept = hidden_ids(tokenizer)
    if not some_kept:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    return str(tokenizer.decode([i for i in token_ids if i not in hidden], skip_special_tokens=False))


def completion_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], opened: str, stop: Sequence[str]
) -> str:
    """Return what a verifier judges: the thought that the prompt opened, the completion, nothing after a stop text.

    Args:
        tokenizer: The policy's.
        token_ids: The completion's tokens.
        opened: ``opening`` of the prompt.
        stop: Texts that end a completion and stay in it.
    """
    text = decode(tokenizer, token_ids)
    ends = [text.index(words) + len(words) for words in stop if words in text]
    return opened + (text[: min(ends)] if ends else text)


def stop_token_ids(form: PromptFormat, eos: int | Sequence[int] | None, stop: Sequence[str]) -> tuple[int, ...]:
    """Return every token that ends a completion.

    Args:
        form: Gives the end tokens of its tokenizer and of its chat template.
        eos: ``eos_token_id`` of the model's generation_config: one, several or none.
        stop: Texts that end a completion; one that is a token added to the vocabulary counts here.
    """
    tokenizer = form.tokenizer
    found = [eos] if isinstance(eos, int) else list(eos or [])
    found += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    found += [form.chat_turn.end] if form.chat_turn is not None else []
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return tuple(sorted({*found, *(added[words] for words in stop if words in added)}))
