"""Prove on a model what a run would prove before its first step: ``python -m srft.selftest model.name=…``."""

from __future__ import annotations

# ruff: noqa: E402
import sys

from srft.launch import share_cores, start_ranks

if __name__ == "__main__":
    share_cores()
    start_ranks(sys.argv[1:])  # what waits for the ranks needs none of the imports below

import transformers

from srft.config import Config
from srft.layouts import compare_layouts, table
from srft.models import with_local_model
from srft.options import exit_on_help, load_config
from srft.policy.learner import Learner
from srft.policy.model import load_tokenizer
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import World, joined
from srft.policy.proof import prove
from srft.prepare import choose_device, load_prepared


def selftest(config: Config) -> str:
    """Load the model of a run and prove that it can be trained on packed sequences, and on these ranks.

    Args:
        config: The whole configuration; its data is not read.

    Returns:
        What was compared, as lines of text; nothing on ranks other than the first.

    Raises:
        ValueError: When the model cannot be read, or fails; the message names its type and the likely cause.
    """
    config = with_local_model(config)
    tokenizer = load_tokenizer(config.model)
    with joined(config, choose_device(config)) as world:
        model = load_prepared(config, tokenizer, None, world)
        text = prove(model, config).table()
        if world.mesh is not None:
            learner = Learner(config, model, tokenizer, make_optimizer(model, config), world)

            def gold() -> Learner:
                alone = World(device=world.device)
                own = load_prepared(config, tokenizer, None, alone)
                return Learner(config, own, tokenizer, make_optimizer(own, config), alone)

            gaps = compare_layouts(learner, gold)
            text += "\n\n" + table(gaps, world.size)
            if wrong := [gap.name for gap in gaps if not gap.passes]:
                raise ValueError(f"gradients depend on the layout: {', '.join(wrong)}\n{text}")
        return text if world.is_first else ""


def main() -> None:
    """Read the command line, prove, and print what was compared or why the model is refused."""
    arguments = sys.argv[1:]
    exit_on_help(
        arguments,
        "srft.selftest",
        "Proves, before anything is trained, that packed sequences give what the model itself gives for each alone, "
        "and with train.ranks=N that N ranks give the gradients of one; exit status 2 where they do not.",
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        if text := selftest(load_config(arguments)):
            print(text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
