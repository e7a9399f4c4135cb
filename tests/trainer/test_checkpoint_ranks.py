"""Checkpoints of several ranks: the files of one process, for any number of ranks, written beside training or not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from srft.disk import WriteError
from srft.policy import checkpoint
from srft.policy.checkpoint import Checkpoints, load_optimizer, newest_checkpoint, read_state, whole_checkpoint
from srft.policy.learner import Learner
from srft.policy.loading import fill, skeleton
from srft.policy.manifest import damage
from srft.policy.model import byte_tokenizer, prepare_policy
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import ALONE, World, whole
from srft.policy.tensor_files import TensorFiles
from srft.policy.weights import whole_tensors
from tests.ranks import results_of_ranks
from tests.trainer.tiny import plain_model, tiny_config
from tests.trainer.worlds import world_of

CONFIG = tiny_config("train.weight_decay=0.1", "train.keep_checkpoints=2")


def learner_from(source: Path, world: World) -> Learner:
    """The policy of a checkpoint or model on these ranks, with a new optimizer."""
    model = skeleton(source, trust_remote_code=False)
    if world.mesh is None:
        fill(model, source, world)
        prepare_policy(model, CONFIG.model, 64, world)
    else:
        prepare_policy(model, CONFIG.model, 64, world)
        fill(model, source, world)
    return Learner(CONFIG, model, byte_tokenizer(), make_optimizer(model, CONFIG), world)


def move(learner: Learner, steps: int) -> None:
    """Optimizer steps whose gradients are elementwise functions of the weights, the same bits on any layout."""
    for _ in range(steps):
        for p in learner.model.parameters():
            p.grad = p.detach() * p.detach()
        learner.optimizer.step()


def contents(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights and moments, whole, by the names of a checkpoint."""
    found = {name: t.clone() for name, t in whole_tensors(learner.model)}
    for name, p in learner.model.named_parameters():
        for key, value in learner.optimizer.state[p].items():
            found[f"{name}:{key}"] = whole(value).clone()
    return found


def resumed(folder: Path, world: World) -> dict[str, torch.Tensor]:
    """What two more steps make of a checkpoint on these ranks."""
    learner = learner_from(folder, world)
    load_optimizer(folder, learner)
    move(learner, 2)
    return contents(learner)


def save(run: Path, step: int, learner: Learner) -> Path:
    checkpoints = Checkpoints(run, learner)
    checkpoints.save(step, {"sampler": step})
    checkpoints.wait()
    return run / "checkpoints" / f"step_{step:06d}"


@contextmanager
def failing(write: Any) -> Iterator[None]:
    """Replace the function that writes this rank's rows."""
    original, TensorFiles.write = TensorFiles.write, write  # type: ignore[method-assign]
    try:
        yield
    finally:
        TensorFiles.write = original  # type: ignore[method-assign]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mistaken(*_: object) -> None:
    raise KeyError("a mistake in the code")


def rank_main(rank: int, folder: Path) -> None:
    """Two ranks write; four, as two replicas of two shards, go on from what one and two wrote, and write again."""
    if os.environ["WORLD_SIZE"] == "4":
        world = world_of(rank, folder, 2)
        report = {kind: resumed(folder / kind / "checkpoints" / "step_000003", world) for kind in ("one", "two")}
        learner = learner_from(folder / "two" / "checkpoints" / "step_000003", world)
        load_optimizer(folder / "two" / "checkpoints" / "step_000003", learner)
        save(folder / "four", 3, learner)
        torch.save(report, folder / f"rank{rank}.pt")
        return
    world = world_of(rank, folder)
    learner = learner_from(folder / "base", world)
    move(learner, 3)
    beside = Checkpoints(folder / "two", learner)
    beside.save(3, {"sampler": 3})
    move(learner, 2)  # while it is written
    report = {"went on": contents(learner)}
    beside.wait()
    report["two"] = resumed(folder / "two" / "checkpoints" / "step_000003", world)
    report["one"] = resumed(folder / "one" / "checkpoints" / "step_000003", world)
    report["errors"] = []
    waiting = replace(learner, config=CONFIG.model_copy(
        update={"train": CONFIG.train.model_copy(update={"async_checkpoints": False})}
    ))  # fmt: skip
    for failed_rank, fault, each in ((1, full, learner), (0, full, waiting), (1, mistaken, learner)):
        with failing(fault if rank == failed_rank else TensorFiles.write):
            try:
                save(folder / "faulty", 5, each)
            except (OSError, RuntimeError) as error:
                report["errors"].append([type(error).__name__, str(error)])
    save(folder / "faulty", 5, waiting)
    save(folder / "faulty", 6, learner)
    torch.save(report, folder / f"rank{rank}.pt")
    with failing(lambda *_: os._exit(0) if rank == 1 else None):  # its connections end as those of a killed process
        try:
            save(folder / "faulty", 7, learner)
        except RuntimeError as error:
            report["errors"].append([type(error).__name__, str(error)])
    torch.save(report, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        os._exit(0)  # a group that lost a rank cannot be taken down in order


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """The folder with the runs "one", "two" and "four", and the reports of two and of four ranks."""
    folder = tmp_path_factory.mktemp("written")
    # of six rows of a key a fourth rank would have none, and nothing divides 37 words
    plain_model(tied=True, kv_heads=1).save_pretrained(folder / "base")
    alone = learner_from(folder / "base", ALONE)
    move(alone, 3)
    save(folder / "one", 3, alone)
    return folder, *(results_of_ranks("tests.trainer.test_checkpoint_ranks", folder, n) for n in (2, 4))


def test_files_are_those_of_one_process(written: tuple[Path, Any, Any]) -> None:
    """To the last byte, whoever wrote them; a tied model has no lm_head.weight, and moments belong to parameters."""
    folder = written[0]
    one, two, four = (folder / kind / "checkpoints" / "step_000003" for kind in ("one", "two", "four"))
    names = sorted(path.name for path in one.iterdir())
    for other in (two, four):
        assert sorted(path.name for path in other.iterdir()) == names
        for name in names:
            assert (other / name).read_bytes() == (one / name).read_bytes(), name
    weights, moments = load_file(one / "model.safetensors"), load_file(one / "optimizer.safetensors")
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights
    assert {name.rsplit(":", 1)[0] for name in moments} == weights.keys()
    assert read_state(two) == {"step": 3, "sampler": 3}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def test_training_went_on_while_the_checkpoint_was_written(written: tuple[Path, Any, Any]) -> None:
    """What was saved is step 3, though the weights moved before the disk had it, and two steps later they are equal."""
    for report in written[1]:
        assert same(report["two"], report["went on"])


def test_any_number_of_ranks_goes_on_from_any_other(written: tuple[Path, Any, Any]) -> None:
    """1 to 2, 1 to 4, 2 to 2, 2 to 4 and 2 to 1: two steps later weights and moments are the same bits."""
    folder, of_two, of_four = written
    expected = resumed(folder / "one" / "checkpoints" / "step_000003", ALONE)
    for kind in ("two", "four"):
        assert same(resumed(folder / kind / "checkpoints" / "step_000003", ALONE), expected)
    assert not same(resumed(folder / "faulty" / "checkpoints" / "step_000005", ALONE), expected)
    for report in (*of_two, *of_four):
        assert same(report["one"], expected) and same(report["two"], expected)


def test_an_error_of_one_rank_fails_the_checkpoint_on_all(written: tuple[Path, Any, Any]) -> None:
    """A full disk is one WriteError on the first rank, whichever met it; nothing half written, the others whole."""
    folder, (first, second), _ = written
    step = folder / "faulty" / "checkpoints" / "step_000005"
    expected = f"cannot write {step}: {os.strerror(errno.ENOSPC)}"
    assert first["errors"][:3] == [
        ["WriteError", expected], ["WriteError", expected], ["RuntimeError", "'a mistake in the code'"]
    ]  # fmt: skip
    assert [kind for kind, _ in second["errors"][:3]] == 3 * ["Elsewhere"]
    assert damage(step) is None


def test_a_rank_lost_in_mid_checkpoint_costs_that_checkpoint(written: tuple[Path, Any, Any]) -> None:
    """The other rank fails at once instead of waiting for it, and the checkpoints before are whole."""
    folder, (first, _), _ = written
    assert len(first["errors"]) == 4 and first["errors"][3][0] not in ("WriteError", "Elsewhere")
    run = folder / "faulty"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000005", "step_000006"]
    assert whole_checkpoint(run) == (run / "checkpoints" / "step_000006", [])
    assert newest_checkpoint(run) == run / "checkpoints" / "step_000006"


def test_large_models_lie_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbered, with an index that transformers and the loader follow."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 9000)
    plain_model().save_pretrained(tmp_path / "base")
    learner = learner_from(tmp_path / "base", ALONE)
    move(learner, 1)
    folder = save(tmp_path, 1, learner)
    for stem in ("model", "optimizer"):
        assert (
            len(list(folder.glob(f"{stem}-*-of-*.safetensors"))) > 2
            and (folder / f"{stem}.safetensors.index.json").is_file()
        )
    assert damage(folder) is None
    again = learner_from(folder, ALONE)
    load_optimizer(folder, again)
    assert same(contents(again), contents(learner))


def test_a_checkpoint_is_a_model_that_transformers_loads(tmp_path: Path) -> None:
    """model.name=<checkpoint> starts from its weights; its configuration is what save_pretrained would write."""
    plain_model(tied=True).save_pretrained(tmp_path / "base")
    learner = learner_from(tmp_path / "base", ALONE)
    move(learner, 1)
    folder = save(tmp_path, 1, learner)
    learner.model.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    saved, found = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert same(found, saved)


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A checkpoint of a model with fewer words."""
    for vocab in (37, 40):
        plain_model(vocab=vocab).save_pretrained(tmp_path / str(vocab))
    small, large = (learner_from(tmp_path / str(vocab), ALONE) for vocab in (37, 40))
    move(small, 1)
    with pytest.raises(ValueError, match=r"moments of .* in the shape \[37, 24\], and this model's is \[40, 24\]"):
        load_optimizer(save(tmp_path, 1, small), large)


def test_the_error_of_a_checkpoint_beside_training_comes_with_the_next(tmp_path: Path) -> None:
    """It is raised once, and by whatever is called next; then training may try again."""
    plain_model().save_pretrained(tmp_path / "base")
    learner = learner_from(tmp_path / "base", ALONE)
    train = CONFIG.train.model_copy(update={"async_checkpoints": True})
    checkpoints = Checkpoints(tmp_path, replace(learner, config=CONFIG.model_copy(update={"train": train})))
    with failing(full):
        checkpoints.save(1, {})
        with pytest.raises(WriteError, match="step_000001: No space left on device"):
            checkpoints.save(2, {})
    checkpoints.wait()
    assert newest_checkpoint(tmp_path) is None
    checkpoints.save(3, {})
    checkpoints.wait()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_000003"
