"""Triton's own way from a launch to machine code, without a GPU: its generated argument binder and its compiler.

The interpreter and ``triton.compile`` use neither the binder nor what a launch passes it, so that a kernel may pass
their tests and fail at its first launch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import srft_kernels
from srft_kernels import objectives
from srft_kernels.formulas import TokenFormula
from srft_kernels.rows import gpu as row_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """One launch, as Triton understood it."""

    name: str
    signature: dict[str, Any]
    """Argument: its type, "constexpr" for what is compiled in."""
    constants: dict[str, Any]
    """Argument: value, of what is compiled in."""
    multiples: frozenset[str]
    """Arguments known to be multiples of 16, so that loads and stores may be vectors."""
    compiled: Any
    """The compiled kernel, or None."""

    @property
    def variant(self) -> tuple:
        """What a launch must share with another to share its machine code."""
        constants = tuple((name, getattr(x, "__name__", x)) for name, x in sorted(self.constants.items()))
        return self.name, *self.signature.items(), constants, self.multiples


class _Driver:
    """Stands for the driver of a GPU, as far as a launch asks it before it runs anything."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded_launches(target: str = "sm_90", compiled: bool = True) -> Iterator[list[Launch]]:
    """Inside, CPU tensors go to the kernels, whose launches end where the GPU would run them.

    Yields a list of the launches that found no machine code compiled for an earlier one.

    Args:
        target: Key of TARGETS.
        compiled: Compile; False ends a launch behind the binder, and records every one.
    """
    launches: list[Launch] = []
    run, compile_kernel = JITFunction.run, JITFunction._do_compile
    driver, active = triton.runtime.driver, triton.runtime.driver._active

    def recorded_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        kernel = compile_kernel(self, key, signature, device, constexprs, options, attrs, warmup) if compiled else None
        names = list(signature)
        constants = {names[path[0]]: value for path, value in constexprs.items() if len(path) == 1}
        multiples = frozenset(names[path[0]] for path, value in attrs.items() if ["tt.divisibility", 16] in value)
        launches.append(Launch(self.__name__, dict(signature), constants, multiples, kernel))
        return kernel

    def recorded_run(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    for kernel in device_functions().values():
        kernel.device_caches.clear()
    driver.set_active(_Driver(TARGETS[target]))
    JITFunction.run, JITFunction._do_compile = recorded_run, recorded_compile
    row_kernels.INTERPRETED = True
    try:
        yield launches
    finally:
        row_kernels.INTERPRETED = False
        JITFunction.run, JITFunction._do_compile = run, compile_kernel
        driver._active = active
        for kernel in device_functions().values():
            kernel.device_caches.clear()


def device_functions() -> dict[str, JITFunction]:
    """Every kernel and device function of the package, by module and name."""
    found = {}
    for module in pkgutil.walk_packages(srft_kernels.__path__, "srft_kernels."):
        if ".integrations" in module.name:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.name:
                found[f"{module.name}.{name}"] = value
    return found


def name_of(formula: TokenFormula) -> str:
    """Such as "grpo_token" or "grpo_token-clip_policy"."""
    return "-".join(x.__name__ for x in formula if x is not None)


def token_formulas() -> dict[str, TokenFormula]:
    """The formulas that a kernel inlines, each with every term that a loss chooses, by name."""
    records = (objectives.CROSS_ENTROPY, objectives.GRPO, objectives.SRFT, objectives.STREAMS)
    return {name_of(x): x for record in records for x in record.formulas.values()}


def scalars_of(formula: TokenFormula) -> int:
    """How many numbers ``formula`` takes."""
    names = [name for name in formula.token.arg_names if not name.isupper()]
    first = next((i for i, name in enumerate(names) if name in ("clip_low", "sft_coef")), len(names))
    return len(names) - first


def arguments_of(formula: TokenFormula, count: int) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Inputs [K, count] and scalars, such as ``formula`` takes."""
    names = [name for name in formula.token.arg_names[2:] if not name.isupper()]
    scalars = scalars_of(formula)
    return torch.ones(len(names) - scalars, count), (0.5,) * scalars
