"""Loss heads of other libraries, each optional: a few lines that call it, or the reason why it is left out."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.heads import Inputs

LogProbs = Callable[[Inputs, bool], tuple[Tensor, Tensor | None]]
Loss = Callable[[Inputs], Tensor]
PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")


class Unsuitable(Exception):
    """Says why a peer cannot run here."""


class Peer(NamedTuple):
    load: Callable[[torch.device], LogProbs | Loss]  # raises ImportError or Unsuitable
    gives: str  # "logprobs", for any case; "logprobs without entropy"; or the only case whose loss it returns
    full_logits: bool = False  # holds [N, V] tensors
    compiled: bool = False  # through torch.compile, which also takes memory once


def _only(device: torch.device, kind: str) -> None:
    if device.type != kind:
        raise Unsuitable(f"runs on {kind} only")


def _trl(device: torch.device) -> LogProbs:
    from trl.kernels import ChunkedLogProbFunction

    def logprobs(x: Inputs, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        outputs = ("entropy",) if want_entropy else ()
        # 32,768 columns at a time, as in TRL's trainers
        return ChunkedLogProbFunction.apply(
            x.hidden_states, x.lm_head_weight, None, x.labels, 1.0, 32_768, None, 1.0, outputs
        )[:2]

    return logprobs


def _liger_grpo(device: torch.device) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def loss(x: Inputs) -> Tensor:
        # chunks of 2048 tokens: by default a chunk is one sequence, and each costs a pass over a [V, D] gradient
        head = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=max(1, 2048 // x.sequence)
        )
        rows = x.labels.view(-1, x.sequence)
        return head(
            x.hidden_states.view(*rows.shape, -1), x.lm_head_weight, rows, torch.ones_like(rows),
            x.advantages.view(rows.shape)[:, 0], old_per_token_logps=x.old_logprobs.view(rows.shape),
        )[0]  # fmt: skip

    return loss


def _liger_scaled_ce(device: torch.device) -> LogProbs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logprobs(x: Inputs, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(
            x.hidden_states, x.lm_head_weight, x.labels, 1.0, -100, 1, want_entropy
        )
        return (-out[0], out[1]) if want_entropy else (-out, None)

    return logprobs


def _liger_ce(device: torch.device) -> Loss:
    _only(device, "cuda")
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return lambda x: LigerFusedLinearCrossEntropyFunction.apply(x.hidden_states, x.lm_head_weight, x.labels)[0]


def _cce(device: torch.device, implementation: str, filter_eps: str | None) -> LogProbs:
    _only(device, "cuda" if implementation == "cce" else "cpu")
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(x: Inputs, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        nll = linear_cross_entropy(
            x.hidden_states, x.lm_head_weight, x.labels, reduction="none", impl=implementation, filter_eps=filter_eps
        )
        return -nll, None

    return logprobs


def _quack(device: torch.device) -> Loss:
    _only(device, "cuda")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: chunked_linear_cross_entropy(x.hidden_states, x.lm_head_weight, x.labels)


def _torch(device: torch.device, chunked: bool) -> Loss:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unsuitable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda x: function(x.hidden_states, x.lm_head_weight, x.labels, options=options)


def _verl_module(name: str) -> types.ModuleType:
    """Import a module of verl without running verl's own __init__, which asks for ray."""
    package = "verl"
    for part in ["", *name.split(".")[:-1]]:
        package = f"{package}.{part}" if part else package
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise ImportError("verl is not installed")
            module = types.ModuleType(package)
            module.__path__ = list(spec.submodule_search_locations or [])
            sys.modules[package] = module
    return importlib.import_module(f"verl.{name}")


def _verl_torch(device: torch.device) -> LogProbs:
    function = _verl_module("utils.experimental.torch_functional").FusedLinearForPPOFunction
    return lambda x, want_entropy: function.apply(x.hidden_states, x.lm_head_weight, x.labels)


def _verl_triton(device: torch.device) -> LogProbs:
    _only(device, "cuda")
    function = _verl_module("utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda x, want_entropy: function(x.hidden_states, x.lm_head_weight, x.labels, 1.0, "none", None)


PEERS = {
    "torch": Peer(functools.partial(_torch, chunked=False), "cross_entropy", full_logits=True),
    "torch-chunked": Peer(functools.partial(_torch, chunked=True), "cross_entropy"),
    "trl": Peer(_trl, "logprobs"),
    "liger-grpo": Peer(_liger_grpo, "grpo", compiled=True),
    "liger-scaled-ce": Peer(_liger_scaled_ce, "logprobs"),
    "liger-ce": Peer(_liger_ce, "cross_entropy"),
    "cce-compiled": Peer(
        functools.partial(_cce, implementation="torch_compile", filter_eps=None),
        "logprobs without entropy", full_logits=True, compiled=True,
    ),
    "cce-exact": Peer(functools.partial(_cce, implementation="cce", filter_eps=None), "logprobs without entropy"),
    "cce-filtered": Peer(functools.partial(_cce, implementation="cce", filter_eps="auto"), "logprobs without entropy"),
    "quack": Peer(_quack, "cross_entropy"),
    "verl-torch": Peer(_verl_torch, "logprobs"),
    "verl-triton": Peer(_verl_triton, "logprobs"),
}  # fmt: skip


@functools.cache
def load(name: str, device: torch.device) -> tuple[LogProbs | Loss | None, str]:
    """The function of a peer and "", or None and why it is left out; tried once."""
    try:
        return PEERS[name].load(device), ""
    except Unsuitable as error:
        return None, str(error)
    except Exception as error:  # the import of a package that is not ours may raise anything
        return None, f"import failed: {type(error).__name__}: {error}".splitlines()[0]


def versions() -> dict[str, str]:
    """Versions of the peers' packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
