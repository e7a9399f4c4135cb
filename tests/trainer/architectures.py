"""Tiny models with random weights, one for each kind of architecture that transformers builds."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 96
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip
_EQUAL_HEADS = {**_LLAMA, "num_key_value_heads": 4}
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 8.0, 12.0, 16.0]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, **_FACTORS}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
_MAMBA = {
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    # plain attention through transformers' interface
    "llama": ("Llama", _LLAMA),
    "llama-tied-bias": ("Llama", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": (
        "Llama",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-linear-rope": (
        "Llama",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama3-rope": (
        "Llama",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "phi": ("Phi", {**_EQUAL_HEADS, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {**_LLAMA, "sliding_window": None}),
    "gemma": ("Gemma", {**_LLAMA, "head_dim": 8}),
    "starcoder2": ("Starcoder2", {**_LLAMA, "sliding_window": None}),
    "olmo2": ("Olmo2", _LLAMA),
    "smollm3": ("SmolLM3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "glm4": ("Glm4", {**_LLAMA, "head_dim": 8}),
    "nemotron": ("Nemotron", _LLAMA),
    "helium": ("Helium", {**_LLAMA, "head_dim": 8}),
    "arcee": ("Arcee", _LLAMA),
    "apertus": ("Apertus", _LLAMA),
    "seed-oss": ("SeedOss", {**_LLAMA, "head_dim": 8}),
    "hunyuan-dense": ("HunYuanDenseV1", {**_LLAMA, "head_dim": 8}),
    "ernie4.5": ("Ernie4_5", {**_LLAMA, "head_dim": 8}),
    "stablelm": ("StableLm", _LLAMA),
    "stablelm-parallel-qk-norm": ("StableLm", {**_LLAMA, "use_parallel_residual": True, "qk_layernorm": True}),
    "bart": (
        "Bart",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "is_decoder": True,
            "is_encoder_decoder": False,
            "max_position_embeddings": 512,
        },
    ),
    "bert": ("Bert", {**_EQUAL_HEADS, "is_decoder": True}),
    "persimmon": ("Persimmon", _EQUAL_HEADS),
    "olmo3": ("Olmo3", {**_LLAMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "exaone4": ("Exaone4", {**_LLAMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "bitnet": ("BitNet", _LLAMA),
    "diffllama": ("DiffLlama", _LLAMA),
    "gpt-bigcode": ("GPTBigCode", _GPT),
    "gpt-neox": ("GPTNeoX", _EQUAL_HEADS),
    "gpt2": ("GPT2", _GPT),
    "opt": ("OPT", {**_EQUAL_HEADS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "biogpt": ("BioGpt", _EQUAL_HEADS),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_EQUAL_HEADS,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    # scaled logits
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.0625}),
    "granite": (
        "Granite",
        {
            **_LLAMA,
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0156,
        },
    ),
    "hyperclovax": ("HyperCLOVAX", {**_LLAMA, "logits_scaling": 8.0, "attention_multiplier": 0.25}),
    "minicpm3": (
        "MiniCPM3",
        {
            **_EQUAL_HEADS,
            "dim_model_base": 8,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "nanochat": ("NanoChat", _LLAMA),
    # routed experts
    "mixtral": ("Mixtral", {**_LOCAL, "sliding_window": None, "router_jitter_noise": 0.1}),
    "qwen2-moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "decoder_sparse_step": 1, "head_dim": 8}),
    "olmoe": ("Olmoe", _MOE),
    "phimoe": ("Phimoe", {**_LOCAL, "sliding_window": None, "input_jitter_noise": 0.1}),
    "granitemoe": ("GraniteMoe", {**_LOCAL, "logits_scaling": 4.0}),
    "jetmoe": ("JetMoe", {**_LOCAL, "kv_channels": 8, "num_key_value_heads": 2}),
    "glm4-moe": (
        "Glm4Moe",
        {
            **_MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
    ),
    "ernie4.5-moe": (
        "Ernie4_5_Moe",
        {**_LLAMA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    ),
    "flex-olmo": ("FlexOlmo", _MOE),
    "dbrx": (
        "Dbrx",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 100.0, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 48,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "ffn_act_fn": {"name": "silu"},
                "hidden_size": 32,
            },
        },
    ),
    # windows, sinks, softcaps
    "mistral-window": ("Mistral", {**_LLAMA, "sliding_window": 16}),
    "phi3-window": ("Phi3", {**_LLAMA, "sliding_window": 16}),
    "gemma2": (
        "Gemma2",
        {**_LLAMA, "head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **_LLAMA,
            "head_dim": 8,
            "sliding_window": 16,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cohere2": ("Cohere2", {**_LLAMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt-oss": ("GptOss", {**_LOCAL, "head_dim": 8, "sliding_window": 16}),
    "llama4": (
        "Llama4Text",
        {
            **_LOCAL,
            "attn_temperature_tuning": False,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0],
        },
    ),
    "llama4-temperature": (
        "Llama4Text",
        {
            **_LOCAL,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "floor_scale": 16,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0],
        },
    ),
    "llama4-chunks": (
        "Llama4Text",
        {
            **_LOCAL,
            "attn_temperature_tuning": False,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0],
        },
    ),
    # frequencies that depend on the longest sequence of a batch
    "phi3-longrope": (
        "Phi3",
        {
            **_LLAMA,
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 32},
        },
    ),
    "llama-dynamic": ("Llama", {**_LLAMA, "max_position_embeddings": 32, "rope_parameters": _DYNAMIC}),
    # attention outside the interface, ALiBi
    "bloom": ("Bloom", {**_GPT, "hidden_size": 32}),
    "mpt": (
        "Mpt",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2},
    ),
    "falcon-rope": ("Falcon", {**_EQUAL_HEADS, "hidden_dropout": 0.1}),
    "falcon-alibi": ("Falcon", {**_EQUAL_HEADS, "alibi": True, "new_decoder_architecture": False}),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
            "max_position_embeddings": 512,
        },
    ),
    "codegen": ("CodeGen", {**_GPT, "rotary_dim": 4, "n_ctx": 512}),
    # state that runs along the row
    "mamba": ("Mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "falcon-mamba": ("FalconMamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "rwkv": ("Rwkv", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 512}),
    "recurrent-gemma": (
        "RecurrentGemma",
        {**_LLAMA, "num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32, "num_key_value_heads": 1},
    ),
    "jamba": (
        "Jamba",
        {
            **_LLAMA,
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("Bamba", {**_LLAMA, **_MAMBA, "attn_layer_indices": [1]}),
    "falcon-h1": ("FalconH1", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8, "lm_head_multiplier": 0.5}),
    "zamba2": (
        "Zamba2",
        {
            **_EQUAL_HEADS,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "use_mem_rope": True,
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **_MOE,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm2": ("Lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "minimax": (
        "MiniMax",
        {**_LOCAL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
}

_STATE = "state that runs from one packed sequence into the next, in .*"
_OUTSIDE = "computes attention outside transformers' AttentionInterface"
# what is refused, and the cause that the refusal must name; everything else is exact
REFUSED = {
    "bart": "positions that it counts along the whole row",
    "bert": "a head that does more than",
    "dbrx": "its forward fails with RuntimeError: index_add_",  # its own experts, under bf16 autocast alone
    "llama4-temperature": "positions from 16 on .* set train.tokens_per_microbatch=16 or less",
    "llama4-chunks": "in sequences of 18 tokens and more .*attention_chunk_size=16",
    "phi3-longrope": "rope_type=longrope.*original_max_position_embeddings=32",
    "llama-dynamic": "rope_type=dynamic.*original_max_position_embeddings=32",
    "bloom": _OUTSIDE, "mpt": _OUTSIDE, "falcon-rope": _OUTSIDE, "falcon-alibi": _OUTSIDE, "gptj": _OUTSIDE,
    "gpt-neo": _OUTSIDE, "codegen": _OUTSIDE, "rwkv": _OUTSIDE,
    "mamba": _STATE + "MambaMixer", "mamba2": _STATE + "Mamba2Mixer", "falcon-mamba": _STATE + "FalconMambaMixer",
    "jamba": _STATE + "JambaMambaMixer", "bamba": _STATE, "falcon-h1": _STATE, "zamba2": _STATE + "Zamba2MambaMixer",
    "qwen3-next": _STATE + "Qwen3NextGatedDeltaNet", "lfm2": _STATE + "Lfm2ShortConv",
    "minimax": _STATE + "MiniMaxLightningAttention",
    "recurrent-gemma": "attention that follows other rules|" + _STATE,
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    """The named model, fp32, in evaluation mode, every parameter far from the value that would hide it.

    Args:
        name: A key of ``ARCHITECTURES``.
    """
    family, settings = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{family}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # matrices of size 1 / sqrt(inputs) keep activations near 1; norms, biases and sinks move off 0 and 1
            scale = 0.2 if parameter.dim() < 2 else 1.5 * parameter.shape[-1] ** -0.5
            noise = scale * torch.randn_like(parameter)
            parameter.data.copy_(parameter.data + noise if parameter.dim() < 2 else noise)
    return model.eval()
