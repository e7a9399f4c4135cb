"""Known layouts of a row: the columns that give one away, and where prompt, answer and demonstrations stand in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from srft.data.messages import Message, is_missing, split_conversation


@dataclass(frozen=True)
class Schema:
    """A layout.

    Args:
        signs: Columns that give it away.
        prompt: Column of the prompt.
        answer: Column of the ground truth.
        demo: Columns that may hold demonstrations; the first that is there counts.
    """

    signs: tuple[str, ...]
    prompt: str
    answer: str
    demo: tuple[str, ...]


SCHEMAS: dict[str, Schema] = {
    # verl's layout; OpenR1-Math and LUFFY keep worked answers in target, verl's GSM8K in extra_info
    "openr1": Schema(
        ("prompt", "reward_model.ground_truth"), "prompt", "reward_model.ground_truth", ("target", "extra_info.answer")
    ),
    "countdown": Schema(("nums", "target"), "nums", "target", ("solution",)),
    "gsm8k": Schema(("question", "answer"), "question", "answer", ("answer",)),
    "math": Schema(("problem", "answer"), "problem", "answer", ("solution",)),
    "prompt_answer": Schema(("prompt", "answer"), "prompt", "answer", ("demo", "completion")),
    "question_answer": Schema(("question", "answer"), "question", "answer", ("demo", "completion")),
    "messages": Schema(("messages", "answer"), "messages", "answer", ("messages",)),
    "conversations": Schema(("conversations", "answer"), "conversations", "answer", ("conversations",)),
}
_ANY = Schema((), "prompt", "answer", ("demo", "completion"))
_GENERATED = Schema((), "question", "answer", ("answer",))
# what OpenR1-Math says of each of its generations
_CORRECT = {"generations": "correctness_math_verify"}
_NUMBER = re.compile(r"[-+$]*[\d,]*\.?\d+%?")


def lookup(row: dict[str, Any], path: str) -> Any:
    """Return the value at a column name or a dotted path.

    Args:
        row: A row of the source.
        path: Column name, dots reaching into nested fields.

    Raises:
        KeyError: If there is none.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(path)
        value = value[part]
    return value


def has_column(row: dict[str, Any], path: str) -> bool:
    """Whether a row has a value at a column name or a dotted path.

    Args:
        row: A row of the source.
        path: As in :func:`lookup`.
    """
    try:
        lookup(row, path)
    except KeyError:
        return False
    return True


def detect_schema(row: dict[str, Any]) -> str | None:
    """Name the known schema that a row's columns (for GSM8K also the "#### " in its answer) fit, or None.

    Args:
        row: Any row of the source, or several merged by :func:`merged`.
    """
    for name, schema in SCHEMAS.items():
        if all(has_column(row, column) for column in schema.signs):
            if name == "gsm8k" and "#### " not in str(row["answer"]):
                continue
            return name
    return None


def merged(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return one row that has every column of these, each with the first value that says something.

    Args:
        rows: Rows that may lack a column, or have null in it.
    """
    whole: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            have = whole.get(key)
            if isinstance(have, dict) and isinstance(value, dict):
                whole[key] = merged([have, value])
            elif key not in whole or (is_missing(have) and not is_missing(value)):
                whole[key] = value
    return whole


def map_columns(
    source: str, row: dict[str, Any], schema: str | None, given: dict[str, str], *, generated: bool = False,
    use_demo: bool = True, require_demo: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Return where prompt, answer and demonstrations stand; the given map wins over the schema.

    Args:
        source: Named in errors.
        row: From :func:`merged`.
        schema: Its known schema, or None.
        given: The user's column map.
        generated: Whether reasoning-gym made the rows.
        use_demo: Whether demonstrations are read at all; without them there is no "demo" in the result.
        require_demo: Whether a missing demonstration column is an error.

    Raises:
        ValueError: Naming the column that is missing, those present, the nearest, and the option to set.
    """
    if unknown := set(given) - {"prompt", "answer", "demo"}:
        raise ValueError(f"data.columns knows prompt, answer and demo, not {sorted(unknown)}")
    known = _GENERATED if generated else SCHEMAS[schema] if schema else _ANY
    found = {"prompt": known.prompt, "answer": known.answer} | given
    if "demo" not in given:
        found["demo"] = next((path for path in known.demo if has_column(row, path)), known.demo[0])
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


def _ends_answered(row: dict[str, Any], column: str) -> bool:
    try:
        halves = split_conversation(lookup(row, column), "")
    except (KeyError, ValueError):
        # no such column, or a fault that is named where its row is read
        return False
    return halves is not None and halves[1] is not None


def read_fields(
    place: str, row: dict[str, Any], columns: dict[str, str], schema: str | None
) -> tuple[str | list[Message], Any, list[str]]:
    """Return prompt, answer and demonstrations of a row; a schema's habits apply where the map left it alone.

    Args:
        place: Where the row stands, for errors.
        row: The row.
        columns: From :func:`map_columns`.
        schema: From :func:`detect_schema`.

    Raises:
        ValueError: On a missing or empty prompt or answer, a field of the wrong type, or text that is none.
    """
    if missing := [path for role, path in columns.items() if role != "demo" and not has_column(row, path)]:
        raise ValueError(f"{place}: no column {missing[0]!r} in this row")
    prompt = _read_prompt(place, row, columns["prompt"], schema)
    answer = lookup(row, columns["answer"])
    if schema == "gsm8k" and columns["answer"] == SCHEMAS[schema].answer:
        answer = str(answer).rpartition("#### ")[2].strip() if "#### " in str(answer) else None
    if isinstance(answer, bytes):
        answer = _decoded(place, "answer", answer)
    if is_missing(answer):
        raise ValueError(f"{place}: no answer in column {columns['answer']!r}")
    demos = _read_demos(place, row, columns, schema) if "demo" in columns else []
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    for role, said in (("prompt", texts), ("answer", [answer]), ("demonstration", demos)):
        for text in said:
            _check_text(place, role, text)
    return prompt, answer, demos


def asked_reward(system: str | None, rows: Iterable[tuple[str, str | list[Message], Any]]) -> str | None:
    r"""Name the verifier that reads what the prompts ask for, or None where they ask for no form.

    An answer in a \boxed{} is for "math"; one after "####" or "Answer:" for "numeric" where every such row's answer is
    a number, else one after "####" for "exact".

    Args:
        system: System turn put before every prompt.
        rows: Id, prompt and ground truth of each example.

    Raises:
        ValueError: When some prompts ask for a box and others for a mark, with an example of each.
    """
    boxed = hashes = marked = None
    numbers = True
    for name, prompt, answer in rows:
        text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
        text = f"{system or ''}\n{text}"
        if "\\boxed" in text:
            boxed = boxed or name
        elif "####" in text or re.search(r"\bAnswer:", text):
            hashes = hashes or (name if "####" in text else None)
            marked = marked or name
            numbers = numbers and _NUMBER.fullmatch(str(answer).strip()) is not None
    if boxed and marked:
        raise ValueError(
            f"{boxed} asks for the answer in a box and {marked} after a mark, which one verifier does not judge alike; "
            "set reward.kind"
        )
    if boxed:
        return "math"
    return None if not marked else "numeric" if numbers else "exact" if hashes else None


def _read_prompt(place: str, row: dict[str, Any], column: str, schema: str | None) -> str | list[Message]:
    if schema == "countdown" and column == SCHEMAS[schema].prompt:
        if not has_column(row, "target"):
            raise ValueError(f"{place}: no column 'target' in this row")
        return _countdown_prompt(row["nums"], row["target"])
    prompt = lookup(row, column)
    if isinstance(prompt, bytes):
        prompt = _decoded(place, "prompt", prompt)
    if (halves := split_conversation(prompt, place)) is not None:
        turns, answered = halves
        if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns):
            before = " before the assistant's" if answered is not None else ""
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


def _read_demos(place: str, row: dict[str, Any], columns: dict[str, str], schema: str | None) -> list[str]:
    column, after_prompt = columns["demo"], columns["demo"] != columns["prompt"]
    if not has_column(row, column):
        return []
    value = lookup(row, column)
    several = isinstance(value, (list, tuple)) and not all(isinstance(item, dict) for item in value)
    items: Sequence[Any] = value if several else [value]
    flags = row.get(_CORRECT.get(column, ""))
    if several and isinstance(flags, (list, tuple)) and len(flags) == len(items):
        items = [item for item, correct in zip(items, flags, strict=True) if correct is not False]
    texts = [text for item in items if (text := _demo_text(place, item, after_prompt)) is not None]
    if schema == "countdown" and column == "solution" and not is_missing(row.get("answer")):
        texts = [f"{text}\n<answer>{row['answer']}</answer>" for text in texts]
    elif (schema, column) in (("gsm8k", "answer"), ("openr1", "extra_info.answer")):
        # calculator marks: 48/2 = <<48/2=24>>24
        texts = [re.sub(r"<<[^<>]*>>", "", text) for text in texts]
    return list(dict.fromkeys(texts))


def _demo_text(place: str, value: Any, after_prompt: bool) -> str | None:
    """One demonstration: text, or the assistant's last turn of a conversation that ends with it.

    ``after_prompt`` says that it follows a prompt of another column, so that no other turn may come between.
    """
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        value = _decoded(place, "demonstration", value)
    if isinstance(value, list) and isinstance(value[0], dict) and not value[0].keys() & {"role", "from"}:
        # a completion of one turn need not say whose it is
        value = [{"role": "assistant", **value[0]}, *value[1:]]
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


def _countdown_prompt(nums: Sequence[Any], target: Any) -> str:
    """Instruction for one Countdown row, asking for the form that the countdown verifier reads."""
    return (
        f"Using the numbers [{', '.join(map(str, nums))}], write an expression that equals {target}. "
        "Use + - * / and parentheses, and each number at most once. Work step by step, then give the "
        "expression alone between <answer> and </answer>.\n"
    )


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
