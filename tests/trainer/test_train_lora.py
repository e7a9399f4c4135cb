"""Runs that train adapters: what they leave, how they go on, and that they begin from what another left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from srft import evaluate
from srft.evaluation.subject import find_subject
from srft.policy.manifest import damage
from tests.trainer.runs import comparable_rows, read_lines, train

peft = pytest.importorskip("peft", reason="needs peft: pip install 'srft[lora]'")

LORA = {"model__lora__rank": 4, "model__lora__merge": True, "train__lr": 0.01}
LORA |= {"train__steps": 4, "train__save_every": 2}
IDS = torch.tensor([[65, 66, 67, 68, 69, 70]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    return train(tmp_path_factory.mktemp("lora"), **LORA)


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.log_softmax(-1)


def plain(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def base_of(folder: Path) -> Path:
    return Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_a_run_leaves_its_adapters_and_the_merged_model(run: Path) -> None:
    """peft on the base, plain transformers on the merged folder: equal log-probabilities, other than the base's."""
    base = plain(base_of(run / "model"))
    before = logprobs(base)
    adapted = logprobs(peft.PeftModel.from_pretrained(base, run / "model"))
    assert (adapted - before).abs().max() > 1e-3
    assert (logprobs(plain(run / "merged")) - adapted).abs().max() < 1e-5
    assert damage(run / "model") is None and damage(run / "merged") is None
    assert not list((run / "model").glob("model*"))
    assert all(row["canary/max_abs_diff"] < 1e-4 for row in comparable_rows(run))


def test_checkpoints_hold_adapters_and_their_moments(run: Path) -> None:
    """Nothing of the base, which they name."""
    (first, last) = sorted((run / "checkpoints").iterdir())
    base = base_of(last)
    assert base.is_dir() and base == base_of(run / "model")
    for folder in (first, last):
        names = {p.name for p in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"} <= names
        assert not {"config.json", "model.safetensors"} & names
    size = sum(p.stat().st_size for p in last.glob("*.safetensors"))
    assert size < (base / "model.safetensors").stat().st_size


def test_a_resumed_run_is_the_whole_one_bit_for_bit(run: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 2, with the base where it was."""
    runs = tmp_path / "runs"
    part = shutil.copytree(run, runs / "run")
    for folder in ("model", "merged", "checkpoints/step_000004"):
        shutil.rmtree(part / folder)
    assert train(tmp_path, **LORA, train__resume=True) == part
    assert comparable_rows(part) == comparable_rows(run)
    assert read_lines(part / "samples.jsonl") == read_lines(run / "samples.jsonl")
    for file in (
        "model/adapter_model.safetensors", "merged/model.safetensors", "checkpoints/step_000004/optimizer.safetensors",
        "checkpoints/step_000004/adapter_model.safetensors",
    ):  # fmt: skip
        assert (part / file).read_bytes() == (run / file).read_bytes(), file


def test_a_run_starts_from_the_adapters_of_another(run: Path, tmp_path: Path) -> None:
    """By its folder as model.name; the first evaluation is that of the adapters, the base is theirs."""
    later = train(tmp_path, **{**LORA, "train__steps": 1}, model__name=run / "model")
    assert base_of(later / "model") == base_of(run / "model")
    (first, last) = comparable_rows(later)[0], comparable_rows(run)[-1]
    assert first["eval/accuracy"] == last["eval/accuracy"]
    with pytest.raises(ValueError, match="is an adapter of rank 4: set model.lora.rank=4 to go on training it"):
        train(tmp_path, **{**LORA, "model__lora__rank": 0}, model__name=run / "model")


def test_a_base_that_is_gone_is_one_line(run: Path, tmp_path: Path) -> None:
    """It names both folders and what can be done."""
    orphan = shutil.copytree(run / "model", tmp_path / "orphan")
    settings = json.loads((orphan / "adapter_config.json").read_text())
    gone = {"base_model_name_or_path": str(tmp_path / "gone")}
    (orphan / "adapter_config.json").write_text(json.dumps(settings | gone))
    with pytest.raises(ValueError, match="is for the model in .*gone, which is not there; bring it back, or set"):
        train(tmp_path, **LORA, model__name=orphan)


def test_adapters_are_evaluated_on_their_base(run: Path, tmp_path: Path) -> None:
    """Of a run, in a folder of their own, and of a checkpoint; the merged model gives the same answers."""
    alone, merged = tmp_path / "alone", tmp_path / "merged"
    shutil.copytree(run / "model", alone)
    shutil.copytree(run / "merged", merged)
    places = {"run": run, "alone": alone, "merged": merged, "merged of run": run / "merged"}
    places |= {"earlier": run / "checkpoints" / "step_000002", "base": base_of(run / "model")}
    said = {}
    for name, place in places.items():
        words = ["chain", "--greedy", "--limit", "4", "--max-new-tokens", "16", "engine.kind=hf", "data.task.max_ops=3"]
        evaluate.main([str(place), *words, "--out", str(tmp_path / name)])
        said[name] = [row["answers"][0]["text"] for row in read_lines(tmp_path / name / "chain.jsonl")]
    assert said["run"] == said["alone"] == said["merged"] == said["merged of run"]
    assert said["run"] != said["earlier"] and said["earlier"] != said["base"] != said["run"]
    with pytest.raises(ValueError, match="evaluated as their folder has them; leave out model.lora.rank=8"):
        find_subject(str(alone), ["model.lora.rank=8"])


@pytest.mark.vllm
def test_vllm_samples_from_merged_weights(tmp_path: Path) -> None:
    """A vLLM that started on the merged model gets every update: after each the two agree to 1e-4 nats."""
    # its attention on CPU takes heads of 32 and more
    shape = {"model__tiny__hidden_size": 64, "model__lora__head": True, "model__tiny__tie_embeddings": False}
    run = train(tmp_path, **{**LORA, "train__steps": 2}, **shape, engine__kind="vllm", train__eval_every=2)
    rows = comparable_rows(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["canary/max_abs_diff"] <= 1e-4 for row in rows)
    assert all(row["mismatch/max"] <= 1e-3 for row in rows[1:])
    before = logprobs(plain(base_of(run / "model")))
    assert (logprobs(plain(run / "merged")) - before).abs().max() > 1e-2
