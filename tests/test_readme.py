"""The README's Python blocks run as they stand, in order, as one session."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def python_blocks(markdown: str) -> list[tuple[int, str]]:
    """Return (first line number, code) of each fenced block marked `python`."""
    return [
        (markdown.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    ]


def test_python_blocks_are_found() -> None:
    """The README shows Python code, so that the next test has something to run."""
    assert README.exists(), "README.md is missing"
    assert python_blocks(README.read_text(encoding="utf-8")), "README.md has no ```python block"


def test_python_blocks_run(tmp_path: Path) -> None:
    """The blocks, joined in order, run in a fresh interpreter outside the checkout."""
    # blank lines in between keep the README's line numbers in a traceback
    script = ""
    for line, code in python_blocks(README.read_text(encoding="utf-8")):
        script += "\n" * (line - 1 - script.count("\n")) + code
    path = tmp_path / "README.py"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"README.md's Python failed:\n{done.stderr[-4000:]}"
