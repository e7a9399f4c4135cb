"""Print what the proof says of every architecture, in fp32 and bf16: ``python -m tests.trainer.architecture_table``."""

from __future__ import annotations

import sys

from srft.policy.model import prepare_policy
from srft.policy.parallel import ALONE
from srft.policy.proof import prove
from tests.trainer.architectures import ARCHITECTURES, build
from tests.trainer.tiny import tiny_config


def verdict(name: str, dtype: str) -> tuple[str, str]:
    """Largest difference in nats beside the noise that it may have, or "refused"; and the cause of a refusal."""
    sizes = ["data.max_prompt_tokens=48", "rollout.max_new_tokens=24"]
    config = tiny_config(*sizes, f"model.compute_dtype={dtype}")
    try:
        proof = prove(prepare_policy(build(name), config.model, config.train.tokens_per_microbatch, ALONE), config)
    except ValueError as error:
        return "refused", str(error)
    gap = proof.logprobs[dtype]
    return f"exact {gap.differences.largest:.0e} ({gap.noise.largest:.0e})", ""


def main() -> None:
    """One row an architecture."""
    print("| architecture | fp32: largest difference (noise), nats | bf16 | cause |\n|---|---|---|---|")
    for name in sys.argv[1:] or ARCHITECTURES:
        fp32, cause = verdict(name, "float32")
        bf16, cause_bf16 = verdict(name, "bfloat16")
        print(f"| {name} | {fp32} | {bf16} | {cause or cause_bf16} |", flush=True)


if __name__ == "__main__":
    main()
