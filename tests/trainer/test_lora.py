"""Adapters in the policy: what is trained, what an engine gets, what lies in a folder, and what is refused."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from srft.batch import pack
from srft.engine.hf import HfEngine
from srft.learning import update
from srft.methods import assign_advantages
from srft.policy import lora
from srft.policy.adapter import base_of, export_adapter, first_adapters, is_adapter, put_adapters
from srft.policy.forwards import packed_forward, sampler_logprobs
from srft.policy.manifest import damage
from srft.policy.model import byte_tokenizer, own_attention, prepare_policy
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import ALONE
from srft.policy.proof import prove
from srft.sync import WeightSync
from tests.trainer.tiny import (
    CPU,
    learner_of,
    plain_model,
    policy,
    random_groups,
    relative_error,
    sequence,
    tiny_config,
)

peft = pytest.importorskip("peft", reason="needs peft: pip install 'srft[lora]'")

IDS = torch.tensor([[5, 6, 7, 8, 9]])
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def put(model: transformers.PreTrainedModel, *words: str) -> transformers.PreTrainedModel:
    """The model, with new adapters of rank 3 as these options say."""
    put_adapters(model, "some/base", tiny_config("model.lora.rank=3", "model.lora.alpha=4", *words))
    return model


def with_adapters(
    *overrides: str, tied: bool = False, head: bool = False, seed: int = 0, moved: bool = True
) -> transformers.PreTrainedModel:
    """A prepared policy with adapters of rank 3 on its layers, which change what it computes where ``moved``."""
    model = put(plain_model(tied=tied), f"train.seed={seed}", *(["model.lora.head=true"] if head else []))
    if moved:
        move(model)
    return prepare_policy(model, tiny_config(*overrides).model, 64, ALONE)


def move(model: torch.nn.Module, scale: float = 0.1) -> None:
    """What optimizer steps do to adapters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, p in lora.adapters(model):
            p.add_(scale * torch.randn(p.shape, generator=generator))


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what must never change."""
    return {name: p.clone() for name, p in model.named_parameters() if lora.checkpoint_name(name) is not None}


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad(), own_attention(model):
        return model(IDS).logits


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    """Every linear layer of the blocks has one, and the head where it is asked for; the class stays."""
    plain = policy(plain_model())
    model = with_adapters(head=True, moved=False)
    assert type(model) is type(plain)
    assert torch.equal(logits(model), logits(plain))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in lora.adapters(model)}
    places = {name.rpartition(".lora_")[0] for name in trained}
    assert {path.rpartition(".")[2] for path in places} == KINDS | {"lm_head"}
    assert len(places) == 2 * len(KINDS) + 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    groups = make_optimizer(model, tiny_config("train.weight_decay=0.1")).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(len(trained), 0.1), (0, 0.0)]


def test_adapters_start_from_the_seed_and_the_name_alone() -> None:
    """Whatever else is drawn, in whatever order: A of a layer is the same, and those of two layers differ."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = dict(lora.adapters(with_adapters(moved=False)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = dict(lora.adapters(with_adapters(head=True, moved=False)))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    other = dict(lora.adapters(with_adapters(seed=1, moved=False)))
    a = [name for name in first if ".lora_A." in name]
    assert not any(torch.equal(first[name], other[name]) for name in a)
    assert len({first[name].sum().item() for name in a}) == len(a)
    # uniform within 1/sqrt(in)
    largest = max((first[name].abs() * first[name].shape[1] ** 0.5).max().item() for name in a)
    assert 0.9 < largest < 1


@pytest.mark.parametrize("words", [(), ("model.gradient_checkpointing=true",)], ids=["plain", "recomputed"])
@pytest.mark.parametrize(("tied", "head"), [(True, False), (False, True)], ids=["tied", "head"])
def test_policies_with_adapters_pass_the_proof(tied: bool, head: bool, words: tuple[str, ...]) -> None:
    """Packed log-probabilities and the gradients of adapters are those of the model's own forward."""
    model = with_adapters(*words, tied=tied, head=head)
    proof = prove(model, tiny_config(*words))
    assert proof.gradients["float32"].differences.largest < 1e-5


def test_gradients_are_those_of_the_merged_weights() -> None:
    """An update's dA and dB by the chain rule from the gradient of a dense policy: s B^T dW and s dW A^T."""
    config = tiny_config("train.lr=1e-9")
    model = with_adapters(head=True)
    dense = policy(plain_model())
    dense.load_state_dict(dict(lora.merged(model.state_dict().items(), model)))
    for each in (model, dense):
        sequences = assign_advantages(random_groups(), config.method)
        update(learner_of(config, each, make_optimizer(each, config)), sequences, 1)
    whole = {name: p.grad for name, p in dense.named_parameters()}
    for path, layer in lora.adapted(model).items():
        a, b, dw = layer.lora_A["default"].weight, layer.lora_B["default"].weight, whole[f"{path}.weight"]
        assert relative_error(a.grad, 4 / 3 * b.T @ dw) < 1e-4, path
        assert relative_error(b.grad, 4 / 3 * dw @ a.T) < 1e-4, path
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("words", [[], ["engine.dtype=bfloat16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tied", "head"), [(True, False), (False, True)], ids=["tied", "head"])
def test_engine_gets_merged_weights_and_the_base_stays(tied: bool, head: bool, words: list[str]) -> None:
    """The canary passes after every update, by names of the base's checkpoint, and no bit of the base moves."""
    config = tiny_config(*words)
    model = with_adapters(tied=tied, head=head, moved=False)
    # a checkpoint in bf16, which the engine of that precision would hold without rounding were it not for the adapters
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    before = frozen(model)
    engine = HfEngine(model, dtype=config.engine_dtype, pad_token_id=0, max_batch=8)
    probe = [[5, 6, 7, 8], [9, 10], list(range(3, 30))]
    sync = WeightSync(model, engine, probe, config)
    sync.push(0)
    first = torch.tensor([x for row in engine.score(probe) for x in row])
    for version in (1, 2):
        move(model)
        sync.push(version)
        now = torch.tensor([x for row in engine.score(probe) for x in row])
        assert (now - first).abs().max() > 0.05
        first = now
    assert all(torch.equal(p, before[name]) for name, p in frozen(model).items())
    names = dict(lora.merged(model.state_dict().items(), model)).keys()
    assert names == plain_model(tied=tied).state_dict().keys()


def test_noise_is_that_of_merged_weights() -> None:
    """What the canary measures noise by computes with W + s B A rounded once, as a bf16 engine does."""
    model = with_adapters(head=True)
    engine = HfEngine(model, dtype=torch.bfloat16, pad_token_id=0, max_batch=8)
    response = sequence([5, 6], [7, 8, 9, 10, 11])
    (scores,) = engine.score([response.prompt_ids + response.response_ids])
    assert (sampler_logprobs(model, [response], torch.bfloat16) - torch.tensor(scores[-5:])).abs().max() < 1e-5


def test_merged_weights_are_those_of_peft() -> None:
    """W + s B A as peft's own merge has it, and nothing else changed."""
    model = with_adapters(head=True)
    state = dict(lora.merged(model.state_dict().items(), model))
    for path, layer in lora.adapted(copy.deepcopy(model)).items():
        layer.merge()
        assert torch.allclose(state[f"{path}.weight"], layer.base_layer.weight, rtol=0, atol=1e-6), path
        assert not torch.equal(state[f"{path}.weight"], model.get_parameter(f"{path}.base_layer.weight"))
    assert torch.equal(state["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_base_policy() -> None:
    """Inside it the policy is its base, to the last bit, also through the fused head; afterwards it is itself."""
    model, plain = with_adapters(head=True), policy(plain_model())
    sequences = [s for group in random_groups(2) for s in group.rollouts]
    (batch,) = pack(sequences, 512, CPU)
    moved = packed_forward(model, batch, torch.float32)[0]
    with lora.base_policy(model):
        base = packed_forward(model, batch, torch.float32)[0]
        assert torch.equal(lora.merged_weight(model.lm_head), model.lm_head.base_layer.weight)
    assert torch.equal(base, packed_forward(plain, batch, torch.float32)[0])
    assert not torch.equal(base, moved)
    assert torch.equal(packed_forward(model, batch, torch.float32)[0], moved)
    assert all(p.requires_grad for _, p in lora.adapters(model))


@pytest.mark.parametrize("method", ["srft", "sft"])
def test_a_frozen_head_costs_two_thirds(method: str) -> None:
    """An update pays 6 N D for a row of the vocabulary of a trained head and 4 N D of a frozen one."""
    config = tiny_config(f"method.name={method}")
    sequences = assign_advantages(random_groups(), config.method)
    rows = sum(len(s.response_ids) for s in sequences)

    def cost(vocab: int, rank: int) -> float:
        model = plain_model(vocab=vocab)
        if rank:
            put(model, f"model.lora.rank={rank}")
        model = prepare_policy(model, config.model, 64, ALONE)
        learner = learner_of(config, model, make_optimizer(model, config))
        with FlopCounterMode(display=False) as counter:
            update(learner, sequences, 1)
        return counter.get_total_flops()

    # a product may have a few rows more than there are
    for rank, expected in ((0, 6), (1, 4)):
        assert (cost(3037, rank) - cost(37, rank)) / (rows * 24 * 3000) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "head"])
def test_a_folder_is_what_peft_loads(head: bool, tmp_path: Path) -> None:
    """``PeftModel.from_pretrained`` on the base gives equal log-probabilities, and ours the same bits."""
    model = with_adapters(head=head)
    plain_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    export_adapter(tmp_path / "adapter", model, byte_tokenizer())
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tmp_path / "base")
    assert not list((tmp_path / "adapter").glob("model*")) and damage(tmp_path / "adapter") is None
    base = transformers.AutoModelForCausalLM.from_pretrained(base_of(tmp_path / "adapter"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, found = (x.log_softmax(-1) for x in (theirs(IDS).logits, logits(model)))
    assert (expected - found).abs().max() < 1e-6
    put_adapters(base, tmp_path / "adapter", tiny_config("model.lora.rank=3"))
    assert all(torch.equal(p, dict(lora.adapters(base))[name]) for name, p in lora.adapters(model))
    assert {name for name, p in base.named_parameters() if p.requires_grad} == {n for n, _ in lora.adapters(base)}


def test_a_foreign_adapter_is_trained_on(tmp_path: Path) -> None:
    """What peft saved itself, rank-stabilised and with its targets as an expression, is loaded as it is."""
    theirs = peft.get_peft_model(
        plain_model(),
        peft.LoraConfig(r=2, target_modules=r".*\.(q_proj|down_proj)", use_rslora=True, lora_dropout=0.1,
                        init_lora_weights=False),
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    base = plain_model()
    put_adapters(base, tmp_path, tiny_config("model.lora.rank=2"))
    assert {path.rpartition(".")[2] for path in lora.adapted(base)} == {"q_proj", "down_proj"}
    with torch.no_grad():
        assert torch.allclose(base(IDS).logits, theirs(IDS).logits, atol=1e-6)
    state = dict(lora.merged(base.state_dict().items(), base))
    with torch.no_grad():
        merged = torch.func.functional_call(plain_model(), state, (IDS,)).logits
        assert torch.allclose(merged, theirs(IDS).logits, atol=1e-5)


def saved(folder: Path, settings: dict[str, object]) -> Path:
    """An adapter's folder with other settings in its configuration."""
    model = with_adapters()
    export_adapter(folder, model, byte_tokenizer())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"use_dora": True}, [], "use_dora=True; only plain LoRA.*merge this adapter into its base"),
        ({"modules_to_save": ["lm_head"]}, [], r"modules_to_save=\['lm_head'\]; only plain LoRA"),
        ({"peft_type": "IA3"}, [], "peft_type='IA3'; only plain LoRA"),
        ({}, ["rank=0"], "an adapter of rank 3: set model.lora.rank=3 to go on training it"),
        ({}, ["rank=8"], "model.lora.rank=8, but the adapter in .* has 3"),
        ({}, ["alpha=5"], "model.lora.alpha=5.0, but the adapter in .* has 4"),
        ({}, ["targets=q_proj"], "do not say what the adapter in .* has: .* and 11 others differ"),
        ({}, ["head=true"], "do not say what the adapter in .* has: lm_head and 0 others"),
        ({"target_modules": ["q_proj"]}, [], "is not of this model's adapters: 24 tensors differ.*expected none"),
        ({"r": 2}, ["rank=2"], r"the first .*lora_A.*: expected \[2, 40\], got \[3, 40\]"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(
    settings: dict[str, object], options: list[str], message: str, tmp_path: Path
) -> None:
    """More than plain LoRA, other options than those of the run, tensors of something else."""
    with pytest.raises(ValueError, match=message) as caught:
        words = [f"model.lora.{word}" for word in ["rank=3", *options]]
        put_adapters(plain_model(), saved(tmp_path / "a", settings), tiny_config(*words))
    assert "\n" not in str(caught.value)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    """A base that is gone or not named, a file that is missing, damaged, or short of a tensor."""
    folder = saved(tmp_path / "a", {"base_model_name_or_path": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match="is for the model in .*gone, which is not there; bring it back, or set"):
        base_of(folder)
    with pytest.raises(ValueError, match="does not name its base; set base_model_name_or_path"):
        base_of(saved(tmp_path / "a", {"base_model_name_or_path": None}))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        base_of(folder)
    tensors = saved(folder, {}) / "adapter_model.safetensors"
    whole = load_file(tensors)
    save_file(dict(list(whole.items())[1:]), tensors)
    with pytest.raises(ValueError, match="1 tensors differ, .* got none"):
        put_adapters(plain_model(), folder, tiny_config("model.lora.rank=3"))
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        put_adapters(plain_model(), folder, tiny_config("model.lora.rank=3"))
    tensors.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing; save the adapter with peft"):
        put_adapters(plain_model(), folder, tiny_config("model.lora.rank=3"))


@pytest.mark.parametrize(
    ("word", "tied", "message"),
    [
        ("head=true", True, "qwen2 ties its head to its embedding.*leave model.lora.head=false"),
        ("targets=q_proj,c_attn", False, "model.lora.targets=c_attn is no linear layer.*choose from down_pr"),
        ("targets=lm_head", False, "model.lora.targets=lm_head is no linear layer of the blocks"),
    ],
)
def test_places_that_are_refused(word: str, tied: bool, message: str) -> None:
    """A head that has no weight of its own, and names that mean nothing."""
    with pytest.raises(ValueError, match=message):
        put(plain_model(tied=tied), f"model.lora.{word}")


def test_targets_by_the_ends_of_names() -> None:
    """One kind of layer, one layer, and what another library reads in the folder."""
    model = put(plain_model(), "model.lora.targets=o_proj,1.mlp.up_proj")
    assert set(lora.adapted(model)) == {
        "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip
    whole = put(plain_model())
    assert whole.peft_config["default"].target_modules == KINDS


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what to install."""
    monkeypatch.setattr(lora.importlib, "import_module", partial(_missing, lora.importlib.import_module))
    with pytest.raises(ValueError, match=r"model.lora needs peft: pip install 'srft\[lora\]'"):
        put(plain_model())


def _missing(original: object, name: str) -> object:
    if name == "peft":
        raise ModuleNotFoundError("No module named 'peft'")
    return original(name)  # type: ignore[operator]


def test_skeletons_get_their_adapters_later() -> None:
    """On the meta device places and names are the same, and nothing is allocated until it is filled in."""
    shape = plain_model().config
    with torch.device("meta"):
        model = put(transformers.Qwen2ForCausalLM(shape))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    lora.fill_adapters(model, first_adapters(model, "some/base", tiny_config()))
    real = put(plain_model())
    expected, found = dict(lora.adapters(real)), dict(lora.adapters(model))
    assert expected.keys() == found.keys()
    assert all(torch.equal(p, found[name]) for name, p in expected.items())
