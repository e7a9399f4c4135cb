"""Checkpoints: bit exact, complete or invisible, few; exports that plain transformers reads."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from srft.policy.checkpoint import Checkpoints, load_optimizer, read_state, whole_checkpoint
from srft.policy.export import export_model
from srft.policy.manifest import damage
from srft.policy.model import byte_tokenizer, load_model
from srft.policy.optimizer import make_optimizer
from tests.trainer.tiny import learner_of, plain_model, policy, tiny_config

IDS = torch.tensor([[5, 6, 7, 8, 9]])
CONFIG = tiny_config("train.weight_decay=0.1", "train.keep_checkpoints=2")


def trained(
    seed: int = 0, *, tied: bool = False
) -> tuple[transformers.PreTrainedModel, torch.optim.Optimizer]:
    """A policy after three AdamW steps."""
    model = policy(plain_model(tied=tied, seed=seed))
    optimizer = make_optimizer(model, CONFIG)
    for _ in range(3):
        move(model, optimizer)
    return model, optimizer


def move(model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step with a gradient that depends on the weights."""
    for p in model.parameters():
        p.grad = p.detach().sin()
    optimizer.step()


def save(run_dir: Path, step: int, model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer) -> Path:
    Checkpoints(run_dir, learner_of(CONFIG, model, optimizer)).save(step, {"sampler": {"drawn": step}})
    return run_dir / "checkpoints" / f"step_{step:06d}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_and_load_are_bit_exact(tmp_path: Path, tied: bool) -> None:
    """Weights, moments and the loop's state; the next step from the copy equals that of the original."""
    model, optimizer = trained(tied=tied)
    folder = save(tmp_path, 3, model, optimizer)
    assert whole_checkpoint(tmp_path) == (folder, [])
    assert read_state(folder) == {"step": 3, "sampler": {"drawn": 3}}
    copied = policy(load_model(folder, trust_remote_code=False))
    copied_optimizer = make_optimizer(copied, CONFIG)
    load_optimizer(folder, learner_of(CONFIG, copied, copied_optimizer))
    for _ in range(2):
        move(model, optimizer)
        move(copied, copied_optimizer)
    expected, found = dict(model.named_parameters()), dict(copied.named_parameters())
    assert expected.keys() == found.keys()
    for name, p in expected.items():
        assert torch.equal(p, found[name]), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, copied_optimizer.state[found[name]][key]), f"{name}:{key}"


def test_half_written_folder_is_ignored(tmp_path: Path) -> None:
    """What a kill leaves behind is neither found nor in the way of the next save."""
    model, optimizer = trained()
    first = save(tmp_path, 3, model, optimizer)
    partial = tmp_path / "checkpoints" / ".step_000004.partial"
    partial.mkdir()
    (partial / "optimizer.safetensors").write_bytes(b"torn")
    assert whole_checkpoint(tmp_path) == (first, [])
    second = save(tmp_path, 4, model, optimizer)
    assert whole_checkpoint(tmp_path) == (second, [])
    assert sorted(p.name for p in second.parent.iterdir()) == ["step_000003", "step_000004"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    """A run folder without a checkpoint."""
    assert whole_checkpoint(tmp_path) == (None, [])


def test_newest_are_kept(tmp_path: Path) -> None:
    """Order is by number, not by text or time."""
    model, optimizer = trained()
    for step in (8, 9, 10, 100):
        save(tmp_path, step, model, optimizer)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000010", "step_000100"]
    assert read_state(whole_checkpoint(tmp_path)[0] or tmp_path)["step"] == 100


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    """A parameter that this model lacks is named."""
    model, optimizer = trained(tied=False)
    folder = save(tmp_path, 1, model, optimizer)
    other = policy(plain_model(tied=True))
    with pytest.raises(ValueError, match="lm_head.weight, which this model lacks"):
        load_optimizer(folder, learner_of(CONFIG, other, make_optimizer(other, CONFIG)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_is_a_plain_hugging_face_folder(tmp_path: Path, tied: bool) -> None:
    """Plain transformers gives the logits of the policy, and nothing of the trainer is in its config."""
    model, _ = trained(tied=tied)
    plain = copy.deepcopy(model).eval()
    plain.set_attn_implementation("sdpa")
    for _ in range(2):
        export_model(tmp_path / "model", model, byte_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, plain(IDS).logits)
    text = (tmp_path / "model" / "config.json").read_text()
    assert "srft" not in text
    assert json.loads(text).get("_attn_implementation") is None
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").decode(
        [16, 17]
    ) == byte_tokenizer().decode([16, 17])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = [
    "optimizer.safetensors", "model.safetensors", "trainer_state.json", "config.json", "tokenizer.json",
    "manifest.json",
]  # fmt: skip
HARMS = {"truncated": truncate, "bit": flip_a_bit, "empty": lambda path: path.write_bytes(b""), "missing": Path.unlink}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("two")
    model, optimizer = trained()
    for step in (3, 4):
        save(folder, step, model, optimizer)
    return folder


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint_is_named_and_the_one_before_taken(
    file: str, harm: str, two_checkpoints: Path, tmp_path: Path
) -> None:
    """A truncated, flipped, empty or missing file of any kind, the manifest included."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    older, newer = (run / "checkpoints" / name for name in ("step_000003", "step_000004"))
    HARMS[harm](newer / file)
    found, notes = whole_checkpoint(run)
    assert found == older
    assert len(notes) == 1 and str(newer) in notes[0] and file in notes[0]
    assert notes[0].endswith("going on from step_000003.")
    # it is out of the way of the steps to come
    assert whole_checkpoint(run) == (older, [])
    assert (run / "checkpoints" / "damaged-step_000004").is_dir()


def test_every_checkpoint_damaged_is_one_line(two_checkpoints: Path, tmp_path: Path) -> None:
    """Each is named with what is wrong with it, none is touched, and the line says what can be done."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    truncate(run / "checkpoints" / "step_000004" / "model.safetensors")
    (run / "checkpoints" / "step_000003" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint of .* is damaged") as caught:
        whole_checkpoint(run)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("step_000004: model.safetensors has", "step_000003: it has no manifest.json", "Set another name"):
        assert part in line
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000003", "step_000004"]


def test_manifest_of_nothing_is_no_manifest(two_checkpoints: Path, tmp_path: Path) -> None:
    """One that was emptied, or lists something else than was written, vouches for nothing."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    manifest = run / "checkpoints" / "step_000004" / "manifest.json"
    text = json.loads(manifest.read_text())
    for broken in ({}, [], {"files": {}, "sha256": text["sha256"]}, text | {"files": {"config.json": 3}}):
        manifest.write_text(json.dumps(broken))
        assert (damage(manifest.parent) or "").startswith("manifest.json")


def test_other_folders_are_no_checkpoints(two_checkpoints: Path, tmp_path: Path) -> None:
    """A copy that somebody keeps under a similar name is left alone."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    (run / "checkpoints" / "step_000004 (copy)").mkdir()
    (run / "checkpoints" / "step_best").mkdir()
    assert whole_checkpoint(run) == (run / "checkpoints" / "step_000004", [])


def test_export_has_a_manifest(tmp_path: Path) -> None:
    """Anybody can see whether a copy of the model is whole."""
    model, _ = trained()
    export_model(tmp_path / "model", model, byte_tokenizer())
    assert damage(tmp_path / "model") is None
    flip_a_bit(tmp_path / "model" / "model.safetensors")
    assert damage(tmp_path / "model") == "model.safetensors has other contents than were written"
