"""The packed forward pass equals separate ones; the byte tokenizer reads any text; what cannot be right is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srft.batch import Batch, pack
from srft.config import ModelConfig
from srft.options import load_config
from srft.policy.model import build_tiny, byte_tokenizer, head_of, load_tokenizer, prepare_policy
from srft.policy.parallel import ALONE
from tests.trainer.architectures import build
from tests.trainer.tiny import (
    CPU,
    flat_gradient,
    hidden_states_of,
    members,
    plain_model,
    policy,
    random_groups,
    relative_error,
    tiny_config,
)


def packed_batch() -> Batch:
    """Forty sequences of 2 to 17 tokens in one batch."""
    (batch,) = pack(members(random_groups()), 10_000, CPU)
    return batch


def separate_hidden_states(model: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    """The same rows from one plain forward pass a sequence."""
    rows = [
        model.model(torch.tensor([s.prompt_ids + s.response_ids])).last_hidden_state[
            0, len(s.prompt_ids) - 1 : -1
        ]
        for s in batch.sequences
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_equals_separate(kv_heads: int, checkpointing: bool) -> None:
    """Hidden states and gradient, with shared key-value heads and recomputed activations too."""
    plain, batch = plain_model(kv_heads=kv_heads), packed_batch()
    packed = policy(plain, f"model.gradient_checkpointing={str(checkpointing).lower()}")
    assert packed.is_gradient_checkpointing is checkpointing
    expected = separate_hidden_states(plain, batch)
    actual = hidden_states_of(packed, batch, torch.float32)
    assert actual.shape == (len(batch.labels), plain.config.hidden_size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    assert relative_error(flat_gradient(packed), flat_gradient(plain)) <= 1e-5


def test_neighbours_do_not_leak() -> None:
    """Changing one packed sequence changes no row of another."""
    packed, batch = policy(plain_model()), packed_batch()
    before = hidden_states_of(packed, batch, torch.float32)
    first, last = batch.cu_seqlens[3:5].tolist()
    batch.input_ids[first:last] = (batch.input_ids[first:last] + 5) % 30
    after = hidden_states_of(packed, batch, torch.float32)
    inside = torch.zeros(len(before), dtype=torch.bool)
    inside[batch.loss_cu_seqlens[3] : batch.loss_cu_seqlens[4]] = True
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


def test_an_exported_byte_tokenizer_comes_back_as_it_was(tmp_path: Path) -> None:
    """Beside a model's config, too, by whose architecture transformers would give it one token more."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert len(load_tokenizer(ModelConfig(name=str(tmp_path)))) == len(tokenizer) == 258


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_gives_the_logits(tied: bool) -> None:
    """Hidden states times the head's weight are the model's logits."""
    plain, batch = plain_model(tied=tied), packed_batch()
    packed = policy(plain)
    logits = head_of(packed)(hidden_states_of(packed, batch, torch.float32), lambda x, weight: x @ weight.T)
    first = batch.sequences[0]
    expected = plain(torch.tensor([first.prompt_ids + first.response_ids])).logits[
        0, len(first.prompt_ids) - 1 : -1
    ]
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=0, atol=1e-5)
    assert head_of(packed).weight is packed.lm_head.weight
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) is tied
    assert list(packed.state_dict()) == list(plain.state_dict()), "the head is no part of what is saved"


def test_head_rounds_its_bias_as_autocast_does() -> None:
    """In bf16 weight and bias are rounded, and gradients reach the fp32 parameters rounded once, as in the model."""
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias.normal_()
    packed = policy(model)
    x = torch.randn(5, packed.lm_head.in_features, dtype=torch.bfloat16)
    actual = head_of(packed)(x, lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias))
    actual.sum().backward()
    gradients = [p.grad.clone() for p in packed.lm_head.parameters()]
    packed.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = packed.lm_head(x)
    expected.sum().backward()
    assert torch.equal(actual, expected) and actual.dtype == torch.bfloat16
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, packed.lm_head.parameters(), strict=True))


def test_head_that_is_no_linear_layer_is_refused() -> None:
    """Before any forward pass, naming the model and the class."""
    model = plain_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"qwen2 has a head that the fused losses do not compute: .*Sequential"):
        prepare_policy(model, tiny_config().model, 64, ALONE)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights() -> None:
    """The compute precision is that of the output, and close to the fp32 one."""
    packed, batch = policy(plain_model()), packed_batch()
    low = hidden_states_of(packed, batch, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert head_of(packed)(low, lambda _x, weight: weight).dtype == torch.bfloat16
    assert {p.dtype for p in packed.parameters()} == {torch.float32}
    assert relative_error(low.float(), hidden_states_of(packed, batch, torch.float32)) < 0.05


@given(st.text())
def test_byte_tokenizer_round_trip(text: str) -> None:
    """Any text comes back, one token a byte, with no special token slipped in."""
    tokenizer = BYTES
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert all(i < 256 for i in ids)
    assert tokenizer.decode(ids) == text


BYTES = byte_tokenizer()


def test_byte_tokenizer_special_tokens() -> None:
    """End and padding are two tokens of their own, dropped from decoded text."""
    assert len(BYTES) == 258
    assert len({BYTES.eos_token_id, BYTES.pad_token_id} - set(range(256))) == 2
    ids = [*BYTES("12", add_special_tokens=False)["input_ids"], BYTES.eos_token_id]
    assert BYTES.decode(ids, skip_special_tokens=True) == "12"


def test_build_tiny_follows_its_seed() -> None:
    """Same seed, same weights, whatever the global generator; its state is left alone."""
    config = load_config(["model.tiny.hidden_size=16", "model.tiny.num_heads=2"]).model
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = build_tiny(config, BYTES, 64, seed=3), build_tiny(config, BYTES, 64, seed=3)
    other = build_tiny(config, BYTES, 64, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight


@pytest.mark.parametrize("window", [3, 9, 40])
def test_sliding_window(window: int) -> None:
    """Windows shorter and longer than the sequences, forward and backward."""
    plain, batch = plain_model(), packed_batch()
    plain.config.sliding_window, plain.config.use_sliding_window = window, True
    plain.config.layer_types = ["sliding_attention", "full_attention"]
    plain = transformers.AutoModelForCausalLM.from_config(plain.config).float().eval()
    packed = policy(plain)
    expected, actual = separate_hidden_states(plain, batch), hidden_states_of(packed, batch, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    assert relative_error(flat_gradient(packed), flat_gradient(plain)) <= 1e-5


@pytest.mark.parametrize(("name", "scale"), [("cohere", 0.0625), ("granite", 0.125), ("hyperclovax", 8.0)])
def test_logit_scale_is_what_the_model_does(name: str, scale: float) -> None:
    """Some models multiply by their setting, others divide by it."""
    assert head_of(policy(build(name))).logit_scale == scale


def test_missing_tokenizer_is_one_line() -> None:
    """A folder that does not exist is an error that names it."""
    with pytest.raises(ValueError, match="no/such/folder"):
        load_tokenizer(tiny_config("model.name=no/such/folder").model)
