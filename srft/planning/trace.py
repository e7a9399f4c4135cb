"""Memory of a policy's forward and backward pass, counted on tensors that have shapes and no numbers.

The pass is the trainer's own ``compute`` on a model of few blocks; more blocks add what the last one added. A tensor
is counted from the operation that makes it to the moment Python and autograd let go of it, so that what is held for
backward, recomputed or kept in two precisions needs no formula.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from srft.batch import Batch
from srft.config import Config
from srft.planning.models import build_policy
from srft.policy.model import compute, in_short, prepare_policy
from srft.policy.parallel import World

_ATTENTION = "srft_plan"
# Blocks of the two models that are traced: the first block of a backward pass has no successor, so one is too few.
_FEW, _MORE = 2, 3
_MOMENTS = ("forward", "between", "backward", "embedding")
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass(frozen=True)
class Held:
    """Bytes that are held at one moment, beside parameters and their gradients.

    Args:
        activations: Whatever the pass made.
        copies: Parameters in the precision of the computation.
    """

    activations: int
    copies: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.activations + self.copies

    def grown(self, other: Held, times: int) -> Held:
        """Return this moment of a model with more blocks.

        Args:
            other: The same moment with one block more.
            times: Blocks more than this has.
        """
        return Held(
            self.activations + times * (other.activations - self.activations),
            self.copies + times * (other.copies - self.copies),
        )


@dataclass(frozen=True)
class BodyPasses:
    """What the body of a policy holds in one micro-batch.

    Args:
        forward: At the worst moment of the forward pass.
        between: While the head computes the loss.
        backward: At the worst moment of the backward pass through the blocks.
        embedding: At the worst moment after it, when the embedding's gradient is made; 0 where it has none.
        flops: Of its matrix products, both passes together, without those of attention.
        moved: Bytes that its other operations read and write, each for itself.
    """

    forward: Held
    between: Held
    backward: Held
    embedding: Held
    flops: int
    moved: int


def trace_body(shape: PretrainedConfig, config: Config, tokens: int, rows: int, *, checkpointing: bool) -> BodyPasses:
    """Count what the body holds in one micro-batch.

    Args:
        shape: Of the model, from ``models.read_shape``.
        config: The whole configuration: precision and adapters.
        tokens: Of the micro-batch, >= 1.
        rows: Tokens whose hidden states the head takes, 1 to ``tokens``.
        checkpointing: Recompute activations in backward.

    Raises:
        ValueError: When the model computes something that depends on numbers, which shapes do not have.
    """
    layers = shape.get_text_config().num_hidden_layers
    few, more = min(_FEW, layers), min(_MORE, layers)
    try:
        first = _traced(with_layers(shape, few), config, tokens, rows, checkpointing)
        second = first if more == few else _traced(with_layers(shape, more), config, tokens, rows, checkpointing)
    except Exception as error:  # whatever the code of a model raises on tensors without numbers
        raise ValueError(
            f"the memory of {shape.model_type} cannot be planned from shapes alone: {in_short(error)}; "
            "run it for one step instead: train.steps=1 measures a worst-case micro-batch first"
        ) from error
    times = layers - few
    none = Held(0, 0)
    forward, between, backward, embedding = (
        first.worst.get(name, none).grown(second.worst.get(name, none), times) for name in _MOMENTS
    )
    return BodyPasses(
        forward, between, backward, embedding,
        flops=first.flops + times * (second.flops - first.flops),
        moved=first.moved + times * (second.moved - first.moved),
    )  # fmt: skip


def with_layers(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the shape of the same model with fewer blocks.

    Args:
        shape: Of the whole model.
        layers: Blocks, at most as many as it has.
    """
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shape


def _traced(
    shape: PretrainedConfig, config: Config, tokens: int, rows: int, checkpointing: bool
) -> _Meter:
    AttentionInterface.register(_ATTENTION, _flash_attention)
    AttentionMaskInterface.register(_ATTENTION, _no_mask)
    # compiled blocks keep no more than they do as they are written, and cannot be traced
    options = config.model.model_copy(update={"gradient_checkpointing": checkpointing, "compile": False})
    with torch.device("meta"):
        # or this machine would make the weights of a model that it has no room for
        assert torch.empty(1).is_meta, "tensors of the meta device have memory"
        model = build_policy(shape, config)
        prepare_policy(model, options, tokens, World(device=torch.device("meta")))
    model.set_attn_implementation(_ATTENTION)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(torch.empty(1), FakeTensor), "fake tensors have memory"
        _to_cpu(model)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        batch = _batch(tokens, rows)
        meter = _Meter(model, model.get_output_embeddings().weight)
        with meter:
            with meter.moment("forward"):
                hidden_states, _ = compute(model, batch, config.compute_dtype, _without_head)
            with meter.moment("between"):
                gradient = torch.empty_like(hidden_states)
            with meter.moment("backward"):
                hidden_states.backward(gradient)
    return meter


def _without_head(hidden_states: Tensor, _weight: Tensor, **_options: object) -> Tensor:
    return hidden_states


def _to_cpu(model: nn.Module) -> None:
    """Move a model of the meta device to a CPU, whose tensors have no memory either under a FakeTensorMode."""
    moved: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in moved:
                    moved[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = moved[p]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _batch(tokens: int, rows: int) -> Batch:
    positions = torch.zeros(tokens, dtype=torch.long)
    counted = torch.zeros(rows, dtype=torch.long)
    vector = torch.zeros(rows)
    bounds = torch.zeros(2, dtype=torch.int32)
    flags = vector.bool()
    return Batch(
        positions, positions, bounds, tokens, counted, counted, bounds, vector, flags, flags, vector, None, [], bounds
    )  # fmt: skip


class _Meter(TorchDispatchMode):
    """Adds up the storages that are alive, and keeps the worst of each moment."""

    def __init__(self, model: nn.Module, head: Tensor):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._copies: set[int] = set()
        self._now = self._copied = 0
        self._moment = ""
        self.worst: dict[str, Held] = {}
        self.flops = self.moved = 0
        own = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self._parameters = {p.untyped_storage()._cdata for p in own}
        self._head = head.untyped_storage()._cdata

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """Note the worst of a ``with`` statement under a name."""
        self._moment = name
        self._look()
        yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding_dense_backward.default:
            self._moment = "embedding"
        result = func(*args, **(kwargs or {}))
        copied = args[0].untyped_storage()._cdata if func is torch.ops.aten._to_copy.default else None
        of_parameter = copied in self._parameters
        if copied == self._head:
            self._moment = "head"  # which is planned by its own sizes
        made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        self._work(func, [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)], made)
        for tensor in made:
            self._count(tensor, of_parameter)
        return result

    def _work(self, func: Any, taken: list[Tensor], made: list[Tensor]) -> None:
        if func in _PRODUCTS:
            # [.., n, k] [.., k, m], perhaps with something of [m] to add
            self.flops += 2 * made[0].numel() * taken[-1].shape[-2]
            return
        sources = {tensor.untyped_storage()._cdata for tensor in taken}
        is_view = all(tensor.untyped_storage()._cdata in sources for tensor in made)
        if not (is_view and not func._schema.is_mutable) and "empty" not in str(func):
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *made))

    def _count(self, tensor: Tensor, is_copy: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._parameters:
            return
        self._sizes[key] = size = storage.nbytes()
        self._now += size
        if is_copy:
            self._copies.add(key)
            self._copied += size
        weakref.finalize(storage, self._gone, key)
        self._look()

    def _gone(self, key: int) -> None:
        size = self._sizes.pop(key)
        self._now -= size
        if key in self._copies:
            self._copies.discard(key)
            self._copied -= size

    def _look(self) -> None:
        if self._moment not in self.worst or self._now > self.worst[self._moment].total:
            self.worst[self._moment] = Held(self._now - self._copied, self._copied)


class _FlashAttention(torch.autograd.Function):
    """The memory of flash attention, without its numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **_options: object
) -> tuple[Tensor, None]:
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    width = value.shape[-1]
    if width != query.shape[-1]:
        value = nn.functional.pad(value, (0, query.shape[-1] - width))
    q, k, v = (x.to(dtype)[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return _FlashAttention.apply(q, k, v)[None, ..., :width], None


def _no_mask(*_args: object, **_kwargs: object) -> None:
    return None
