"""How fast a run is beside its plan, and who else is told of its rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from srft.planning import speed as speed_module
from srft.planning.speed import Speed
from srft.policy.frozen import Frozen
from srft.record.history import load_record
from srft.record.screen import _beside_plan
from srft.record.trackers import open_trackers, refuse_absent
from tests.trainer.synthetic_run import srft_row
from tests.trainer.tiny import learner_of, plain_model, policy, tiny_config

ROW = {
    "step": 1, "tokens/step": 1000, "tokens/counted": 600, "tokens/squared": 20_000,
    "time/train": 2.0, "time/step": 5.0, "time/eval": 1.0,
}  # fmt: skip


def _speed(monkeypatch: pytest.MonkeyPatch, rate: float = 1e9, model: Any = None) -> Speed:
    monkeypatch.setattr(speed_module, "product_rate", lambda *_: rate)
    own = policy(plain_model()) if model is None else model
    return Speed(learner_of(tiny_config("method.name=sft"), own, torch.optim.AdamW(own.parameters())))


def test_a_row_gets_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens a second of the step without evaluation; the products of training over its seconds and the peak."""
    row = _speed(monkeypatch).with_figures(ROW)
    assert row["speed/tokens_per_s"] == 1000 / 4
    # a block has products of q, k, v, o and three of the MLP; attention has two blocks of 4 heads of 6
    products = 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40)
    flops = 6 * products * 1000 + 6 * 37 * 24 * 600 + 6 * 2 * 24 * 20_000
    assert row["speed/mfu"] == pytest.approx(flops / 2.0 / 1e9)
    assert 0 < row["speed/planned_s"] < 2
    assert {key: row[key] for key in ROW} == ROW


def test_what_was_not_computed_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tokens shared: the body works on the other half, the head on as many as before."""
    speed = _speed(monkeypatch)
    whole, half = speed.with_figures(ROW), speed.with_figures({**ROW, "tokens/shared": 0.5})
    body = 6 * 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40) * 500 + 6 * 2 * 24 * 20_000 / 4
    assert (whole["speed/mfu"] - half["speed/mfu"]) * 2.0 * 1e9 == pytest.approx(body)
    assert half["speed/tokens_per_s"] == whole["speed/tokens_per_s"]
    assert 0.4 * whole["speed/planned_s"] < half["speed/planned_s"] < 0.8 * whole["speed/planned_s"]


def test_the_plan_follows_the_tokens_and_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the sequences take ten times as long, and so do products at a tenth of the rate, nearly."""
    planned = _speed(monkeypatch).with_figures(ROW)["speed/planned_s"]
    more = {key: 10 * value if key.startswith("tokens/") else value for key, value in ROW.items()}
    assert _speed(monkeypatch).with_figures(more)["speed/planned_s"] == pytest.approx(10 * planned, rel=0.05)
    assert _speed(monkeypatch, rate=1e6).with_figures(ROW)["speed/planned_s"] > 50 * planned


def test_a_teacher_that_is_held_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own products, not the policy's again; one of experts leaves the seconds out."""
    monkeypatch.setattr(speed_module, "product_rate", lambda *_: 1e6)
    own, teacher = policy(plain_model()), plain_model(kv_heads=4).requires_grad_(False)
    alone = learner_of(tiny_config("method.name=opd", "method.teacher=it"), own, torch.optim.AdamW(own.parameters()))
    taught = replace(alone, frozen=Frozen(teacher=teacher))
    # q, k, v, o and three of the MLP; before it the policy's passes, 3 and the one without a gradient
    size = (4 * 24 * 24 + 3 * 24 * 40) / (3 * 24 * 24 + 3 * 24 * 40)
    usual, more = (Speed(each).with_figures(ROW)["speed/planned_s"] for each in (alone, taught))
    assert more / usual == pytest.approx((4 + size) / 5, rel=1e-3) and size > 1.1
    teacher.config.num_experts_per_tok = 2
    assert "speed/planned_s" not in Speed(taught).with_figures(ROW)


def test_what_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without tokens has no speed, and a mixture of experts no known work."""
    speed = _speed(monkeypatch)
    assert speed.with_figures({"step": 0, "eval/accuracy": 0.5}) == {"step": 0, "eval/accuracy": 0.5}
    model = policy(plain_model())
    model.config.num_experts_per_tok = 2
    row = _speed(monkeypatch, model=model).with_figures(ROW)
    assert row.keys() - ROW.keys() == {"speed/tokens_per_s"}


def test_the_screen_and_the_report_answer_whether_that_is_normal(tmp_path: Path) -> None:
    """The share of the peak, and how many times as long training takes as planned."""
    from tests.trainer.synthetic_run import open_log

    figures = {"speed/mfu": 0.25, "speed/planned_s": 0.5, "sync/bytes": 15.2e9, "time/weights": 1.5}
    assert _beside_plan(srft_row(1) | figures) == " (25% of peak, train 1.0s, planned 0.5s)"
    assert _beside_plan(srft_row(1)) == ""
    with open_log(tmp_path) as log:
        for step in range(1, 4):
            log.metrics(srft_row(step) | figures)
    places = dict(load_record(tmp_path).places)
    assert places["weights to the engine"] == "15,200.0 MB in 1.5 s"
    assert places["training speed"] == "25.0% of the peak of the devices' products; 2.0 times as long as planned"


def _fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_rows_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every finite value at its step; a resumed run hides what the lost steps had written."""
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, *what: Any) -> None:
            told.append(what)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            told.append("closed")

    _fake_package(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    for resume_step in (None, 4):
        (tracker,) = open_trackers(tiny_config("train.tensorboard=true"), tmp_path, resume_step)
        tracker.write({"step": 5, "loss/total": 0.5, "reward/mean": None})
        tracker.close()
        folder = (str(tmp_path / "tensorboard"), None if resume_step is None else 5)
        assert told == [folder, ("loss/total", 0.5, 5), "closed"]
        told.clear()


def test_rows_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the run's name, with its options; a resumed run goes on under its id."""
    told: list[Any] = []
    run = SimpleNamespace(
        id="abc", log=lambda values, step: told.append((values, step)), finish=lambda: told.append("finished")
    )

    def init(**options: Any) -> SimpleNamespace:
        assert options["settings"]["save_code"] is False
        told.append((options["project"], options["name"], options["id"], options["resume"], options["config"]["name"]))
        return run

    _fake_package(monkeypatch, "wandb", init=init)
    for resume_step, own in ((None, (None, None)), (4, ("abc", "allow"))):
        (tracker,) = open_trackers(tiny_config("train.wandb=mine", "name=one"), tmp_path, resume_step)
        tracker.write({"step": 5, "loss/total": 0.5, "reward/mean": None})
        tracker.close()
        assert told == [("mine", "one", *own, "one"), ({"loss/total": 0.5}, 5), "finished"]
        told.clear()


@pytest.mark.parametrize("option", ["tensorboard=true", "wandb=mine"])
def test_a_tracker_that_is_not_installed_is_refused_at_the_door(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it; without the option nothing is asked for."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_absent(tiny_config())
    name = option.split("=")[0]
    with pytest.raises(ValueError, match=rf"train.{option}, but {name} is not installed; pip install 'srft\[{name}\]'"):
        refuse_absent(tiny_config(f"train.{option}"))
    assert not open_trackers(tiny_config(), Path("nowhere"), None)


def test_the_log_hands_its_rows_on(tmp_path: Path) -> None:
    """As they are in the file, and ends its trackers however it ends."""
    from srft.record.log import RunLog

    told: list[Any] = []
    tracker = SimpleNamespace(write=lambda row: told.append(dict(row)), close=lambda: told.append("closed"))
    with pytest.raises(KeyError), RunLog(
        tmp_path, total_steps=2, config_text="", title="a run", resume_step=None, report=load_record, quiet=True,
        trackers=[tracker],
    ) as log:  # fmt: skip
        log.metrics({"step": 1, "a": float("nan"), "b": 2})
        raise KeyError
    assert told[0]["a"] is None and told[0]["b"] == 2 and told[0]["step"] == 1 and "time/elapsed" in told[0]
    assert told[1:] == ["closed"]
