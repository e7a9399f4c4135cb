"""What can be asked of a measurement, and the tables that this makes."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.heads import DTYPES, HEADS, Inputs, make_inputs
from benchmarks.losses import CASES

# option: (default, help); the command line has them as they are, pytest with the prefix head-
OPTIONS = {
    "names": ("qwen2.5-0.5b", f"heads, comma-separated, or all; of {', '.join(HEADS)}"),
    "tokens": ("2048", "numbers of tokens N, comma-separated, each a multiple of four sequences"),
    "dtype": ("fp32", f"one of {', '.join(DTYPES)}"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda; default: cuda if there is one"),
    "cases": ("grpo", f"losses, comma-separated, of {', '.join(CASES)}"),
    "variants": ("", "comma-separated, or all; default: all that can run"),
    "what": ("time,memory", "of check, time and memory; time checks first"),
    "rounds": ("3", "timed calls of each variant"),
    "sequence": ("", "tokens of a sequence; default: 128 on CPU, 512 on a GPU"),
    "gate-tokens": ("", "N of the comparison with float64; default: four sequences"),
    "minutes": ("0", "leave out what would take longer than this, and say so; 0: no limit"),
}


# what make bench takes where nothing else is asked for: a small model's head, so few tokens that the comparison with
# float64 is the warm-up too, what need not be compiled first, and a limit of time for a machine that does other work
QUICK = {
    "names": "smollm2-135m",
    "tokens": "512",
    "variants": "ours,ours-16bit-logits,ours-logprobs,naive,torch,trl,torchtitan-grpo,torchtitan-ce,verl-torch",
    "what": "time",
    "minutes": "4",
}


@dataclasses.dataclass
class Spec:
    """One table: a head at one number of tokens."""

    name: str
    tokens: int
    dtype: str
    device: torch.device
    cases: list[str]
    only: frozenset[str]  # names of variants; empty: all
    what: set[str]
    rounds: int
    sequence: int
    gate_tokens: int

    def __post_init__(self):
        for number in (self.tokens, self.gate_tokens):
            if number % (4 * self.sequence):
                raise ValueError(f"the numbers of tokens must be multiples of {4 * self.sequence}, got {number}")

    def inputs(self, tokens: int) -> Inputs:
        """Fresh inputs of this head."""
        return make_inputs(HEADS[self.name], DTYPES[self.dtype], tokens, self.sequence, self.device)


def specs(options: dict[str, str]) -> list[Spec]:
    """The tables that the options of ``OPTIONS`` ask for."""
    names = [name for name in HEADS if name != "tiny"] if options["names"] == "all" else options["names"].split(",")
    unknown = {*names} - {*HEADS} | {options["dtype"]} - {*DTYPES} | {*options["cases"].split(",")} - {*CASES}
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    sequence = int(options["sequence"] or (512 if options["device"] == "cuda" else 128))
    return [
        Spec(
            name,
            int(tokens),
            options["dtype"],
            torch.device(options["device"]),
            options["cases"].split(","),
            frozenset() if options["variants"] == "all" else frozenset(filter(None, options["variants"].split(","))),
            {*options["what"].split(",")},
            int(options["rounds"]),
            sequence,
            int(options["gate-tokens"] or 4 * sequence),
        )
        for name in names
        for tokens in options["tokens"].split(",")
    ]
