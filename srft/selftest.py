"""Prove on a model what a run would prove before its first step: ``python -m srft.selftest model.name=…``."""

from __future__ import annotations

import sys

import transformers

from srft.config import Config
from srft.options import exit_on_help, load_config
from srft.policy.model import build_tiny, load_model, load_tokenizer, prepare_policy
from srft.policy.parallel import World
from srft.policy.proof import Proof, prove
from srft.prepare import choose_device


def selftest(config: Config) -> Proof:
    """Load the model of a run and prove that it can be trained on packed sequences.

    Args:
        config: The whole configuration; its data is not read.

    Raises:
        ValueError: When the model cannot be read, or fails; the message names its type and the likely cause.
    """
    if config.model.name == "tiny":
        model = build_tiny(
            config.model, load_tokenizer(config.model), config.longest_sequence, config.train.seed
        )
    else:
        model = load_model(config.model.name, trust_remote_code=config.model.trust_remote_code)
    prepare_policy(model, config.model, config.train.tokens_per_microbatch, World(device=choose_device(config)))
    return prove(model, config)


def main() -> None:
    """Read the command line, prove, and print what was compared or why the model is refused."""
    arguments = sys.argv[1:]
    exit_on_help(
        arguments,
        "srft.selftest",
        "Proves, before anything is trained, that packed sequences give what the model itself gives for each alone; "
        "exit status 2 where they do not.",
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        print(selftest(load_config(arguments)).table())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
