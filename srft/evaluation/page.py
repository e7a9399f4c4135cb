"""The page of an evaluation, on which every answer can be read; long ones go on further pages beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srft.evaluation.summary import SetResult
from srft.record.files import write_atomically
from srft.report.page import document, paragraphs, readable, safe, table
from srft.report.table import Table

_PAGE_CHARACTERS = 4_000_000  # what a browser shows without waiting
_STATUS_WORDS = {
    "timeout": "deadline passed", "error": "verifier failed", "bad_gold": "answer key unreadable",
    "unjudged": "not judged",
}  # fmt: skip
_STYLE = (
    "<style>details.problem{border-top:1px solid var(--grid);padding:.4rem 0}details.problem>summary{font-weight:400;"
    "overflow-wrap:anywhere}details.answer{margin-left:1rem}details.answer>summary{font-weight:400}</style>"
)


def write_page(
    folder: Path,
    title: str,
    tables: Sequence[Table],
    sentences: Sequence[str],
    results: Sequence[SetResult],
    settings: Mapping[str, Any],
) -> Path:
    """Write ``report.html``, and ``answers-<set>-<n>.html`` where the answers are too long for one page.

    Args:
        folder: The evaluation's.
        title: Of the page.
        tables: From ``summary.make_tables``, and of contamination.
        sentences: From ``summary.warnings``.
        results: From ``summary.read_results``.
        settings: From ``record.read_settings``.

    Returns:
        The page.

    Raises:
        WriteError: When the disk refuses.
    """
    parts = [_STYLE, f"<h1>{safe(title)}</h1>"]
    if sentences:
        parts.append(f'<div class="warn">{paragraphs(sentences)}</div>')
    parts += [
        f'<h2>{safe(t.title)}</h2><p class="muted">{safe(t.caption)}</p>{table(t.columns, t.rows)}' for t in tables
    ]
    stale = {path.name for path in folder.glob("answers-*.html")}
    problems = {
        result.name: [_problem(row, _seen(result, name)) for name, row in result.answered.rows.items()]
        for result in results
    }
    is_short = sum(len(text) for texts in problems.values() for text in texts) <= _PAGE_CHARACTERS
    for result in results:
        heading = f"Answers to {result.about['title']}"
        parts.append(f"<h2>{safe(heading)}</h2>")
        if is_short:
            parts += problems[result.name]
            continue
        for number, (first, texts) in enumerate(_pages(problems[result.name]), start=1):
            name = f"answers-{result.name}-{number:03}.html"
            part = f"{heading}: {first + 1} to {first + len(texts)}"
            back = '<p><a href="report.html">All figures</a></p>'
            write_atomically(folder / name, document(part, [_STYLE, f"<h1>{safe(part)}</h1>", back, *texts]))
            stale.discard(name)
            parts.append(f'<p><a href="{safe(name)}">{safe(part)}</a></p>')
    parts.append(f"<h2>How it was run</h2><pre>{safe(json.dumps(settings, indent=1))}</pre>")
    write_atomically(folder / "report.html", document(title, parts))
    for name in stale:
        (folder / name).unlink()
    return folder / "report.html"


def _pages(texts: Sequence[str]) -> list[tuple[int, list[str]]]:
    """The problems of each page, and the place of its first."""
    pages: list[tuple[int, list[str]]] = []
    size = _PAGE_CHARACTERS
    for place, text in enumerate(texts):
        if size + len(text) > _PAGE_CHARACTERS:
            pages.append((place, []))
            size = 0
        pages[-1][1].append(text)
        size += len(text)
    return pages


def _seen(result: SetResult, problem: str) -> float:
    """The largest share of a problem's words that stands in a training set."""
    return max([shares.get(problem, 0.0) for shares in result.about.get("overlaps", {}).values()], default=0.0)


def _problem(row: Mapping[str, Any], seen: float) -> str:
    """A problem with every answer, folded; an only answer is open once its problem is."""
    counts, answers = row["tally"], row["answers"]
    right, judged = counts["right"], counts["judged"]
    kind = "plain" if 0 < right < judged or not judged else "right" if right else "wrong"
    sign = {"right": "✓", "wrong": "✗", "plain": "~"}[kind]
    asked = readable(row["prompt"])
    opening = " ".join(asked.split())[:110]
    overlap = f'<span class="tag wrong">! {seen:.0%} in training</span> ' if seen else ""
    shown = "".join(_answer(number, answer, len(answers) == 1) for number, answer in enumerate(answers, start=1))
    return (
        f'<details class="problem"><summary><span class="tag {kind}">{sign} {right} of {judged}</span> {overlap}'
        f"<b>{safe(row['id'])}</b> {safe(opening)}</summary>"
        f'<div class="prompt"><div class="text">{safe(asked)}</div><p class="muted">answer: '
        f"{safe(readable(row['answer']))}</p></div>{shown}</details>"
    )


def _answer(number: int, answer: Mapping[str, Any], is_open: bool) -> str:
    status = answer["status"]
    if status != "ok":
        tag = f'<span class="tag wrong">! {safe(_STATUS_WORDS.get(status, status))}</span>'
    elif answer["value"] >= 0.5:
        tag = '<span class="tag right">✓ correct</span>'
    else:
        tag = '<span class="tag wrong">✗ incorrect</span>'
    cut = ", cut off" if answer["finish"] == "length" else ""
    said = f'<p class="muted">{safe(answer["message"])}</p>' if answer["message"] else ""
    return (
        f'<details class="answer"{" open" if is_open else ""}><summary>{tag} answer {number}, {answer["tokens"]} '
        f'tokens{cut}</summary>{said}<div class="text">{safe(answer["text"])}</div></details>'
    )
