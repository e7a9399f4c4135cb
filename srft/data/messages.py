"""Conversations in the forms people store them, and the prompt and the demonstration that one of them holds."""

from __future__ import annotations

import ast
import itertools
import json
import re
from typing import Any

Message = dict[str, str]
Demo = str | list[Message]
"""A demonstration: a text, or the turns of a conversation, the first and the last of which are the assistant's."""

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool",
}  # fmt: skip
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_STORED_KEYS = [re.compile(rf"""["'](?:{words})["']\s*:""") for words in ("role|from", "content|value")]


def is_missing(value: Any) -> bool:
    """Whether a field says nothing: null, NaN, blank text or an empty list.

    Args:
        value: Any field of a row.
    """
    nan = isinstance(value, float) and value != value
    return value is None or nan or value == [] or (isinstance(value, str) and not value.strip())


def split_conversation(value: Any, place: str) -> tuple[list[Message], str | None] | None:
    """Return the turns before the assistant's last one, and the text of that one; None if it is no conversation.

    Args:
        value: A list of messages, one message, or either as JSON; keys "role" or "from", "content" or "value".
        place: Where the row stands, for errors.

    Returns:
        (turns, answer): ``answer`` is None when the conversation does not end with the assistant.

    Raises:
        ValueError: For a message without a known role or without text, for messages as text that is not JSON, and
            when the assistant ends the conversation with several turns in a row.
    """
    turns = _unpack(value, place)
    if turns is None:
        return None
    messages = [_message(turn, place) for turn in turns]
    if not messages or messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise ValueError(f"{place}: the assistant has two turns in a row at the end; join them or remove one")
    return messages[:-1], _with_thought(turns[-1], messages[-1]["content"])


def split_turns(value: Any, place: str) -> tuple[list[Message], list[Message]] | None:
    """Return the turns before the assistant's first one, and all from that to the end; None if it is no conversation.

    Args:
        value: As for ``split_conversation``.
        place: Where the row stands, for errors.

    Returns:
        (turns, answered): of a conversation that does not end with the assistant all turns are before, and ``answered``
        is empty.

    Raises:
        ValueError: As ``split_conversation``, of two turns in a row wherever they are answered.
    """
    turns = _unpack(value, place)
    if turns is None:
        return None
    messages = [_message(turn, place) for turn in turns]
    if not messages or messages[-1]["role"] != "assistant":
        return messages, []
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    answered = messages[first:]
    if any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(answered)):
        raise ValueError(f"{place}: the assistant has two turns in a row; join them or remove one")
    for turn, message in zip(turns[first:], answered, strict=True):
        if message["role"] == "assistant":
            message["content"] = _with_thought(turn, message["content"])
    return messages[:first], answered


def _with_thought(turn: dict[str, Any], text: str) -> str:
    """A text with the thought that a message has beside it."""
    thought = next((turn[key] for key in _THOUGHT_KEYS if not is_missing(turn.get(key))), None)
    if isinstance(thought, str) and "<think>" not in text:
        return f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    return text


def texts_of(demo: Demo) -> list[str]:
    """Return what the assistant says in a demonstration, turn by turn.

    Args:
        demo: A demonstration.
    """
    return [demo] if isinstance(demo, str) else [turn["content"] for turn in demo if turn["role"] == "assistant"]


def _unpack(value: Any, place: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and _looks_stored(value.strip()):
        value = _parse(value, place)
    if isinstance(value, dict) and any(key in value for key in _ROLE_KEYS):
        columns = list(value.values())
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            # the datasets library turns a list of messages into one list for each of their fields
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
        else:
            value = [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value):
        return list(value)
    return None


def _looks_stored(text: str) -> bool:
    """Whether text is a list of messages, or one, as JSON or Python's own print writes it."""
    return text[:1] in ("[", "{") and text[-1:] in ("]", "}") and all(key.search(text) for key in _STORED_KEYS)


def _parse(text: str, place: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(
        f"{place}: a list of messages stored as text that is neither JSON nor a Python list: {text[:60]!r}; "
        "store it as JSON"
    )


def _message(turn: dict[str, Any], place: str) -> Message:
    said = next((turn[key] for key in _ROLE_KEYS if turn.get(key) is not None), None)
    role = _ROLES.get(str(said).strip().lower())
    if role is None:
        known = ", ".join(sorted(_ROLES))
        raise ValueError(f"{place}: a message has the role {said!r}; expected one of {known} under role or from")
    text = next((turn[key] for key in _TEXT_KEYS if turn.get(key) is not None), None)
    if isinstance(text, (list, tuple)):
        text = _joined(text, place)
    if not isinstance(text, str):
        raise ValueError(f"{place}: a message of {role} has no text under content or value, got {str(text)[:60]!r}")
    return {"role": role, "content": text}


def _joined(parts: Any, place: str) -> str:
    """Text of a message that is a list of parts, as multimodal APIs write it."""
    other = [part for part in parts if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
    if other:
        raise ValueError(f"{place}: a message has a part that is not text: {str(other[0])[:60]!r}")
    return "".join(part["text"] for part in parts)
