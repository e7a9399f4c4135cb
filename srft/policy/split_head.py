"""A head whose rows stay on their ranks: hidden states travel, and the weight does not."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from transformers import PreTrainedModel

from srft.policy.head import no_head
from srft_kernels import (
    FusedLMHead,
    PolicyLoss,
    VocabParallel,
    linear_grpo_loss,
    linear_logprobs,
    linear_srft_loss,
    linear_token_loss,
)
from srft_kernels.lm_head import logit_options
from srft_kernels.vocab_parallel import of_all_ranks

_T = TypeVar("_T")
_LOSSES = (linear_grpo_loss, linear_srft_loss, linear_token_loss)
_BOUNDS = "cu_seqlens"


class SplitHead:
    """The head of a policy, called as a ``PolicyHead`` is, of which each rank computes its own rows for all ranks.

    Every rank calls it at the same time, each with hidden states and an op's arguments of its own. Those with a row a
    token are gathered; numbers and 0-d tensors are taken to be the same everywhere. What comes back is of this rank's
    tokens, with gradients that are not to be summed over the ranks: that of the weight is of all tokens already.

    Args:
        model: A causal LM, on the CPU or the meta device. Its lm_head keeps this rank's rows alone, as DTensors whose
            first dimension is sharded; called as a module it gathers its weight, for the model's own forward.
        mesh: The ranks, in one dimension.
        device: Where this rank computes.

    Raises:
        ValueError: When the head is tied to the embedding, has an adapter, or has too few rows for the ranks.
    """

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
        layer: Any = model.get_output_embeddings()
        text = model.config.get_text_config()
        off = "set train.vocab_parallel=false"
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"train.vocab_parallel splits a head that is a linear layer, got {type(layer).__name__}; give the head "
                f"no adapter, or {off}"
            )
        if layer.weight is model.get_input_embeddings().weight:
            raise ValueError(
                f"train.vocab_parallel splits the head, which {text.model_type} ties to its embedding; {off}"
            )
        ranks, vocab = mesh.size(), layer.weight.shape[0]
        rows = -(-vocab // ranks)
        if vocab <= rows * (ranks - 1):
            raise ValueError(f"train.vocab_parallel gives each rank {rows} of {vocab} words, and the last none; {off}")
        start = rows * mesh.get_local_rank()
        for name in ("weight", "bias"):
            whole = getattr(layer, name)
            if whole is not None:
                part = whole.detach()[start : start + rows].clone()
                part = part if part.is_meta else part.to(device)
                split = DTensor.from_local(
                    part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
                )
                setattr(layer, name, nn.Parameter(split, requires_grad=whole.requires_grad))
        layer.forward = partial(_gathered_forward, layer)  # type: ignore[method-assign]
        # what becomes of its parameters, such as memory of their own, is followed
        self._layer = layer
        self._shard = VocabParallel(mesh.get_group(), start, vocab)
        self._options = {k: v for k, v in logit_options(model.config).items() if v not in (None, 1.0)}

    def __call__(self, hidden_states: Tensor, op: Callable[..., _T]) -> _T:
        """Call an op on the hidden states of all ranks and this rank's rows, and keep what is of its tokens.

        Args:
            hidden_states: [N, D]; their dtype is that of the computation. N may differ between ranks.
            op: The loss of a policy or ``linear_logprobs``, bound by ``functools.partial``; or ``no_head``.

        Returns:
            What the op would return here. The loss and terms of a PolicyLoss are this rank's share of their sum: equal
            parts, which add up to those of all tokens. Backward starts from the same number on every rank.

        Raises:
            ValueError: For another op, for arguments that are not of a row a token, and on every rank where one has
                other arguments than the first.
        """
        if op is no_head:
            return op(hidden_states, self._layer.weight)
        call: Any = op
        if not isinstance(op, partial) or op.func not in (linear_logprobs, *_LOSSES) or op.args:
            names = ", ".join(each.__name__ for each in (linear_logprobs, *_LOSSES))
            raise ValueError(
                f"train.vocab_parallel takes {names}, whose arguments are bound by name with functools.partial, got "
                f"{getattr(call, 'func', call)!r}; take one of these, or set train.vocab_parallel=false"
            )
        calls = _Calls.of(op, hidden_states, self._shard.group)
        hidden, options = calls.gathered(hidden_states, op.keywords)
        layer, dtype = self._layer, hidden_states.dtype
        if layer.bias is not None:
            options["bias"] = _own(layer.bias, dtype)
        options |= self._options | {"vocab_parallel": self._shard}
        out: Any = op.func(hidden, _own(layer.weight, dtype), **options)
        if op.func is linear_logprobs:
            return _OwnLogprobs.apply(*out, calls)
        share: Any = _share_of(out, calls)
        return share


@dataclass(frozen=True)
class _Calls:
    """The calls of all ranks that are one: how many rows each has, and where their sequences end.

    Args:
        group: The ranks.
        counts: Rows of each.
        own: Where this rank's are among all.
        bounds: [B+1] bounds of every rank's sequences in all rows, on the CPU, or None.
    """

    group: dist.ProcessGroup
    counts: list[int]
    own: slice
    bounds: Tensor | None

    @classmethod
    def of(cls, op: partial[Any], hidden_states: Tensor, group: dist.ProcessGroup) -> _Calls:
        """Learn from the other ranks what they call, and that it is the same."""
        bounds = op.keywords.get(_BOUNDS)
        many, ranks = 0 if bounds is None else bounds.numel(), group.size()
        described = _described(op, hidden_states)
        header = torch.tensor([zlib.crc32(repr(described).encode()), len(hidden_states), many])
        found, counts, many_each = of_all_ranks(header, group).t().tolist()
        if len(set(found)) > 1:
            _refuse_differences(described, group)
        first = sum(counts[: group.rank()])
        if bounds is not None:
            padded = torch.zeros(max(many_each), dtype=torch.int64)
            padded[:many] = bounds
            each = of_all_ranks(padded, group)
            ends = [each[rank, 1 : many_each[rank]] + sum(counts[:rank]) for rank in range(ranks)]
            bounds = torch.cat([torch.zeros(1, dtype=torch.int64), *ends]).int()
        return cls(group, counts, slice(first, first + len(hidden_states)), bounds)

    def gathered(self, hidden_states: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states and keywords of the call that all ranks make together."""
        rows = {k: x for k, x in keywords.items() if _has_rows(k, x)}
        hidden, *others = _Gathered.apply(hidden_states, self, *rows.values())
        bounds = {} if self.bounds is None else {_BOUNDS: self.bounds}
        return hidden, {**keywords, **dict(zip(rows, others, strict=True)), **bounds}

    def all_rows(self, x: Tensor) -> Tensor:
        """Every rank's rows of a tensor [N, ...]."""
        own, most = self.counts[self.group.rank()], max(self.counts)
        if own < most:
            x = torch.cat([x, x.new_zeros(most - own, *x.shape[1:])])
        each = of_all_ranks(x, self.group)
        if min(self.counts) == most:
            return each.flatten(0, 1)
        return torch.cat([each[rank, :count] for rank, count in enumerate(self.counts)])

    def all_rows_of_each(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same of several small ones, by one collective."""
        raw = [x.detach().unsqueeze(-1).flatten(1).contiguous().view(torch.uint8) for x in tensors]
        found = self.all_rows(torch.cat(raw, dim=1))
        return [
            part.clone(memory_format=torch.contiguous_format).view(x.dtype).reshape(len(found), *x.shape[1:])
            for part, x in zip(found.split([x.shape[1] for x in raw], dim=1), tensors, strict=True)
        ]


def _has_rows(name: str, value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and name != _BOUNDS


def _described(op: partial[Any], hidden_states: Tensor) -> dict[str, str]:
    """What the calls of all ranks must have in common; raise where tensors do not have a row a token."""
    said = {"the op": op.func.__name__, "hidden_states": str(hidden_states.dtype)}
    for name, value in sorted(op.keywords.items()):
        if name == _BOUNDS:
            said[name] = "None" if value is None else "bounds"
        elif not isinstance(value, Tensor):
            said[name] = repr(value)
        elif value.dim() == 0:
            said[name] = f"0-d {value.dtype}"
        elif len(value) == len(hidden_states):
            said[name] = f"{value.dtype} {['N', *value.shape[1:]]}"
        else:
            raise ValueError(f"{name} must have [N]=[{len(hidden_states)}] rows, got {list(value.shape)}")
    return said


def _refuse_differences(said: dict[str, str], group: dist.ProcessGroup) -> NoReturn:
    """Name an argument in which the calls of two ranks differ."""
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, said, group=group)
    first = every[0]
    rank, name = next(
        (rank, name)
        for rank, other in enumerate(every)
        for name in {**first, **other}
        if other.get(name) != first.get(name)
    )
    raise ValueError(
        f"{first['the op']} is called with {name}={first.get(name, 'nothing')} on the first rank and "
        f"{name}={every[rank].get(name, 'nothing')} on rank {rank}; bind the same on every rank and in every "
        "micro-batch, tensors of zeros among them, or set train.vocab_parallel=false"
    )


def _own(parameter: Any, dtype: torch.dtype) -> Tensor:
    """This rank's rows of a parameter in a dtype; its gradient is that of the parameter's rows here."""
    return parameter.to_local().to(dtype)


def _share_of(out: PolicyLoss, calls: _Calls) -> PolicyLoss:
    """Of what every rank has of all tokens, what is this rank's."""
    own, ranks = calls.own, len(calls.counts)
    return PolicyLoss(
        _Share.apply(out.loss, ranks), out.logprobs[own], out.entropy[own], out.ratio[own], out.clipped[own],
        {name: term / ranks for name, term in out.terms.items()},
    )  # fmt: skip


def _gathered_forward(layer: Any, hidden_states: Tensor) -> Tensor:
    """What the whole linear layer computes; gradients of its parameters are summed over the ranks."""
    whole = FusedLMHead(layer.weight, layer.bias, grad_reduction="sum")
    return whole(hidden_states, _linear)


def _linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(hidden_states, weight, bias)


class _Gathered(torch.autograd.Function):
    """Rows of all ranks; the gradient of all of them, which every rank has whole, gives this rank's."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, calls: _Calls, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.own = calls.own
        rest = calls.all_rows_of_each(others)
        ctx.mark_non_differentiable(*rest)
        return calls.all_rows(hidden_states), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
        return dhidden[ctx.own], None, *(None for _ in rest)


class _Share(torch.autograd.Function):
    """A rank's share of a number that all ranks have; its gradient is that of the whole."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, ranks: int) -> Tensor:
        return total / ranks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dshare: Tensor) -> tuple[Tensor, None]:
        return dshare, None


class _OwnLogprobs(torch.autograd.Function):
    """This rank's log-probabilities and entropies; the op needs the gradients of all on every rank."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor, calls: _Calls) -> tuple[Tensor, Tensor]:
        ctx.calls = calls
        own = logprobs[calls.own].clone(), entropy[calls.own].clone()
        if not entropy.requires_grad:
            ctx.mark_non_differentiable(own[1])
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.calls.all_rows_of_each([dlogprobs, dentropy]), None
