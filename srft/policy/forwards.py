"""The two forward passes that the proof compares, and the sequences it compares them on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from srft.batch import Batch
from srft.config import Config
from srft.policy.lora import adapted, b_of, merged_parameters, merged_weight
from srft.policy.model import compute, device_of, own_attention
from srft.policy.parallel import is_sharded, let_go
from srft.policy.weights import own_part
from srft.responses import Response
from srft_kernels import linear_logprobs

# Response tokens compared of one sequence.
ROWS = 64
_COUNTS_TOKENS = re.compile("(position|window|chunk|floor_scale|context|max_seq)(?!.*layer)")


def probe_sequences(model: PreTrainedModel, config: Config) -> list[Response]:
    """Random sequences of the lengths at which models change: short ones, around each limit they name, the longest.

    Args:
        model: Names its limits in its configuration, and its vocabulary.
        config: The whole configuration.

    Returns:
        Sequences of at most 64 response tokens, one of them of a single one.
    """
    longest = config.longest_sequence
    # what a comparison may cost before the first step; a limit of the model beyond it is still compared on both sides
    affordable = 4096 if device_of(model).type == "cuda" else 256
    limits = sorted({n for _, n in limits_of(model) if n < longest})
    # the last token of a sequence predicts nothing, so that only two more than the limit show what comes after it
    around = {n + more for n in limits for more in (0, 1, 2)}
    most = min(longest, max([affordable, *around]))
    lengths = sorted({2, 3, 5, 17, 20, 40, most // 2, most, *around})
    rows = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    pad = model.config.get_text_config().pad_token_id
    allowed = torch.tensor([i for i in range(rows) if i != pad])
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in (n for n in lengths if 2 <= n <= most):
        ids = allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist()
        responses = 1 if length == 20 else min(length - 1, ROWS)
        sequences.append(Response(ids[:-responses], ids[-responses:], False, False, [], ""))
    return sequences


def shared_probes(sequences: list[Response]) -> list[Response]:
    """Divide sequences anew, so that most of each is prompt, and give each prompt two more responses.

    Args:
        sequences: From ``probe_sequences``, each of which gives three: its own tokens, a response in reverse that is as
            long, and one of a single token.
    """
    found = []
    for s in sequences:
        ids = s.prompt_ids + s.response_ids
        prompt = max(1, len(ids) * 2 // 3, len(ids) - ROWS)
        responses = ids[prompt:], ids[: prompt - 1 : -1], ids[:1]
        found += [Response(ids[:prompt], response, False, False, [], "") for response in responses]
    return found


def limits_of(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Whole numbers of a model's configuration whose names say that they count tokens, with their names.

    Args:
        model: Any.
    """
    found: list[tuple[str, int]] = []

    def collect(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, dict):
                collect(value)
            elif isinstance(value, int) and value >= 2 and _COUNTS_TOKENS.search(str(name)):
                found.append((name, value))

    collect(model.config.get_text_config().to_dict())
    return sorted(set(found))


def packed_logprobs(model: PreTrainedModel, batches: list[Batch], dtype: torch.dtype) -> Tensor:
    """Log-probability and entropy of every response token as training computes them.

    Args:
        model: From ``model.prepare_policy``.
        batches: Packed sequences.
        dtype: Precision of the forward pass.

    Returns:
        [2, N] fp32 on the CPU, in the order of ``own_logprobs``.
    """
    by_sequence: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            both = torch.stack(packed_forward(model, batch, dtype)).cpu()
            for sequence, place in batch.responses():
                by_sequence[id(sequence)] = both[:, place]
    every = sorted((s for batch in batches for s in batch.sequences), key=_order)
    return torch.cat([by_sequence[id(s)] for s in every], dim=1)


def _order(sequence: Response) -> tuple[int, list[int], list[int]]:
    return len(sequence), sequence.prompt_ids, sequence.response_ids


def packed_forward(
    model: PreTrainedModel, batch: Batch, dtype: torch.dtype, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] of a batch as training computes them, with their gradient.

    Args:
        model: From ``model.prepare_policy``.
        batch: Packed sequences.
        dtype: Precision of the forward pass.
        temperature: Divides the logits, > 0.
    """
    return compute(model, batch, dtype, partial(linear_logprobs, labels=batch.labels, temperature=temperature))[0]


def own_logprobs(
    model: PreTrainedModel, sequences: list[Response], dtype: torch.dtype, *, round_again: bool = False
) -> Tensor:
    """The same from the model's own forward, a sequence at a time.

    Args:
        model: From ``model.prepare_policy``.
        sequences: Any; the shortest comes first in the result, of equally long ones that of the smaller tokens.
        dtype: Precision of the forward pass.
        round_again: Round the output of every module once more, at random: how much the model makes of rounding.

    Returns:
        [2, N] fp32 on the CPU: log-probabilities and entropies, nats.
    """
    with torch.no_grad(), own_attention(model), Rounding(model, round_again):
        every = [torch.stack(own_forward(model, s, dtype)).cpu() for s in sorted(sequences, key=_order)]
    let_go(model)
    return torch.cat(every, dim=1)


def own_forward(model: PreTrainedModel, sequence: Response, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a response from the logits of the model, with their gradient.

    Args:
        model: Under ``model.own_attention``.
        sequence: Of one prompt and response.
        dtype: Precision of the forward pass.
    """
    with torch.autocast(device_of(model).type, dtype=dtype, enabled=dtype != torch.float32):
        return _of_response(model(**_inputs(model, sequence)).logits, sequence)


@torch.no_grad()
def sampler_logprobs(model: PreTrainedModel, sequences: list[Response], dtype: torch.dtype) -> Tensor:
    """Log-probabilities from the model's own forward with its weights rounded, as an engine in that dtype holds them.

    Args:
        model: From ``model.prepare_policy``; its weights stay as they are, beside a rounded copy for this call.
        sequences: Any.
        dtype: Of the engine.

    Returns:
        [N] fp32 on the CPU, in the order of ``sequences``.
    """
    with own_attention(model):
        if is_sharded(model):
            with _rounded_in_place(model, dtype):
                every = [own_forward(model, s, dtype)[0].cpu() for s in sequences]
            let_go(model)
            return torch.cat(every)
        rounded = {name: p.to(dtype) for name, p in merged_parameters(model).items()}
        for path, module in model.named_modules():
            for name, buffer in module.named_buffers(path, recurse=False):
                if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set and buffer.is_floating_point():
                    rounded[name] = buffer.to(dtype)
        return torch.cat(
            [
                _of_response(functional_call(model, rounded, (), _inputs(model, s)).logits, s)[0].cpu()
                for s in sequences
            ]
        )


@contextmanager
def _rounded_in_place(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Round the weights of a sharded policy, and what its innermost modules give, for the length of the body.

    Under autocast that is what a model in ``dtype`` computes, whose residual stream is rounded too.
    """
    parts = [own_part(p).detach() for p in model.parameters()]
    kept = [part.clone() for part in parts]

    def hook(_module: nn.Module, _inputs: object, output: object) -> object:
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    hooks = [m.register_forward_hook(hook) for m in model.modules() if next(m.children(), None) is None]
    try:
        # as an engine gets them: adapters in their weights
        for layer in adapted(model).values():
            own_part(layer.base_layer.weight).copy_(own_part(merged_weight(layer)))
            own_part(b_of(layer)).zero_()
        for part in parts:
            part.copy_(part.to(dtype))
        yield
    finally:
        for part, before in zip(parts, kept, strict=True):
            part.copy_(before)
        for each in hooks:
            each.remove()


def _inputs(model: PreTrainedModel, sequence: Response) -> dict[str, Any]:
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids], device=device_of(model))
    accepted = inspect.signature(model.forward).parameters
    fewer = {"logits_to_keep": len(sequence.response_ids) + 1} if "logits_to_keep" in accepted else {}
    return {"input_ids": ids, "use_cache": False, **fewer}


def _of_response(logits: Tensor, sequence: Response) -> tuple[Tensor, Tensor]:
    n = len(sequence.response_ids)
    logprobs = logits[0, -n - 1 : -1].float().log_softmax(-1)
    # a logit of -inf has probability 0 and adds nothing
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)
    labels = torch.tensor(sequence.response_ids, device=logits.device)
    return logprobs.gather(-1, labels[:, None])[:, 0], entropy


class Rounding:
    """Multiplies every module's output by 1 + u, |u| <= 2^-21: rounding of fp32 in sums of hundreds of products.

    Args:
        model: Whose modules, for the length of a ``with`` statement.
        active: Or nothing is done.
        seed: Of the u.
    """

    def __init__(self, model: PreTrainedModel, active: bool, seed: int = 0) -> None:
        self._model, self._active, self._seed = model, active, seed

    def __enter__(self) -> None:
        self._hooks = []
        if self._active:
            generator = torch.Generator(device_of(self._model)).manual_seed(self._seed)

            def hook(_module: nn.Module, _inputs: object, output: object) -> object:
                if not isinstance(output, Tensor) or not output.is_floating_point():
                    return output
                u = torch.rand(output.shape, generator=generator, device=output.device, dtype=output.dtype)
                return output * (1 + (2 * u - 1) * 2.0**-21)

            leaves = [m for m in self._model.modules() if next(m.children(), None) is None]
            self._hooks = [m.register_forward_hook(hook) for m in leaves]

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()
