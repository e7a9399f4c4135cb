"""The policy: load or build a Hugging Face causal LM whose forward takes packed sequences and stops before the head."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from srft.batch import Batch
from srft.config import ModelConfig

PACKED_ATTENTION = "srft_varlen"


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run; a model built from scratch without one gets its bytes as tokens.

    Args:
        config: The model section of the configuration.

    Raises:
        ValueError: When the folder or hub id cannot be read, or the tokenizer has no end-of-sequence token.
    """
    source = config.tokenizer or config.name
    if source == "tiny":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a damaged file fails in the libraries below with whatever they happen to raise
        raise ValueError(f"cannot load a tokenizer from {source!r}: {_in_short(error)}") from error
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


def load_model(source: str | Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """Load a Hugging Face causal LM with fp32 weights from safetensors.

    Args:
        source: Folder or hub id.
        trust_remote_code: Run Python code shipped with the checkpoint.

    Raises:
        ValueError: When it cannot be read.
    """
    try:
        shape = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_pretrained(
            source,
            config=shape,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"cannot load a causal LM from {str(source)!r}: {_in_short(error)}") from error


def prepare_policy(
    model: PreTrainedModel, config: ModelConfig, max_tokens: int, device: torch.device
) -> PreTrainedModel:
    """Put a model into the state the trainer needs: packed attention, on its device.

    Args:
        model: A causal LM with fp32 weights.
        config: The model section of the configuration.
        max_tokens: Longest sequence, prompt and completion.
        device: Where it computes.

    Raises:
        ValueError: For an architecture whose attention or head the trainer would compute wrongly.
    """
    text = model.config.get_text_config()
    unsupported = [
        name
        for name in ("attn_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        if getattr(text, name, None) not in (None, 1, 1.0)
    ]
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        unsupported.append("attention sinks")
    window = getattr(text, "sliding_window", None)
    if window is not None and window < max_tokens and getattr(text, "use_sliding_window", True):
        unsupported.append(f"sliding_window={window} below the longest sequence of {max_tokens} tokens")
    if unsupported:
        raise ValueError(
            f"{text.model_type} sets {', '.join(unsupported)}, which the packed forward does not apply"
        )
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def final_hidden_states(model: PreTrainedModel, batch: Batch, compute_dtype: torch.dtype) -> Tensor:
    """Run the body of the model over a packed batch and keep the rows that predict a counted token.

    Args:
        model: From ``prepare_policy``.
        batch: Packed sequences of T tokens, N of them counted.
        compute_dtype: Precision of the forward pass; bf16 runs under autocast.

    Returns:
        [N, D] final normed hidden states in ``compute_dtype``.
    """
    with torch.autocast(
        batch.input_ids.device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32
    ):
        output = model.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
    return output.last_hidden_state[0][batch.loss_rows].to(compute_dtype)


class Head(TypedDict):
    """What the fused ops need of a head: ``lm_head_weight`` [V, D], ``bias`` [V], ``logit_softcap`` > 0."""

    lm_head_weight: Tensor
    bias: Tensor | None
    logit_softcap: float | None


def head_arguments(model: PreTrainedModel, compute_dtype: torch.dtype) -> Head:
    """Return what the fused ops need of the head: weight [V, D], bias [V] or None, and the final softcap.

    Args:
        model: From ``prepare_policy``.
        compute_dtype: Precision in which the ops read the head.
    """
    head: nn.Linear = model.get_output_embeddings()
    return {
        "lm_head_weight": head.weight.to(compute_dtype),
        "bias": None if head.bias is None else head.bias.to(compute_dtype),
        "logit_softcap": getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    }


def register_packed_attention() -> None:
    """Teach transformers an attention over packed sequences that builds no [T, T] mask."""
    AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    return None


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; query [1, H, T, d], key and value [1, H_kv, T, d]."""
    assert cu_seq_lens_q is not None and max_length_q is not None and attention_mask is None
    assert sliding_window is None or sliding_window >= max_length_q, "sliding windows shorter than a sequence"
    if torch.is_autocast_enabled(query.device.type):
        # rotary embeddings leave queries and keys in fp32, and varlen_attn has no autocast rule of its own
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype != torch.float32:  # flash attention has no fp32
        from torch.nn.attention.varlen import varlen_attn

        bounds = cu_seq_lens_q.to(query.device, non_blocking=True)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = varlen_attn(
            q,
            k,
            v,
            bounds,
            bounds,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=key.shape[1] != query.shape[1],
        )
        assert isinstance(out, Tensor)  # it returns more only when asked for auxiliary outputs
        return out[None], None
    pieces, places = [], []
    for rows_cpu, real_cpu in _padded_groups(cu_seq_lens_q):
        rows, real = rows_cpu.to(query.device), real_cpu.to(query.device)
        q, k, v = (x[0].transpose(0, 1)[rows].transpose(1, 2) for x in (query, key, value))
        # padding is on the right, so the causal mask alone keeps it from every real query
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        pieces.append(y.transpose(1, 2)[real])
        places.append(rows[real])
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat(places)))[None], None


def _padded_groups(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group sequences of similar length; give each group's token indices [b, t] and the mask of real ones.

    In a group the shortest sequence has at least four fifths of the longest one's tokens, which bounds the padding.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    groups, first = [], 0
    order = torch.argsort(lengths, stable=True)
    by_length = lengths[order].tolist()
    for last in range(1, len(by_length) + 1):
        if last == len(by_length) or by_length[first] < 0.8 * by_length[last]:
            members, longest = order[first:last], by_length[last - 1]
            steps = torch.arange(longest)
            real = steps < lengths[members, None]
            # padded slots point at the sequence's own first token: any index inside the batch serves
            groups.append((starts[members, None] + steps * real, real))
            first = last
    return groups


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
