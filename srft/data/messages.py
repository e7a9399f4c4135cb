"""Conversations in the forms people store them, and the prompt and the demonstration that one of them holds."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

Message = dict[str, str]

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
    thought = next((turns[-1][key] for key in _THOUGHT_KEYS if not is_missing(turns[-1].get(key))), None)
    text = messages[-1]["content"]
    if isinstance(thought, str) and "<think>" not in text:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    return messages[:-1], text


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
