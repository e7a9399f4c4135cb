"""How many tokens a forward pass may have: a fixed number on a CPU, and what is measured to fit on a GPU."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from srft.batch import Batch, pack
from srft.config import Config
from srft.policy.forwards import packed_forward
from srft.policy.parallel import World
from srft.policy.weights import own_part
from srft.responses import Response

# Tokens of the shorter of the two micro-batches that are measured, at least.
_SHORT = 2048
# Longer forward passes gain no speed.
_MOST = 65_536
_MULTIPLE = 1024
# Of a GPU's memory, what is left to fragments and to libraries.
_SPARED = 0.1


def choose_tokens_per_microbatch(config: Config, model: PreTrainedModel, world: World, engine_bytes: int = 0) -> int:
    """Return ``train.tokens_per_microbatch``, chosen where it is "auto"; the same on every rank, and all must call.

    On a GPU two micro-batches of the longest sequences, every token of which counts in the loss, are computed forward
    and backward with gradients in place. Their peaks give what a token takes, and what is taken whatever the tokens;
    Adam's moments and the engine, which come later, are kept free. Nine tenths of the memory count.

    Args:
        config: The whole configuration.
        model: From ``model.prepare_policy``; its gradients are dropped.
        world: The ranks.
        engine_bytes: What a rollout engine on the same device will take.

    Raises:
        ValueError: When not even the longest sequence fits.
    """
    if config.train.tokens_per_microbatch != "auto" or world.device.type != "cuda":
        return config.microbatch_tokens
    device, longest = world.device, config.longest_sequence
    free, total = torch.cuda.mem_get_info(device)
    usable = int((free + torch.cuda.memory_reserved(device)) - _SPARED * total)
    spoken_for = engine_bytes + _moments(model, device)
    fitting = min(world.gather(_fitting(_measured(model, config, world), usable - spoken_for)))
    if fitting < longest:
        raise ValueError(
            f"train.tokens_per_microbatch=auto found no room for a sequence of data.max_prompt_tokens + "
            f"rollout.max_new_tokens = {longest} tokens beside {_gib(spoken_for)} of optimizer and engine in "
            f"{_gib(usable)}; set model.gradient_checkpointing=true, shorter sequences, a smaller "
            "engine.gpu_memory_utilization, or more train.ranks"
        )
    most = min(_MOST, getattr(model.config.get_text_config(), "floor_scale", None) or _MOST)
    return max(longest, min(fitting, most) // _MULTIPLE * _MULTIPLE)


def _measured(model: PreTrainedModel, config: Config, world: World) -> list[tuple[int, int]]:
    """Tokens and peak bytes of a micro-batch and of one twice as long, as far as they fit."""
    short = math.ceil(_SHORT / config.longest_sequence)
    peaks: list[tuple[int, int]] = []
    try:
        # the first finds no gradients, and takes what libraries then keep
        for sequences in (short, short, 2 * short):
            peaks.append((sequences * config.longest_sequence, _peak(model, config, sequences, world)))
    except torch.OutOfMemoryError:  # on every rank alike, which have the same shapes to hold
        pass
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return peaks[1:]


def _fitting(peaks: list[tuple[int, int]], room: int) -> int:
    """How many tokens take no more bytes than there is room for, by the line through two peaks."""
    if not peaks:
        return 0
    few, low = peaks[0]
    if len(peaks) == 1:
        return few if low <= room else 0
    many, high = peaks[1]
    each = max(1.0, (high - low) / (many - few))
    return int(few + (room - low) / each)


def _moments(model: PreTrainedModel, device: torch.device) -> int:
    """Bytes of Adam's two moments of this rank's parameters, which the first step will take on the device."""
    mine = [own_part(p) for p in model.parameters() if p.requires_grad]
    return 2 * sum(p.numel() * p.element_size() for p in mine if p.device.type == device.type)


def _peak(model: PreTrainedModel, config: Config, sequences: int, world: World) -> int:
    """Most bytes in use during a forward and backward pass."""
    batch = _worst(model, config, sequences, world)
    torch.cuda.reset_peak_memory_stats(world.device)
    packed_forward(model, batch, config.compute_dtype)[0].sum().backward()
    return torch.cuda.max_memory_allocated(world.device)


def _worst(model: PreTrainedModel, config: Config, sequences: int, world: World) -> Batch:
    """Sequences of the greatest length, of tokens that are all but one counted."""
    rows = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (sequences, config.longest_sequence), generator=generator).tolist()
    every = [Response(tokens[:1], tokens[1:], False, False, [], "") for tokens in ids]
    (batch,) = pack(every, sequences * config.longest_sequence, world.device)
    return batch


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
