"""The Python of the GPU path without a GPU: tensors that say they are on one, and what is done with them, counted."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from srft_kernels.head import loss as known_loss
from srft_kernels.rows import gpu as row_kernels
from srft_kernels.rows import rounding

# the package exports functions of these names
_LOGPROBS, _LOGITS = (sys.modules[f"srft_kernels.{name}"] for name in ("linear_logprobs", "logprobs_from_logits"))
OPS = [
    known_loss._AttachGradients, _LOGPROBS._LinearLogprobs, _LOGPROBS._FrozenLogprobs, _LOGITS._LogprobsFromLogits
]  # fmt: skip
GPU = torch.device("cuda", 0)
# move no memory, or write over all of their first argument
_NO_TRAFFIC = {"detach", "empty", "new_empty", "empty_like", "empty_strided", "set_", "_assert_async"}
_OVERWRITES = {"copy_", "fill_", "zero_"}


class _OnDevice(TorchFunctionMode):
    """Tensors say that they are on a GPU, and what is made for a GPU is made on ``real``."""

    def __init__(self, real: str):
        super().__init__()
        self._real = torch.device(real)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.is_cuda.__get__:
            return True
        if func == Tensor.device.__get__:
            return GPU

        def moved(x):
            return self._real if isinstance(x, torch.device) or isinstance(x, str) and x == "cuda" else x

        kwargs = kwargs or {}
        if kwargs.get("device") == "meta":
            # takes no memory on a GPU either
            with torch.utils._python_dispatch._disable_current_modes():
                return func(*args, **kwargs)
        return func(*tree_map(moved, args), **tree_map(moved, kwargs))


def _wide_product(name: str, args: tuple, kwargs: dict) -> Tensor:
    """A product of 16-bit matrices in the dtype that is asked for, which torch has for GPUs only."""
    total = args[0] if name == "addmm" else None
    left, right, dtype = args[-3:]
    out = kwargs["out"] if "out" in kwargs else left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    if out.is_meta:
        return out
    product = left.to(dtype) @ right.to(dtype) * kwargs.get("alpha", 1)
    return out.copy_(product if not kwargs.get("beta", 1) or total is None else total * kwargs["beta"] + product)


class Traffic(TorchDispatchMode):
    """Bytes that are read and written by each operation, calls of it, and memory in use."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []
        self.live = self.peak = 0
        self._held: set[int] = set()

    def launch(self, given: dict) -> None:
        """Count a launch with the arguments ``given``: of the row kernel one read for each pass, and the gradient."""
        if "x_ptr" in given:
            name, read, written = "scaled_kernel", given["x_ptr"], given["out_ptr"]
            self.bytes[name] += _size(read) + _size(written)
        else:
            name, read, written = "row_kernel", given["z_ptr"], given["dz_ptr"]
            passes = int(given["GRADIENT"]) + int(not given["STATS_KNOWN"])
            self.bytes[name] += passes * _size(read) + (_size(written) if given["GRADIENT"] else 0)
        self.calls.append((name, [tuple(read.shape)]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        wide = name in ("mm", "addmm") and "dtype" in func._overloadname
        result = _wide_product(name, args, kwargs) if wide else func(*args, **kwargs)
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in written:
            self._hold(x.untyped_storage())
        if not func.is_view and name not in _NO_TRAFFIC:
            read = [x for key, x in [*enumerate(args), *kwargs.items()] if key != "out"]
            read = [x for x in tree_leaves(read) if isinstance(x, Tensor)]
            self.calls.append((name, [tuple(x.shape) for x in read]))
            if name in _OVERWRITES or (name == "addmm" and kwargs.get("beta", 1) == 0):
                read = read[1:]
            self.bytes[name] += sum(map(_size, [*read, *written]))
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            self._held.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def device_path(real: str) -> Iterator[Traffic]:
    """Inside, tensors say they are on a GPU, and every operation is counted.

    Args:
        real: "cpu", where the interpreter must run the kernels, or "meta": no memory, nothing is computed.
    """
    traffic = Traffic()

    class Launcher:
        def __init__(self, kernel):
            self._kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                given = dict(zip(self._kernel.arg_names, args, strict=False)) | constants
                with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                    traffic.launch(given)
                    if real != "meta":
                        self._kernel[grid](*args, **constants)

            return launch

    mode = _OnDevice(real)

    def in_mode(backward):
        # the engine leaves such modes at the door
        def call(*args):
            with mode:
                return backward(*args)

        return staticmethod(call)

    with pytest.MonkeyPatch.context() as patch:
        for op in OPS:
            patch.setattr(op, "backward", in_mode(op.backward))
        patch.setattr(row_kernels, "_row_kernel", Launcher(row_kernels._row_kernel))
        patch.setattr(rounding, "_scaled_kernel", Launcher(rounding._scaled_kernel))
        patch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
        with mode, traffic:
            yield traffic
