"""A table as rows of text: which Markdown, the terminal and the page have in common."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from srft.record.text import UNPRINTABLE


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: Its heading.
        caption: What its numbers are.
        columns: Headings; the first is of names, the others of numbers.
        rows: As many texts each.
    """

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]


def markdown(table: Table) -> str:
    """Return a table as Markdown, with its heading and caption.

    Args:
        table: The table.
    """
    lines = [table.columns, ["---", *("--:" for _ in table.columns[1:])], *table.rows]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{table.caption}\n\n{grid}"


def on_terminal(table: Table) -> RichTable:
    """Return a table for rich, in which names are not broken.

    Args:
        table: The table.
    """
    shown = RichTable(
        box=SIMPLE_HEAD, pad_edge=False, title=table.title, caption=table.caption, title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for place, heading in enumerate(table.columns):
        shown.add_column(heading, justify="right" if place else "left", no_wrap=place == 0)
    for row in table.rows:
        shown.add_row(*map(plain, row))
    return shown


def plain(text: str, style: str = "") -> Text:
    """Return text for rich as it stands: no markup, and no control characters.

    Args:
        text: The text.
        style: Of all of it.
    """
    return Text(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text), style)
