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
import torch._dynamo
from torch import Tensor

from benchmarks.heads import Inputs
from benchmarks.losses import CASES

LogProbs = Callable[[Inputs, bool], tuple[Tensor, Tensor | None]]
Loss = Callable[[Inputs], Tensor]
PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "torchtitan", "xtuner", "fast-llm")
# Fast-LLM's cross_entropy_splits has no default but none; so many as torchtitan has chunks
FAST_LLM_SPLITS = 8


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
        # torch 2.11 fails to compile for a number of sequences that may change, as it does from the gate to the timing
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
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


def _module(name: str) -> types.ModuleType:
    """Import a module without running the __init__ of the packages above it, which ask for what it does not need."""
    parts = name.split(".")
    for number in range(1, len(parts)):
        package = ".".join(parts[:number])
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise ImportError(f"{package} is not installed")
            module = types.ModuleType(package)
            module.__path__ = list(spec.submodule_search_locations or [])
            sys.modules[package] = module
    return importlib.import_module(name)


def _verl_torch(device: torch.device) -> LogProbs:
    # without verl's own __init__, which asks for ray
    function = _module("verl.utils.experimental.torch_functional").FusedLinearForPPOFunction
    return lambda x, want_entropy: function.apply(x.hidden_states, x.lm_head_weight, x.labels)


def _verl_triton(device: torch.device) -> LogProbs:
    _only(device, "cuda")
    function = _module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda x, want_entropy: function(x.hidden_states, x.lm_head_weight, x.labels, 1.0, "none", None)


def _torchtitan(device: torch.device, case: str) -> Loss:
    """PyPI's torchtitan 0.3.0. Its losses of RL lie in a package whose __init__ asks for vLLM, and is not run."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    inner = CrossEntropyLoss if case == "cross_entropy" else _module("torchtitan.experiments.rl.losses.grpo").GRPOLoss

    def loss(x: Inputs) -> Tensor:
        # 8 chunks of the tokens, as in its trainer; the logits of a chunk grow with their number
        head = ChunkedLossWrapper(ChunkedLossWrapper.Config(loss_fn=inner.Config()))
        head.set_lm_head(lambda hidden: torch.nn.functional.linear(hidden, x.lm_head_weight))
        given = {
            "generator_logprobs": x.old_logprobs[None],
            "advantages": x.advantages[None],
            "loss_mask": torch.ones_like(x.labels, dtype=torch.bool)[None],
        }
        # it differentiates each chunk by the head's weight here; backward hands over the states' gradient alone
        labels = x.labels[None]
        return head(x.hidden_states[None], labels, len(x.labels), **(given if case == "grpo" else {}))[0]

    return loss


def _xtuner(device: torch.device, case: str) -> Loss:
    """Not on PyPI, whose xtuner 0.2.0 ends before v1, so that this has run against a stand-in only.

    After InternLM/xtuner, xtuner/v1/loss/chunk_loss.py: apply(hidden [1, N, D], weight, no bias, function of a chunk,
    that function's arguments by chunk, rows) differentiates chunk by chunk and returns the sum and a dict.
    """
    from xtuner.v1.loss.chunk_loss import ChunkLoss

    def of_chunk(hidden: Tensor, weight: Tensor, bias: None, x: Inputs) -> tuple[Tensor, tuple[None, dict]]:
        # as xtuner's own losses take them: logits of the dtype of the inputs, rounded to fp32
        logits = torch.nn.functional.linear(hidden, weight)[0].float()
        logprobs = -torch.nn.functional.cross_entropy(logits, x.labels, reduction="none")
        return CASES[case](logprobs, None, x) * len(x.labels), (None, {})

    def loss(x: Inputs) -> Tensor:
        rows = 1024  # its default
        chunks = [
            x._replace(
                labels=x.labels[start : start + rows],
                advantages=x.advantages[start : start + rows],
                old_logprobs=x.old_logprobs[start : start + rows],
            )
            for start in range(0, len(x.labels), rows)
        ]
        total, _ = ChunkLoss.apply(x.hidden_states[None], x.lm_head_weight, None, of_chunk, chunks, rows)
        return total / len(x.labels)

    return loss


class _FastLLM(torch.autograd.Function):
    """Fast-LLM's head: each split of the tokens goes through products and loss kernel, forward and backward at once."""

    @staticmethod
    def forward(ctx, hidden, weight, x: Inputs, case: str, kernel: Callable) -> Tensor:
        count, rows = len(x.labels), -(-len(x.labels) // FAST_LLM_SPLITS)
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part], weight)
            given = {"ce": (1.0,)}
            if case == "grpo":
                given = {"grpo": (x.advantages[part], x.old_logprobs[part], 1.0, 0.2, 0.2, None)}
            ce, _, grpo, _, dlogits, _, _ = kernel(logits, x.labels[part], None, 1.0, None, count, **given)
            total += grpo if case == "grpo" else ce
            torch.mm(dlogits, weight, out=dhidden[part])
            # its gradient buffer has the dtype of the weight, or fp32 where a run asks for that
            torch.addmm(dweight, dlogits.t(), hidden[part], beta=float(start > 0), out=dweight)
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    def backward(ctx, dloss):
        return *ctx.saved_tensors, None, None, None


def _fast_llm(device: torch.device, case: str) -> Loss:
    """Not on PyPI, so that this has run against a stand-in only.

    After ServiceNow/Fast-LLM, fast_llm/functional/triton/monolithic_loss.py: kernel(logits, labels, None, scale, no
    group, divisor, ce=(gradient,) or grpo=(advantages, old log-probabilities, gradient, clip below, clip above, None))
    returns losses of cross-entropy, z and GRPO, a metric, the gradient of the logits, and two more.
    """
    _only(device, "cuda")
    from fast_llm.functional.triton.monolithic_loss import triton_monolithic_loss_forward_backward as kernel

    return lambda x: _FastLLM.apply(x.hidden_states, x.lm_head_weight, x, case, kernel)


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
    "torchtitan-grpo": Peer(functools.partial(_torchtitan, case="grpo"), "grpo"),
    "torchtitan-ce": Peer(functools.partial(_torchtitan, case="cross_entropy"), "cross_entropy"),
    "xtuner-grpo": Peer(functools.partial(_xtuner, case="grpo"), "grpo"),
    "xtuner-ce": Peer(functools.partial(_xtuner, case="cross_entropy"), "cross_entropy"),
    "fast-llm-grpo": Peer(functools.partial(_fast_llm, case="grpo"), "grpo"),
    "fast-llm-ce": Peer(functools.partial(_fast_llm, case="cross_entropy"), "cross_entropy"),
}  # fmt: skip


_LOADED: dict[tuple[str, torch.device], tuple[LogProbs | Loss | None, str]] = {}


def load(
    name: str, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> tuple[LogProbs | Loss | None, str]:
    """The function of a peer and "", or None and why it is left out; tried once, and ``say`` is told before."""
    if (name, device) not in _LOADED:
        say(f"importing what {name} needs")
        try:
            _LOADED[name, device] = PEERS[name].load(device), ""
        except Unsuitable as error:
            _LOADED[name, device] = None, str(error)
        except Exception as error:  # the import of a package that is not ours may raise anything
            _LOADED[name, device] = None, f"import failed: {type(error).__name__}: {error}".splitlines()[0]
    return _LOADED[name, device]


def versions() -> dict[str, str]:
    """Versions of the peers' packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
