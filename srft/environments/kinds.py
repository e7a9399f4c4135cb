"""An environment by its name: a built-in one, or a class in a file of the user's."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from srft.environments.calculator import Calculator


class Environment(Protocol):
    """One conversation; made by ``(answer, row)`` of the example that it is about."""

    def step(self, text: str) -> str | None:
        """Answer a turn of the policy.

        Args:
            text: What the policy said in this turn.

        Returns:
            What is said to it, or None when the conversation is over.
        """

    # and, where it judges by itself: def reward(self) -> float, called once when the conversation is over or was cut


Maker = Callable[[Any, dict[str, Any]], Environment]
_BUILT_IN: dict[str, Maker] = {"calculator": Calculator}
_SHAPE = (
    "class Name: def __init__(self, answer, row), def step(self, text) -> str | None and, where it judges by itself, "
    "def reward(self) -> float"
)


def check_environment(name: str) -> None:
    """Refuse the name of an environment that cannot be right, without loading anything.

    Args:
        name: "calculator" or "path/to/file.py:Class".

    Raises:
        ValueError: On an unknown name or a missing file.
    """
    if name in _BUILT_IN:
        return
    path, colon, word = name.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"env.name={name}: no such file {path}")
        if not word.isidentifier():
            raise ValueError(f"env.name={name}: {word!r} is not a class name; write path/to/file.py:Class")
        return
    near = difflib.get_close_matches(name, _BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"env.name: expected {', '.join(_BUILT_IN)} or path/to/file.py:Class, got {name!r}{hint}")


def load_environment(name: str) -> Maker:
    """Return what makes an environment for each conversation.

    Args:
        name: As in :func:`check_environment`.

    Raises:
        ValueError: On an unknown name, a file that raises, or a class that is missing or has not what it needs.
    """
    check_environment(name)
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    path, _, word = name.rpartition(":")
    file = Path(path).resolve()
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"srft_env_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look the module up by name
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{told(error, file)}; mend the file") from error
    maker = getattr(module, word, None)
    if not isinstance(maker, type):
        names = [name for name, value in vars(module).items() if isinstance(value, type) and not name.startswith("_")]
        raise ValueError(f"{path} has no class {word!r}; it has: {', '.join(names) or 'none'}")
    _check_shape(name, maker)
    return maker


def _check_shape(name: str, maker: type) -> None:
    step = getattr(maker, "step", None)
    if not callable(step):
        raise ValueError(f"{name} has no method step; write {_SHAPE}")
    if inspect.iscoroutinefunction(step):
        raise ValueError(f"step of {name} is an async function; write {_SHAPE}, which may call asyncio.run inside")
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        (name, maker, ("answer", {})), (f"step of {name}", step, ("self", "text"))
    ]  # fmt: skip
    if (reward := getattr(maker, "reward", None)) is not None:
        calls.append((f"reward of {name}", reward, ("self",)))
    for what, call, arguments in calls:
        try:
            inspect.signature(call).bind(*arguments)
        except TypeError as error:
            found = inspect.signature(call)
            raise ValueError(f"{what} has the signature {found}, expected {_SHAPE} ({error})") from None


def told(error: BaseException, file: Path | None) -> str:
    """Say in one line what an error of an environment is, and where in its file it arose.

    Args:
        error: As caught.
        file: The user's, or None for a built-in environment.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file}:{frames[-1].lineno}" if frames else str(file or "it")
    if isinstance(error, SyntaxError) and error.filename == str(file):
        place = f"{file}:{error.lineno}"
    return f"{place} raised {type(error).__name__}: {' '.join(str(error).split())}"
