"""The policy: load or build a Hugging Face causal LM whose forward takes packed sequences and stops before the head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from srft.batch import Batch
from srft.config import ModelConfig
from srft.policy.adapter import base_of, is_adapter
from srft.policy.attention import register_packed_attention
from srft.policy.attention_choice import PackedAttention, caps_scores, choose_attention
from srft.policy.compiled import as_written, compile_blocks
from srft.policy.head import PolicyHead, make_head
from srft.policy.parallel import World, let_go, open_to, shard
from srft.policy.prefixes import select_repeated
from srft.policy.split_head import SplitHead

_T = TypeVar("_T")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run; a model built from scratch without one gets its bytes as tokens.

    Args:
        config: The model section of the configuration.

    Raises:
        ValueError: When the folder or hub id cannot be read, or the tokenizer has no words or no end-of-sequence token.
    """
    source = config.tokenizer or config.name
    if source == "tiny":
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = config.chat_template
        return tokenizer
    if is_adapter(source) and not (Path(source) / "tokenizer_config.json").is_file():
        source = base_of(source)
    try:
        own = get_tokenizer_config(source).get("tokenizer_class") if Path(source).is_dir() else None
        # AutoTokenizer would rather take the class of the architecture, which adds a token (transformers 5.19)
        kind = PreTrainedTokenizerFast if own == PreTrainedTokenizerFast.__name__ else AutoTokenizer
        tokenizer = kind.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a damaged file fails in the libraries below with whatever they happen to raise
        raise ValueError(f"cannot load a tokenizer from {source!r}: {in_short(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # of a folder without its files transformers makes one without words
        raise ValueError(f"the tokenizer {source!r} has no words; is tokenizer.json missing there?")
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {source!r} names no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes, a padding and an end token: it reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def build_tiny(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int
) -> PreTrainedModel:
    """Build a small Qwen2 model with random weights.

    Args:
        config: The model section of the configuration.
        tokenizer: Gives the vocabulary size and the special tokens.
        max_tokens: Longest sequence, prompt and completion.
        seed: Seed of the weights.
    """
    tiny = config.tiny
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        intermediate_size=tiny.intermediate_size,
        tie_word_embeddings=tiny.tie_embeddings,
        max_position_embeddings=max(max_tokens, 64),
        # the usual base of 10,000 barely turns within such short sequences; this one tells neighbours apart at once
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # so narrow a model learns several times faster from activations of size 1 than from the usual 0.02
        initializer_range=tiny.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def read_config(source: str | Path, options: ModelConfig) -> PretrainedConfig:
    """Read the configuration of a checkpoint, and put the options' numbers in place of its own.

    Args:
        source: Folder or hub id.
        options: The model section of the configuration.

    Raises:
        ValueError: When it cannot be read, or has not what the options are for.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"cannot load a causal LM from {str(source)!r}: {in_short(error)}") from error
    if not options.edits:
        return config
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"model.{next(iter(options.edits))} is for unscaled rotary positions of one base, and {str(source)!r} "
            f"({text.model_type}) has rope_parameters={rope or None}; unset it, and edit the config.json of a copy"
        )
    text.rope_parameters = {**rope, "rope_theta": options.rope_theta or rope["rope_theta"]}
    text.max_position_embeddings = options.max_position_embeddings or text.max_position_embeddings
    return config


def load_model(
    source: str | Path, *, trust_remote_code: bool, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load a Hugging Face causal LM with fp32 weights from safetensors.

    Args:
        source: Folder or hub id.
        trust_remote_code: Run Python code shipped with the checkpoint.
        config: What it is configured by; None takes its own.

    Raises:
        ValueError: When it cannot be read.
    """
    try:
        shape = config or AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_pretrained(
            source,
            config=shape,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"cannot load a causal LM from {str(source)!r}: {in_short(error)}") from error


@dataclass(frozen=True)
class Traits:
    """What ``prepare_policy`` keeps of a model, on the model as ``srft_traits``.

    Args:
        attention: The attention it was loaded with, which samplers and the proof use.
        packed: The attention that it is trained with.
        dropout: Rates above 0 in its configuration, by name; training has them off.
        head: Shares the parameters of its lm_head.
        device: Where it computes.
        shares_prompts: Whether a prompt is computed once for all sequences of it in a micro-batch, as the proof allows.
    """

    attention: str
    packed: PackedAttention
    dropout: dict[str, float]
    head: PolicyHead | SplitHead
    device: torch.device
    shares_prompts: bool = False


def prepare_policy(
    model: PreTrainedModel, config: ModelConfig, max_tokens: int, world: World
) -> PreTrainedModel:
    """Put a model into the state the trainer needs: packed attention, no dropout, on its device or sharded over many.

    What it computes then is proved by ``srft.policy.proof``; only what a proof cannot see is refused here.

    Args:
        model: A causal LM with fp32 weights, on the CPU or the meta device.
        config: The model section of the configuration.
        max_tokens: Most tokens in one forward pass.
        world: The ranks; one that has a mesh shards it.

    Raises:
        ValueError: For an architecture whose attention cannot be told where packed sequences end, or whose head is
            not a linear layer; for a ``model.attention`` that does not run here, a head that cannot be split as
            ``train.vocab_parallel`` asks, or ``model.compile`` without a compiler.
    """
    text = model.config.get_text_config()
    if getattr(text, "attn_temperature_tuning", False) and max_tokens > (text.floor_scale or max_tokens):
        # the scale counts from the start of the packed row, and no affordable proof is that long
        raise ValueError(
            f"{text.model_type} scales its attention by positions from {text.floor_scale} on and counts them through "
            f"packed sequences; set train.tokens_per_microbatch={text.floor_scale} or less, got {max_tokens}"
        )
    # of transformers' own attentions, only the eager one caps scores
    own = "eager" if caps_scores(model) else model.config._attn_implementation
    packed = choose_attention(model, config, world.device)
    model.eval()
    if world.mesh is None:
        model.to(world.device)
    head: PolicyHead | SplitHead = make_head(model)
    if world.mesh is not None and world.vocab_parallel:
        head = SplitHead(model, world.mesh["shards"], world.device)
    model.srft_traits = Traits(own, packed, _dropout_rates(text), head, world.device)
    model.srft_compute = MethodType(_compute, model)
    register_packed_attention()
    model.set_attn_implementation(packed.name)
    if model.config._attn_implementation != packed.name:
        raise ValueError(
            f"{text.model_type} computes attention outside transformers' AttentionInterface, where packed sequences "
            "would see each other; train a model whose attention goes through that interface"
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _recompute_in_evaluation_mode(model)
    if config.compile:
        compile_blocks(model, world.device)
    if world.mesh is not None:
        shard(model, world)
        open_to(model, "srft_compute")
    return model


def head_of(model: PreTrainedModel) -> PolicyHead | SplitHead:
    """Return the head through which every loss and every score of a policy goes.

    Args:
        model: From ``prepare_policy``.
    """
    return model.srft_traits.head


def device_of(model: PreTrainedModel) -> torch.device:
    """Return where a policy computes, which need not be where its weights lie.

    Args:
        model: From ``prepare_policy``.
    """
    return model.srft_traits.device


def allow_sharing(model: PreTrainedModel, allowed: bool) -> None:
    """Note whether a model computes a prompt once for all sequences of it in a micro-batch.

    Args:
        model: From ``prepare_policy``, which has it off.
        allowed: What the proof says of it, or of a model of the same kind.
    """
    model.srft_traits = replace(model.srft_traits, shares_prompts=allowed)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a policy the attention it was loaded with, and no compiled block, for the length of a ``with`` statement.

    Args:
        model: From ``prepare_policy``.
    """
    model.set_attn_implementation(model.srft_traits.attention)
    try:
        with as_written(model):
            yield
    finally:
        model.set_attn_implementation(model.srft_traits.packed.name)


def compute(
    model: PreTrainedModel,
    batch: Batch,
    compute_dtype: torch.dtype,
    op: Callable[..., _T],
    *,
    router_logits: bool = False,
    on_gradient: Callable[[Tensor], None] | None = None,
    then: Callable[[Any], Callable[..., Any]] | None = None,
) -> tuple[_T, tuple[Tensor, ...]]:
    """Run a policy over a packed batch, and an op over its head and the rows that predict a counted token.

    This is how training, scores and proofs call a policy: a sharded one is whole inside.

    Args:
        model: From ``prepare_policy``.
        batch: Packed sequences of T tokens, N of them counted.
        compute_dtype: Precision of the forward pass; bf16 runs under autocast.
        op: Called as ``op(hidden_states, lm_head_weight, **options_of_the_head)`` with the [N, D] final normed hidden
            states in ``compute_dtype``; an op of ``srft_kernels`` bound by ``functools.partial``.
        router_logits: Ask for what the routers of a mixture of experts say; only for models that have routers.
        on_gradient: Called in the backward pass with the gradient of the [N, D] hidden states, where they have one.
        then: Makes of what ``op`` returns, without a gradient, the op over the same rows whose result is returned.

    Returns:
        What ``op`` returns, and one [T, experts] tensor a routed layer where they are asked for.
    """
    result = model.srft_compute(batch, compute_dtype, op, router_logits, on_gradient, then)
    if not torch.is_grad_enabled():
        let_go(model)
    return result


def _compute(
    model: PreTrainedModel,
    batch: Batch,
    compute_dtype: torch.dtype,
    op: Callable[..., _T],
    router_logits: bool,
    on_gradient: Callable[[Tensor], None] | None,
    then: Callable[[Any], Callable[..., Any]] | None,
) -> tuple[_T, tuple[Tensor, ...]]:
    # its cache would hold 16-bit copies of all weights until the last block is through, of sharded ones, too
    with torch.autocast(
        batch.input_ids.device.type, dtype=compute_dtype, enabled=compute_dtype.itemsize == 2, cache_enabled=False
    ):
        output = body_of(model)(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens_k,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            **({"output_router_logits": True} if router_logits else {}),
        )
    select = torch.Tensor.__getitem__ if batch.cu_seqlens_k is batch.cu_seqlens else select_repeated
    hidden_states = select(output.last_hidden_state[0], batch.loss_rows).to(compute_dtype)
    if on_gradient is not None and hidden_states.requires_grad:
        hidden_states.register_hook(on_gradient)
    if then is not None:
        with torch.no_grad():
            op = then(head_of(model)(hidden_states.detach(), op))
    return head_of(model)(hidden_states, op), (tuple(output.router_logits or ()) if router_logits else ())


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal LM that ends before its head.

    Args:
        model: A causal LM.
    """
    body = model.get_decoder()
    if body is not model:
        return body
    # a class that transformers' lookup does not know: the child that holds the embedding
    embedding = model.get_input_embeddings()
    return next(child for child in model.children() if any(m is embedding for m in child.modules()))


_RANDOM = re.compile("drop|jitter")


def _dropout_rates(config: PretrainedConfig) -> dict[str, float]:
    return {
        name: rate
        for name, rate in config.to_dict().items()
        if _RANDOM.search(name) and isinstance(rate, float) and rate > 0
    }


def _recompute_in_evaluation_mode(model: PreTrainedModel) -> None:
    """Let layers recompute, which transformers allows in training mode alone, without the dropout of that mode."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone: train() would reach the dropout inside
            for name, rate in list(vars(module).items()):
                if "drop" in name and isinstance(rate, float):
                    setattr(module, name, 0.0)


def in_short(error: Exception) -> str:
    """Return an error's message on one line, or the name of its class where it has none.

    Args:
        error: Of any library.
    """
    return " ".join(str(error).split())[:300] or type(error).__name__
