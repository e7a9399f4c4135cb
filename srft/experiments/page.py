"""The page of a suite: one file without scripts or outside references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srft.experiments.findings import Findings
from srft.report.page import captioned, document, paragraphs, safe, table
from srft.report.table import Table


def render(findings: Findings, tables: Sequence[Table], figures: Mapping[str, tuple[str, str, str]]) -> str:
    """Return the page.

    Args:
        findings: Give title, question, warnings, and the options of the arms.
        tables: From ``tables.make_tables``.
        figures: From ``figures.draw_figures``.
    """
    parts = [f"<h1>{safe(findings.title)}</h1>", f"<p>{safe(findings.question)}</p>"]
    parts.append(f'<p class="muted">{safe(" ".join(findings.conditions))}</p>')
    if findings.warnings:
        parts.append(f'<div class="warn">{paragraphs(findings.warnings)}</div>')
    # wide: many panels in a figure
    parts += [
        f'<h2>{safe(t.title)}</h2><p class="muted">{safe(t.caption)}</p>{table(t.columns, t.rows)}' for t in tables
    ]
    parts.append("<h2>Figures</h2>")
    parts += [f'<div class="wide">{captioned(*figure)}</div>' for figure in figures.values()]
    if not figures:
        parts.append('<p class="muted">No run has ended.</p>')
    parts.append("<h2>Arms</h2>" + _arms(findings))
    parts.append(f"<h2>Configuration of {safe(findings.reference)}</h2><pre>{safe(findings.config)}</pre>")
    return document(findings.title, ["<style>.wide{margin:2rem 0}.wide svg{max-width:none}</style>", *parts])


def _arms(findings: Findings) -> str:
    entries = "".join(
        f"<dt>{safe(arm.name)}</dt><dd>{safe(' '.join(arm.options) or 'nothing besides what all have')}</dd>"
        for arm in findings.arms
    )
    return f"<dl>{entries}</dl>"
