"""The house keeps its order: what imports what, how long a file and a function may be, what the README draws.

Of imports, pyproject.toml has the contracts, which lint-imports checks; here each of them is broken on purpose.
Sizes are counted so:

- a file: all its lines, at most `FILE_LINES`;
- a function: the lines of its body after the docstring, functions inside included, at most `FUNCTION_LINES`.
  Signature and docstring are what a user reads, and stand in full.

An exception stands in `EXCEPTIONS` with its reason, and goes when it is no longer needed.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES = 400
FUNCTION_LINES = 80
ROOMS = ("srft", "srft_kernels", "benchmarks", "tests")
EXCEPTIONS = {
    "srft_kernels/compile/ops.py logprobs_op": "forward, backward and their shapes are one op, over one schema",
    "srft_kernels/rows/gpu.py _row_kernel": "one kernel is one pass over the vocabulary; a part of it has no name",
}


def test_files_and_functions_have_a_size_one_can_read() -> None:
    """Nothing is longer than it may be, and no exception is left over."""
    if faults := too_long(ROOT, EXCEPTIONS):
        pytest.fail("\n".join(faults), pytrace=False)


def test_what_is_too_long_is_told(tmp_path: Path) -> None:
    """A line too many in a file and in a function, and an exception that is not needed."""
    (tmp_path / "srft").mkdir()
    body = "    x = 0\n"
    (tmp_path / "srft" / "long.py").write_text("x = 0\n" * 401)
    (tmp_path / "srft" / "full.py").write_text("x = 0\n" * 400)
    (tmp_path / "srft" / "parts.py").write_text(
        f"class C:\n    def m(self):\n{('    ' + body) * 81}\n"
        f"def f(\n    a,\n):\n    '''One.\n\n    Two.\n    '''\n{body * 80}\n"
        f"async def g():\n    def h():\n{('    ' + body) * 79}    # the last line\n    return h\n"
    )
    faults = too_long(tmp_path, {})
    assert faults == [
        "srft/long.py has 401 lines, of 400 at most",
        "srft/parts.py C.m has 81 lines, of 80 at most",
        "srft/parts.py g has 82 lines, of 80 at most",
    ]
    exceptions = {"srft/long.py": "a table", "srft/parts.py C.m": "a kernel", "srft/parts.py f": "", "srft/gone.py": ""}
    assert too_long(tmp_path, exceptions) == [
        "srft/parts.py g has 82 lines, of 80 at most",
        "srft/gone.py needs no exception",
        "srft/parts.py f needs no exception",
    ]


def test_no_comment_is_a_banner() -> None:
    """A heading is a comment like any other."""
    banners = [
        f"{path.relative_to(ROOT)}:{number}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"\s*#\s*[-=#*~]{3}", line)
    ]
    assert not banners


def test_kernels_need_torch_and_triton_alone() -> None:
    """Whoever imports the kernels into a trainer of theirs installs nothing else; only adapters know their peer."""
    allowed = {*sys.stdlib_module_names, "srft_kernels", "torch", "triton"}
    others = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "srft_kernels").rglob("*.py")
        if path.parent.name != "integrations"
        for name in imported(ast.parse(path.read_text()))
        if name.partition(".")[0] not in allowed
    }
    assert not others


def test_the_map_in_the_readme_is_of_this_house() -> None:
    """It names every room, every file beside the rooms, and nothing that is not there."""
    drawn = (ROOT / "README.md").read_text().partition("\n## Files\n")[2].split("```")[1]
    named = set(re.findall(r"[\w/]+(?:\.py|/)(?= |:|;|,|\n)", drawn))
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for package in ("srft", "srft_kernels")
        for path in (ROOT / package).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__.py"}
    assert named >= there, f"not on the map: {sorted(there - named)}"
    strangers = {n for n in named if not ((ROOT / n).exists() or any(f for r in ROOMS for f in (ROOT / r).rglob(n)))}
    assert not strangers, f"on the map alone: {sorted(strangers)}"


def test_make_lint_checks_order_and_sizes() -> None:
    """The target runs lint-imports and this file."""
    commands = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert "lint-imports" in commands and "tests/test_house.py" in commands


def test_no_module_imports_a_room_that_imports_it() -> None:
    """The circle that no contract sees: by way of an `__init__` that imports the module in its turn."""
    grimp = pytest.importorskip("grimp", reason="needs import-linter: pip install 'srft[dev]'")
    assert not own_rooms(grimp.build_graph("srft", "srft_kernels", cache_dir=None))
    graph = grimp.ImportGraph()
    graph.add_import(importer="a.b.c", imported="a.b.d")
    graph.add_import(importer="a.bb", imported="a.b")
    assert not own_rooms(graph)
    graph.add_import(importer="a.b.c", imported="a")
    assert not own_rooms(graph)
    graph.add_import(importer="a", imported="a.bb")
    graph.add_import(importer="a.b", imported="a.b.c")
    assert own_rooms(graph) == ["a.b.c imports a, which imports a.bb, which imports a.b, which imports a.b.c"]


INSIDE = "\ndef planted():\n    {}\n"
TYPES_ONLY = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize(
    ("file", "code", "broken"),
    [
        ("srft/batch.py", "", None),
        ("srft/rewards/answers.py", "import srft.train\n", "rooms of srft import downward"),
        ("srft/disk.py", TYPES_ONLY.format("from srft.stop import Stopped"), "rooms of srft import downward"),
        ("srft/attic.py", '"""In no layer."""\n', "rooms of srft import downward"),
        ("srft_kernels/formulas.py", INSIDE.format("import srft.config"), "which know nothing of it"),
        ("srft_kernels/rows/gpu.py", INSIDE.format("from .. import losses"), "rooms of srft_kernels import downward"),
        ("srft_kernels/head/chunks.py", INSIDE.format("import srft_kernels"), "rooms of srft_kernels import downward"),
        ("srft/record/text.py", TYPES_ONLY.format("from srft.record.screen import Screen"), "no circles"),
        ("srft/record/files.py", INSIDE.format("from srft.record import history"), "no circles"),
        ("srft_kernels/rows/types.py", "from .cpu import row_stats\n", "no circles"),
        ("srft/data/tasks.py", INSIDE.format("import tests.numerics"), "needs nothing that is not"),
    ],
)  # fmt: skip
def test_imports_that_break_the_order_are_found(tmp_path: Path, file: str, code: str, broken: str | None) -> None:
    """Upward imports, circles and strays, also where Python would not mind: in a function or for types alone."""
    pytest.importorskip("importlinter", reason="needs import-linter: pip install 'srft[dev]'")
    for room in ("srft", "srft_kernels"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as target:
        target.write(code)
    lint = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    failed = [line for line in done.stdout.splitlines() if line.endswith(" BROKEN")]
    assert done.returncode == (0 if broken is None else 1), done.stdout + done.stderr
    assert not failed if broken is None else any(broken in line for line in failed), done.stdout


def too_long(root: Path, exceptions: dict[str, str]) -> list[str]:
    """Say which files and functions are longer than they may be, and which exceptions are not needed."""
    limits = {name: (lines, limit) for name, lines, limit in sizes(root) if lines > limit}
    faults = [
        f"{name} has {lines} lines, of {limit} at most"
        for name, (lines, limit) in limits.items()
        if name not in exceptions
    ]
    return sorted(faults) + [f"{name} needs no exception" for name in sorted(exceptions.keys() - limits.keys())]


def sizes(root: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, lines, limit) of every file and function."""
    for room in ROOMS:
        for path in (root / room).rglob("*.py"):
            name, text = str(path.relative_to(root)), path.read_text()
            yield name, len(text.splitlines()), FILE_LINES
            for function, lines in functions(ast.parse(text), ""):
                yield f"{name} {function}", lines, FUNCTION_LINES


def functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (qualified name, lines of the body) of every function that is not inside another."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(child) is not None
            before = child.body[0].end_lineno if documented else first_line(child.body[0]) - 1
            assert before is not None and child.end_lineno is not None
            yield prefix + child.name, child.end_lineno - before
        else:
            inner = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
            yield from functions(child, inner)


def first_line(statement: ast.stmt) -> int:
    """Return the line at which a statement begins, its decorators included."""
    return min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])


def own_rooms(graph: Any) -> list[str]:
    """Name the modules of an import graph that import a package they lie in and that comes back to them."""
    return [
        f"{module} imports " + ", which imports ".join(chain)
        for module in sorted(graph.modules)
        for package in sorted(graph.find_modules_directly_imported_by(module))
        if module.startswith(package + ".") and (chain := graph.find_shortest_chain(package, module))
    ]


def imported(tree: ast.Module) -> set[str]:
    """Return the absolute names that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names
