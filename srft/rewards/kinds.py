"""A verifier by its name: one that is built in, a reasoning-gym task's own, or a function in a file of the user's."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srft.rewards.answers import after_thinking
from srft.rewards.gym import REASONING_GYM, reasoning_gym_dataset
from srft.rewards.verifiers import VERIFIERS, Verifier, math


def check_kind(kind: str) -> None:
    """Refuse a verifier name that cannot be right, without loading anything.

    Args:
        kind: "exact", "numeric", "countdown", "math", "reasoning_gym:<task>" or "path/to/file.py:function".

    Raises:
        ValueError: On an unknown name or a missing file.
    """
    if kind in VERIFIERS or (kind.startswith(REASONING_GYM) and len(kind) > len(REASONING_GYM)):
        return
    path, colon, function = kind.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"reward {kind!r}: no such file {path}")
        if not function.isidentifier():
            raise ValueError(f"reward {kind!r}: {function!r} is not a function name; write path/to/file.py:function")
        return
    near = difflib.get_close_matches(kind, VERIFIERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown reward {kind!r}; {hint}choose from {', '.join(VERIFIERS)}, reasoning_gym:<task>, "
        "path/to/file.py:function"
    )


def load_verifier(kind: str) -> Verifier:
    """Return the verifier of that name, imported and warmed up so that its first item is as fast as the rest.

    Args:
        kind: As in :func:`check_kind`.

    Raises:
        ValueError: On an unknown name, a missing file, function, package or task.
    """
    check_kind(kind)
    if kind.startswith(REASONING_GYM):
        return _reasoning_gym(kind.removeprefix(REASONING_GYM))
    if kind not in VERIFIERS:
        return _custom(kind)
    if kind == "math":
        try:
            import latex2sympy2_extended  # noqa: F401
        except ImportError as error:
            raise ValueError("the math reward needs math-verify: pip install 'srft[train]'") from error
        # it logs every formula that it cannot read
        logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
        math(r"\boxed{\frac{\sqrt{2}}{2}}", r"1/\sqrt{2}", {})
    return VERIFIERS[kind]


def _reasoning_gym(name: str) -> Verifier:
    dataset = reasoning_gym_dataset(name, size=1, seed=0)

    def verify(completion: str, answer: Any, row: dict[str, Any]) -> float:
        text = after_thinking(completion)
        tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        return float(dataset.score_answer((tagged[-1] if tagged else text).strip(), row))

    return verify


def _custom(spec: str) -> Verifier:
    path, _, function = spec.rpartition(":")
    file = Path(path)
    sys.path.insert(0, str(file.resolve().parent))
    module_spec = importlib.util.spec_from_file_location(f"srft_custom_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # dataclasses and pickle look the module up by name
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    verifier = getattr(module, function, None)
    if not callable(verifier):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{path} has no function {function!r}; it has: {', '.join(names) or 'none'}")
    _check_signature(spec, verifier)
    return verifier


_SIGNATURE = "def judge(completion, answer, row) -> float"


def _check_signature(spec: str, verifier: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with (completion, answer, row), knowing other trainers' rewards."""
    try:
        signature = inspect.signature(verifier)
    except (TypeError, ValueError):
        # something built in: only calling it can tell
        return
    name, names = spec.rpartition(":")[2], set(signature.parameters)
    if names & {"solution_str", "data_source"}:
        call = "row.get('data_source'), completion, answer, row.get('extra_info')"
        raise ValueError(
            f"{spec} has verl's signature {signature}; write {_SIGNATURE}: return {name}({call}), where a score in a "
            "dict is returned as a number, and set reward.kind to it"
        )
    if names & {"completions", "prompts", "queries", "responses"}:
        raise ValueError(
            f"{spec} takes whole batches, as TRL's rewards do, {signature}; it is called once a completion here: write "
            f"{_SIGNATURE}: return {name}(completions=[completion], answer=[answer])[0], with what else it needs, and "
            "set reward.kind to it"
        )
    try:
        signature.bind("completion", "answer", {})
    except TypeError as error:
        raise ValueError(f"{spec} has the signature {signature}, expected {_SIGNATURE} ({error})") from None
    if inspect.iscoroutinefunction(verifier):
        raise ValueError(f"{spec} is an async function; write {_SIGNATURE}, which may call asyncio.run inside")
