"""FusedLMHead on models of transformers: the loss and gradients of the model's own logits."""

from functools import partial

import pytest
import torch
import transformers

from srft_kernels import FusedLMHead, linear_logprobs
from srft_kernels.lm_head import logit_options

VOCAB, WIDTH = 97, 32
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# config: (what it sets, the scale and softcap of its logits)
SCALED = {
    "CohereConfig": ({"logit_scale": 0.25}, 0.25, None),
    "Cohere2Config": ({"logit_scale": 0.25}, 0.25, None),
    "FalconH1Config": ({"lm_head_multiplier": 0.4}, 0.4, None),
    "Gemma2Config": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "GraniteConfig": ({"logits_scaling": 8.0}, 0.125, None),
    "HyperCLOVAXConfig": ({"logits_scaling": 0.3}, 0.3, None),
    "LlamaConfig": ({}, 1.0, None),
    "MiniCPM3Config": ({"dim_model_base": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}, 0.5, None),
    "MptConfig": ({"logit_scale": 0.5, "d_model": WIDTH, "n_layers": 1, "n_heads": 4}, 1.0, None),
    "RecurrentGemmaConfig": ({"logits_soft_cap": 2.0}, 1.0, 2.0),
}


def causal_lm(name: str, **options) -> transformers.PreTrainedModel:
    """A tiny model whose logits are far from uniform."""
    config = getattr(transformers, name)(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data.normal_()
    return model


def final_states(model: transformers.PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, D] inputs of the head, and the model's own logits [T, V]."""
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return model.base_model(input_ids=ids, use_cache=False)[0][0], logits


@pytest.mark.parametrize("name", SCALED)
def test_logits_of_a_config(name):
    """Scale and softcap that a config gives make the model's own log-probabilities."""
    options, scale, softcap = SCALED[name]
    model = causal_lm(name, **options)
    found = logit_options(model.config)
    assert found == {"logit_scale": scale, "logit_softcap": softcap}
    ids, labels = torch.randint(3, VOCAB, (2, 1, 9))
    with torch.no_grad():
        hidden, logits = final_states(model, ids)
        head = FusedLMHead.from_linear(model.get_output_embeddings(), **found)
        logprobs, _ = head(hidden, partial(linear_logprobs, labels=labels[0]))
    expected = logits.log_softmax(-1).gather(-1, labels[0][:, None])[:, 0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_scale_of_a_model_with_several_modalities():
    """The text model's config is the one that counts."""
    text = transformers.GraniteConfig(**SIZES, logits_scaling=4.0)
    config = transformers.LlavaConfig(text_config=text)
    assert logit_options(config) == {"logit_scale": 0.25, "logit_softcap": None}


def test_two_scales_are_refused():
    """Nobody can know which of them the model reads."""
    config = transformers.CohereConfig(**SIZES, logit_scale=0.25)
    config.lm_head_multiplier = 2.0
    with pytest.raises(ValueError, match="cohere sets logit_scale and lm_head_multiplier; pass logit_scale yourself"):
        logit_options(config)
