"""What vLLM can be asked, how its answers are read, and weights in pieces, however it is reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from srft.engine.base import Completion, Sampling
from srft.engine.stops import StopTexts

# vLLM raises a temperature below the first and refuses one above the second
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0


def check_request(
    prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], max_model_len: int, vocab_size: int
) -> None:
    """Refuse what vLLM would cut, clamp or crash on.

    Args:
        prompts: Token ids.
        sampling: How to draw.
        seeds: One list per prompt.
        max_model_len: Most tokens of a prompt and its completion together.
        vocab_size: Tokens are below it.

    Raises:
        ValueError: On an argument out of its range, or a prompt that leaves no room for a token.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds must have one list per prompt, got {len(seeds)} for {len(prompts)}")
    if sampling.temperature != 0 and not _MIN_TEMPERATURE <= sampling.temperature <= _MAX_TEMPERATURE:
        raise ValueError(
            f"temperature must be 0 or in [{_MIN_TEMPERATURE}, {_MAX_TEMPERATURE}] for vLLM, got {sampling.temperature}"
        )
    if sampling.max_new_tokens <= 0:
        raise ValueError(f"max_new_tokens must be > 0, got {sampling.max_new_tokens}")
    least, most = sampling.min_new_tokens, sampling.max_new_tokens
    if not 0 <= least <= most:
        raise ValueError(f"min_new_tokens must be in [0, max_new_tokens={most}], got {least}")
    if any(not 0 <= seed < 2**63 for row in seeds for seed in row):
        raise ValueError("every seed must be in [0, 2**63); reduce it modulo 2**63")
    check_tokens("prompt", prompts, max_model_len, vocab_size)


def check_tokens(what: str, rows: list[list[int]], max_model_len: int, vocab_size: int) -> None:
    """Refuse rows that are empty or too long, or have tokens that are none.

    Args:
        what: A row is called.
        rows: Token ids.
        max_model_len: A row has fewer.
        vocab_size: Tokens are below it.

    Raises:
        ValueError: On the first such row.
    """
    for row in rows:
        if not row or len(row) >= max_model_len:
            raise ValueError(
                f"every {what} must have 1 to {max_model_len - 1} tokens (max_model_len={max_model_len}), "
                f"got {len(row)}"
            )
        if min(row) < 0 or max(row) >= vocab_size:
            raise ValueError(f"tokens must be in [0, {vocab_size}), got {min(row)} to {max(row)} in a {what}")


def completed(
    token_ids: list[int], logprobs: list[float], finish: str, texts: StopTexts | None, version: int
) -> Completion:
    """Return what vLLM drew, up to the token that completes a stop text.

    vLLM reads text piece by piece, and may go on past a stop text that only the whole shows.

    Args:
        token_ids: Drawn.
        logprobs: Of each of them.
        finish: "stop" or "length".
        texts: What it was told to stop at; None: no text.
        version: Of the weights.
    """
    count = texts.cut(token_ids) if texts is not None else None
    ended: Literal["stop", "length"] = "length" if finish == "length" and count is None else "stop"
    return Completion(token_ids[:count], logprobs[:count], ended, version)


def in_pieces(named_tensors: Iterable[tuple[str, Tensor]], piece_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield weights on the CPU, as many at a time as fit into a file.

    Args:
        named_tensors: Of any device and layout.
        piece_bytes: Most bytes of a file, but for one with a single larger tensor.
    """
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        # a copy, since a file cannot hold two names of one memory
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        if piece and size + copy.nbytes > piece_bytes:
            yield piece
            piece, size = {}, 0
        piece[name] = copy
        size += copy.nbytes
    if piece:
        yield piece
