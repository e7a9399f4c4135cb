"""FusedLMHead on models of transformers: the loss and gradients of the model's own logits."""

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from srft_kernels import FusedLMHead, linear_cross_entropy, linear_logprobs
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


# what becomes of a model's lm_head


def granite(*, tied: bool = False) -> transformers.PreTrainedModel:
    """A model that scales its logits, in float64."""
    return causal_lm("GraniteConfig", logits_scaling=4.0, tie_word_embeddings=tied).double()


def resized(model: transformers.PreTrainedModel, number: int) -> transformers.PreTrainedModel:
    """The same with another number of words; the new ones are told apart from the mean."""
    model.resize_token_embeddings(number, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(torch.randn_like(model.get_output_embeddings().weight), alpha=0.3)
    return model


def with_lora(model: transformers.PreTrainedModel, **options) -> nn.Module:
    """The model with an adapter on its lm_head that is not 0."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=6, **options)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return adapted.double()


def with_trained_copy(model: transformers.PreTrainedModel) -> nn.Module:
    """The model in peft with a copy of its lm_head that differs."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=3)
    adapted = peft.get_peft_model(model, config).double()
    nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    return adapted


def loaded(model: transformers.PreTrainedModel) -> None:
    """Other weights, as the parameters themselves."""
    state = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def tied_again(model: transformers.PreTrainedModel) -> None:
    """The head gets the weight of the embedding."""
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def another(model: transformers.PreTrainedModel, bias: bool = True) -> nn.Linear:
    """A layer of the size of the head."""
    return nn.Linear(WIDTH, model.config.vocab_size, bias=bias).double()


def set_weight(model: transformers.PreTrainedModel) -> None:
    """A new parameter in the same layer."""
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH).double())


def set_bias(model: transformers.PreTrainedModel) -> None:
    """The layer gets a bias."""
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB).double())


def through_meta(model: transformers.PreTrainedModel) -> None:
    """New parameters, by way of a device that holds none."""
    model.lm_head.to("meta").to_empty(device="cpu")
    nn.init.normal_(model.lm_head.weight)


def switched(model: transformers.PreTrainedModel) -> nn.Module:
    """A second adapter in the place of the first."""
    adapted = with_lora(model)
    adapted.add_adapter("other", adapted.peft_config["default"])
    nn.init.normal_(model.lm_head.lora_B["other"].weight)
    adapted.set_adapter("other")
    return adapted.double()


def trained(model: nn.Module) -> None:
    """peft freezes what it wraps."""
    model.requires_grad_(True)


CHANGES: dict[str, Callable] = {
    "larger": lambda model: resized(model, VOCAB + 7) and None,
    "smaller": lambda model: resized(model, VOCAB - 7) and None,
    "padded": lambda model: model.resize_token_embeddings(pad_to_multiple_of=64) and None,
    "tied": tied_again,
    "tied-and-larger": lambda model: (tied_again(model), resized(model, VOCAB + 7)) and None,
    "set": lambda model: model.set_output_embeddings(another(model)),
    "attribute": lambda model: setattr(model, "lm_head", another(model, bias=False)),
    "twice": lambda model: (resized(model, VOCAB + 7), resized(model, VOCAB + 9)) and None,
    "weight": set_weight,
    "bias": set_bias,
    "loaded": loaded,
    "meta": through_meta,
    "fp32-and-back": lambda model: model.float().double() and None,
    "lora": with_lora,
    "lora-after-larger": lambda model: with_lora(resized(model, VOCAB + 7)),
    "lora-switched": switched,
    "lora-disabled": lambda model: trained(with_lora(model).base_model.disable_adapter_layers() or model),
    "lora-merged": lambda model: trained(with_lora(model).merge_and_unload()),
    "lora-unloaded": lambda model: trained(with_lora(model).unload()),
    "lora-unloaded-larger": lambda model: trained(resized(with_lora(model).merge_and_unload(), VOCAB + 7)),
    "copy-trained": with_trained_copy,
    "copy-disabled": lambda model: trained(with_trained_copy(model).base_model.disable_adapter_layers() or model),
    "copy-unloaded": lambda model: trained(with_trained_copy(model).merge_and_unload()),
}


def assert_like_the_model(model: nn.Module, head: FusedLMHead) -> None:
    """The loss and every gradient of the head are those of the model's own logits."""
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(3, VOCAB - 10, (2, 1, 7), generator=generator)
    found = []
    for fused in (False, True):
        model.zero_grad()
        if fused:
            hidden = model.model(input_ids=ids, use_cache=False)[0][0]
            loss = head(hidden, partial(linear_cross_entropy, labels=labels[0]))
        else:
            loss = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0], labels[0])
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (expected, gold), (loss, gradients) = found
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert gradients.keys() == gold.keys() and any("lm_head" in name or "embed" in name for name in gold)
    for name, x in gold.items():
        assert (gradients[name] - x).norm() <= 1e-9 * x.norm(), name


def head_of(model: transformers.PreTrainedModel, how: str) -> FusedLMHead:
    """A head made from the model, or from its layer."""
    if how == "model":
        return FusedLMHead.from_model(model)
    return FusedLMHead.from_linear(model.lm_head, **logit_options(model.config))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("called", [True, False], ids=["used-before", "new"])
@pytest.mark.parametrize("how", ["model", "layer"])
def test_the_head_follows(how, called, change):
    """Whatever becomes of the model's lm_head, the fused loss is that of its logits."""
    model = granite()
    head = head_of(model, how)
    if called:
        assert_like_the_model(model, head)
    kept = CHANGES[change](model)
    assert_like_the_model(model, head)
    assert head.weight is not None and kept is not model


@pytest.mark.parametrize("change", ["larger", "lora", "lora-merged", "weight"])
@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
@pytest.mark.parametrize("how", ["model", "layer"])
def test_a_copy_of_the_model_follows_the_copy(how, by, change):
    """The head inside a copied model belongs to the copy, and the original's to the original."""
    model = granite()
    model.fused = head_of(model, how)
    if by == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin.fused.weight is twin.lm_head.weight is not model.lm_head.weight
    CHANGES[change](twin)
    assert_like_the_model(twin, twin.fused)
    assert_like_the_model(model, model.fused)


def test_a_head_in_the_layers_place():
    """The head may stand where the layer stood, or take over from an Identity, and is then its own."""
    for stand_in in (True, False):
        model, gold = granite(), granite()
        gold.load_state_dict(model.state_dict())
        head = FusedLMHead.from_linear(model.lm_head, logit_scale=0.25)
        model.lm_head = head if stand_in else nn.Identity()
        ids = torch.randint(3, VOCAB, (1, 7))
        hidden = model.model(input_ids=ids, use_cache=False)[0][0]
        loss = head(hidden, partial(linear_cross_entropy, labels=ids[0]))
        expected = F.cross_entropy(gold(input_ids=ids, use_cache=False).logits[0], ids[0])
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(head.weight.grad, gold.lm_head.weight.grad)
        model.lm_head = another(model)
        if stand_in:
            model.config.logits_scaling = 4.0
            assert_like_the_model(model, head)


class Scaled(nn.Linear):
    """A layer that does more than nn.Linear."""

    def forward(self, x):
        """Twice the product."""
        return 2 * super().forward(x)


def test_what_cannot_be_followed_raises():
    """Another kind of layer, or one whose forward is its own, is not taken for the old one."""
    hidden, op = torch.randn(3, WIDTH).double(), partial(linear_cross_entropy, labels=torch.arange(3))
    for new, message in (
        (Scaled(WIDTH, VOCAB).double(), "got Scaled with a forward of its own"),
        (nn.Sequential(nn.Linear(WIDTH, VOCAB)), "module must be an nn.Linear, .*got Sequential"),
    ):
        for how in ("model", "layer"):
            model = granite()
            head = head_of(model, how)
            model.lm_head = new
            with pytest.raises(ValueError, match=message):
                head(hidden, op)
            with pytest.raises(ValueError, match=message):
                FusedLMHead.from_linear(new)
    model = granite()
    head = head_of(model, "layer")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match="got Linear with a forward of its own"):
        head(hidden, op)
    model = granite()
    head = head_of(model, "layer")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match="weight must be a floating point nn.Parameter"):
        head(hidden, op)
    # the head has another weight than they shared: nobody can know which is meant
    for change in (loaded, lambda model: setattr(model.fused, "weight", nn.Parameter(torch.ones(VOCAB, WIDTH)))):
        model = granite()
        model.fused = head_of(model, "model")
        change(model)
        with pytest.raises(ValueError, match="no longer share their weight; apply fully_shard"):
            model.fused(hidden, op)


def test_a_layer_that_was_put_past_every_hook():
    """A head made from the model looks where the model does."""
    model = granite()
    head = FusedLMHead.from_model(model)
    model._modules["lm_head"] = another(model)
    assert_like_the_model(model, head)


def test_the_adapters_that_came_later_are_parameters_of_the_head():
    """FSDP2 must find them; those that went are no longer."""
    model = granite()
    head = FusedLMHead.from_model(model)
    adapted = with_lora(model)
    assert_like_the_model(model, head)
    assert set(head.state_dict()) == {"weight", "lora_A.default.weight", "lora_B.default.weight"}
    trained(adapted.unload())
    assert_like_the_model(model, head)
    assert set(head.state_dict()) == {"weight"}
