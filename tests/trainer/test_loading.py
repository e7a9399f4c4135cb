"""Loading without ever holding the whole: the same bits as from_pretrained, and each rank reads its own rows alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from srft.disk import WriteError
from srft.engine.hf import HfEngine
from srft.policy import tensor_files
from srft.policy.export import export_model
from srft.policy.loading import fill, skeleton
from srft.policy.manifest import damage
from srft.policy.model import byte_tokenizer, load_model
from srft.policy.parallel import ALONE, Elsewhere, World, shard
from srft.policy.weights import named_weights, own_part, own_rows, whole_tensors
from tests.ranks import results_of_ranks
from tests.trainer.architectures import build
from tests.trainer.tiny import plain_model
from tests.trainer.worlds import world_of

# untied and tied; with tensors that from_pretrained stacks and joins, and with buffers in the checkpoint
SOURCES = ("qwen2", "llama-tied-bias", "mixtral", "deepseek-v3")


def narrow_model() -> transformers.PreTrainedModel:
    """A model whose keys have six rows, of which a fourth rank has none, and 37 words, which nothing divides."""
    return plain_model(tied=True, kv_heads=1)


def write_sources(folder: Path) -> None:
    """The checkpoints that the ranks load: in one file, in several, in 16 bits."""
    for name in SOURCES:
        build(name).save_pretrained(folder / name, max_shard_size="20KB")
    narrow_model().save_pretrained(folder / "narrow")
    narrow_model().to(torch.bfloat16).save_pretrained(folder / "narrow-bf16")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def engine_of(model: transformers.PreTrainedModel) -> HfEngine:
    return HfEngine(model, dtype=torch.float32, pad_token_id=0, max_batch=4)


class Counted:
    """A file of safetensors that counts the bytes taken from it."""

    bytes = 0

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Counted:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self._file.get_slice(name))


class CountedSlice:
    """A slice of it."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def get_shape(self) -> list[int]:
        return self._whole.get_shape()

    def __getitem__(self, rows: Any) -> torch.Tensor:
        found = self._whole[rows]
        Counted.bytes += found.nbytes
        return found


@contextmanager
def counted() -> Iterator[None]:
    """Count what loading reads, from 0."""
    Counted.bytes, opened = 0, tensor_files.safe_open
    tensor_files.safe_open = lambda *args, **options: Counted(opened(*args, **options))  # type: ignore[assignment]
    try:
        yield
    finally:
        tensor_files.safe_open = opened


def loaded(source: Path, world: World) -> transformers.PreTrainedModel:
    model = skeleton(source, trust_remote_code=False)
    shard(model, world)
    fill(model, source, world)
    return model


def rank_main(rank: int, folder: Path) -> None:
    """Every source over four ranks, and over two replicas of two; then a source that one rank cannot read."""
    torch.manual_seed(rank)
    report: dict[str, Any] = {}
    for shards in (4, 2):
        world = world_of(rank, folder, shards)
        for source in (*SOURCES, "narrow", "narrow-bf16"):
            with counted():
                model = loaded(folder / source, world)
            expected = dict(named_weights(load_model(folder / source, trust_remote_code=False)))
            found = dict(whole_tensors(model))
            report[f"{source}/{shards}"] = {
                "same": found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected),
                "dtypes": sorted({str(t.dtype) for t in found.values()}),
                "buffers": all(
                    torch.equal(buffer, dict(model.named_buffers())[name])
                    for name, buffer in load_model(folder / source, trust_remote_code=False).named_buffers()
                ),
                "read": Counted.bytes,
                "own": sum(own_part(t).numel() for _, t in named_weights(model)),
                "rows": {name: own_rows(t) for name, t in named_weights(model) if t.dim()},
                "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            }
            assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    for source in ("mixtral", "narrow"):
        model = loaded(folder / source, world)
        export_model(folder / f"exported-{source}", model, byte_tokenizer(), world)
        engine = engine_of(model)
        with torch.no_grad():
            model.get_output_embeddings().weight.to_local().add_(1)
        report[f"engine/{source}"] = [engine.score([[3, 4, 5, 6]])]
        engine.update_weights(whole_tensors(model, torch.float32), 1)
        report[f"engine/{source}"] += engine.score([[3, 4, 5, 6]])
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr("srft.policy.export.save_file", full)
        try:
            export_model(folder / "exported-narrow", model, byte_tokenizer(), world)
        except (WriteError, Elsewhere) as error:
            report["full disk"] = type(error).__name__
    offloaded = loaded(folder / "narrow", replace(world, cpu_offload=True))
    report["offloaded"] = {n: t.clone() for n, t in whole_tensors(offloaded, torch.bfloat16)}
    broken = folder / "narrow" if rank != 2 else folder / "nowhere"
    model = skeleton(folder / "narrow", trust_remote_code=False)
    shard(model, world)
    try:
        fill(model, broken, world)
    except (ValueError, Elsewhere) as error:
        report["error"] = str(error)
        report["kind"] = type(error).__name__
    torch.save(report, folder / f"rank{rank}.pt")
    world.barrier()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_sources(folder)
    return folder, results_of_ranks("tests.trainer.test_loading", folder, 4)


@pytest.mark.parametrize("source", [*SOURCES, "narrow", "narrow-bf16"])
@pytest.mark.parametrize("shards", [4, 2])
def test_ranks_hold_the_bits_of_from_pretrained(
    ranks: tuple[Path, list[dict[str, Any]]], source: str, shards: int
) -> None:
    """Weights, buffers that no checkpoint holds, ties and dtypes; also where a checkpoint is in 16 bits."""
    for found in (report[f"{source}/{shards}"] for report in ranks[1]):
        assert found["same"] and found["buffers"] and found["dtypes"] == ["torch.float32"]
        assert found["tied"] == (source not in ("qwen2", "mixtral", "deepseek-v3"))


@pytest.mark.parametrize("source", [*SOURCES, "narrow", "narrow-bf16"])
@pytest.mark.parametrize("shards", [4, 2])
def test_a_rank_reads_its_own_rows_and_nothing_else(
    ranks: tuple[Path, list[dict[str, Any]]], source: str, shards: int
) -> None:
    """Bytes read are bytes held, also of experts that lie one by one in the files; nobody comes near the whole."""
    size = 2 if source.endswith("bf16") else 4
    reports = [report[f"{source}/{shards}"] for report in ranks[1]]
    for found in reports:
        assert found["read"] == size * found["own"]
    for name in reports[0]["rows"]:
        ranges = [found["rows"][name] for found in reports]
        if shards == 4 and "e_score" not in name:  # buffers are on every rank
            assert all(here[1] == there[0] for here, there in zip(ranges, ranges[1:], strict=False))
        elif shards == 2:
            assert ranges[:2] == ranges[2:]
    if source == "narrow" and shards == 4:
        assert reports[3]["rows"]["model.layers.0.self_attn.k_proj.weight"] == (6, 6)


def test_tensors_for_an_engine_are_rounded_as_a_whole_model_is(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Rounding each part before the parts are gathered gives the bits of rounding the whole; offloaded weights, too."""
    expected = {name: t.bfloat16() for name, t in named_weights(narrow_model())}
    for report in ranks[1]:
        assert report["offloaded"].keys() == expected.keys()
        assert all(torch.equal(report["offloaded"][name], t) for name, t in expected.items())


@pytest.mark.parametrize("source", ["mixtral", "narrow"])
def test_an_export_of_ranks_is_what_one_process_saves(ranks: tuple[Path, list[dict[str, Any]]], source: str) -> None:
    """The same files, names, shapes and bits; one that fails on the first rank leaves the one before."""
    folder, reports = ranks
    export_model(folder / f"alone-{source}", load_model(folder / source, trust_remote_code=False), byte_tokenizer())
    ours, theirs = folder / f"exported-{source}", folder / f"alone-{source}"
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    found, expected = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert damage(ours) is None
    assert [report["full disk"] for report in reports] == ["WriteError", *3 * ["Elsewhere"]]


@pytest.mark.parametrize("source", ["mixtral", "narrow"])
def test_an_engine_of_a_rank_has_a_whole_copy(ranks: tuple[Path, list[dict[str, Any]]], source: str) -> None:
    """Its log-probabilities are those of the model in one process, before the weights move and after."""
    folder, reports = ranks
    model = load_model(folder / source, trust_remote_code=False)
    before = engine_of(model).score([[3, 4, 5, 6]])
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    expected = [before, *engine_of(model).score([[3, 4, 5, 6]])]
    assert all(report[f"engine/{source}"] == expected for report in reports)


def test_what_one_rank_cannot_read_stops_all(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """The first rank says it, instead of three ranks that wait for the one."""
    assert ranks[1][0]["error"].startswith("cannot load the weights of ")
    assert all("nowhere" in report["error"] for report in ranks[1])
    assert [report["kind"] for report in ranks[1]] == ["ValueError", *3 * ["Elsewhere"]]


@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi3-longrope", "apertus", "minimax", "opt", "gemma3", "jamba"])
def test_one_process_has_the_bits_of_from_pretrained(name: str, tmp_path: Path) -> None:
    """Architectures with other names, layouts and computed buffers; what is saved again is the same, too."""
    build(name).save_pretrained(tmp_path / "source")
    expected = load_model(tmp_path / "source", trust_remote_code=False)
    model = skeleton(tmp_path / "source", trust_remote_code=False)
    assert all(p.is_meta for p in model.parameters())
    fill(model, tmp_path / "source", ALONE)
    assert not model.training
    for kind in ("state_dict", "named_buffers"):
        theirs, ours = dict(getattr(expected, kind)()), dict(getattr(model, kind)())
        assert list(ours) == list(theirs)
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    model.save_pretrained(tmp_path / "again")
    again, source = (load_file(tmp_path / kind / "model.safetensors") for kind in ("again", "source"))
    assert again.keys() == source.keys() and all(torch.equal(again[key], source[key]) for key in source)


def edited(folder: Path, change: Any) -> Path:
    """A checkpoint of the tied model whose tensors were changed."""
    narrow_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def filled(folder: Path) -> transformers.PreTrainedModel:
    model = skeleton(folder, trust_remote_code=False)
    fill(model, folder, ALONE)
    return model


EMBEDDING = "model.embed_tokens.weight"


def test_names_of_the_files_are_found_as_transformers_finds_them(tmp_path: Path) -> None:
    """Without the prefix of the body, under the other name of tied weights, under both, and beside strangers."""
    expected = narrow_model().state_dict()

    def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    changes = {
        "bare": without_prefix,
        "head": lambda tensors: tensors.update({"lm_head.weight": tensors.pop(EMBEDDING)}),
        "both": lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}),
        "stranger": lambda tensors: tensors.update({"rotary.inv_freq": torch.ones(3)}),
    }
    for name, change in changes.items():
        found = filled(edited(tmp_path / name, change)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lack 1 of the model's tensors, such as model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(9)}),
            r"model.norm.weight has the shape \[9\] in its files, and \[24\] in the model",
        ),
        (lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1}), "set tie_word_embeddings=false"),
    ],
    ids=["missing", "shape", "untied"],
)
def test_files_of_another_model_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    """Nothing is made up where the files lack it."""
    with pytest.raises(ValueError, match=words):
        filled(edited(tmp_path / "edited", change))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """An empty folder, a truncated file, a file of the index that is gone, quantized weights."""
    with pytest.raises(ValueError, match="cannot load a causal LM from"):
        skeleton(tmp_path, trust_remote_code=False)
    folder = edited(tmp_path / "cut", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot load the weights of"):
        filled(folder)
    narrow_model().save_pretrained(tmp_path / "many", max_shard_size="10KB")
    next((tmp_path / "many").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="model-00002"):
        filled(tmp_path / "many")
    shutil.rmtree(tmp_path / "cut")
    settings = json.loads((edited(tmp_path / "cut", lambda tensors: None) / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its weights are quantized"):
        skeleton(tmp_path / "cut", trust_remote_code=False)
