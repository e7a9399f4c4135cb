"""Rows of a data source, whatever it is, and the columns that hold prompt, answer and demonstration."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srft.tasks import BUILTIN_TASKS, REASONING_GYM, chain_rows, reasoning_gym_rows

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
GENERATED_ROWS = {"train": 8192, "eval": 256}  # how many a generated task gives when no limit is set
Message = dict[str, str]
PlacedRow = tuple[str, dict[str, Any]]  # where the row stands, in words for an error message, and the row

# schema -> (columns that give it away, where prompt, answer and demo are found)
SCHEMAS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "openr1": (
        ("prompt", "reward_model.ground_truth"),
        {"prompt": "prompt", "answer": "reward_model.ground_truth", "demo": "target"},
    ),
    "countdown": (("nums", "target"), {"prompt": "nums", "answer": "target", "demo": "solution"}),
    "gsm8k": (("question", "answer"), {"prompt": "question", "answer": "answer", "demo": "answer"}),
    "math": (("problem", "answer"), {"prompt": "problem", "answer": "answer", "demo": "solution"}),
    "prompt_answer": (("prompt", "answer"), {"prompt": "prompt", "answer": "answer", "demo": "demo"}),
    "question_answer": (("question", "answer"), {"prompt": "question", "answer": "answer", "demo": "demo"}),
}


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
        row: Any row of the source.
    """
    for name, (columns, _) in SCHEMAS.items():
        if all(has_column(row, column) for column in columns):
            if name == "gsm8k" and "#### " not in str(row["answer"]):
                continue
            return name
    return None


def _read_jsonl(path: Path, limit: int | None) -> list[PlacedRow]:
    rows: list[PlacedRow] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                cut = "" if line.endswith(b"\n") else "; the file ends within this line: is it truncated?"
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}){cut}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            rows.append((f"{path}, line {number}", row))
    if not rows:
        raise ValueError(f"{path}, line 1: no rows, the file is empty")
    return rows


def _read_file(path: Path, limit: int | None) -> list[PlacedRow]:
    """Rows of a file, each with the words that name its place in an error."""
    if not path.is_file():
        raise ValueError(f"no such data file: {path}")
    if path.suffix == ".jsonl":
        return _read_jsonl(path, limit)
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg}); one object a line is .jsonl"
            ) from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a JSON list of objects")
        rows = rows[:limit]
    else:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError("parquet files need the extra srft[train]: pip install 'srft[train]'") from error
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                rows = []
                for batch in file.iter_batches(batch_size=1024):
                    rows += batch.to_pylist()
                    if limit is not None and len(rows) >= limit:
                        break
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
        rows = rows[:limit]
    return [(f"{path}, row {index}", row) for index, row in enumerate(rows)]


def _read_hub(source: str, split: str, limit: int | None) -> list[PlacedRow]:
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ValueError("hub data sets need the extra srft[train]: pip install 'srft[train]'") from error
    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cannot load {source!r} ({split}) from the Hugging Face hub: {type(error).__name__}: "
            f"{reason}; check the name (owner/name or owner/name:config), the split and the network, or give "
            "a local .jsonl or .parquet file"
        ) from error
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return [(f"{source}, row {index}", dict(row)) for index, row in enumerate(dataset)]


def read_source(
    source: str, split: str, limit: int | None, seed: int, task: dict[str, Any]
) -> list[PlacedRow]:
    """Return the rows of any source; the arguments are those of ``data.load_examples``.

    Args:
        source: Task, file or hub data set.
        split: Split to read.
        limit: Number of rows, or None.
        seed: Of a generated task.
        task: Options of a generated task.

    Raises:
        ValueError: On a missing or unreadable source, or options that it does not have.
    """
    count = GENERATED_ROWS["train" if split == "train" else "eval"] if limit is None else limit
    if source in BUILTIN_TASKS:
        if unknown := set(task) - {"min_ops", "max_ops"}:
            raise ValueError(f"task chain has no option {sorted(unknown)}; it has min_ops and max_ops")
        generated = chain_rows(count, split=split, seed=seed, **task)
    elif source.startswith(REASONING_GYM):
        name = source.removeprefix(REASONING_GYM)
        generated = reasoning_gym_rows(name, count, split=split, seed=seed, options=task)
    else:
        if task:
            raise ValueError(f"task options {sorted(task)} are for generated tasks, not for {source!r}")
        path = Path(source).expanduser()
        if path.suffix in FILE_SUFFIXES or path.exists() or source.startswith((".", "/", "~")):
            if path.suffix not in FILE_SUFFIXES:
                raise ValueError(
                    f"cannot tell the format of {source}; expected one of {', '.join(FILE_SUFFIXES)}"
                )
            return _read_file(path, limit)
        if "/" not in source and (near := difflib.get_close_matches(source, BUILTIN_TASKS, n=1)):
            raise ValueError(f"unknown data source {source!r}; did you mean the built-in task {near[0]!r}?")
        return _read_hub(source, split, limit)
    return [(f"{source}, row {index}", row) for index, row in enumerate(generated)]


def map_columns(
    source: str, row: dict[str, Any], schema: str | None, given: dict[str, str], require_demo: bool
) -> dict[str, str]:
    """Return where prompt, answer and demo stand; the given map wins over the schema.

    Args:
        source: Named in errors.
        row: The first row.
        schema: Its known schema, or None.
        given: The user's column map.
        require_demo: Whether a missing demonstration column is an error.

    Raises:
        ValueError: Naming the column that is missing, those present, the nearest, and the option to set.
    """
    if unknown := set(given) - {"prompt", "answer", "demo"}:
        raise ValueError(f"data.columns knows prompt, answer and demo, not {sorted(unknown)}")
    if source.startswith(REASONING_GYM):
        found = {"prompt": "question", "answer": "answer", "demo": "answer"}
    else:
        found = (
            dict(SCHEMAS[schema][1]) if schema else {"prompt": "prompt", "answer": "answer", "demo": "demo"}
        )
    found |= given
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


def _countdown_prompt(nums: Sequence[Any], target: Any) -> str:
    """Instruction for one Countdown row, asking for the form that the countdown verifier reads."""
    return (
        f"Using the numbers [{', '.join(map(str, nums))}], write an expression that equals {target}. "
        "Use + - * / and parentheses, and each number at most once. Work step by step, then give the "
        "expression alone between <answer> and </answer>.\n"
    )


def _message_text(value: Any) -> Any:
    """Text of a demonstration given as chat messages: the assistant's turns; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        spoken = [turn for turn in value if turn.get("role", "assistant") == "assistant"]
        return "".join(str(turn.get("content", "")) for turn in spoken)
    return value


def _is_message(turn: Any) -> bool:
    return (
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def read_fields(
    place: str, row: dict[str, Any], columns: dict[str, str], schema: str | None
) -> tuple[str | list[Message], Any, str | None]:
    """Return prompt, answer and demonstration of a row; a schema's habits apply where the map left it alone.

    Args:
        place: Where the row stands, for errors.
        row: The row.
        columns: From :func:`map_columns`.
        schema: From :func:`detect_schema`.

    Raises:
        ValueError: On a missing or empty prompt or answer, or a field of the wrong type.
    """
    if missing := [path for role, path in columns.items() if role != "demo" and not has_column(row, path)]:
        raise ValueError(f"{place}: no column {missing[0]!r} in this row")
    prompt, answer = lookup(row, columns["prompt"]), lookup(row, columns["answer"])
    demo = _message_text(lookup(row, columns["demo"])) if has_column(row, columns["demo"]) else None
    own = SCHEMAS[schema][1] if schema else {}
    if schema == "countdown":
        if columns["prompt"] == own["prompt"]:
            prompt = _countdown_prompt(row["nums"], row["target"])
        if columns["demo"] == own["demo"] and not _is_empty(demo) and not _is_empty(row.get("answer")):
            demo = f"{demo}\n<answer>{row['answer']}</answer>"
    elif schema == "gsm8k":
        if columns["demo"] == own["demo"] and isinstance(demo, str):
            # calculator marks: 48/2 = <<48/2=24>>24
            demo = re.sub(r"<<[^<>]*>>", "", demo)
        if columns["answer"] == own["answer"]:
            answer = answer.rpartition("#### ")[2].strip() if "#### " in str(answer) else None
    if columns["prompt"] in ("question", "problem") and isinstance(prompt, str):
        # a question needs an end before plain text can go on with its solution
        prompt = prompt.rstrip() + "\n"
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        prompt = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    elif not isinstance(prompt, str) or _is_empty(prompt):
        seen = str(prompt)[:80]
        raise ValueError(f"{place}: the prompt must be text or messages with role and content, got {seen!r}")
    if _is_empty(answer):
        raise ValueError(f"{place}: no answer in column {columns['answer']!r}")
    if not _is_empty(demo) and not isinstance(demo, str):
        raise ValueError(f"{place}: the demonstration must be text or messages, got {type(demo).__name__}")
    return prompt, answer, None if _is_empty(demo) else demo
