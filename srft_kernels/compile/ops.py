"""The ops under torch.compile: each public function becomes one or two nodes of the graph and is not traced.

The implementation of a node is the eager code itself, so checks, chunks, kernels and results are the same, and
errors are raised when the graph runs. A loss is one node: it returns the values, then the gradients, which a second
node attaches to the loss. linear_logprobs is a node in the graph of forward and another in that of backward; around
them, linear_policy_loss leaves the loss of the caller to the tracer.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._numbers import plain_arguments
from ..head.arguments import make_head
from ..head.chunks import compute_dtype
from ..head.gradients import Gradients
from ..head.last_gradient import last_gradient, without_graph
from ..head.sweep import Given, When, sweep
from ..objectives.record import LossRecord
from ..rows.types import Coefficients, Stats
from ..types import HeadOptions, Wanted
from .schema import NAMESPACE, Schema

P = ParamSpec("P")
R = TypeVar("R")

# arguments of an op that may have a gradient, in the order of Inputs
_DIFFERENTIABLE = ("hidden_states", "lm_head_weight", "bias", "lora_a", "lora_b")


def _dispatch(function: Callable[P, R], traced: Callable[[dict[str, Any]], Any]) -> Callable[P, R]:
    """``function``, and under torch.compile ``traced`` of its arguments by name."""
    signature = inspect.signature(function)
    eager: Any = function

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        positional, named = plain_arguments(args, kwargs)
        if not torch.compiler.is_compiling():
            return eager(*positional, **named)
        given = signature.bind(*positional, **named)
        given.apply_defaults()
        return traced(given.arguments)

    return call


def _wants(parts: dict[str, Any]) -> list[bool]:
    """Whether each of ``_DIFFERENTIABLE`` needs a gradient; traced."""
    inputs = [parts[name] for name in _DIFFERENTIABLE]
    return [x is not None and torch.is_grad_enabled() and x.requires_grad for x in inputs]


def _fills(parts: dict[str, Any], wants: Sequence[bool]) -> bool:
    """The gradient of the weight goes to weight_grad, so that autograd gets none."""
    return parts["weight_grad"] is not None and wants[_DIFFERENTIABLE.index("lm_head_weight")]


def _wanted(parts: dict[str, Any], wants: Sequence[bool], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Those of ``gradients``, one for each of ``_DIFFERENTIABLE``, that autograd gets."""
    named = {name: x for name, x, want in zip(_DIFFERENTIABLE, gradients, wants, strict=True) if want}
    if _fills(parts, wants):
        del named["lm_head_weight"]
    return named


def _or_empty(gradients: Sequence[Tensor | None], hidden: Tensor) -> list[Tensor]:
    """``gradients`` with a tensor of no elements for None, which an op cannot return."""
    dtype = compute_dtype(hidden.dtype)
    return [torch.empty(0, dtype=dtype, device=hidden.device) if x is None else x for x in gradients]


def _gradients_like(parts: dict[str, Any], wants: Sequence[bool], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Uninitialised gradients of ``_DIFFERENTIABLE``, in ``dtype`` or their own; see ``_or_empty``."""
    names = _wanted(parts, wants, [parts[name] for name in _DIFFERENTIABLE])
    inputs = [parts[name] if name in names else None for name in _DIFFERENTIABLE]
    gradients = [None if x is None else x.new_empty(x.shape, dtype=dtype) for x in inputs]
    return _or_empty(gradients, parts["hidden_states"])


def _tensors(count: int) -> Any:
    """Type hint of ``count`` tensors."""
    return types.GenericAlias(tuple, (Tensor,) * count)


@torch.library.custom_op(f"{NAMESPACE}::attach", mutates_args=())
def _attach(loss: Tensor, totals: list[Tensor], inputs: list[Tensor], filled: Tensor | None) -> Tensor:
    """``loss``, with ``totals`` for gradients of ``inputs``, each rounded once, after the upstream gradient.

    ``filled`` is a weight whose gradient is in weight_grad.
    """
    return loss.clone()


@_attach.register_fake
def _(loss: Tensor, totals: list[Tensor], inputs: list[Tensor], filled: Tensor | None) -> Tensor:
    return torch.empty_like(loss)


def _save_totals(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, totals, leaves, filled = inputs
    # the leaves only for the error of a second derivative; where backward is traced, they are not kept
    ctx.save_for_backward(*totals, *leaves)
    ctx.dtypes, ctx.filled = [x.dtype for x in leaves], filled is not None


def _scale_totals(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
    if ctx.filled:
        torch._assert_async(
            dloss == 1,
            "the gradient of the weight is in weight_grad already, for a loss that enters backward with factor 1; "
            "put the factor into the weights of the tokens, or drop weight_grad",
        )
    totals, leaves = ctx.saved_tensors[: len(ctx.dtypes)], ctx.saved_tensors[len(ctx.dtypes) :]
    with torch.no_grad():
        scaled = [(total * dloss).to(dtype) for total, dtype in zip(totals, ctx.dtypes, strict=True)]
    return None, [None] * len(totals), list(without_graph(scaled, leaves)), None


_attach.register_autograd(_scale_totals, setup_context=_save_totals)


def loss_op(
    record: LossRecord, *, unreduced: Callable[..., Tensor] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the loss of ``record``, whose terms a graph must know before there is a loss, a node.

    ``unreduced``, of its arguments by name, is traced in its place for the reduction "none".
    """
    terms = record.terms

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        schema = Schema(function)
        call: Any = function

        def implementation(wants: list[bool], *flat: Any) -> tuple[Tensor, ...]:
            parts = schema.named(flat)
            for name, want in zip(_DIFFERENTIABLE, wants, strict=True):
                if want:
                    parts[name] = parts[name].detach().requires_grad_()
            with torch.enable_grad():
                result = call(**schema.join(parts))
            loss, *vectors = result[:5] if terms else (result, *(result.new_empty(0) for _ in range(4)))
            assert not terms or tuple(result.terms) == terms, f"{function.__name__} has the terms {list(result.terms)}"
            sums = torch.stack(tuple(result.terms.values())) if terms else result.new_empty(0)
            node, totals = loss.grad_fn, [None] * len(wants)
            if node is not None:
                totals = node.gradients.totals(node.tokens.put)
            return loss.detach(), *vectors, sums, *_or_empty(totals, parts["hidden_states"])

        def fake(wants: list[bool], *flat: Any) -> tuple[Tensor, ...]:
            parts = schema.named(flat)
            labels, dtype = parts["labels"], compute_dtype(parts["hidden_states"].dtype)
            dtypes = (dtype, dtype, dtype, torch.bool if terms else dtype)
            vectors = [labels.new_empty(labels.shape if terms else 0, dtype=x) for x in dtypes]
            loss, sums = labels.new_empty((), dtype=dtype), labels.new_empty(len(terms), dtype=dtype)
            return loss, *vectors, sums, *_gradients_like(parts, wants, dtype)

        returns = _tensors(6 + len(_DIFFERENTIABLE))
        ops = schema.define(function.__name__, implementation, fake, returns, wants=list[bool])

        def traced(values: dict[str, Any]) -> Any:
            if unreduced is not None and values["reduction"] == "none":
                return unreduced(values)
            parts = schema.split(values)
            wants = _wants(parts)
            # torch 2.11 compiles no index that is a bool
            op = ops[1] if _fills(parts, wants) else ops[0]
            detached = [x.detach() if isinstance(x, Tensor) else x for x in parts.values()]
            loss, logprobs, entropy, ratio, clipped, sums, *totals = op(wants, *detached)
            if any(wants):
                wanted = _wanted(parts, wants, totals)
                filled = parts["lm_head_weight"] if _fills(parts, wants) else None
                loss = _attach(loss, list(wanted.values()), [parts[name] for name in wanted], filled)
            if not terms:
                return loss
            named = dict(zip(terms, sums.unbind(), strict=True))
            return schema.result_type(loss, logprobs, entropy, ratio, clipped, named)

        return _dispatch(function, traced)

    return decorate


def logprobs_op(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``linear_logprobs`` a node in the graph of forward and one in that of backward."""
    schema = Schema(function)

    def head_of(flat: Sequence[Any]) -> tuple[Any, Any, Any]:
        values = schema.join(schema.named(flat))
        del values["entropy_grad"]
        if "options" not in values:
            values["options"] = HeadOptions(*(values.pop(name) for name in HeadOptions._fields))
        return make_head(**values)

    @torch.no_grad()
    def forward(frozen: bool, *flat: Any) -> list[Tensor]:
        inputs, head, tokens = head_of(flat)
        if not frozen:
            return [tokens.put(x) for x in sweep(head, When.NEVER)]
        grads = Gradients(head, inputs, Wanted(hidden=True), None)
        known = sweep(head, When.ONE, grads)
        return [tokens.put(x) for x in (known.logprobs, known.entropy, grads.directions())]

    def fake_forward(frozen: bool, *flat: Any) -> list[Tensor]:
        parts = schema.named(flat)
        labels, hidden = parts["labels"], parts["hidden_states"]
        shapes = [labels.shape] * 2 + ([hidden.shape] if frozen else [labels.shape] * 2)
        return [labels.new_empty(shape, dtype=compute_dtype(hidden.dtype)) for shape in shapes]

    @torch.no_grad()
    def gradients(
        wants: list[bool], dlogprobs: Tensor | None, dentropy: Tensor | None, known: list[Tensor], *flat: Any
    ) -> tuple[Tensor, ...]:
        inputs, head, tokens = head_of(flat)
        stats = Stats(*(tokens.select(x) for x in known))
        dlogp = torch.zeros_like(stats.logprobs) if dlogprobs is None else tokens.take(dlogprobs)
        dentropy = None if dentropy is None else tokens.take(dentropy)
        grads = Gradients(head, inputs, Wanted(*wants), schema.named(flat)["weight_grad"])
        sweep(head, When.BEFORE, grads, Given(stats, Coefficients(dlogp, dentropy)))
        return tuple(_or_empty(grads.finish(tokens.put), inputs.hidden))

    def fake_gradients(wants: list[bool], dlogprobs: Any, dentropy: Any, known: Any, *flat: Any) -> tuple[Tensor, ...]:
        return tuple(_gradients_like(schema.named(flat), wants))

    op, _ = schema.define(function.__name__, forward, fake_forward, list[Tensor], frozen=bool)
    gradient_ops = schema.define(
        function.__name__ + "_backward",
        gradients,
        fake_gradients,
        _tensors(len(_DIFFERENTIABLE)),
        wants=list[bool],
        dlogprobs=Tensor | None,
        dentropy=Tensor | None,
        known=list[Tensor],
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.frozen, *flat = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in flat]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in flat), *output)
        ctx.mark_non_differentiable(*output[2 if schema.named(flat)["entropy_grad"] else 1 :])
        ctx.set_materialize_grads(False)

    @last_gradient
    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        saved, known = tensors[: len(ctx.others)], list(tensors[len(ctx.others) :])
        flat = [other if x is None else x for x, other in zip(saved, ctx.others, strict=True)]
        parts, needs = schema.named(flat), schema.named(ctx.needs_input_grad[1:])
        dlogprobs, dentropy, *_ = grads
        if ctx.frozen:
            directions, hidden = known[2], parts["hidden_states"]
            assert dlogprobs is not None
            dlogp = torch.where(parts["labels"] != parts["ignore_index"], dlogprobs, 0.0)
            given = {"hidden_states": (directions * dlogp[:, None]).to(hidden.dtype)}
        else:
            wants = [needs[name] for name in _DIFFERENTIABLE]
            gradient_op = gradient_ops[1] if _fills(parts, wants) else gradient_ops[0]
            found = gradient_op(wants, dlogprobs, dentropy, known, *flat)
            given = _wanted(parts, wants, found)
        return None, *(given.get(name) for name in parts)

    op.register_autograd(backward, setup_context=save)

    def traced(values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        parts = schema.split(values)
        wants = _wants(parts)
        frozen = wants[0] and not any(wants[1:]) and not values["entropy_grad"]
        logprobs, entropy, *_ = op(frozen, *parts.values())
        return logprobs, entropy

    return _dispatch(function, traced)


def user_loss_op(linear_logprobs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make ``linear_policy_loss`` the loss of the caller, traced, of the nodes of ``linear_logprobs``; 8NDV."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        result_type: Any = typing.get_type_hints(function)["return"]

        def traced(values: dict[str, Any]) -> Any:
            objective = values.pop("objective")
            logprobs, entropy = linear_logprobs(**values, entropy_grad=True)
            with torch.autocast(logprobs.device.type, enabled=False):
                loss = objective(logprobs, entropy)
            if loss.dim() != 0:
                raise ValueError(f"objective must return a 0-d tensor, got {tuple(loss.shape)}; reduce it")
            logprobs, entropy = logprobs.detach(), entropy.detach()
            ones = torch.ones_like(logprobs)
            return result_type(loss, logprobs, entropy, ones, torch.zeros_like(ones, dtype=torch.bool), {})

        return _dispatch(function, traced)

    return decorate
