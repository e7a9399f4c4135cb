"""Models beside the policy that score what it learns from and are never trained: a reference and a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.config import Config
from srft.policy.adapter import is_adapter
from srft.policy.loading import fill, skeleton
from srft.policy.lora import base_policy
from srft.policy.model import load_model, load_tokenizer, prepare_policy
from srft.policy.parallel import World
from srft.policy.proof import prove


@dataclass(frozen=True)
class Frozen:
    """The models beside a policy, each sharded as it is.

    Args:
        reference: What the policy was at the start, or ``model.reference``. None: the policy without its adapters,
            which these are new to.
        teacher: The model that ``taught_by`` names. None where that is no model of its own.
        start: Name of the folder in ``cache_dir`` that the reference was loaded from, which checkpoints remember; empty
            where it was no such.
    """

    reference: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    start: str = ""

    @contextmanager
    def scoring(self, who: str, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Give the model that scores, for the length of a ``with`` statement.

        Args:
            who: "policy", "reference", or anything else for the teacher.
            policy: As it is now.
        """
        if who == "reference" and self.reference is None:
            with base_policy(policy):
                yield policy
        else:
            yield {"policy": policy, "reference": self.reference}.get(who, self.teacher) or policy


NONE = Frozen()
"""No model but the policy."""


def load_frozen(
    option: str, source: str, config: Config, tokenizer: PreTrainedTokenizerBase, world: World
) -> PreTrainedModel:
    """Load a model that scores the policy's tokens, prove its forward pass, and freeze it.

    Its weights are fp32 and sharded as the policy's are, its precision is that of the run.

    Args:
        option: What names it, for errors.
        source: Folder or hub id.
        config: The whole configuration.
        tokenizer: The policy's, whose tokens it must have.
        world: The ranks; all of them call this.

    Raises:
        ValueError: When it cannot be read, has other tokens, is an adapter, or fails the proof.
    """
    if is_adapter(source):
        raise ValueError(
            f"{option}={source} is an adapter; merge it into its base (model.lora.merge=true does at the end of a run) "
            "and give the folder of that"
        )
    remote = config.model.trust_remote_code
    own = load_tokenizer(config.model.model_copy(update={"tokenizer": source}))
    _refuse_other_tokens(option, source, own, tokenizer)
    load = load_model if world.mesh is None else skeleton
    model = load(source, trust_remote_code=remote)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"{option}={source} has embeddings for {rows} tokens, the policy's tokenizer {len(tokenizer)}; take a "
            "model of the policy's family"
        )
    # its head may be tied where the policy's is not
    world = replace(world, vocab_parallel=False)
    prepare_policy(model, config.model, config.microbatch_tokens, world)
    if world.mesh is not None:
        fill(model, source, world)
    model.requires_grad_(False)
    try:
        prove(model, config)
    except ValueError as error:
        raise ValueError(f"{option}={source}: {error}") from error
    return model


def _refuse_other_tokens(
    option: str, source: str, own: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase
) -> None:
    """Check that a model gives every token the number that the policy gives it."""
    theirs, ours = own.get_vocab(), policys.get_vocab()
    if theirs == ours:
        return
    different = sorted(token for token in {*theirs, *ours} if theirs.get(token) != ours.get(token))
    first = different[0]
    raise ValueError(
        f"{option}={source} has another tokenizer: {len(different)} tokens differ, such as {first!r}, which is "
        f"{theirs.get(first)} there and {ours.get(first)} in the policy's; it scores the policy's tokens one by one, "
        "so take a model of the policy's family"
    )
