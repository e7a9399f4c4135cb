"""What a run will need, before anything is loaded: ``python -m srft.plan recipe.toml --gpus 8,64``.

Memory and work follow from shapes alone, seconds from the published rates of devices: they say what those allow, not
what a machine was seen to do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from srft.config import Config
from srft.options import exit_on_help, load_config
from srft.planning.advice import Plan, Planner, settings
from srft.planning.devices import Device, find_device, this_device
from srft.planning.pace import Tokens, expected_lengths, sequences_a_prompt, training_flops
from srft.prepare import choose_device
from srft.record.text import format_count, format_seconds

_GIB = 2**30
_COUNTS = "1,8,64,512"


def describe(planner: Planner) -> list[str]:
    """Say what a step consists of, as sentences.

    Args:
        planner: Of the run.
    """
    config, shape, lengths = planner.config, planner.shape, planner.lengths
    train, each = config.train, sequences_a_prompt(config)
    sequences = train.prompts_per_step * each
    flops = training_flops(
        shape, sequences * lengths.sequence, sequences * lengths.response, sequences * lengths.sequence**2
    )
    adapters = "" if shape.trained == shape.parameters else f", {_millions(shape.trained)} of them trained"
    return [
        f"{config.model.name}: {_millions(shape.parameters)} parameters{adapters}; {shape.layers} blocks of "
        f"{_millions(shape.block)}, a head of {shape.vocab:,} x {shape.hidden:,}.",
        f"A prompt: {each} sequences of at most {config.longest_sequence:,} tokens, {each * config.longest_sequence:,} "
        f"in all. Counted with {lengths.prompt:,} + {lengths.response:,} each (--prompt-tokens, --response-tokens).",
        f"A step: {train.prompts_per_step} prompts, {sequences:,} sequences, "
        f"{format_count(sequences * lengths.sequence)} tokens, {_teraflops(flops)} of training.",
        *([] if planner.teacher is None else [f"A teacher of {_millions(planner.teacher.parameters)} parameters."]),
        *_about_rollouts(config),
    ]


def _about_rollouts(config: Config) -> list[str]:
    """What the options say of rollouts that a plan counts otherwise than by an engine beside training, in turn."""
    said, engine = [], config.engine
    if config.train.replay:
        return ["Rollouts are those of train.replay: no engine, no weights for one."]
    if config.train.rollouts_only:
        said.append("Rollouts alone (train.rollouts_only): nothing is trained.")
    if engine.kind == "http":
        said.append(
            f"Rollouts by {len(engine.urls)} server{'s' if len(engine.urls) > 1 else ''}, each taken to have a device "
            "like one of these for itself."
        )
    if engine.devices:
        number, spread = len(engine.devices), engine.tensor_parallel
        each = f", one for every {spread} GPUs" if spread > 1 else ""
        said.append(f"Engines on {number} GPU{'s' if number > 1 else ''} of each machine that train nothing{each}.")
    if config.rollout.segments > 1:
        said.append(
            f"Completions go on over {config.rollout.segments} steps at most (rollout.partial_tokens): what they have "
            "is read again in each, which is not counted."
        )
    if config.rollout.steps_ahead:
        said.append(
            "Rollouts go on beside training (rollout.max_lag): a step takes the longer of the two, where they share no "
            "GPU."
        )
    return said


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _teraflops(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP" if flops >= 1e13 else f"{flops / 1e12:.3f} TFLOP"


def table(planner: Planner, plans: Sequence[Plan]) -> Table:
    """Lay plans beside each other: memory by part, seconds by part, and what breaks first.

    Args:
        planner: Of the run.
        plans: A column each.
    """
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for plan in plans:
        device, ranks = plan.layout.device, plan.layout.ranks
        result.add_column(f"{ranks} x {device.name}" if device.is_gpu else f"{ranks} on CPU", justify="right")

    def line(label: str, cells: Sequence[str]) -> None:
        result.add_row(label, *cells)

    # in the order of the plan that has most, so that what stands comes first
    of_plans = [plan.memory.parts(plan.memory.shown) for plan in plans]
    for name in dict.fromkeys(name for parts in sorted(of_plans, key=len, reverse=True) for name in parts):
        line(f"GiB  {name}", [_gib(parts.get(name, 0)) for parts in of_plans])
    line("GiB  in all, at the worst moment", [_gib(plan.memory.at(plan.memory.shown)) for plan in plans])
    if any(plan.memory.shown != plan.memory.worst for plan in plans):
        line("GiB  in all, while the engine samples", [_gib(plan.memory.peak) for plan in plans])
    line("GiB  of the device", [_gib(plan.layout.device.memory) for plan in plans])
    line("     the worst moment", [plan.memory.shown.replace("backward", "back") for plan in plans])
    if any(plan.memory.host for plan in plans):
        line("GiB  of the host, a rank", [_gib(plan.memory.host) for plan in plans])
    longest = planner.config.longest_sequence * planner.shape.kv_bytes
    if any(plan.memory.engine_cache > 1 for plan in plans):
        room = [plan.memory.engine_cache * plan.layout.engine_ranks / longest for plan in plans]
        line("     longest sequences an engine holds", [f"{max(0, count):.0f}" for count in room])
    for part in ("rollout", "train", "sync", "step"):
        line(f"time {part}", [_seconds(plan, getattr(plan.pace, part)) for plan in plans])
    line("     micro-batches of a rank", [str(plan.pace.micro_batches) for plan in plans])
    return result


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}" if size >= 0.05 * _GIB or not size else f"{size / _GIB:.4f}"


def _seconds(plan: Plan, seconds: float) -> str:
    return format_seconds(seconds) if plan.memory.fits else "-"


def verdicts(planner: Planner, plans: Sequence[Plan]) -> list[str]:
    """Say of each plan whether it fits, by which options, and what breaks first.

    Args:
        planner: Of the run.
        plans: As in the table.
    """
    lines = []
    for plan in plans:
        name = f"{plan.layout.ranks} x {plan.layout.device.name}"
        fits = "fits" if plan.memory.fits else "DOES NOT FIT"
        lines.append(f"{name}: {fits}. {' '.join(settings(plan))}. First limit: {planner.obstacle(plan)}.")
    return lines


def show(planner: Planner, plans: Sequence[Plan], note: str) -> None:
    """Print a plan.

    Args:
        planner: Of the run.
        plans: A column each.
        note: A sentence on what they are.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for sentence in (*describe(planner), note):
        console.print(sentence, markup=False)
    console.print(table(planner, plans))
    for sentence in verdicts(planner, plans):
        console.print(sentence, markup=False)


def dry_run(config: Config) -> None:
    """Print the plan of a run on this machine, as its options stand.

    Args:
        config: From ``options.load_config``.

    Raises:
        ValueError: When the model cannot be planned.
    """
    planner, device = Planner(config), this_device(choose_device(config))
    ranks = config.train.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    show(planner, [planner.as_configured(device, ranks)], "On this machine, as the options stand:")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, plan, and print.

    Args:
        argv: The command line's words; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    exit_on_help(
        arguments,
        "srft.plan",
        "Plans a run from shapes alone. --gpus 8,64: how many; --gpu H100: which (or cpu); --gpu-memory 80: GiB, when "
        "other; --prompt-tokens, --response-tokens: expected lengths; --as-configured: not the recommended layout, but "
        "that of the options; --engine-gpus 4: GPUs of an engine, in place of engine.tensor_parallel.",
    )
    parser = argparse.ArgumentParser(prog="python -m srft.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", default=_COUNTS)
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--response-tokens", type=int)
    parser.add_argument("--engine-gpus", type=int)
    parser.add_argument("--as-configured", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        planner, device = _planner(load_config(rest), options), find_device(options.gpu, options.gpu_memory)
        counts = [1] if not device.is_gpu and options.gpus == _COUNTS else _numbers(options.gpus)
        show(planner, *_plans(planner, device, counts, options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _planner(config: Config, options: argparse.Namespace) -> Planner:
    asked = options.prompt_tokens, options.response_tokens
    limits = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    for name, number, limit in zip(("--prompt-tokens", "--response-tokens"), asked, limits, strict=True):
        if number is not None and not 0 < number <= limit:
            raise ValueError(f"{name} must be from 1 to the limit of the options, {limit}, got {number}")
    usual = expected_lengths(config)
    return Planner(config, Tokens(options.prompt_tokens or usual.prompt, options.response_tokens or usual.response))


def _plans(
    planner: Planner, device: Device, counts: list[int], options: argparse.Namespace
) -> tuple[list[Plan], str]:
    if options.as_configured:
        return [planner.as_configured(device, ranks) for ranks in counts], "As the options stand:"
    plans = [planner.recommended(device, ranks, options.engine_gpus) for ranks in counts]
    return plans, "Recommended: the plainest layout that fits and is about as fast as any:"


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdigit() and 0 < int(word) <= 100_000 for word in words):
        raise ValueError(f"--gpus must be numbers divided by commas, such as 8,64, got {text!r}")
    return [int(word) for word in words]


if __name__ == "__main__":
    main()
