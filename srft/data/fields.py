"""From a row to prompt, answer and demonstrations: where they stand in it, and what they must be."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from srft.data.columns import Row, has_column, lookup
from srft.data.messages import Demo, Message, is_missing, split_conversation, split_turns
from srft.data.schemas import Column, Schema

# what OpenR1-Math says of each of its generations
_CORRECT = {"generations": "correctness_math_verify"}


def map_columns(
    source: str, row: Row, schema: Schema, given: dict[str, str], *, use_demo: bool = True, require_demo: bool = False
) -> dict[str, str]:
    """Return where prompt, answer and demonstrations stand; the given map wins over the layout.

    Args:
        source: Named in errors.
        row: From :func:`srft.data.columns.merged`.
        schema: Its layout.
        given: The user's column map.
        use_demo: Whether demonstrations are read at all; without them there is no "demo" in the result.
        require_demo: Whether a missing demonstration column is an error.

    Raises:
        ValueError: Naming the column that is missing, those present, the nearest, and the option to set.
    """
    if unknown := set(given) - {"prompt", "answer", "demo"}:
        raise ValueError(f"data.columns knows prompt, answer and demo, not {sorted(unknown)}")
    found = {"prompt": schema.prompt.name, "answer": schema.answer.name} | given
    if "demo" not in given:
        known = [column.name for column in schema.demos]
        found["demo"] = next((path for path in known if has_column(row, path)), known[0])
        if not has_column(row, found["demo"]) and _ends_answered(row, found["prompt"]):
            found["demo"] = found["prompt"]
    if not use_demo:
        del found["demo"]
    present = [
        *row,
        *(f"{key}.{inner}" for key, value in row.items() if isinstance(value, dict) for inner in value),
    ]
    for role, path in found.items():
        if has_column(row, path):
            continue
        if role == "demo" and role not in given and not require_demo:
            continue
        near = difflib.get_close_matches(path, present, n=1, cutoff=0.5)
        hint = f"; nearest: {near[0]!r}" if near else ""
        example = near[0] if near else "<column>"
        raise ValueError(
            f"{source} has no column {path!r} for the {role}{hint}; columns present: {', '.join(present)}; "
            f"set data.columns.{role}={example}"
        )
    return found


def _ends_answered(row: Row, column: str) -> bool:
    try:
        halves = split_conversation(lookup(row, column), "")
    except (KeyError, ValueError):
        # no such column, or a fault that is named where its row is read
        return False
    return halves is not None and halves[1] is not None


def read_fields(
    place: str, row: Row, columns: dict[str, str], schema: Schema, *, turns: bool = False
) -> tuple[str | list[Message], Any, list[Demo]]:
    """Return prompt, answer and demonstrations of a row; a layout reads its own columns in its own way.

    Args:
        place: Where the row stands, for errors.
        row: The row.
        columns: From :func:`map_columns`.
        schema: Its layout.
        turns: Whether a conversation is answered from the assistant's first turn on, rather than by its last.

    Raises:
        ValueError: On a missing or empty prompt or answer, a field of the wrong type, or text that is none.
    """
    if missing := [path for role, path in columns.items() if role != "demo" and not has_column(row, path)]:
        raise ValueError(f"{place}: no column {missing[0]!r} in this row")
    prompt = _read_prompt(place, row, columns["prompt"], schema.prompt, turns)
    answer = _value(place, "answer", row, columns["answer"], schema.answer)
    if is_missing(answer):
        raise ValueError(f"{place}: no answer in column {columns['answer']!r}")
    demos = _read_demos(place, row, columns, schema, turns) if "demo" in columns else []
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    for role, said in (("prompt", texts), ("answer", [answer]), ("demonstration", demos)):
        for one in said:
            turns_of = [turn["content"] for turn in one] if role == "demonstration" and isinstance(one, list) else [one]
            for text in turns_of:
                _check_text(place, role, text)
    return prompt, answer, demos


def _value(place: str, role: str, row: Row, column: str, known: Column) -> Any:
    """What stands in a column, bytes as text, as the layout reads it."""
    value = lookup(row, column)
    return _as_read(place, row, column, _decoded(place, role, value) if isinstance(value, bytes) else value, known)


def _as_read(place: str, row: Row, column: str, value: Any, *known: Column) -> Any:
    """What the layout makes of a value if the column is one of its own; another's stands as it is."""
    own = next((candidate for candidate in known if candidate.name == column), None)
    if own is None or own.read is None:
        return value
    try:
        return own.read(value, row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _read_prompt(place: str, row: Row, column: str, known: Column, until_first: bool) -> str | list[Message]:
    prompt = _value(place, "prompt", row, column, known)
    split = split_turns if until_first else split_conversation
    if (halves := split(prompt, place)) is not None:
        turns, answered = halves
        if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns):
            before = " before the assistant's" if answered else ""
            raise ValueError(f"{place}: the messages in column {column!r} have no user turn{before}")
        beside = row.get("system")
        if isinstance(beside, str) and beside.strip() and turns[0]["role"] != "system":
            # ShareGPT files may keep the system turn in a column of its own
            turns = [{"role": "system", "content": beside}, *turns]
        return turns
    if not isinstance(prompt, str) or is_missing(prompt):
        seen = str(prompt)[:80]
        raise ValueError(f"{place}: the prompt must be text or messages with role and content, got {seen!r}")
    # a question needs an end before plain text can go on with its solution
    return prompt.rstrip() + "\n" if column in ("question", "problem") else prompt


def _read_demos(place: str, row: Row, columns: dict[str, str], schema: Schema, turns: bool) -> list[Demo]:
    column, after_prompt = columns["demo"], columns["demo"] != columns["prompt"]
    if not has_column(row, column):
        return []
    value = lookup(row, column)
    several = isinstance(value, (list, tuple)) and not all(isinstance(item, dict) for item in value)
    items: Sequence[Any] = value if several else [value]
    flags = row.get(_CORRECT.get(column, ""))
    if several and isinstance(flags, (list, tuple)) and len(flags) == len(items):
        items = [item for item, correct in zip(items, flags, strict=True) if correct is not False]
    demos: list[Demo] = []
    for item in items:
        halves = split_turns(_as_turns(item), place) if turns else None
        if halves is not None and len(halves[1]) > 1:
            demos.append(halves[1])
        elif (text := _demo_text(place, item, after_prompt)) is not None:
            demos.append(_as_read(place, row, column, text, *schema.demos))
    return [demo for i, demo in enumerate(demos) if demo not in demos[:i]]


def _as_turns(value: Any) -> Any:
    """A completion of one turn need not say whose it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and not value[0].keys() & {"role", "from"}:
        return [{"role": "assistant", **value[0]}, *value[1:]]
    return value


def _demo_text(place: str, value: Any, after_prompt: bool) -> str | None:
    """One demonstration: text, or the assistant's last turn of a conversation that ends with it.

    ``after_prompt`` says that it follows a prompt of another column, so that no other turn may come between.
    """
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        value = _decoded(place, "demonstration", value)
    value = _as_turns(value)
    if (halves := split_conversation(value, place)) is not None:
        if after_prompt and any(turn["role"] == "assistant" for turn in halves[0]):
            raise ValueError(
                f"{place}: the demonstration has several turns of the assistant, of which only the last would follow "
                "the prompt; map data.columns.prompt to the same conversation"
            )
        value = halves[1]
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{place}: the demonstration must be text or messages, got {type(value).__name__}")
    return value


def _decoded(place: str, role: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: the {role} is bytes that are not UTF-8 ({error.reason})") from error


def _check_text(place: str, role: str, text: Any) -> None:
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        half = str(text)[error.start]
        raise ValueError(
            f"{place}: the {role} holds half of a surrogate pair ({half!a}), which is no character; repair the file, "
            "or drop such rows by data.bad_rows=skip"
        ) from error
