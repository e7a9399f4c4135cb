"""Each page's Python blocks run as they stand, in order, as one session, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for folder in (".", "docs", "benchmarks", "results") for path in sorted((ROOT / folder).glob("*.md"))]


def python_blocks(markdown: str) -> list[tuple[int, str]]:
    """Return (first line number, code) of each fenced block marked `python`."""
    return [
        (markdown.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    ]


def anchors(page: Path) -> set[str]:
    """Return what links to a page's headings end in, as GitHub makes it of their text."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


WITH_PYTHON = [page for page in PAGES if python_blocks(page.read_text("utf-8"))]


def test_python_blocks_are_found() -> None:
    """Where they are expected, so that the next test has something to run."""
    assert {"README.md", "methods.md"} <= {page.name for page in WITH_PYTHON}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """The blocks, joined in order, run in a fresh interpreter outside the checkout."""
    # blank lines in between keep the page's line numbers in a traceback
    script = ""
    for line, code in python_blocks(page.read_text("utf-8")):
        script += "\n" * (line - 1 - script.count("\n")) + code
    path = tmp_path / f"{page.stem}.py"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}'s Python failed:\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there and, where they name one, to a heading of it."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}, a heading that is not there"
