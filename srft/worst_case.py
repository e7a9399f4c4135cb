"""The largest micro-batches that a run may meet, before its first step: what does not fit fails now, not at night."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor

from srft.learning import accumulate
from srft.planning.devices import free_memory
from srft.planning.pace import sequences_a_prompt
from srft.policy.learner import Learner
from srft.policy.weights import own_part
from srft.responses import Response

_GIB = 2**30
# of both micro-batches on a CPU: seconds, where the largest of a real model would take minutes and all memory
_CPU_FLOPS = 2e12


def worst_case(learner: Learner) -> str:
    """Compute two of the largest micro-batches that a step can hold, forward and backward, and drop their gradients.

    Two, since the second finds the gradients of the first in memory. Weights, moments and random numbers are left as
    they are; what AdamW's moments will take on a GPU is held meanwhile.

    Args:
        learner: The policy; every rank of the run must call.

    Returns:
        A sentence on what was computed and what memory it took.

    Raises:
        ValueError: When a GPU has no room for it.
    """
    device, on_gpu = learner.world.device, learner.world.device.type == "cuda"
    sequences = longest_sequences(learner)
    tokens = sum(map(len, sequences))
    moments = _missing_moments(learner) if on_gpu else []
    _forget_peak(device)
    try:
        accumulate(learner, sequences, step=1)
    except torch.OutOfMemoryError as error:
        config, whole = learner.config, torch.cuda.get_device_properties(device).total_memory
        raise ValueError(
            f"a micro-batch of {tokens // 2:,} tokens, the most that train.tokens_per_microbatch="
            f"{config.train.tokens_per_microbatch} and sequences of {config.longest_sequence} tokens allow, does not "
            f"fit in the {whole / _GIB:.0f} GiB of the device beside the engine; set train.tokens_per_microbatch lower,"
            " model.gradient_checkpointing=true, a smaller engine.gpu_memory_utilization or more train.ranks; python "
            "-m srft.plan says what takes how much"
        ) from error
    finally:
        learner.optimizer.zero_grad(set_to_none=True)
        moments.clear()
    peak = max(learner.world.gather(_peak(device)))
    room = torch.cuda.get_device_properties(device).total_memory if on_gpu else peak + free_memory()
    which = "The largest micro-batches a step may have" if on_gpu else "Micro-batches of the longest sequences"
    return (
        f"{which}, of {tokens // 2:,} tokens, took {peak / _GIB:.1f} of "
        f"{room / _GIB:.1f} GiB{'' if on_gpu else ' with all else of this process'}."
    )


def longest_sequences(learner: Learner) -> list[Response]:
    """Return sequences that fill two micro-batches, each of the greatest length, or those of a step where it has fewer.

    On a CPU they are as many as take a few seconds, one a micro-batch at least: nothing is lost there by running out of
    memory later, and the largest micro-batch of a real model might end the machine's other work.

    Args:
        learner: Its configuration says how long and how many.
    """
    config, train = learner.config, learner.config.train
    longest = config.longest_sequence
    each = sequences_a_prompt(config)
    of_a_step = -(-train.prompts_per_step * each // (train.updates_per_step * learner.world.size))
    number = min(config.microbatch_tokens // longest, of_a_step)
    if learner.world.device.type == "cpu":
        weights = sum(p.numel() for p in learner.model.parameters())
        number = min(number, int(_CPU_FLOPS / (2 * 6 * weights * longest)))
    number = max(1, number)
    rows = learner.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [_longest(learner, i, torch.randint(rows, (longest,), generator=generator)) for i in range(2 * number)]


def _longest(learner: Learner, number: int, tokens: Tensor) -> Response:
    method, ids = learner.config.method, tokens.tolist()
    prompt = max(1, len(ids) - learner.config.rollout.max_new_tokens)
    is_demo = method.trains_demos and (number % 2 == 0 or not method.needs_rollouts)
    response = ids[prompt:]
    return Response(
        ids[:prompt], response, is_demo, False, [] if is_demo else [-1.0] * len(response), "",
        reward=float(number % 4 < 2), advantage=1.0 if number % 4 < 2 else -1.0,
    )  # fmt: skip


def _missing_moments(learner: Learner) -> list[Tensor]:
    """Memory of the size of the moments that the first update will make."""
    if learner.optimizer.state:
        return []
    own = [own_part(p) for p in learner.model.parameters() if p.requires_grad]
    return [torch.empty_like(p) for p in own if p.device.type == "cuda" for _ in range(2)]


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        with clear.open("w") as file:
            file.write("5")


def _peak(device: torch.device) -> int:
    """Bytes since then, of the device, or of the process where that is a CPU; 0 where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
