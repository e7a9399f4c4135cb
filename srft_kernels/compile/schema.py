"""The arguments of a public function as those of a torch op: tensors, str, int, bool and dtype."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import HeadOptions

# torch has one table of ops for a process, and a copy of this package must not take the place of its original
NAMESPACE = __name__.rsplit(".", 2)[0].replace(".", "_")
# a captured graph would keep the workspace of logits, and the numbers that come from the host
_TAGS = (torch.Tag.cudagraph_unsafe,)


@dataclass(frozen=True)
class Argument:
    """One argument of a function, and the arguments of its op that stand for it.

    A number that is or may be a float, or that may be a tensor, becomes a 0-d float64 tensor on the CPU, which
    holds it exactly: a graph is compiled again for each value of a float, but not of a tensor. What may be a
    number or a string becomes an argument for each; a named tuple, one for each field; a process group, its name.
    The fields of HeadOptions have the names that they have as arguments of a public op.
    """

    name: str
    kinds: tuple[Any, ...]
    optional: bool
    fields: tuple[Argument, ...]

    @staticmethod
    def of(name: str, hint: Any, optional: bool = False) -> Argument:
        """The argument ``name`` with type hint ``hint``, or also None if ``optional``."""
        members = typing.get_args(hint) or (hint,)
        as_tensor = {int, float, Tensor} if {float, Tensor} & set(members) else {Tensor}
        kinds = dict.fromkeys(Tensor if x in as_tensor else x for x in members if x is not type(None))
        optional = optional or len(kinds) > 1 or type(None) in members
        fields: tuple[Argument, ...] = ()
        if issubclass(members[0], tuple):
            inner = typing.get_type_hints(members[0])
            prefix = "" if members[0] is HeadOptions else f"{name}_"
            fields = tuple(Argument.of(f"{prefix}{field}", x, optional) for field, x in inner.items())
        return Argument(name, tuple(kinds), optional, fields)

    def parts(self) -> dict[str, Any]:
        """Names and type hints of the op's arguments."""
        parts = {part: hint for field in self.fields for part, hint in field.parts().items()}
        for kind in () if self.fields else self.kinds:
            name = self.name if kind is self.kinds[0] else f"{self.name}_{kind.__name__}"
            hint = str if kind is dist.ProcessGroup else kind
            parts[name] = hint | None if self.optional else hint
        return parts

    def split(self, value: Any) -> list[Any]:
        """The op's arguments for ``value``; traced."""
        if self.fields:
            values = [None] * len(self.fields) if value is None else list(value)
            return [part for field, x in zip(self.fields, values, strict=True) for part in field.split(x)]
        if self.kinds[0] is dist.ProcessGroup:
            return [None if value is None else value.group_name]
        if self.kinds[0] is Tensor and isinstance(value, int | float):
            # only as the factor of a tensor is a float a variable of the graph, and not a constant
            value = torch.ones((), dtype=torch.float64, device="cpu") * value
        parts = []
        for kind in self.kinds[:-1]:
            parts.append(value if isinstance(value, kind) else None)
            value = None if isinstance(value, kind) else value
        return [*parts, value]

    def join(self, rest: Iterator[Any]) -> Any:
        """Inverse of ``split``, in the op; takes its arguments from ``rest``."""
        if self.fields:
            values = [field.join(rest) for field in self.fields]
            return None if self.optional and values[0] is None else self.kinds[0](*values)
        value: Any = next((x for x in [next(rest) for _ in self.kinds] if x is not None), None)
        if self.kinds[0] is dist.ProcessGroup and value is not None:
            return dist.distributed_c10d._resolve_process_group(value)
        is_number = isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64
        return value.item() if is_number and value.device.type == "cpu" else value


class Schema:
    """The arguments of a function and of its ops."""

    def __init__(self, function: Callable[..., Any]):
        """Read the type hints of ``function``."""
        hints = typing.get_type_hints(function)
        self.result_type = hints.pop("return")
        self._arguments = [Argument.of(name, hint) for name, hint in hints.items()]
        self._parts = {part: hint for argument in self._arguments for part, hint in argument.parts().items()}

    def split(self, values: dict[str, Any]) -> dict[str, Any]:
        """The op's arguments by name, from the function's; traced."""
        parts = self.named([x for argument in self._arguments for x in argument.split(values[argument.name])])
        hidden = parts["hidden_states"]
        if torch.is_autocast_enabled(hidden.device.type):
            # as the function does, but autocast is off where the op runs
            parts["lm_head_weight"] = parts["lm_head_weight"].to(hidden.dtype)
        return parts

    def named(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Anything that is in the order of the op's arguments, by their names."""
        return dict(zip(self._parts, flat, strict=True))

    def join(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Inverse of ``split``, in the op."""
        rest = iter(parts.values())
        return {argument.name: argument.join(rest) for argument in self._arguments}

    def define(
        self, name: str, implementation: Callable, fake: Callable, returns: Any, **first: Any
    ) -> tuple[Any, Any]:
        """The op ``name``, whose arguments are ``first`` and then its own, and its twin that writes to weight_grad.

        Args:
            name: Also of the twin, with a suffix.
            implementation: What runs.
            fake: Makes tensors of the same shapes and dtypes.
            returns: Type hint of the result.
            **first: Type hints of arguments that the function has not.
        """
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(n, kind, annotation=x) for n, x in (first | self._parts).items()]
        signature = inspect.Signature(parameters, return_annotation=returns)
        implementation.__signature__ = signature  # type: ignore[attr-defined]
        ops = []
        for suffix, mutated in (("", ()), ("_into_weight_grad", ("weight_grad",))):
            op = torch.library.custom_op(
                f"{NAMESPACE}::{name}{suffix}", implementation, mutates_args=mutated, tags=_TAGS
            )
            op.register_fake(fake)
            ops.append(op)
        return ops[0], ops[1]
