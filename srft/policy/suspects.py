"""Why a model's packed forward differs from its own: a few more forward passes, and what the model itself names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.batch import pack
from srft.policy.compiled import as_written
from srft.policy.forwards import limits_of, own_logprobs, packed_logprobs
from srft.policy.model import body_of, device_of, head_of, own_attention
from srft.responses import Response
from srft_kernels import linear_logprobs

_STATEFUL = re.compile("mamba|conv|recurr|rwkv|wkv|delta|lightning|linearattention|lstm|ssm|rglru", re.IGNORECASE)
_ATTENTION = re.compile("window|chunk|alibi|softcap|rope_type|sink|bias_max|layer_types")


def find_cause(model: PreTrainedModel, sequences: list[Response], dtype: torch.dtype, allowed: float) -> str:
    """Tell what is wrong: compiled blocks, or what packing changes: the head, attention, neighbours or their lengths.

    Args:
        model: From ``model.prepare_policy``; it failed the comparison.
        sequences: Of different lengths, on which it failed.
        dtype: In which it failed.
        allowed: Difference that is no more than rounding, nats.
    """
    def off(actual: Tensor, expected: Tensor) -> bool:
        return not bool((actual - expected).abs().max() <= allowed)

    own = own_logprobs(model, sequences, dtype)
    with as_written(model) as compiled:
        if compiled and not off(packed_logprobs(model, pack(sequences, 10**9, device_of(model)), dtype), own):
            return "what torch.compile makes of its blocks; set model.compile=false"
    if dtype != torch.float32:
        return "how this device computes attention or the head in that precision, since fp32 is right"
    shortest = min(sequences, key=len)
    if off(_through_fused_head(model, shortest), own_logprobs(model, [shortest], dtype)):
        settings = _named(model, re.compile("logit|multiplier"))
        return f"a head that does more than weight, bias, scale and softcap{settings}"
    wrong = [s for s in sorted(sequences, key=len) if off(_packed(model, [s]), own_logprobs(model, [s], dtype))]
    if wrong:
        first = len(wrong[0])
        since = f", in sequences of {first} tokens and more" if first > len(shortest) else ""
        return f"attention that follows other rules than causal attention{since}{_named(model, _ATTENTION)}"
    longest = max(sequences, key=len)
    others = [s for s in sequences if s is not longest]
    changed = Response(longest.prompt_ids[::-1], longest.response_ids[::-1], False, False, [], "")
    n = sum(len(s.response_ids) for s in others)
    if off(_packed(model, [*others, changed])[:, :n], _packed(model, [*others, longest])[:, :n]):
        return f"state that runs from one packed sequence into the next{_modules(model)}"
    twins = [longest, changed]  # of one length, so that nothing but their places in the row differs
    if off(_packed(model, twins), own_logprobs(model, twins, dtype)):
        return "positions that it counts along the whole row, whatever sequence a token belongs to"
    most = len(longest)
    return (
        f"something that depends on the longest sequence of a batch{_named(model, re.compile('rope_type'))}"
        f"{limits_passed(model, most)}; set data.max_prompt_tokens and rollout.max_new_tokens so that their sum stays "
        "within that limit"
    )


def limits_passed(model: PreTrainedModel, longest: int) -> str:
    """Name the limits of a model's configuration that the longest sequence passes, for the end of a message.

    Args:
        model: Any.
        longest: Longest sequence of the run, tokens.
    """
    passed = [f"{name}={n}" for name, n in limits_of(model) if n < longest]
    return f"; sequences have up to {longest} tokens, its configuration has {', '.join(passed)}" if passed else ""


def _packed(model: PreTrainedModel, sequences: list[Response]) -> Tensor:
    return packed_logprobs(model, pack(sequences, 10**9, device_of(model)), torch.float32)


@torch.no_grad()
def _through_fused_head(model: PreTrainedModel, sequence: Response) -> Tensor:
    """The model's own hidden states under the head that training uses."""
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids], device=device_of(model))
    with own_attention(model):
        hidden_states = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    n = len(sequence.response_ids)
    both = head_of(model)(hidden_states[0, -n - 1 : -1], partial(linear_logprobs, labels=ids[0, -n:]))
    return torch.stack(both).cpu()


def _modules(model: PreTrainedModel) -> str:
    """Classes of modules that keep a state along the row."""
    names = {type(m).__name__ for m in model.modules() if _STATEFUL.search(type(m).__name__)}
    shown = sorted(n for n in names if n != type(model).__name__)[:3]
    return f", in {', '.join(shown)}" if shown else ", or attention that ignores their bounds"


def _named(model: PreTrainedModel, pattern: re.Pattern[str]) -> str:
    """Settings of the configuration that match, for the end of a message."""
    found = {
        f"{name}={value}"
        for name, value in _flat(model.config.get_text_config().to_dict())
        if pattern.search(name) and value not in (None, False, 0, "default") and not isinstance(value, (list, tuple))
    }
    return f" ({', '.join(sorted(found))})" if found else ""


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield str(name), value
