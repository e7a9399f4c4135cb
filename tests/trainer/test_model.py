"""The packed forward pass equals separate ones; the byte tokenizer reads any text; what cannot be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srft.batch import Batch, pack
from srft.config import ModelConfig
from srft.options import load_config
from srft.policy.loading import skeleton
from srft.policy.model import (
    build_tiny,
    byte_tokenizer,
    head_of,
    load_model,
    load_tokenizer,
    prepare_policy,
    read_config,
)
from srft.policy.parallel import ALONE
from tests.trainer.architectures import build
from tests.trainer.runs import train
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


def test_a_model_without_its_tokenizer_is_one_line(tmp_path: Path) -> None:
    """Of its config alone transformers makes a tokenizer that turns any text into nothing."""
    build("qwen2").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no words; is tokenizer.json missing there"):
        load_tokenizer(tiny_config(f"model.name={tmp_path}").model)


EDITS = ("model.rope_theta=40000", "model.max_position_embeddings=256")


def saved(folder: Path) -> Path:
    """A checkpoint of 64 positions, with a tokenizer of bytes."""
    plain_model(vocab=259).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_positions_are_those_of_the_options(tmp_path: Path) -> None:
    """Whole and as a skeleton, the model is that of a copy whose config.json says so, to the last bit."""
    folder, copy = saved(tmp_path / "own"), saved(tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"], settings["max_position_embeddings"] = 40000.0, 256
    (copy / "config.json").write_text(json.dumps(settings))
    config = read_config(folder, tiny_config(f"model.name={folder}", *EDITS).model)
    model, expected = (
        load_model(source, trust_remote_code=False, config=given) for source, given in ((folder, config), (copy, None))
    )
    assert model.config.to_diff_dict() | {"_name_or_path": ""} == expected.config.to_diff_dict() | {"_name_or_path": ""}
    tokens = torch.arange(60)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert not torch.equal(model(tokens).logits, load_model(folder, trust_remote_code=False)(tokens).logits)
    bare = skeleton(folder, trust_remote_code=False, config=config)
    (name, turns), *_ = [(n, b) for n, b in bare.named_buffers() if n.endswith("inv_freq")]
    assert torch.equal(turns, dict(expected.named_buffers())[name]) and bare.config.max_position_embeddings == 256


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}), ("gemma3_text", {}), ("mamba", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    ],
)  # fmt: skip
def test_positions_of_other_kinds_are_refused(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Learned ones, two bases, none, scaled ones: one line that names the option and the model."""
    transformers.AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    for edit in EDITS:
        with pytest.raises(ValueError, match=rf"^{edit.partition('=')[0]} is for unscaled rotary.*\({kind}\)"):
            read_config(tmp_path, tiny_config(f"model.name={tmp_path}", edit).model)
    read_config(tmp_path, tiny_config(f"model.name={tmp_path}").model)


@pytest.mark.parametrize("edit", EDITS)
def test_the_built_in_model_has_no_checkpoint_to_edit(edit: str) -> None:
    """It is built with what a run needs."""
    with pytest.raises(ValueError, match=f"{edit.partition('=')[0]}.*is built to fit; unset it"):
        load_config([edit])


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    """Before the data are read; with as many as the options give, the run goes on to the data."""
    words = {"model__name": saved(tmp_path / "own"), "data__train": tmp_path / "none.jsonl"}
    longer = {**words, "rollout__max_new_tokens": 33}
    with pytest.raises(ValueError, match="= 65 and model.name=.* positions for 64 tokens; .* set model.max"):
        train(tmp_path, **longer)
    for fits in (words, {**longer, "model__max_position_embeddings": 65}):
        with pytest.raises(ValueError, match="no such data file"):
            train(tmp_path, **fits)


def test_a_chat_template_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    """Of a checkpoint's and of the bytes; it is kept with the tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "theirs"
    tokenizer.save_pretrained(tmp_path / "own")
    assert load_tokenizer(tiny_config(f"model.name={tmp_path / 'own'}").model).chat_template == "theirs"
    for name in ("tiny", tmp_path / "own"):
        tokenizer = load_tokenizer(tiny_config(f"model.name={name}", "model.chat_template={{ messages }}").model)
        tokenizer.save_pretrained(tmp_path / "kept")
        assert load_tokenizer(tiny_config(f"model.name={tmp_path / 'kept'}").model).chat_template == "{{ messages }}"
