"""FusedLMHead: the lm_head as a module that is called, so that FSDP2 gathers its weight around an op."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._checks import check_choice, check_positive
from .head.layer import active_lora, is_lora, is_trained_copy, linear_of, tell_of_replacements
from .types import LoraDelta

__all__ = ["FusedLMHead", "logit_options"]

_T = TypeVar("_T")


class FusedLMHead(nn.Module):
    """An lm_head that hands its weight to an op of this package instead of computing logits.

    The weight may be tied to an embedding, frozen, of another dtype than the hidden states, or sharded by FSDP2::

        head = FusedLMHead.from_model(model)
        loss = partial(linear_grpo_loss, labels=labels, advantages=advantages, old_logprobs=old_logprobs)
        out = head(hidden_states, loss)  # linear_grpo_loss(hidden_states, model.lm_head.weight, labels=labels, ...)

    Made from a model or from its layer, the head follows what becomes of that: resized, tied, loaded into, cast,
    another in its place, a wrapper of peft put around it or taken off. A copy of the model has a copy of the head that
    follows the copy. Where it cannot follow, a call raises.

    The op comes with its per-token tensors inside for a reason: under ``MixedPrecisionPolicy(param_dtype=
    torch.bfloat16)`` FSDP2 rounds every tensor it finds among the arguments of a module, ``old_logprobs`` too, and
    it does not look into a partial or a closure.

    FSDP2: apply ``fully_shard`` to the head, or to a module that contains the head and calls it in its forward; the
    weight is then gathered and its gradient reduced like any other. An embedding stays tied to the head where one
    ``fully_shard`` covers both. Fused losses compute their gradients in forward: where the head is a ``fully_shard``
    unit of its own, ``head.set_unshard_in_backward(False)`` saves them the second gather. ``linear_logprobs`` and
    ops that build a graph of their own need it. A weight that is still a DTensor when the head is called, because
    no FSDP2 module was entered, is gathered here and its gradient reduced as ``grad_reduction`` says, in its own
    dtype, on every call and without overlap.

    Precision: the weight is cast to the dtype of ``hidden_states``, autocast or not. Where it differs, every call
    copies it (V D elements, until backward), and its gradient is rounded once to that dtype before it joins the
    weight's own, as under FSDP2's mixed precision. On one process ``weight_grad=head.weight.grad``, an fp32 tensor
    that the caller made, spares the rounding. The bias and LoRA are not cast.
    """

    weight: nn.Parameter
    """[V, D], under the key that ``nn.Linear`` uses."""
    bias: nn.Parameter | None
    """[V] or None, likewise."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        grad_reduction: str = "mean",
    ):
        """Share ``weight`` and ``bias`` with whoever holds them.

        Args:
            weight: [V, D] floating point.
            bias: [V], added to the logits.
            logit_softcap: Cap of the logits, > 0, or None.
            logit_scale: Multiplies the logits before the cap, > 0; ``logit_options`` reads both from a config.
            grad_reduction: "mean" or "sum": how the gradient of a DTensor that the head gathers itself is reduced
                over the ranks of its mesh, each of which computes a loss of its own. "mean" is FSDP2's default;
                "sum" belongs to ``set_gradient_divide_factor(1.0)`` and losses divided by global token counts.

        Raises:
            ValueError: On a weight or bias that is no parameter of the right shape and kind, a softcap or scale that is
            not positive, or an unknown reduction.
        """
        super().__init__()
        _check_parameter("weight", weight, 2)
        if bias is not None:
            _check_parameter("bias", bias, 1)
            if bias.shape[0] != weight.shape[0]:
                raise ValueError(f"bias must be [V]=[{weight.shape[0]}], got {list(bias.shape)}")
        if logit_softcap is not None:
            check_positive("logit_softcap", logit_softcap)
        check_positive("logit_scale", logit_scale)
        check_choice("grad_reduction", grad_reduction, ("mean", "sum"))
        self.weight = weight
        self.register_parameter("bias", bias)
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        self.grad_reduction = grad_reduction
        # the layer that is followed, and the model that has it
        self._layer: weakref.ref[nn.Module] | None = None
        self._model: weakref.ref[nn.Module] | None = None
        # the same layer where it must not die; in a tuple it is no submodule
        self._kept: tuple[nn.Module, ...] = ()
        self._replaced = False
        # weight and bias of the layer when they were last looked at
        self._seen: dict[str, weakref.ref[Tensor]] = {}
        tell_of_replacements(self)

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        *,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        grad_reduction: str = "mean",
    ) -> Self:
        """Make a head that shares the parameters of a linear layer, and follows it.

        What takes the layer's place in a module is followed in its stead; the head itself may take it, or an
        ``nn.Identity``, and then stands alone. Sharding the head without the layer would part them: a call then raises.

        A LoRA layer of peft may stand in for the linear layer: the head takes part in its active adapter, in
        ``disable_adapter`` and in merging as the layer does, and lists the adapters under ``lora_A`` and ``lora_B``.
        Freezing the base weight is left to peft.

        Args:
            module: The lm_head, an ``nn.Linear``, or peft's LoRA layer or ``modules_to_save`` around one.
            logit_softcap: As for the class.
            logit_scale: As for the class.
            grad_reduction: As for the class.

        Raises:
            ValueError: Where ``module`` is no such layer or has a forward of its own, or as for the class.
        """
        linear = linear_of(module)
        weight: Any = linear.weight  # torch declares it as a tensor
        head = cls(
            weight, linear.bias, logit_softcap=logit_softcap, logit_scale=logit_scale, grad_reduction=grad_reduction
        )
        head._take(module, linear)
        return head

    @classmethod
    def from_model(cls, model: nn.Module, *, grad_reduction: str = "mean") -> Self:
        """Make a head for the lm_head of a model of transformers, with the scale and softcap of its config.

        Args:
            model: Whose ``get_output_embeddings()`` is looked up at every call; bare or inside a peft model.
            grad_reduction: As for the class.

        Raises:
            ValueError: As ``from_linear`` and ``logit_options``.
        """
        found: Any = model
        head = cls.from_linear(
            found.get_output_embeddings(), grad_reduction=grad_reduction, **logit_options(found.config)
        )
        head._model = weakref.ref(model)
        return head

    def layer_replaced(self, old: nn.Module, new: nn.Module | None) -> None:
        """Called when a module puts ``new`` in the place of ``old``; a call of the head then looks at ``new``."""
        current = self if self._layer is None else self._layer()
        if old is not current:
            return
        if new is None or new is self or isinstance(new, nn.Identity):
            if old is not self and not is_trained_copy(old):
                self._layer = None
        elif old is not self or isinstance(new, nn.Linear) or is_lora(new) or is_trained_copy(new):
            self._layer, self._kept, self._replaced = weakref.ref(new), (new,), True

    def _take(self, module: nn.Module, linear: nn.Linear) -> None:
        """Follow ``module`` from now on, whose linear layer is ``linear`` and has the parameters of the head."""
        self._layer, self._replaced = weakref.ref(module), False
        self._kept = (module,) if is_lora(module) or is_trained_copy(module) else ()
        for name in ("lora_A", "lora_B"):
            if is_lora(module):
                setattr(self, name, getattr(module, name))
            elif name in self._modules:
                delattr(self, name)
        self._see(linear)

    def _see(self, linear: nn.Linear) -> None:
        """Remember the parameters of ``linear`` that are the head's."""
        found = {name: getattr(linear, name, None) for name in ("weight", "bias")}
        self._seen = {
            name: weakref.ref(x) for name, x in found.items() if x is not None and x is getattr(self, name)
        }

    def _follow(self) -> None:
        """Look at the layer, and take over its parameters where they are others than before."""
        model: Any = None if self._model is None else self._model()
        layer = None if self._layer is None else self._layer()
        if model is not None:
            now = model.get_output_embeddings()
            layer = layer if now is self or isinstance(now, nn.Identity) else now
        if layer is None:
            return
        linear, changed = linear_of(layer), self._replaced or layer is not (self._layer and self._layer())
        for name in ("weight", "bias"):
            mine, theirs = getattr(self, name), getattr(linear, name, None)
            seen = mine is None or (name in self._seen and self._seen[name]() is mine)
            changed = changed or not seen or mine is not theirs
            if mine is theirs:
                continue
            if not seen:
                raise ValueError(
                    f"the head and the layer it was made from no longer share their {name}; apply fully_shard to a "
                    "module that contains both, or put the head in the layer's place"
                )
            if theirs is not None or name == "weight":
                _check_parameter(name, theirs, 2 if name == "weight" else 1)
            setattr(self, name, theirs)
        if changed:
            self._take(layer, linear)

    def forward(self, hidden_states: Tensor, op: Callable[..., _T]) -> _T:
        """Call ``op`` with the hidden states, the weight, and the bias, softcap, scale and LoRA that the head has.

        Args:
            hidden_states: [N, D], as the ops take them; their dtype is that of the computation.
            op: Called as ``op(hidden_states, lm_head_weight, bias=bias, logit_softcap=logit_softcap,
                logit_scale=logit_scale, lora=lora)``, without a scale of 1 and keywords that are None here. One of this
                package's ops with its other arguments bound by ``functools.partial``, or any function; one that calls
                several ops gathers the weight once.

        Returns:
            What ``op`` returns. For FSDP2 that should be tensors, or tuples and dicts of them.

        Raises:
            ValueError: On arguments of the wrong kind, a weight that is no longer that of ``from_linear``'s module,
            or an adapter that does more than add ``scale`` b a to the weight.
        """
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            got = hidden_states.dtype if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
            raise ValueError(
                f"hidden_states must be a floating point tensor, got {got}; call head(hidden_states, op)"
            )
        if not callable(op):
            raise ValueError(
                f"op must be callable, got {type(op).__name__}; bind the other arguments: "
                "head(hidden_states, partial(linear_grpo_loss, labels=labels, advantages=advantages))"
            )
        self._follow()
        options: dict[str, Any] = {}
        if self.bias is not None:
            options["bias"] = _whole(self.bias, self.bias.dtype, self.grad_reduction)
        if self.logit_softcap is not None:
            options["logit_softcap"] = self.logit_softcap
        if self.logit_scale != 1.0:
            options["logit_scale"] = self.logit_scale
        lora = active_lora(self._kept[0]) if self._kept and is_lora(self._kept[0]) else None
        if lora is not None:
            a, b = (_whole(x, x.dtype, self.grad_reduction) for x in lora[:2])
            options["lora"] = LoraDelta(a, b, lora.scale)
        weight = _whole(self.weight, hidden_states.dtype, self.grad_reduction)
        return op(hidden_states, weight, **options)

    def extra_repr(self) -> str:
        """Sizes and options, as ``nn.Linear`` shows them."""
        out_features, in_features = self.weight.shape
        softcap = "" if self.logit_softcap is None else f", logit_softcap={self.logit_softcap}"
        scale = "" if self.logit_scale == 1.0 else f", logit_scale={self.logit_scale}"
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}{softcap}{scale}"

    def __getstate__(self) -> dict[str, Any]:
        """The layer goes along, so that a copy of both stays together; a copy of the head alone stands alone."""
        return {**self.__dict__, "_layer": None if self._layer is None else self._layer(), "_model": None, "_seen": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Inverse of ``__getstate__``."""
        super().__setstate__(state)
        layer: Any = self._layer
        self._layer = None if layer is None else weakref.ref(layer)
        if layer is not None and not self._replaced:
            self._see(linear_of(layer))
        tell_of_replacements(self)


class LogitOptions(TypedDict):
    """What a model does to the logits of its head, as keywords of ``FusedLMHead`` and of every ``linear_`` op."""

    logit_scale: float
    logit_softcap: float | None


# what transformers' models multiply their logits by: a config's name for it, and whether that is the divisor
_SCALES = {"logit_scale": False, "output_multiplier": False, "lm_head_multiplier": False, "logits_scaling": True}


def logit_options(config: Any) -> LogitOptions:
    """Scale and softcap of a model of transformers, as its config has them.

    Cohere, Muse Glimmer, Falcon-H1 and HyperCLOVA X multiply their logits, Granite and MiniCPM3 divide them; Gemma and
    RecurrentGemma cap them. Code that comes with a checkpoint may do so under other names: compare with its own logits.

    Args:
        config: A PretrainedConfig, that of a text model or of one that contains it.

    Raises:
        ValueError: Where two scales are set.
    """
    text = config.get_text_config()
    # of these transformers' MPT has the name and does not read it
    names = [name for name in _SCALES if getattr(text, name, None) is not None and text.model_type != "mpt"]
    if len(names) > 1:
        raise ValueError(f"{text.model_type} sets {' and '.join(names)}; pass logit_scale yourself")
    scale = 1.0
    for name in names:
        # HyperCLOVA X multiplies by what has the name of Granite's divisor
        divides = _SCALES[name] and text.model_type != "hyperclovax"
        scale = 1.0 / getattr(text, name) if divides else float(getattr(text, name))
    softcap = getattr(text, "final_logit_softcapping", getattr(text, "logits_soft_cap", None))
    return {"logit_scale": scale, "logit_softcap": softcap}


def _check_parameter(name: str, x: object, dim: int) -> None:
    if not isinstance(x, nn.Parameter) or x.dim() != dim or not x.is_floating_point():
        got = f"{type(x).__name__} {x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} must be a floating point nn.Parameter {'[V, D]' if dim == 2 else '[V]'}, got {got}"
        )


def _whole(x: Tensor, dtype: torch.dtype, reduction: str) -> Tensor:
    """``x`` as a plain tensor of ``dtype``, differentiably."""
    if hasattr(x, "full_tensor"):
        return _Gather.apply(x, dtype, reduction)
    return x.to(dtype)


class _Gather(torch.autograd.Function):
    """All-gather a DTensor in the dtype of the computation; reduce its gradient in the DTensor's own.

    ``full_tensor()`` alone takes the gradient to be the same on every rank and keeps only this rank's rows of it.
    """

    @staticmethod
    def forward(ctx, sharded, dtype: torch.dtype, reduction: str):
        ctx.mesh, ctx.placements, ctx.dtype = sharded.device_mesh, sharded.placements, sharded.dtype
        ctx.reduction = {"mean": "avg", "sum": "sum"}[reduction]
        return sharded.to(dtype).full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx, dfull):
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(dfull.to(ctx.dtype), ctx.mesh, [Partial(ctx.reduction)] * ctx.mesh.ndim)
        return parts.redistribute(placements=ctx.placements), None, None
