"""The proof before step 0: what training computes on packed sequences is what the model itself says of each alone.

Two forward passes are compared on the user's own model. One is the trainer's: sequences of many lengths packed as in
the run, hidden states, head and fused op. The other is the model's: ``model(input_ids=…).logits``, with the attention
it was loaded with, one sequence at a time. In fp32, where rounding is small, any difference of substance is an error of
packing; in the run's dtype they may differ as that dtype's own rounding lets the model differ from its fp32 self. The
same holds for the gradient of a random sum of log-probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.attention import UnsupportedAttention
from srft.batch import Batch, Sequence, pack, unweighted
from srft.config import Config
from srft.forwards import Rounding, own_forward, own_logprobs, packed_forward, packed_logprobs, probe_sequences
from srft.model import in_short, own_attention, run_body
from srft.router import router_of
from srft.suspects import find_cause, limits_passed

# Differences beyond these multiples of the noise are errors: two samples of hundreds of values from one distribution
# differ by less (0.8 to 1.3 and 0.8 to 1.5 over 50 architectures in bf16), errors of packing by orders more.
RMS_FACTOR, MAX_FACTOR = 2.0, 4.0
# Rounding that the noise of fp32 does not show (sums in another order) in units of the largest value compared.
_FLOOR = 2e-6
# Tokens of the sequences whose gradient is compared.
_GRADIENT_TOKENS = 128


@dataclass(frozen=True)
class Gap:
    """How far one computation is from another, beside the noise it may have.

    Args:
        rms: Root mean square of the differences.
        largest: Largest difference.
        noise_rms: Root mean square of the noise.
        noise_largest: Largest of the noise.
        floor: Added to what the noise allows.
    """

    rms: float
    largest: float
    noise_rms: float
    noise_largest: float
    floor: float

    @property
    def allowed(self) -> float:
        """Largest difference that passes."""
        return MAX_FACTOR * self.noise_largest + self.floor

    @property
    def passes(self) -> bool:
        """Whether the differences are no more than noise; False for NaN."""
        return (
            self.rms <= RMS_FACTOR * self.noise_rms + self.floor
            and self.largest <= self.allowed
        )


@dataclass(frozen=True)
class Proof:
    """What was compared and how close it was.

    Args:
        model_type: Of the model's configuration.
        logprobs: Log-probabilities and entropies, nats, by dtype; float32 always, and the run's.
        gradients: Relative errors of each parameter's gradient, by dtype.
        lengths: Of the sequences compared, tokens.
        dropout: Rates that the configuration asks for and training has off.
        seconds: What the proof took.
    """

    model_type: str
    logprobs: dict[str, Gap]
    gradients: dict[str, Gap]
    lengths: list[int]
    dropout: dict[str, float]
    seconds: float

    def sentence(self) -> str:
        """Say in a line what was proved."""
        parts = [
            f"{dtype} log-probabilities within {gap.largest:.1e} nats (its own noise: {gap.noise_largest:.1e}), "
            f"gradients within {grad.largest:.1e} of their norm ({grad.noise_largest:.1e})"
            for (dtype, gap), grad in zip(self.logprobs.items(), self.gradients.values(), strict=True)
        ]
        off = "".join(f"; dropout off: {name} {rate:g}" for name, rate in self.dropout.items())
        return (
            f"Packed sequences of {min(self.lengths)} to {max(self.lengths)} tokens equal {self.model_type}'s own "
            f"forward: {'; '.join(parts)}; {self.seconds:.1f} s{off}."
        )

    def table(self) -> str:
        """Return what was compared as lines of text, one a dtype and quantity, and the lengths and seconds."""
        lines = [f"{self.model_type}: exact", f"{'':34}{'largest':>10}{'rms':>10}{'noise':>10}{'its rms':>10}"]
        for what, gaps in (("log-probabilities, nats", self.logprobs), ("gradients, relative", self.gradients)):
            for dtype, gap in gaps.items():
                numbers = (gap.largest, gap.rms, gap.noise_largest, gap.noise_rms)
                lines.append(f"{what:24}{dtype:10}" + "".join(f"{n:10.1e}" for n in numbers))
        lines.append(f"sequences of {', '.join(map(str, sorted(self.lengths)))} tokens; {self.seconds:.1f} s")
        if self.dropout:
            lines.append("dropout off: " + ", ".join(f"{name} {rate:g}" for name, rate in self.dropout.items()))
        return "\n".join(lines)


def prove(model: PreTrainedModel, config: Config) -> Proof:
    """Compare packed training with the model's own unpacked forward and backward, in fp32 and in the run's dtype.

    Args:
        model: From ``model.prepare_policy``; its gradients are dropped.
        config: The whole configuration: longest sequence, tokens of a forward pass, dtype.

    Raises:
        ValueError: Naming the model type and the likely cause, when they differ or the model fails inside.
    """
    start = time.perf_counter()
    model_type = model.config.get_text_config().model_type
    try:
        logprobs, gradients, lengths = _compare(model, config)
    except Refusal as refusal:
        raise ValueError(f"{model_type} cannot be trained on packed sequences: {refusal}") from None
    except UnsupportedAttention as error:
        raise ValueError(f"{model_type} cannot be trained on packed sequences: it has {error}") from None
    except Exception as error:  # whatever a model raises inside, from transformers or from code of its own
        raise ValueError(
            f"{model_type} cannot be trained on packed sequences: its forward fails with {type(error).__name__}: "
            f"{in_short(error)}{limits_passed(model, config.longest_sequence)}"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    return Proof(model_type, logprobs, gradients, lengths, model.srft_traits.dropout, seconds)


class Refusal(ValueError):
    """The reason why a model is not trained, without its name."""


def _compare(model: PreTrainedModel, config: Config) -> tuple[dict[str, Gap], dict[str, Gap], list[int]]:
    sequences = probe_sequences(model, config)
    budget = config.train.tokens_per_microbatch
    packed = pack(sequences, budget, unweighted, model.device)
    small = _first_tokens(sequences, _GRADIENT_TOKENS)
    packed_small = pack(small, budget, unweighted, model.device)

    gold = own_logprobs(model, sequences, torch.float32)
    noise = {"float32": own_logprobs(model, sequences, torch.float32, round_again=True) - gold}
    dtypes = list(dict.fromkeys([torch.float32, config.compute_dtype]))
    logprobs: dict[str, Gap] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if dtype != torch.float32:
            noise[name] = own_logprobs(model, sequences, dtype) - gold
        actual = packed_logprobs(model, packed, dtype)
        if not torch.equal(actual, packed_logprobs(model, packed, dtype)):
            raise Refusal(
                "the same batch gives different log-probabilities twice: dropout or other noise that the trainer "
                "cannot turn off"
            )
        logprobs[name] = _gap(actual - gold, noise[name], _FLOOR * max(1.0, float(gold.abs().max())))
        if not logprobs[name].passes:
            raise Refusal(
                f"log-probabilities in {name} differ from its own forward by {logprobs[name].largest:.2g} nats at "
                f"most, where its own rounding gives {logprobs[name].noise_largest:.1g}; likely cause: "
                f"{find_cause(model, sequences, dtype, logprobs[name].allowed)}"
            )
    gradients = _compare_gradients(model, small, packed_small, dtypes)
    _compare_router(model, config, small[-1])
    return logprobs, gradients, [len(s) for s in sequences]


def _first_tokens(sequences: list[Sequence], tokens: int) -> list[Sequence]:
    """The shortest sequences, as many as fit; the first of the longer ones is cut to fill the rest."""
    chosen: list[Sequence] = []
    for s in sorted(sequences, key=len):
        left = tokens - sum(map(len, chosen))
        ids = (s.prompt_ids + s.response_ids)[:left]
        if len(ids) < 2:
            break
        prompt = min(len(s.prompt_ids), len(ids) - 1)
        chosen.append(Sequence(ids[:prompt], ids[prompt:], False, False, [], ""))
    return chosen


def _gap(differences: Tensor, noise: Tensor, floor: float) -> Gap:
    d, e = differences.double(), noise.double()
    rms = [float(x.square().mean().sqrt()) for x in (d, e)]
    return Gap(rms[0], float(d.abs().max()), rms[1], float(e.abs().max()), floor)


def _compare_router(model: PreTrainedModel, config: Config, sequence: Sequence) -> None:
    """The auxiliary loss of a mixture of experts against the one that the model itself returns."""
    router = router_of(config, model)
    if router is None:
        return
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids], device=model.device)
    with torch.no_grad():
        (batch,) = pack([sequence], len(sequence), unweighted, model.device)
        gates = run_body(model, batch, torch.float32, router_logits=True)[1]
        actual = float(router.loss(gates, router.load(gates))) if gates else math.nan
        with own_attention(model):
            output = model(input_ids=ids, use_cache=False, output_router_logits=True)
    expected = router.coef * float(output.aux_loss) if isinstance(output.aux_loss, Tensor) else math.nan
    if not abs(actual - expected) <= 1e-4 * expected:
        raise Refusal(
            f"its auxiliary loss of the router is {expected:.6g} on a sequence where training computes {actual:.6g}; "
            "set model.router_aux_coef=0 to train without it"
        )


def _compare_gradients(
    model: PreTrainedModel, sequences: list[Sequence], packed: list[Batch], dtypes: list[torch.dtype]
) -> dict[str, Gap]:
    """Gradients of a random signed sum of log-probabilities, each parameter's error relative to its norm."""
    sequences = sorted(sequences, key=len)
    rows = sum(len(s.response_ids) for s in sequences)
    signs = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(model.device) / rows
    of_sequence = dict(
        zip(map(id, sequences), signs.split([len(s.response_ids) for s in sequences]), strict=True)
    )

    def own(dtype: torch.dtype, round_again: bool) -> Callable[[], None]:
        def backward() -> None:
            with own_attention(model), Rounding(model, round_again):
                for s in sequences:
                    (own_forward(model, s, dtype)[0] * of_sequence[id(s)]).sum().backward()

        return backward

    def as_trained(dtype: torch.dtype) -> Callable[[], None]:
        def backward() -> None:
            for batch in packed:
                weights = torch.cat([of_sequence[id(s)] for s in batch.sequences])
                (packed_forward(model, batch, dtype)[0] * weights).sum().backward()

        return backward

    gold = _gradients(model, own(torch.float32, False))
    gaps: dict[str, Gap] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        noise = _relative(_gradients(model, own(dtype, dtype == torch.float32)), gold)
        error = _relative(_gradients(model, as_trained(dtype)), gold)
        gaps[name] = _gap(error, noise, 1e-5)
        if not gaps[name].passes:
            worst = list(gold)[int(error.argmax())]
            raise Refusal(
                f"its log-probabilities agree with its own forward, its gradients in {name} do not: {worst} differs "
                f"by {gaps[name].largest:.2g} of its norm, where rounding gives {gaps[name].noise_largest:.1g}; likely "
                "cause: a layer whose backward depends on how sequences are packed, or misses some of its weights"
            )
    return gaps


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
    norms = torch.stack([g.norm() for g in gold.values()])
    differences = torch.stack([(gradients[name] - g).norm() for name, g in gold.items()])
    return (differences / norms.clamp(min=float(norms.norm()) * 1e-3)).cpu()
