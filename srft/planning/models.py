"""Shapes of models: from a table of well-known ones, a folder, a hub, or the options of the built-in one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from srft.config import Config
from srft.policy.lora import attach
from srft.policy.model import body_of, build_tiny, in_short, load_tokenizer
from srft.policy.parallel import blocks_of


@dataclass(frozen=True)
class _Row:
    """Width of the stream, of the MLP, blocks, heads, heads of keys, vocabulary, whether the head is the embedding."""

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False


_QWEN = {
    "0.5B": _Row("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "1.5B": _Row("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "3B": _Row("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "7B": _Row("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "14B": _Row("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "32B": _Row("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "72B": _Row("qwen2", 8192, 29568, 80, 64, 8, 152064),
}
_LLAMA = {
    "8B": _Row("llama", 4096, 14336, 32, 32, 8, 128256),
    "70B": _Row("llama", 8192, 28672, 80, 64, 8, 128256),
}
KNOWN = {
    **{f"Qwen/Qwen2.5-{size}{kind}": row for size, row in _QWEN.items() for kind in ("", "-Instruct")},
    **{f"Qwen/Qwen2.5-Math-{size}{kind}": _QWEN[size] for size in ("1.5B", "7B", "72B") for kind in ("", "-Instruct")},
    **{f"meta-llama/Meta-Llama-3-{size}{kind}": row for size, row in _LLAMA.items() for kind in ("", "-Instruct")},
    **{f"meta-llama/Llama-3.1-{size}{kind}": row for size, row in _LLAMA.items() for kind in ("", "-Instruct")},
    "smollm2-135m": _Row("llama", 576, 1536, 30, 9, 3, 49152, True),
}
"""Models whose shape is known without their files, by hub id or the name that ``srft.models`` has for them."""


def read_shape(config: Config) -> PretrainedConfig:
    """Return the shape of a run's model, without its weights.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: When the model is in no table, and its config.json cannot be read.
    """
    if config.model.name == "tiny":
        with torch.device("meta"):
            model = build_tiny(config.model, load_tokenizer(config.model), config.longest_sequence, 0)
        return model.config
    return _shape_of("model.name", config.model.name, config)


def read_teacher(config: Config) -> ModelShape | None:
    """Return the sizes of the model that teaches a run; None where nobody does, the policy, or its reference.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: As ``read_shape`` and ``measure_shape``.
    """
    name = config.method.taught_by
    if name is None or name in ("policy", "reference"):
        return None
    shape = _shape_of("method.teacher", name, config)
    with torch.device("meta"):
        return measure_shape(_bare(shape, config))


def _shape_of(option: str, name: str, config: Config) -> PretrainedConfig:
    if name in KNOWN and not Path(name).exists():
        return _known(KNOWN[name])
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # whatever the hub's client and a damaged file end in
        raise ValueError(
            f"cannot read the shape of {name!r}: {in_short(error)}; give as {option} a folder that has its "
            f"config.json (weights are not needed), or one of the shapes that are built in: {', '.join(KNOWN)}"
        ) from error


def _known(row: _Row) -> PretrainedConfig:
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[row.family]
    return kind(
        vocab_size=row.vocab, hidden_size=row.hidden, intermediate_size=row.mlp, num_hidden_layers=row.layers,
        num_attention_heads=row.heads, num_key_value_heads=row.kv_heads, tie_word_embeddings=row.tied,
    )  # fmt: skip


def build_policy(shape: PretrainedConfig, config: Config) -> PreTrainedModel:
    """Build a policy of a shape on whatever device is current, with fp32 weights that mean nothing.

    Args:
        shape: From ``read_shape``.
        config: The whole configuration.
    """
    model = _bare(shape, config)
    if config.model.lora.rank:
        attach(model, config.model.lora, base=config.model.name)
    return model


def _bare(shape: PretrainedConfig, config: Config) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        shape, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )


@dataclass(frozen=True)
class ModelShape:
    """Numbers of parameters by unit, and the sizes that memory and time follow from.

    Args:
        parameters: All of them.
        trained: Those that have a gradient.
        layers: Blocks.
        block: Parameters of the largest block.
        trained_block: Those of a block that have a gradient, at most.
        root: Parameters of all that is no block: embedding, last norm, head.
        largest: The largest single one that is trained; 0 where none is.
        vocab: Rows of the head.
        hidden: Width of the residual stream.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of one.
        tied: The head is the embedding.
        head_trained: Its weight has a gradient.
        products: Parameters of the linear layers of the body, each of which is 2 FLOPs a token.
        trained_products: Those of them that have a gradient.
    """

    parameters: int
    trained: int
    layers: int
    block: int
    trained_block: int
    root: int
    largest: int
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    head_trained: bool
    products: int
    trained_products: int

    @property
    def head(self) -> int:
        """Parameters of the head, which are the embedding's where both are one."""
        return self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes that a token takes in a 16-bit cache of keys and values."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def measure_shape(model: PreTrainedModel) -> ModelShape:
    """Count the parameters of a policy, or of a model beside it.

    Args:
        model: On any device, the meta device included.

    Raises:
        ValueError: For a mixture of experts, whose work depends on the numbers.
    """
    text = model.config.get_text_config()
    if getattr(text, "num_experts_per_tok", None):
        raise ValueError(
            f"{text.model_type} is a mixture of experts, whose memory and time depend on where its tokens go; "
            "run it for one step instead: train.steps=1 measures a worst-case micro-batch first"
        )
    blocks = blocks_of(model)
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    parameters = sum(p.numel() for p in model.parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [m.weight for m in body_of(model).modules() if isinstance(m, nn.Linear)]
    heads = text.num_attention_heads
    return ModelShape(
        parameters=parameters,
        trained=sum(trained),
        layers=len(blocks),
        block=max(counts),
        trained_block=max(sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks),
        root=parameters - sum(counts),
        largest=max(trained, default=0),
        vocab=head.weight.shape[0],
        hidden=head.weight.shape[1],
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        tied=head.weight is embedding.weight,
        head_trained=head.weight.requires_grad,
        products=sum(weight.numel() for weight in linear),
        trained_products=sum(weight.numel() for weight in linear if weight.requires_grad),
    )
