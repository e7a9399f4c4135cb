"""The proof before step 0: right models pass, each kind of wrong one is refused with its cause, in fp32 and bf16."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from srft import selftest
from srft.batch import pack
from srft.config import Config
from srft.policy import attention
from srft.policy.attention import PACKED_NAMES
from srft.policy.forwards import packed_logprobs, probe_sequences
from srft.policy.model import byte_tokenizer, prepare_policy
from srft.policy.parallel import ALONE
from srft.policy.proof import prove
from tests.trainer.architectures import ARCHITECTURES, REFUSED, build
from tests.trainer.runs import train
from tests.trainer.tiny import CPU, plain_model, tiny_config

BOTH = "model.compute_dtype=bfloat16"  # fp32 is proved in every run


def run_config(*overrides: str) -> Config:
    """Sequences of up to 72 tokens: on either side of windows of 16 and of a change at 32."""
    return tiny_config("data.max_prompt_tokens=48", "rollout.max_new_tokens=24", *overrides)


def prepared(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    return prepare_policy(model, config.model, config.train.tokens_per_microbatch, ALONE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exact_or_refused_by_name(name: str) -> None:
    """What is called exact is so against the model's own float64 logits; what is refused has the right cause."""
    model, config = build(name), run_config(BOTH)
    model_type = model.config.get_text_config().model_type
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"^{model_type} .*{REFUSED[name]}"):
            prove(prepared(model, config), config)
        return
    gold_model = copy.deepcopy(model).double()
    gold_model.set_experts_implementation("eager")  # grouped products have no float64
    if name == "gemma2":
        gold_model.set_attn_implementation("eager")  # the one of transformers' attentions that caps scores
    proof = prove(prepared(model, config), config)
    assert proof.model_type == model_type and set(proof.logprobs) == {"float32", "bfloat16"}
    sequences = sorted(probe_sequences(model, config), key=len)
    gold = []
    for s in sequences:
        ids, n = torch.tensor([s.prompt_ids + s.response_ids]), len(s.response_ids)
        with torch.no_grad():
            logprobs = gold_model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)
        gold.append(logprobs.gather(-1, ids[0, -n:, None])[:, 0])
    actual = packed_logprobs(model, pack(sequences, 10**6, CPU), torch.float32)[0]
    expected = torch.cat(gold)
    assert float((actual - expected).abs().max()) <= 1e-5 + 2e-6 * float(expected.abs().max())


def test_lengths_lie_on_either_side_of_what_a_model_names() -> None:
    """Shortest, each limit and one and two more, the longest of the run; a single response token among them."""
    model = prepared(plain_model(), run_config())
    model.config.sliding_window, model.config.max_position_embeddings = 33, 70
    sequences = probe_sequences(model, run_config())
    assert {len(s) for s in sequences} == {2, 3, 5, 17, 20, 33, 34, 35, 36, 40, 70, 71, 72}
    assert any(len(s.response_ids) == 1 < len(s.prompt_ids) for s in sequences)
    assert all(len(s) <= 12 for s in probe_sequences(model, tiny_config("rollout.max_new_tokens=4")))


def attention_with(change: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def changed(*args: object, **kwargs: object) -> tuple[Tensor, None]:
        return change(attention._packed_attention("sdpa", *args, **kwargs)[0]), None

    return changed


def refusal_with(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, change: Callable[[Tensor], Tensor], *overrides: str
) -> str:
    """What the proof says when the packed attention's output is changed."""
    config = run_config(*overrides)
    policy = prepared(model, config)
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_NAMES["sdpa"], attention_with(change))
    with pytest.raises(ValueError) as caught:
        prove(policy, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_attention_is_told_from_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is wrong alone is not blamed on its neighbours."""
    message = refusal_with(monkeypatch, plain_model(), lambda y: 1.01 * y)
    assert "attention that follows other rules than causal attention" in message


def test_bounds_that_are_ignored_are_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """One causal row over the whole batch: each sequence sees those before it."""
    config = run_config()
    policy = prepared(plain_model(), config)
    by_length = attention._by_length
    monkeypatch.setattr(
        attention, "_by_length", lambda *a: by_length(*a[:5], a[5][[0, -1]], *a[6:])
    )
    with pytest.raises(ValueError, match="state that runs .*, or attention that ignores their bounds"):
        prove(policy, config)


def test_a_window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 17 tokens instead of 16 is seen from the first sequence that it cuts on, and named."""
    config = run_config()
    policy = prepared(build("mistral-window"), config)
    by_length = attention._by_length
    monkeypatch.setattr(
        attention, "_by_length", lambda q, k, v, s, w, *a: by_length(q, k, v, s, w and w + 1, *a)
    )
    with pytest.raises(ValueError, match="in sequences of 18 tokens and more.*sliding_window=16"):
        prove(policy, config)


class DoubledBackward(torch.autograd.Function):
    """The identity, whose backward is wrong by a twentieth."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return 1.05 * dy


def test_a_wrong_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right log-probabilities are not enough."""
    message = refusal_with(monkeypatch, plain_model(), DoubledBackward.apply)
    assert "its gradients in float32 do not" in message and "misses some of its weights" in message


def test_gradient_that_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a layer ran without autograd when packed."""
    assert "its gradients in float32 do not" in refusal_with(monkeypatch, plain_model(), Tensor.detach)


def test_an_error_of_the_run_s_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 right, bf16 wrong by three times its own noise."""

    def change(y: Tensor) -> Tensor:
        return 1.1 * y if y.dtype == torch.bfloat16 else y

    message = refusal_with(monkeypatch, plain_model(), change, BOTH)
    assert "log-probabilities in bfloat16 differ" in message and "since fp32 is right" in message


def test_noise_that_cannot_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over one batch must agree but for rounding."""
    message = refusal_with(monkeypatch, plain_model(), lambda y: y + 1e-3 * torch.randn_like(y))
    assert "different log-probabilities twice" in message


def test_a_head_that_does_more() -> None:
    """A scale that the configuration names and the model does not apply."""
    model, config = plain_model(), run_config()
    model.config.logit_scale = 0.5
    policy = prepared(model, config)
    with pytest.raises(ValueError, match="a head that does more than weight, bias, .*logit_scale=0.5"):
        prove(policy, config)


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_lengths_on_one_side_of_a_change_are_exact(name: str) -> None:
    """Frequencies that change at 32 tokens do not hinder a run that stays within them."""
    config = tiny_config("data.max_prompt_tokens=20", "rollout.max_new_tokens=12")
    assert max(prove(prepared(build(name), config), config).lengths) == 32


def test_positions_that_run_out() -> None:
    """An exception inside the model becomes a line with the limit that was passed."""
    config = run_config()
    shape = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    with pytest.raises(ValueError, match="^gpt2 .*IndexError.*sequences have up to 72 tokens.*n_positions=64"):
        prove(prepared(model, config), config)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["store", "recompute"])
def test_dropout_is_off_and_said(checkpointing: bool) -> None:
    """GPT-2 and OPT train without their dropout, recomputed layers too, and the log names the rates."""
    for name, rates in (("gpt2", {"attn_pdrop", "embd_pdrop", "resid_pdrop"}), ("opt", {"dropout"})):
        config = run_config(f"model.gradient_checkpointing={str(checkpointing).lower()}")
        model = prepared(build(name), config)
        assert model.is_gradient_checkpointing is checkpointing
        proof = prove(model, config)
        assert proof.dropout.keys() >= rates
        assert all(f"dropout off: {rate} 0.1" in proof.sentence() for rate in sorted(rates)[:1])


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_refuses_before_it_trains(tmp_path: Path) -> None:
    """A recurrent model never reaches the first step; a right one logs what was proved."""
    shape = transformers.MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, state_size=8)
    folder = saved(tmp_path / "mamba", transformers.AutoModelForCausalLM.from_config(shape))
    with pytest.raises(ValueError, match="^mamba cannot be trained on packed sequences.*MambaMixer"):
        train(tmp_path, model__name=folder)
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A table and status 0, or one line and status 2; the options are those of a run."""
    words = ["data.max_prompt_tokens=8", "rollout.max_new_tokens=8"]

    def run(*more: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["selftest", *words, *more])
        selftest.main()
        return capsys.readouterr()

    # a tokenizer that is read as Qwen2's has one token more than the bytes and two
    folder = saved(tmp_path / "qwen2", plain_model(vocab=259))
    out, _ = run(f"model.name={folder}", BOTH)
    assert out.startswith("qwen2: exact\n")
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("log-prob")] == [
        ["log-probabilities,", "nats", "float32"], ["log-probabilities,", "nats", "bfloat16"],
    ]  # fmt: skip
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_parameters"] = {
        "rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8,
    }  # fmt: skip
    settings["max_position_embeddings"] = 8
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="2"):
        run(f"model.name={folder}")
    error = capsys.readouterr().err
    assert error.startswith("error: qwen2 cannot be trained on packed sequences") and error.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert capsys.readouterr().out.startswith("usage: python -m srft.selftest")
