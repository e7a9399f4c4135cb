"""HTML of a run's page. Everything that comes from a run is escaped: completions can contain anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from srft.record.text import UNPRINTABLE

_MAX_CHARACTERS = 4000
_MAX_SAMPLES_PER_STEP = 24
_STATUS_WORDS = {
    "timeout": "deadline passed", "error": "reward failed", "bad_gold": "answer key unreadable",
    "unjudged": "not judged",
}  # fmt: skip

# should an escape ever be missed, the browser still runs and loads nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CSS = """
:root{color-scheme:light dark;--sans:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--paper:#fff;--sheet:#f6f7f9;--ink:#1f2328;--muted:#5d6672;--grid:#dfe3e8;--blue:#0072b2;--vermillion:#d55e00;
--green:#00916a;--purple:#b0578d;--amber:#e69f00;--grey:#98a1ab;--right:#00704f;--right-bg:#e2f4ed;
--wrong:#a83a00;--wrong-bg:#fdebe0;--demo:#5b3f78;--demo-bg:#efe9f6}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--sheet:#1d2126;--ink:#e4e7eb;--muted:#9aa4af;--grid:#343a42;
--blue:#5ab4e6;--vermillion:#f58a45;--green:#3fc79d;--purple:#dd93bf;--amber:#f0b93a;--grey:#7c8691;--right:#6fdcb7;
--right-bg:#12352a;--wrong:#ffab7a;--wrong-bg:#43230f;--demo:#c9b0e6;--demo-bg:#32264a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 var(--sans);-webkit-text-size-adjust:100%}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:3rem 0 .25rem}
h3{font-size:1rem;margin:1.75rem 0 .5rem}
p{margin:.25rem 0}
.muted,figcaption span,small{color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:.75rem;margin:1.5rem 0}
.card{background:var(--sheet);border-radius:10px;padding:.8rem 1rem}
.card b{display:block;font-size:1.45rem;line-height:1.35;font-weight:650;white-space:nowrap;
font-variant-numeric:tabular-nums}
.card small{display:block;line-height:1.35}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:2rem 2.5rem;
margin-top:1rem}
figure{margin:0;display:grid;grid-template-rows:subgrid;grid-row:span 2;row-gap:.5rem}
figcaption b{display:block}
figcaption span{display:block;font-size:.9rem;line-height:1.4}
svg{display:block;width:100%;height:auto;max-width:600px}
.warn{background:var(--wrong-bg);color:var(--wrong);border-radius:10px;padding:.6rem 1rem;margin:1rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{text-align:left;padding:.3rem 1.5rem .3rem 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}
.prompt{border-left:3px solid var(--grid);padding:.1rem 0 .1rem .9rem;margin:2rem 0 .75rem}
h3+.prompt{margin-top:.25rem}
.sample{display:grid;grid-template-columns:11.5rem minmax(0,1fr);gap:.25rem 1.25rem;padding:.7rem 0;
border-top:1px solid var(--grid)}
.tag{display:inline-block;border-radius:99px;padding:.05rem .7rem;font-weight:600;font-size:.88rem}
.right{color:var(--right);background:var(--right-bg)}.wrong{color:var(--wrong);background:var(--wrong-bg)}
.demo{color:var(--demo);background:var(--demo-bg)}.plain{background:var(--sheet)}
.sample small{display:block;line-height:1.55;font-variant-numeric:tabular-nums}
.text,pre{font:.85rem/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.sample .text{max-height:22rem;overflow-y:auto}
pre{background:var(--sheet);border-radius:10px;padding:1rem;white-space:pre;overflow-x:auto}
pre.wrap{white-space:pre-wrap}
details{margin:.5rem 0}
summary{cursor:pointer;font-weight:600}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.2rem 1.25rem;margin:.5rem 0;
font-size:.95rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:640px){body{padding:1.25rem .9rem 3rem}h1{font-size:1.4rem}
.cards{grid-template-columns:1fr 1fr}
.card{padding:.65rem .75rem}.card b{font-size:1.08rem}.card small{font-size:.8rem}
.sample{grid-template-columns:minmax(0,1fr)}.sample small{display:inline-block;margin-left:.3rem;
font-size:.76rem}
.tag{font-size:.78rem;padding:.05rem .55rem}
.figures{gap:1.75rem}th,td{padding-right:.6rem;font-size:.85rem}td.n{white-space:normal}
dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:.5rem}}
@media print{.sample .text{max-height:none}}
"""


def render(
    *,
    title: str,
    status: str,
    cards: Sequence[tuple[str, str, str]],
    figures: Sequence[tuple[str, str, str]],
    smoothing_width: float,
    samples: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    said: Sequence[str],
    config_text: str,
    sessions: Sequence[Mapping[str, Any]],
    facts: Sequence[tuple[str, str, str, str]],
    places: Sequence[tuple[str, str]],
    alarms: Sequence[Mapping[str, Any]],
) -> str:
    """Return the page as one HTML document without scripts or outside references.

    Args:
        title: A few words that name the run.
        status: One sentence: how far it came.
        cards: (label, headline, line below).
        figures: (title, caption, inline SVG); the SVG is trusted, everything else is escaped.
        smoothing_width: Standard deviation of the curves' smoothing window, in steps.
        samples: Rows of ``samples.jsonl`` in order of step.
        warnings: Sentences on what is wrong with the record.
        said: Sentences the run printed.
        config_text: Resolved configuration; may be empty.
        sessions: From ``run.json``: command, versions and so on of every start.
        facts: (label, first, best, last).
        places: (label, text) of run time and files.
        alarms: Rows of ``alarms.jsonl``.
    """
    subtitle = f"{status}."
    if sessions and sessions[0].get("started"):
        subtitle += f" Started {sessions[0]['started'].replace('T', ' ').removesuffix('+00:00')} UTC."
    parts = [f"<h1>{safe(title)}</h1>", f'<p class="muted">{safe(subtitle)}</p>']
    if cards:
        parts.append('<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>")
    if warnings:
        parts.append(f'<div class="warn">{paragraphs(warnings)}</div>')
    parts.append(paragraphs(said))
    if alarms:
        parts.append("<h2>Alarms</h2>" + _alarm_table(alarms))
    parts.append("<h2>Curves</h2>")
    if figures:
        parts.append(
            f'<p class="muted">Faint lines are single steps; bold ones a running mean over about '
            f"{2 * smoothing_width:.0f} steps.</p>"
        )
        parts.append('<div class="figures">' + "".join(captioned(*figure) for figure in figures) + "</div>")
    else:
        parts.append('<p class="muted">No step has been recorded.</p>')
    if facts:
        parts.append("<h2>Numbers</h2>" + _fact_table(facts))
    parts.append("<h2>Samples</h2>" + _samples(samples))
    parts.append("<h2>How it was run</h2>" + _list(places))
    parts += [_session(session) for session in sessions]
    if config_text:
        parts.append(f"<h2>Configuration</h2><pre>{safe(config_text)}</pre>")
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return one HTML document without scripts or outside references, in the style of a run's page.

    Args:
        title: Of the window; escaped here.
        parts: HTML of the body, in order.
    """
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{safe(title)}</title><style>{_CSS}</style></head><body>"
    )
    return head + "\n".join(parts) + "</body></html>\n"


def safe(text: str) -> str:
    """Return text as HTML that shows it: no tags, and a mark in place of what HTML cannot hold.

    Args:
        text: Anything.
    """
    return escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")))


def paragraphs(sentences: Sequence[str]) -> str:
    """Return a paragraph for each sentence.

    Args:
        sentences: Texts; escaped here.
    """
    return "".join(f"<p>{safe(sentence)}</p>" for sentence in sentences)


def _card(label: str, headline: str, below: str) -> str:
    label, headline, below = safe(label), safe(headline), safe(below)
    return f'<div class="card"><small>{label}</small><b>{headline}</b><small>{below}</small></div>'


def captioned(title: str, caption: str, svg: str) -> str:
    """Return a figure with its heading and its caption.

    Args:
        title: Escaped here, as the caption.
        caption: A sentence.
        svg: Inline SVG, which is trusted.
    """
    title, caption = safe(title), safe(caption)
    svg = svg.replace('role="img"', f'role="img" aria-label="{title}"', 1)
    return f"<figure><figcaption><b>{title}</b><span>{caption}</span></figcaption>{svg}</figure>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers.

    Args:
        columns: Headings; escaped here, as the cells.
        rows: A cell for each column.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        numbers = "".join(f'<{tag} class="n">{safe(cell)}</{tag}>' for cell in cells[1:])
        return f"<tr><{tag}>{safe(cells[0])}</{tag}>{numbers}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(columns, "th")}{body}</table></div>'


def _fact_table(facts: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ['<tr><th></th><th class="n">first</th><th class="n">best</th><th class="n">last</th></tr>']
    for label, *values in facts:
        cells = "".join(f'<td class="n">{safe(value)}</td>' for value in values)
        lines.append(f"<tr><td>{safe(label)}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _alarm_table(alarms: Sequence[Mapping[str, Any]]) -> str:
    lines = ["<tr><th>step</th><th>alarm</th><th>seen</th><th>expected</th><th>what to do</th></tr>"]
    for alarm in alarms:
        values = [str(alarm.get(key, "")) for key in ("step", "alarm", "seen", "limit", "remedy")]
        lines.append("<tr>" + "".join(f"<td>{safe(value)}</td>" for value in values) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    entries = "".join(f"<dt>{safe(label)}</dt><dd>{safe(value)}</dd>" for label, value in pairs)
    return f"<dl>{entries}</dl>"


def _session(session: Mapping[str, Any]) -> str:
    resumed = session.get("resume_step")
    title = "Start" if resumed is None else f"Resumed after step {resumed}"
    versions = ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items())
    pairs = [("time", session.get("started")), ("commit", session.get("commit")), ("versions", versions),
             ("machine", f"{session.get('platform')}, {session.get('cpus')} CPUs")]  # fmt: skip
    listed = _list([(label, str(value)) for label, value in pairs if value])
    return f'<h3>{title}</h3><pre class="wrap">{safe(str(session.get("command", "")))}</pre>{listed}'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the samples of the first, the middle and the last step that has any, by prompt."""
    steps = sorted({row["step"] for row in samples})
    if not steps:
        return '<p class="muted">No samples were recorded.</p>'
    parts = []
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        rows = [row for row in samples if row["step"] == step]
        parts.append(f"<h3>Step {step}</h3>")
        previous: object = None
        for row in rows[:_MAX_SAMPLES_PER_STEP]:
            if row.get("prompt") != previous:
                previous = row.get("prompt")
                parts.append(_prompt(row))
            parts.append(_sample(row))
        if len(rows) > _MAX_SAMPLES_PER_STEP:
            parts.append(f'<p class="muted">{len(rows) - _MAX_SAMPLES_PER_STEP} more in samples.jsonl.</p>')
    return "".join(parts)


def _prompt(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    shown = f'<p class="muted">answer: {_text(answer)}</p>' if answer not in (None, "") else ""
    return f'<div class="prompt"><div class="text">{_text(row.get("prompt"))}</div>{shown}</div>'


def _sample(row: Mapping[str, Any]) -> str:
    numbers = [
        f"{key} {row[key]:{spec}}"
        for key, spec in (("reward", "g"), ("advantage", "+.2f"), ("entropy", ".2f"))
        if isinstance(row.get(key), int | float)
    ]
    shown = "".join(f"<small>{number}</small> " for number in numbers)
    message = row.get("message")
    said = f'<div class="muted">{_text(message)}</div>' if message else ""
    marks = f"<div>{_tags(row)} {shown}</div>{said}"
    return f'<div class="sample">{marks}<div class="text">{_text(row.get("completion"))}</div></div>'


def _tags(row: Mapping[str, Any]) -> str:
    """Return the marks of a completion; they differ in word and sign, not only in colour."""
    tags = []
    if row.get("demo"):
        tags.append('<span class="tag demo">demonstration</span>')
    status, reward = row.get("status", "ok"), row.get("reward")
    if status not in ("ok", None):
        tags.append(f'<span class="tag wrong">! {safe(_STATUS_WORDS.get(str(status), str(status)))}</span>')
    elif isinstance(reward, int | float):
        if reward >= 1:
            tags.append('<span class="tag right">✓ correct</span>')
        elif reward <= 0:
            tags.append('<span class="tag wrong">✗ incorrect</span>')
        else:
            tags.append('<span class="tag plain">~ in part</span>')
    return " ".join(tags)


def readable(value: object) -> str:
    """Return a prompt, completion or answer as a person reads it: a conversation turn by turn; not escaped.

    Args:
        value: Text, the turns of a conversation, or whatever JSON has.
    """
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n\n".join(f"{turn.get('role', '')}: {turn['content']}" for turn in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: object) -> str:
    """The words of a prompt, completion or answer, escaped, and cut when they are very long."""
    text = readable(value)
    html = safe(text[:_MAX_CHARACTERS])
    more = len(text) - _MAX_CHARACTERS
    if more > 0:
        html += f' <span class="muted">… {more} more characters in samples.jsonl</span>'
    return html
