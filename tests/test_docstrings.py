"""Public docstrings name every argument.

The rule, for both packages and every public module, function, class and method in them:

- public: in the module's `__all__`, or without one not starting with "_"; so are methods of public classes;
- named: the argument's name stands in the docstring as a word of its own. Arguments of a class are those of
  `__init__` or its annotated fields, and stand in the docstring of the class or of `__init__`; a field may
  instead have a docstring of its own on the next line;
- a method may leave its arguments to the method of the same name of a base class or protocol of the packages.

Triton kernels, overloads, nested functions and names that start with "_" are exempt, and so is what lies behind the
public ops (`INTERNAL`): there a comment beside a field and the shapes in a sentence say more than an Args block would.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERNAL = (
    "srft_kernels/compile/",
    "srft_kernels/head/",
    "srft_kernels/presets.py",
    "srft_kernels/rows/cpu.py",
    "srft_kernels/rows/types.py",
)
MODULES = sorted(
    path
    for package in ("srft_kernels", "srft")
    for path in (ROOT / package).rglob("*.py")
    if path.name == "__init__.py" or not path.name.startswith("_")
    if not str(path.relative_to(ROOT)).startswith(INTERNAL)
)
EXEMPT_DECORATORS = ("triton.jit", "jit", "overload", "typing.overload")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Fault = tuple[int, str, list[str]]
"""Line, qualified name, arguments that the docstring does not name."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_docstrings_name_every_argument(path: Path) -> None:
    """Every public function, class and method of the module documents each of its arguments."""
    faults = [
        f"{path.relative_to(ROOT)}:{line} {name} does not name {', '.join(missing)} in its docstring"
        for line, name, missing in undocumented(ast.parse(path.read_text()), shared_method_docs())
    ]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(a, b): 'Adds a.'", ["b"]),
        ("def f(a, *, num_a): 'Adds num_a.'", ["a"]),
        ("def f(a, b):\n  '''Adds.\n\n  Args:\n    a: One.\n    b: Other.\n  '''", []),
        ("def f(a, *rest, **options): 'Adds a.'", ["rest", "options"]),
        ("def f(a): pass", ["a"]),
        ("def _f(a): pass", []),
        ("__all__ = ['g']\ndef f(a): pass\ndef g(_ctx): pass", []),
        ("@triton.jit\ndef f(a): pass", []),
        ("class C:\n  'Has x.'\n  x: int\n  y: int = 0", ["y"]),
        ("class C:\n  'Has none.'\n  x: int\n  'Documented here.'\n  y: ClassVar[int] = 0", []),
        ("class C:\n  'Has a.'\n  def __init__(self, a, b): pass", ["b"]),
        ("class C:\n  'Has none.'\n  def m(self, a): 'Does.'\n  def _m(self, a): pass", ["a"]),
        ("class P(Protocol):\n  def m(self, a): 'Takes a.'\nclass C:\n  def m(self, a): 'Does.'", []),
    ],
)
def test_the_rule_itself(source: str, missing: list[str]) -> None:
    """The check finds what is missing, and nothing else."""
    tree = ast.parse(source)
    assert [name for _, _, names in undocumented(tree, method_docs([tree])) for name in names] == missing


def undocumented(tree: ast.Module, shared_docs: dict[str, str]) -> Iterator[Fault]:
    """Yield the faults of every public function and class of a module."""
    for node in tree.body:
        if not is_public(node, exported_names(tree)):
            continue
        if isinstance(node, Function):
            missing = unnamed(arguments(node), ast.get_docstring(node) or "")
            if missing:
                yield node.lineno, node.name, missing
        elif isinstance(node, ast.ClassDef):
            yield from undocumented_in_class(node, shared_docs)


def undocumented_in_class(node: ast.ClassDef, shared_docs: dict[str, str]) -> Iterator[Fault]:
    """Yield the faults of a class: its fields and `__init__`, then its public methods."""
    methods = [child for child in node.body if isinstance(child, Function)]
    inits = [method for method in methods if method.name == "__init__"]
    names = undocumented_fields(node) + [name for init in inits for name in arguments(init)[1:]]
    missing = unnamed(names, "\n".join(ast.get_docstring(each) or "" for each in [node, *inits]))
    if missing:
        yield node.lineno, node.name, missing
    for method in methods:
        if is_public(method, exported=None):
            static = any(ast.unparse(each) == "staticmethod" for each in method.decorator_list)
            text = (ast.get_docstring(method) or "") + "\n" + shared_docs.get(method.name, "")
            missing = unnamed(arguments(method)[0 if static else 1 :], text)
            if missing:
                yield method.lineno, f"{node.name}.{method.name}", missing


def is_public(node: ast.stmt, exported: set[str] | None) -> bool:
    """Tell whether a definition is for users: in `exported`, or else without a leading underscore."""
    if not isinstance(node, Function | ast.ClassDef):
        return False
    if any(ast.unparse(each).split("(")[0] in EXEMPT_DECORATORS for each in node.decorator_list):
        return False
    return node.name in exported if exported is not None else not node.name.startswith("_")


def exported_names(tree: ast.Module) -> set[str] | None:
    """Return what the module lists in `__all__`, or None when it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def arguments(function: Function) -> list[str]:
    """Return the names a call can fill, in order, `self` and `cls` included."""
    spec = function.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return [arg.arg for arg in [*named, spec.vararg, spec.kwarg] if arg is not None]


def undocumented_fields(node: ast.ClassDef) -> list[str]:
    """Return the annotated fields that are not followed by a docstring of their own."""
    fields = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        has_docstring = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if not has_docstring and "ClassVar" not in ast.unparse(statement.annotation):
            fields.append(statement.target.id)
    return fields


def unnamed(names: list[str], docstring: str) -> list[str]:
    """Return the names that are no word of the docstring, those with a leading underscore left out."""
    return [name for name in names if not name.startswith("_") and not re.search(rf"\b{name}\b", docstring)]


def method_docs(trees: list[ast.Module]) -> dict[str, str]:
    """Join, by method name, the docstrings of all classes that others derive from or that are protocols."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    derived_from = {ast.unparse(base).split("[")[0].split(".")[-1] for node in classes for base in node.bases}
    docs: dict[str, str] = {}
    for node in classes:
        is_protocol = any(ast.unparse(base).split(".")[-1] == "Protocol" for base in node.bases)
        if is_protocol or node.name in derived_from:
            for method in node.body:
                if isinstance(method, Function):
                    docs[method.name] = docs.get(method.name, "") + "\n" + (ast.get_docstring(method) or "")
    return docs


@functools.cache
def shared_method_docs() -> dict[str, str]:
    """Return `method_docs` of both packages."""
    return method_docs([ast.parse(path.read_text()) for path in MODULES])
