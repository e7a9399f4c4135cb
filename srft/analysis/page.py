"""HTML of the analyses' page: sections, and responses whose tokens are coloured by a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from srft.report.page import document, paragraphs, safe, table

__all__ = ["Section", "Token", "legend", "render", "response", "table"]
_CSS = """<style>.figures:has(.wide){grid-template-columns:minmax(0,1fr)}.wide svg{max-width:860px}
.tokens{font:.9rem/1.75 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:.25rem 0 1rem}
.tokens span{border-radius:3px;padding:.1em 0}
.u{background:color-mix(in srgb,var(--blue) calc(var(--d)*75%),transparent)}
.v{background:color-mix(in srgb,var(--vermillion) calc(var(--d)*75%),transparent)}
.key span{border-radius:3px;padding:.1rem .5rem;margin-right:.5rem}</style>"""
# a space at the end of a line, or alone, would not be seen
_SEEN = str.maketrans({"\n": "↵\n", "\t": "⇥"})


class Token(NamedTuple):
    """A token as the page colours it: its ``text``, ``shade`` in [-1, 1], and what is ``told`` on hovering over it."""

    text: str
    shade: float
    told: str


class Section(NamedTuple):
    """A part of the page: its ``title``, ``sentences`` below it, and ``html``, which is trusted."""

    title: str
    sentences: Sequence[str]
    html: str


def render(title: str, subtitle: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page as one HTML document without scripts or outside references.

    Args:
        title: A few words; escaped here, as all that is no section's HTML.
        subtitle: A sentence.
        warnings: Sentences on what is wrong with what was read.
        sections: In order.
    """
    parts = [_CSS, f"<h1>{safe(title)}</h1>", f'<p class="muted">{safe(subtitle)}</p>']
    if warnings:
        parts.append(f'<div class="warn">{paragraphs(warnings)}</div>')
    for section in sections:
        parts.append(f"<h2>{safe(section.title)}</h2>{paragraphs(section.sentences)}{section.html}")
    return document(title, parts)


def response(prompt: str, tokens: Sequence[Token], note: str = "") -> str:
    """Return a response with its prompt, each token coloured: blue above 0, vermillion below, deeper further off.

    Args:
        prompt: Its text.
        tokens: Of the response.
        note: A few words on it.
    """
    spans = "".join(
        f'<span class="{"u" if token.shade > 0 else "v"}" style="--d:{min(1.0, abs(token.shade)):.3f}" '
        f'title="{safe(token.told)}">{safe(token.text.translate(_SEEN))}</span>'
        for token in tokens
    )
    said = f'<p class="muted">{safe(note)}</p>' if note else ""
    return f'<div class="prompt"><div class="text">{safe(prompt)}</div>{said}</div><div class="tokens">{spans}</div>'


def legend(low: str, high: str, sentence: str) -> str:
    """Return what the colours of tokens mean.

    Args:
        low: What vermillion means; empty where it is not used.
        high: What blue means.
        sentence: More about them.
    """
    kinds = (("v", low), ("u", high))
    marks = [f'<span class="{kind}" style="--d:.6">{safe(text)}</span>' for kind, text in kinds if text]
    return f'<p class="key">{"".join(marks)}<span class="muted">{safe(sentence)}</span></p>'
