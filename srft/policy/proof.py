"""The proof before step 0: what training computes on packed sequences is what the model itself says of each alone.

Two forward passes are compared on the user's own model. One is the trainer's: sequences of many lengths packed as in
the run, hidden states, head and fused op. The other is the model's: ``model(input_ids=…).logits``, with the attention
it was loaded with, one sequence at a time. In fp32, where rounding is small, any difference of substance is an error of
packing; in the run's dtype they may differ as that dtype's own rounding lets the model differ from its fp32 self. The
same holds for the gradient of a random sum of log-probabilities. Whether sequences of one prompt may share its
computation is compared in the same way; a model that fails there is trained without.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.batch import Batch, pack
from srft.config import Config
from srft.policy.attention import UnsupportedAttention
from srft.policy.forwards import (
    Rounding,
    own_forward,
    own_logprobs,
    packed_forward,
    packed_logprobs,
    probe_sequences,
    shared_probes,
)
from srft.policy.model import allow_sharing, device_of, in_short, own_attention
from srft.policy.parallel import let_go, whole
from srft.policy.router import Router, router_logits, router_of
from srft.policy.spread import Spread
from srft.policy.suspects import find_cause, limits_passed
from srft.responses import Response

# Rounding that the noise of fp32 does not show (sums in another order) in units of the largest value compared.
_FLOOR = 2e-6
# Tokens of the sequences whose gradient is compared.
_GRADIENT_TOKENS = 128
# Times that the noise of fp32 gradients is drawn before a model is refused: a single draw may come out small in the one
# parameter of hundreds that differs most.
_DRAWS = 5


@dataclass(frozen=True)
class Gap:
    """How far one computation is from another, beside the noise it may have.

    Args:
        differences: From what it should be.
        noise: What rounding gives.
        floor: Differences up to this pass whatever the noise.
    """

    differences: Spread
    noise: Spread
    floor: float

    @property
    def passes(self) -> bool:
        """Whether the differences are no more than noise; False for NaN."""
        return not self.differences.beyond(self.noise, self.floor)


@dataclass(frozen=True)
class Proof:
    """What was compared and how close it was.

    Args:
        model_type: Of the model's configuration.
        logprobs: Log-probabilities and entropies, nats, by dtype; float32 always, and the run's.
        gradients: Relative errors of each parameter's gradient, by dtype.
        lengths: Of the sequences compared, tokens.
        attention: Which attention training uses, a sentence.
        dropout: Rates that the configuration asks for and training has off.
        seconds: What the proof took.
        sharing: Whether a prompt is computed once for all its sequences, a sentence; empty where it has one alone.
    """

    model_type: str
    logprobs: dict[str, Gap]
    gradients: dict[str, Gap]
    lengths: list[int]
    attention: str
    dropout: dict[str, float]
    seconds: float
    sharing: str = ""

    def sentence(self) -> str:
        """Say in a line what was proved."""
        parts = [
            f"{dtype} log-probabilities within {gap.differences.largest:.1e} nats "
            f"(its own noise: {gap.noise.largest:.1e}), gradients within {grad.differences.largest:.1e} of their norm "
            f"({grad.noise.largest:.1e})"
            for (dtype, gap), grad in zip(self.logprobs.items(), self.gradients.values(), strict=True)
        ]
        off = "".join(f"; dropout off: {name} {rate:g}" for name, rate in self.dropout.items())
        return (
            f"Packed sequences of {min(self.lengths)} to {max(self.lengths)} tokens equal {self.model_type}'s own "
            f"forward: {'; '.join(parts)}; {self.seconds:.1f} s{off}. {self.attention} {self.sharing}"
        ).rstrip()

    def table(self) -> str:
        """Return what was compared as lines of text, one a dtype and quantity, and the lengths and seconds."""
        lines = [f"{self.model_type}: exact", f"{'':34}{'largest':>10}{'mean':>10}{'noise':>10}{'its mean':>10}"]
        for what, gaps in (("log-probabilities, nats", self.logprobs), ("gradients, relative", self.gradients)):
            for dtype, gap in gaps.items():
                numbers = (gap.differences.largest, gap.differences.mean, gap.noise.largest, gap.noise.mean)
                lines.append(f"{what:24}{dtype:10}" + "".join(f"{n:10.1e}" for n in numbers))
        lines.append(f"sequences of {', '.join(map(str, sorted(self.lengths)))} tokens; {self.seconds:.1f} s")
        lines += [self.attention, *([self.sharing] if self.sharing else [])]
        if self.dropout:
            lines.append("dropout off: " + ", ".join(f"{name} {rate:g}" for name, rate in self.dropout.items()))
        return "\n".join(lines)


def prove(model: PreTrainedModel, config: Config) -> Proof:
    """Compare packed training with the model's own unpacked forward and backward, in fp32 and in the run's dtype.

    Args:
        model: From ``model.prepare_policy``; its gradients are dropped. Of one that is frozen the forward alone. What
            it shares from here on is noted on it.
        config: The whole configuration: longest sequence, tokens of a forward pass, dtype.

    Raises:
        ValueError: Naming the model type and the likely cause, when they differ or the model fails inside.
    """
    start = time.perf_counter()
    model_type = model.config.get_text_config().model_type
    try:
        sequences = probe_sequences(model, config)
        logprobs, gradients = _compare(model, config, sequences)
    except Refusal as refusal:
        raise ValueError(f"{model_type} cannot be trained on packed sequences: {refusal}") from None
    except UnsupportedAttention as error:
        raise ValueError(f"{model_type} cannot be trained on packed sequences: it has {error}") from None
    except Exception as error:  # whatever a model raises inside, from transformers or from code of its own
        raise ValueError(
            f"{model_type} cannot be trained on packed sequences: its forward fails with {type(error).__name__}: "
            f"{in_short(error)} ({_place(error)}){limits_passed(model, config.longest_sequence)}"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
    sharing = _allow_sharing(model, config, sequences, logprobs, gradients)
    seconds = time.perf_counter() - start
    traits = model.srft_traits
    return Proof(
        model_type, logprobs, gradients, [len(s) for s in sequences], traits.packed.sentence, traits.dropout, seconds,
        sharing,
    )  # fmt: skip


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


class Refusal(ValueError):
    """The reason why a model is not trained, without its name."""


def _compare(
    model: PreTrainedModel, config: Config, sequences: list[Response]
) -> tuple[dict[str, Gap], dict[str, Gap]]:
    budget = config.microbatch_tokens
    packed = pack(sequences, budget, device_of(model))
    small = _first_tokens(sequences, _GRADIENT_TOKENS)
    packed_small = pack(small, budget, device_of(model))

    gold = own_logprobs(model, sequences, torch.float32)
    noise = {"float32": own_logprobs(model, sequences, torch.float32, round_again=True) - gold}
    dtypes = list(dict.fromkeys([torch.float32, config.compute_dtype]))
    logprobs: dict[str, Gap] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if dtype != torch.float32:
            noise[name] = own_logprobs(model, sequences, dtype) - gold
        actual = packed_logprobs(model, packed, dtype)
        floor = _FLOOR * max(1.0, float(gold.abs().max()))
        again = packed_logprobs(model, packed, dtype)
        if not float((again - actual).abs().max()) <= Spread.of(noise[name]).allowed(floor):
            raise Refusal(
                "the same batch gives different log-probabilities twice: dropout or other noise that the trainer "
                "cannot turn off"
            )
        logprobs[name] = Gap(Spread.of(actual - gold), Spread.of(noise[name]), floor)
        if not logprobs[name].passes:
            raise Refusal(
                f"log-probabilities in {name} differ from its own forward by {logprobs[name].differences.largest:.2g} "
                f"nats at most, where its own rounding gives {logprobs[name].noise.largest:.1g}; likely cause: "
                f"{find_cause(model, sequences, dtype, logprobs[name].noise.allowed(floor))}"
            )
    gradients: dict[str, Gap] = {}
    if any(p.requires_grad for p in model.parameters()):
        gradients = _compare_gradients(model, small, packed_small, dtypes)
        _compare_router(model, config, small[-1])
    return logprobs, gradients


def _allow_sharing(
    model: PreTrainedModel,
    config: Config,
    sequences: list[Response],
    logprobs: dict[str, Gap],
    gradients: dict[str, Gap],
) -> str:
    """Let a model compute a prompt once for all its sequences if that is as exact, and say whether it does."""
    method, train = config.method, config.train
    if method.needs_rollouts * train.rollouts_per_prompt + method.trains_demos * train.demos_per_prompt < 2:
        return ""
    try:
        _compare_shared(model, config, sequences, logprobs, gradients)
    except (Refusal, UnsupportedAttention) as refusal:
        reason = str(refusal)
    except Exception as error:  # whatever a model raises inside
        reason = f"its forward fails with {type(error).__name__}: {in_short(error)}"
    else:
        allow_sharing(model, True)
        return "The prompt of a group is computed once."
    finally:
        model.zero_grad(set_to_none=True)
    return f"A prompt is computed for each of its sequences, not once for all: {reason}."


def _compare_shared(
    model: PreTrainedModel,
    config: Config,
    sequences: list[Response],
    logprobs: dict[str, Gap],
    gradients: dict[str, Gap],
) -> None:
    """The same as ``_compare`` on several responses a prompt, which is computed once, by the noise found there."""
    device, budget = device_of(model), config.microbatch_tokens
    dtypes = list(dict.fromkeys([torch.float32, config.compute_dtype]))
    # the longest, the dearest, shows nothing more
    shared = shared_probes(sorted(sequences, key=len)[:-1])
    packed = pack(shared, budget, device, share_prompts=True)
    gold = own_logprobs(model, shared, torch.float32)
    for dtype, gap in zip(dtypes, logprobs.values(), strict=True):
        differences = Spread.of(packed_logprobs(model, packed, dtype) - gold)
        if not replace(gap, differences=differences, floor=_FLOOR * max(1.0, float(gold.abs().max()))).passes:
            raise Refusal(
                f"its log-probabilities in {str(dtype).removeprefix('torch.')} then differ by "
                f"{differences.largest:.2g} nats at most, where rounding gives {gap.noise.largest:.1g}"
            )
    if (router := router_of(config, model)) is not None:
        one, other = (
            _router_loss(router, model, pack(shared, sum(map(len, shared)), device, share_prompts=shares))
            for shares in (True, False)
        )
        if not abs(one - other) <= 1e-4 * other:
            raise Refusal(f"its auxiliary loss of the router is then {one:.6g} where it is {other:.6g} for copies")
    if gradients:
        small = shared_probes(_first_tokens(sequences, _GRADIENT_TOKENS))
        signs = _signs(small, device)
        # copies of the prompt have been compared with the model's own backward, which costs one a sequence
        copies = _gradients(model, _as_trained(model, pack(small, budget, device), signs, torch.float32))
        packed = pack(small, budget, device, share_prompts=True)
        for dtype, gap in zip(dtypes, gradients.values(), strict=True):
            error = Spread.of(_relative(_gradients(model, _as_trained(model, packed, signs, dtype)), copies))
            if not replace(gap, differences=error).passes:
                raise Refusal(
                    f"its gradients in {str(dtype).removeprefix('torch.')} then differ by {error.largest:.2g} of their "
                    f"norm, where rounding gives {gap.noise.largest:.1g}"
                )


def _first_tokens(sequences: list[Response], tokens: int) -> list[Response]:
    """The shortest sequences, as many as fit; the first of the longer ones is cut to fill the rest."""
    chosen: list[Response] = []
    for s in sorted(sequences, key=len):
        left = tokens - sum(map(len, chosen))
        ids = (s.prompt_ids + s.response_ids)[:left]
        if len(ids) < 2:
            break
        prompt = min(len(s.prompt_ids), len(ids) - 1)
        chosen.append(Response(ids[:prompt], ids[prompt:], False, False, [], ""))
    return chosen


def _compare_router(model: PreTrainedModel, config: Config, sequence: Response) -> None:
    """The auxiliary loss of a mixture of experts against the one that the model itself returns."""
    router = router_of(config, model)
    if router is None:
        return
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids], device=device_of(model))
    actual = _router_loss(router, model, pack([sequence], len(sequence), device_of(model)))
    with torch.no_grad(), own_attention(model):
        output = model(input_ids=ids, use_cache=False, output_router_logits=True)
    let_go(model)
    expected = router.coef * float(output.aux_loss) if isinstance(output.aux_loss, Tensor) else math.nan
    if not abs(actual - expected) <= 1e-4 * expected:
        raise Refusal(
            f"its auxiliary loss of the router is {expected:.6g} on a sequence where training computes {actual:.6g}; "
            "set model.router_aux_coef=0 to train without it"
        )


@torch.no_grad()
def _router_loss(router: Router, model: PreTrainedModel, batches: list[Batch]) -> float:
    """Of one batch, in fp32; NaN where the routers say nothing."""
    (batch,) = batches
    gates = router_logits(model, batch, torch.float32)
    return float(router.loss(gates, router.load(gates, batch), batch)) if gates else math.nan


def _compare_gradients(
    model: PreTrainedModel, sequences: list[Response], packed: list[Batch], dtypes: list[torch.dtype]
) -> dict[str, Gap]:
    """Gradients of a random signed sum of log-probabilities, each parameter's error relative to its norm."""
    signs = _signs(sequences, device_of(model))

    def own(dtype: torch.dtype, round_again: bool, seed: int = 0) -> Callable[[], None]:
        def backward() -> None:
            with own_attention(model), Rounding(model, round_again, seed):
                for s in sorted(sequences, key=len):
                    (own_forward(model, s, dtype)[0] * signs[id(s)]).sum().backward()

        return backward

    gold = _gradients(model, own(torch.float32, False))
    gaps: dict[str, Gap] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        noise = _relative(_gradients(model, own(dtype, dtype == torch.float32)), gold)
        error = _relative(_gradients(model, _as_trained(model, packed, signs, dtype)), gold)
        gaps[name] = Gap(Spread.of(error), Spread.of(noise), 1e-5)
        for seed in range(1, _DRAWS if dtype == torch.float32 else 1):
            if gaps[name].passes or not error.isfinite().all():
                break
            another = Spread.of(_relative(_gradients(model, own(dtype, True, seed)), gold))
            gaps[name] = replace(gaps[name], noise=gaps[name].noise.widened(another))
        if not gaps[name].passes:
            worst = list(gold)[int(error.argmax())]
            raise Refusal(
                f"its log-probabilities agree with its own forward, its gradients in {name} do not: {worst} differs "
                f"by {gaps[name].differences.largest:.2g} of its norm, where rounding gives "
                f"{gaps[name].noise.largest:.1g}; likely "
                "cause: a layer whose backward depends on how sequences are packed, or misses some of its weights"
            )
    return gaps


def _signs(sequences: list[Response], device: torch.device) -> dict[int, Tensor]:
    """Random weights of each sequence's tokens, by its id."""
    lengths = [len(s.response_ids) for s in sorted(sequences, key=len)]
    rows = sum(lengths)
    signs = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(device) / rows
    return dict(zip(map(id, sorted(sequences, key=len)), signs.split(lengths), strict=True))


def _as_trained(
    model: PreTrainedModel, packed: list[Batch], signs: dict[int, Tensor], dtype: torch.dtype
) -> Callable[[], None]:
    """The backward pass of training, of log-probabilities by these weights."""

    def backward() -> None:
        for batch in packed:
            weights = torch.cat([signs[id(s)] for s in batch.sequences])
            (packed_forward(model, batch, dtype)[0] * weights).sum().backward()

    return backward


def _gradients(model: PreTrainedModel, backward: Callable[[], None]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    backward()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None
    return found


def _relative(gradients: dict[str, Tensor], gold: dict[str, Tensor]) -> Tensor:
    """[parameters] norm of each difference over the gold's, or over a thousandth of the whole if that is more."""
    norms = torch.stack([whole(g.norm()) for g in gold.values()])
    differences = torch.stack([whole((gradients[name] - g).norm()) for name, g in gold.items()])
    return (differences / norms.clamp(min=float(norms.norm()) * 1e-3)).cpu()
