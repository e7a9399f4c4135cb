"""Whole runs with rollouts by servers: every step samples from its own weights, whatever becomes of the servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from srft.engine.base import EngineError
from srft.policy.model import build_tiny, byte_tokenizer
from tests.trainer.fake_server import FakeServer, serving
from tests.trainer.runs import comparable_rows, during_call, read_lines, small_config, train, weights

RUN = {
    "engine__kind": "http", "train__lr": 0.01, "train__eval_every": 2, "train__prompts_per_step": 2,
    "train__rollouts_per_prompt": 2, "data__eval_limit": 2,
}  # fmt: skip


@contextmanager
def servers(folder: Path, count: int) -> Iterator[tuple[list[FakeServer], dict[str, Any]]]:
    """Servers of another start of the model that a run in this folder builds, and the options of the run."""
    config = small_config(folder)
    model = build_tiny(config.model, byte_tokenizer(), config.longest_sequence, 5)
    with serving(model, count, config.longest_sequence) as found:
        urls = [server.url for server in found]
        yield found, RUN | {"engine__urls": urls, "engine__weights_dir": folder / "shared"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with servers(folder, 1) as (_, options):
        return train(folder, **options)


def test_every_step_samples_from_its_own_weights(undisturbed: Path) -> None:
    """The canary holds after every step, each of which moves the weights, and nothing stays in the shared folder."""
    rows = read_lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["canary/max_abs_diff"] <= 1e-4 for row in rows)
    assert all(row["mismatch/max"] <= 1e-3 for row in rows[1:])
    assert rows[2]["loss/total"] != rows[1]["loss/total"]
    assert not list((undisturbed.parents[1] / "shared").iterdir())
    assert not (undisturbed / "engine").exists()


def away(server: FakeServer) -> Callable[[], Any]:
    """While entered, a server goes away and comes back with the weights of its folder."""

    @contextmanager
    def entered() -> Iterator[None]:
        def back() -> None:
            server.restart()
            server.up()

        server.down()
        timer = threading.Timer(0.5, back)
        timer.start()
        yield
        timer.join()

    return entered


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_loses_servers_learns_the_same(
    undisturbed: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One goes away in the rollout of step 1 and the update of step 2; where it is the only one, it is waited for."""
    with servers(tmp_path, count) as (found, options), pytest.MonkeyPatch.context() as patch:
        during_call(patch, "srft.engine.http.HttpEngine.generate", 2, away(found[-1]))
        # of one server, the third update gives it again what it had
        during_call(patch, "srft.engine.http.HttpEngine.update_weights", 3 if count == 2 else 4, away(found[-1]))
        run = train(tmp_path, **options)
    rows, expected = comparable_rows(run), comparable_rows(undisturbed)
    assert [row.pop("engine/restarts", None) for row in rows] == [None, *([1, 2] if count == 1 else [0, 0])]
    assert [row.pop("engine/restarts", None) for row in expected] == [None, 0, 0]
    assert rows == expected
    assert weights(run) == weights(undisturbed)
    said = capsys.readouterr().err
    assert f"lost {found[-1].url}: " in said
    assert ("it is started again (2 of 3)" in said) == (count == 1)


def test_server_that_never_comes_back_ends_the_run(tmp_path: Path) -> None:
    """After as many tries as are granted, with what kept it."""
    @contextmanager
    def gone() -> Iterator[None]:
        found[0].down()
        yield

    with servers(tmp_path, 1) as (found, options), pytest.MonkeyPatch.context() as patch:
        during_call(patch, "srft.engine.http.HttpEngine.generate", 2, gone)
        with pytest.raises(EngineError, match=r"refused; no other answer in 2 s\nand it is not started again.*=1"):
            train(tmp_path, **options, engine__deadline_s=2, engine__restarts=1)
