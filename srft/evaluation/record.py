"""What an evaluation writes: its settings, and a line for each problem with every answer to it, whole at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srft.data.prompts import Prompt
from srft.disk import writing
from srft.evaluation.answers import Answer, tally
from srft.evaluation.estimators import Tally
from srft.record.files import json_line, locked, open_json_lines, write_atomically, write_json_line

SETTINGS = "evaluation.json"


def taken(folder: Path) -> AbstractContextManager[None]:
    """Keep other evaluations out of a folder for as long as the body runs; the lock goes with the process.

    Args:
        folder: Made where there is none.

    Raises:
        ValueError: When another process has it.
        WriteError: When the disk refuses.
    """
    return locked(
        folder, f"another process is writing to {folder}; wait for it to end, or set --out to another folder"
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what was asked in an evaluation's folder; nothing where there is none.

    Args:
        folder: The evaluation's.

    Raises:
        ValueError: When they cannot be read.
    """
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; set --out to another folder") from error


def keep_settings(
    folder: Path, asked: dict[str, Any], sets: dict[str, dict[str, Any]], session: dict[str, Any]
) -> None:
    """Write what is asked, after checking that it is what the folder's answers, if any, were drawn with.

    Args:
        folder: The evaluation's.
        asked: The model and how it is sampled.
        sets: By name, what is asked of each; other sets of the folder stay.
        session: Of this start: command, versions and so on.

    Raises:
        ValueError: Naming what differs.
        WriteError: When the disk refuses.
    """
    # as JSON has them
    asked, sets = json.loads(json.dumps(asked)), json.loads(json.dumps(sets))
    before = read_settings(folder)
    known = before.get("sets", {})
    pairs = [("", before.get("asked", asked), asked)]
    pairs += [(f"{name}.", known[name]["asked"], sets[name]["asked"]) for name in sets if name in known]
    differ = [
        f"{prefix}{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for prefix, old, new in pairs
        for key in old | new
        if old.get(key) != new.get(key)
    ]
    if differ and any((folder / f"{name}.jsonl").exists() for name in known):
        raise ValueError(f"{folder} holds another evaluation: {'; '.join(differ)}. Set --out to another folder")
    if differ:
        # a start that failed before the first answer binds nobody
        known = {}
    sessions = [*before.get("sessions", []), session]
    text = json.dumps({"asked": asked, "sets": known | sets, "sessions": sessions}, indent=1)
    write_atomically(folder / SETTINGS, text + "\n")


class Answered:
    """The answers to a set so far: ``<name>.jsonl``, a problem a line.

    Args:
        folder: The evaluation's.
        name: The set's.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        """By the id of the problem."""
        self._end = 0
        """Where the last whole line ends."""
        data = self.path.read_bytes() if self.path.exists() else b""
        self._end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._end].splitlines(), start=1):
            try:
                row = json.loads(line)
                self.rows.setdefault(row["id"], row)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is no answered problem: {error}") from error

    def refuse_others(self, prompts: Sequence[Prompt]) -> None:
        """Check that the problems answered are those that are asked.

        Args:
            prompts: What is asked.

        Raises:
            ValueError: Naming the first that is another one.
        """
        for prompt in prompts:
            row = self.rows.get(prompt.example.id)
            if row is not None and row["problem"] != digest(prompt):
                raise ValueError(
                    f"{self.path} answers another problem under the id {prompt.example.id}; restore the set, or set "
                    "--out to another folder"
                )

    def add(self, answers: Sequence[tuple[Prompt, Sequence[Answer]]]) -> None:
        """Append problems that are not answered yet, each in one system call.

        Args:
            answers: Problems with all the answers to each.

        Raises:
            WriteError: When the disk refuses.
        """
        new = [(prompt, said) for prompt, said in answers if prompt.example.id not in self.rows]
        if not new:
            return
        with writing(self.path):
            if self.path.exists():
                # half a line that a killed process left; nothing that was whole stands behind it
                os.truncate(self.path, self._end)
        with open_json_lines(self.path) as file:
            for place, (prompt, said) in enumerate(new):
                row = _row(prompt, said)
                write_json_line(file, row, sync=place == len(new) - 1)
                self.rows[row["id"]] = row
                self._end += len(json_line(row))


def digest(prompt: Prompt) -> str:
    """Return a short digest of a problem as the policy and the verifier see it.

    Args:
        prompt: The problem.
    """
    facts = json.dumps([prompt.prompt_ids, str(prompt.example.answer)])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def tally_of(row: dict[str, Any]) -> Tally:
    """Return the counts of an answered problem.

    Args:
        row: From ``Answered.rows``.
    """
    return Tally(**row["tally"])


def _row(prompt: Prompt, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "id": prompt.example.id,
        "problem": digest(prompt),
        "prompt": prompt.example.prompt,
        "answer": prompt.example.answer,
        "tally": asdict(tally(answers)),
        "answers": [
            {"text": a.text, "tokens": a.tokens, "finish": a.finish, "value": a.result.value,
             "status": a.result.status, "message": a.result.message}
            for a in answers
        ],
    }  # fmt: skip
