"""Give an engine new weights many times, and look for what the canary says, what leaks and what is left behind.

    python -m tests.trainer.many_syncs --engine vllm --dtype float32 --tied --syncs 1000

Before each sync every weight gets noise of its own, and the canary compares trainer and engine after it, as in a run: a
sync that it does not let pass ends this with its words. A line says the worst it saw, the time of a sync, what the
processes grew by, and how many of the folders that weights went through are left.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from srft.engine.base import Engine
from srft.engine.hf import HfEngine
from srft.engine.vllm import VllmEngine
from srft.sync import WeightSync
from tests.trainer.tiny import policy as copied_policy
from tests.trainer.tiny import tiny_config
from tests.trainer.tiny_vllm import live_members, save_model, start, tiny_model

# cached blocks and the first files are made in the first syncs
_SETTLED = 20


@dataclass(frozen=True)
class Seen:
    """What many syncs showed.

    Args:
        worst: Largest difference of log-probabilities, nats.
        worst_mean: Largest mean difference, nats.
        seconds: Of the weights of a sync, each.
        bytes: Of a sync.
        grown: KiB by which trainer and engine grew between the first syncs and the last.
    """

    worst: float
    worst_mean: float
    seconds: list[float]
    bytes: float
    grown: tuple[int, int]


def many_syncs(syncs: int, model: PreTrainedModel, engine: Engine, dtype: str) -> Seen:
    """Sync so often, each time weights that are those of a model but for noise.

    Args:
        syncs: How often, > 0.
        model: Left as it is.
        engine: Serves such a model.
        dtype: Of the engine; training is in fp32.
    """
    policy = copied_policy(model, "model.compute_dtype=float32")
    config = tiny_config("model.compute_dtype=float32", f"engine.dtype={dtype}")
    vocab = model.get_input_embeddings().num_embeddings
    probe = [[2 + (7 * i * k + i) % (vocab - 2) for i in range(40)] for k in range(1, 5)]
    sync = WeightSync(policy, engine, probe, config)
    pids = live_members(engine.pid) if isinstance(engine, VllmEngine) else []
    originals = [p.detach().clone() for p in policy.parameters()]
    # no rows, which would be what grows
    worst, worst_mean, seconds, size, before = 0.0, 0.0, [], 0.0, (0, 0)
    for number in range(syncs):
        with torch.no_grad():
            for parameter, original in zip(policy.parameters(), originals, strict=True):
                parameter.copy_(original + 0.05 * torch.randn_like(original))
        row = sync.push(engine.version + 1)
        worst, worst_mean = max(worst, row["canary/max_abs_diff"]), max(worst_mean, row["canary/mean_abs_diff"])
        size = row["sync/bytes"]
        seconds.append(row["time/weights"])
        if number == min(_SETTLED, syncs - 1):
            before = _memory(["self"]), _memory(pids)
    grown = _memory(["self"]) - before[0], _memory(pids) - before[1]
    return Seen(worst, worst_mean, seconds, size, grown)


def hf_engine(model: PreTrainedModel, dtype: str) -> HfEngine:
    """The engine of this process."""
    return HfEngine(model, dtype=getattr(torch, dtype), pad_token_id=0, max_batch=8)


def _memory(pids: Sequence[int | str]) -> int:
    """KiB that processes hold for themselves."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def main() -> None:
    """Read the command line, sync, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--syncs", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:

        model = tiny_model(tied=options.tied, seed=0)
        engine: Engine
        if options.engine == "hf":
            engine = hf_engine(model, options.dtype)
        else:
            engine = start(save_model(model, Path(folder)), dtype=options.dtype)
        with closing(engine):
            seen = many_syncs(options.syncs, model, engine, options.dtype)
        left = [path for path in getattr(engine, "folders", []) if path.exists()]
    print(
        f"{options.engine}, {options.dtype}, {'tied' if options.tied else 'untied'}: {options.syncs} syncs of "
        f"{seen.bytes / 1e6:.2f} MB; canary at worst {seen.worst:.1e}, mean {seen.worst_mean:.1e} nats; median "
        f"{1e3 * statistics.median(seen.seconds):.1f} ms, first ten {1e3 * statistics.median(seen.seconds[:10]):.1f}, "
        f"last ten {1e3 * statistics.median(seen.seconds[-10:]):.1f}; trainer grew by {seen.grown[0]} KiB, engine by "
        f"{seen.grown[1]} KiB; folders left: {len(left)}"
    )


if __name__ == "__main__":
    main()
