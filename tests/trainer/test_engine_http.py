"""Rollouts by servers over HTTP: the right answers from the right weights, whatever becomes of the servers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from srft.disk import WriteError
from srft.engine import weight_store
from srft.engine.base import Completion, EngineError, EngineLost, Sampling
from srft.engine.hf import HfEngine
from srft.engine.http import HttpEngine
from tests.trainer.fake_server import Drop, FakeServer, Refuse, serving
from tests.trainer.tiny import VOCAB, plain_model

# the weights that servers are started with, and those that they are given
BASE, GIVEN = plain_model(seed=1), plain_model(seed=2)
MODEL = {"architecture": "Qwen2ForCausalLM", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2}
PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
SEEDS = [[1, 2], [3], [], [5, 6, 2**63 - 1]]
SAMPLING = Sampling(0.8, 6, (1, 2, 3), min_new_tokens=2)
SEQUENCES = [[2, 3, 4], [5, 6], [7, 8, 9, 10]]


def meet(servers: list[FakeServer], folder: Path | None, **changes: Any) -> HttpEngine:
    settings = {"weights_dir": folder, "owner": "run", "model": MODEL, "dtype": "float32", "max_model_len": 64}
    return HttpEngine([server.url for server in servers], **settings | {"deadline_s": 60.0} | changes)


@contextmanager
def given(folder: Path | None, count: int, **changes: Any) -> Iterator[tuple[HttpEngine, list[FakeServer]]]:
    """An engine on so many servers which have weights."""
    with serving(BASE, count) as servers:
        engine = meet(servers, folder, **changes)
        engine.update_weights(GIVEN.named_parameters(), 3)
        yield engine, servers
        engine.close()


def right(version: int = 3) -> list[list[Completion]]:
    """What the weights that were given answer."""
    own = HfEngine(GIVEN, dtype=torch.float32, pad_token_id=0, max_batch=1)
    own.version = version
    return own.generate(PROMPTS, SAMPLING, SEEDS)


def drawn(engine: HttpEngine) -> list[list[Completion]]:
    return engine.generate(PROMPTS, SAMPLING, SEEDS)


def repeated(act: Callable[[], None], on: dict[str, Callable[[], None]], what: str) -> Callable[[], None]:
    """The same act for every such question."""

    def again() -> None:
        on[what] = again
        act()

    return again


def drop() -> None:
    raise Drop


def refuse(status: int, text: str) -> Callable[[], None]:
    def act() -> None:
        raise Refuse(status, text)

    return act


@pytest.mark.parametrize(("count", "fetched"), [(1, False), (1, True), (2, True), (3, False)])
def test_answers_are_those_of_the_weights(tmp_path: Path, count: int, fetched: bool) -> None:
    """To the last bit, however many servers read or fetch them and share the work; a prompt's samples stay together."""
    with given(None if fetched else tmp_path, count) as (engine, servers):
        assert all(server.place.startswith("http://127.0.0.1:") == fetched for server in servers)
        assert drawn(engine) == right()
        own = HfEngine(GIVEN, dtype=torch.float32, pad_token_id=0, max_batch=1)
        assert engine.score([*SEQUENCES, [4]]) == [*own.score(SEQUENCES), []]
        for i, server in enumerate(servers):
            asked = [body["prompt"] for body in server.asked if "seed" in body]
            mine = [p for p, row in zip(PROMPTS, SEEDS, strict=True) for _ in row if PROMPTS.index(p) % count == i]
            assert sorted(asked) == sorted(mine)


def test_each_completion_is_told_as_its_server_has_answered(tmp_path: Path) -> None:
    """By its place among the prompts and their samples."""
    told: list[tuple[int, int, list[int]]] = []
    with given(tmp_path, 2) as (engine, _):
        engine.generate(PROMPTS, SAMPLING, SEEDS, lambda p, k, ids: told.append((p, k, ids)))
    assert sorted(told) == [(p, k, c.token_ids) for p, row in enumerate(right()) for k, c in enumerate(row)]


def test_updates_reach_every_server_and_leave_one_folder(tmp_path: Path) -> None:
    """Files of an earlier version go when all have taken the new one, and all of them when the engine is closed."""
    (tmp_path / "run" / "000007").mkdir(parents=True)
    with given(tmp_path, 2) as (engine, servers):
        engine.update_weights(BASE.named_parameters(), 4)
        own = HfEngine(BASE, dtype=torch.float32, pad_token_id=0, max_batch=1)
        for _ in servers:
            assert engine.score(SEQUENCES) == own.score(SEQUENCES)
        assert {c.version for row in drawn(engine) for c in row} == {4}
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["000002"]
        # from call to call by another server
        assert all([body["prompt"] for body in server.asked].count(SEQUENCES[0]) == 1 for server in servers)
    assert not list(tmp_path.iterdir())


def test_questions_leave_nothing_to_the_server(tmp_path: Path) -> None:
    """What a generation_config of the served model could change is said, and so are stop texts and the room left."""
    with given(tmp_path, 1, max_model_len=8) as (engine, (server,)):
        engine.generate([[2] * 5], Sampling(0.0, 6, (1, 4), min_new_tokens=5), [[7]])
        (body,) = server.asked
        assert body == {
            "prompt": [2] * 5, "max_tokens": 3, "min_tokens": 3, "temperature": 0.0, "seed": 7, "logprobs": 0,
            "stop_token_ids": [1, 4], "stop": [], "include_stop_str_in_output": True, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        with pytest.raises(ValueError, match="1 to 7 tokens"):
            engine.generate([[2] * 8], SAMPLING, [[7]])
        with pytest.raises(ValueError, match="stop texts need the engine's tokenizer"):
            engine.generate([[2]], Sampling(1.0, 2, (), ("x",)), [[7]])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"dtype": "bfloat16"}, "has dtype bfloat16, not float32; start it with .*--dtype float32"),
        ({"logprobs_mode": "raw_logprobs"}, "has logprobs_mode raw_logprobs, not processed_logprobs; start it"),
        ({"max_model_len": 63}, "has max_model_len 63, less than 64; start it with"),
        ({"model": MODEL | {"vocab_size": 99, "hidden_size": 8}}, "has vocab_size 99, not 37; hidden_size 8, not 24"),
    ],
    ids=["dtype", "logprobs", "length", "model"],
)
def test_server_of_something_else_is_refused(tmp_path: Path, about: dict, message: str) -> None:
    """Before it is given anything; the other one is as it must be."""
    with serving(BASE, 2) as servers:
        servers[1].about |= about
        with pytest.raises(ValueError, match=f"{servers[1].url} {message}"):
            meet(servers, tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (refuse(404, '{"detail":"Not Found"}'), "answered 404 to /collective_rpc: Not Found; start it with VLLM_"),
        (
            refuse(500, '{"error":{"message":"no attribute srft_about"}}'),
            "answered 500 .*: no attribute srft_about; start it .*--worker-extension-cls srft.engine.vllm_extension",
        ),
        (refuse(200, '{"results":[{"protocol":0}]}'), "another version of srft than the trainer"),
        (refuse(200, "<html>"), "with what is no JSON: <html>"),
        (refuse(401, ""), "answered 401 to /collective_rpc: nothing"),
    ],
    ids=["no-dev-mode", "no-extension", "other-srft", "no-vllm", "empty"],
)
def test_server_that_lacks_something_is_refused(tmp_path: Path, act: Callable[[], None], message: str) -> None:
    """With its own words, and how to start it."""
    with serving(BASE) as (server,):
        server.on["about"] = act
        with pytest.raises(EngineError, match=f"{server.url} .*{message}"):
            meet([server], tmp_path)


def test_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Nobody listens on one of two: the start fails; on a later start, one is enough."""
    with serving(BASE, 2) as servers:
        servers[1].down()
        with pytest.raises(EngineLost, match=f"^{servers[1].url}: Connection refused; is vLLM there.*extension"):
            meet(servers, tmp_path)
        engine = meet(servers, tmp_path, patience_s=60.0)
        engine.update_weights(GIVEN.named_parameters(), 3)
        assert drawn(engine) == right()
        servers[0].down()
        with pytest.raises(EngineLost, match="refused; no other answer in 0.1 s"):
            meet(servers, tmp_path, patience_s=0.1)


def test_server_to_which_there_is_no_way_any_more_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address from which it was reached is none of this machine's, as after a change of networks."""
    with given(None, 2) as (engine, servers):
        monkeypatch.setattr(engine._servers[1], "own_address", "192.0.2.1")
        engine.update_weights(BASE.named_parameters(), 4)
        monkeypatch.undo()
        assert servers[1].loads == 1
        engine.update_weights(GIVEN.named_parameters(), 5)
        assert servers[1].loads == 2 and drawn(engine) == right(5)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """It is a file."""
    (tmp_path / "weights").touch()
    with serving(BASE) as servers, pytest.raises(WriteError, match="cannot write .*/weights/run: Not a directory"):
        meet(servers, tmp_path / "weights")


@pytest.mark.parametrize("fetched", [False, True], ids=["read", "fetched"])
@pytest.mark.parametrize("how", ["dies", "fails", "hangs"])
def test_the_others_take_over(tmp_path: Path, how: str, fetched: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """One server is lost while it is asked. When it answers again, it has those of its folder, and is given these."""
    released = threading.Event()
    folder = None if fetched else tmp_path
    with given(folder, 2, deadline_s=3.0 if how == "hangs" else 60.0) as (engine, servers):
        act = {"dies": servers[1].down, "fails": refuse(500, "out of memory"), "hangs": released.wait}[how]
        servers[1].on["complete"] = repeated(act, servers[1].on, "complete")
        servers[0].asked.clear()
        assert drawn(engine) == right()
        assert len(servers[0].asked) == sum(map(len, SEEDS))
        released.set()
        servers[1].on.clear()
        servers[1].restart()
        if how == "dies":
            assert drawn(engine) == right()
            servers[1].up()
        servers[1].asked.clear()
        assert drawn(engine) == right()
        # and some that were given up, where it hung
        assert len(servers[1].asked) >= 1 + len(SEEDS[3])
    why = {
        "dies": r"(Connection reset by peer|Remote end closed connection without response|Connection refused)",
        "fails": "answered 500 to /v1/completions: out of memory",
        "hangs": "no whole answer to /v1/completions in engine.deadline_s=3 s",
    }[how]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert re.fullmatch(f"engine: lost {servers[1].url}:? {why}", said[0])
    assert said[1] == f"engine: {servers[1].url} answers again and has the weights"


@pytest.mark.parametrize("when", ["before", "in"])
def test_server_that_was_started_again_is_found_out(
    tmp_path: Path, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers all the while, once with the weights of its folder: between two calls, or in the middle of one."""
    with given(tmp_path, 2) as (engine, servers):
        if when == "before":
            servers[0].restart()
        else:
            servers[0].on["complete"] = servers[0].restart
        assert drawn(engine) == right()
        assert servers[0].loads == 2 and servers[1].loads == 1
    said = capsys.readouterr().err
    assert said == f"engine: {servers[0].url} was started again; it is given the weights\n"


def test_server_lost_in_an_update_gets_the_newest_weights(tmp_path: Path) -> None:
    """It comes back after another update, for which it was away, too."""
    with given(tmp_path, 2) as (engine, servers):
        servers[1].on["load"] = servers[1].down
        engine.update_weights(BASE.named_parameters(), 4)
        engine.update_weights(GIVEN.named_parameters(), 5)
        servers[1].restart()
        servers[1].up()
        assert drawn(engine) == right(5)
        assert servers[1].loads == 2 and len(servers[1].asked) == 1 + len(SEEDS[3])


@pytest.mark.parametrize("where", ["complete", "score", "load", "about"])
def test_all_lost_is_an_engine_lost(tmp_path: Path, where: str) -> None:
    """Which the run answers by waiting for them; the reason of each is in it."""
    with given(tmp_path, 2) as (engine, servers):
        for server in servers:
            server.on[where] = repeated(drop, server.on, where)
        calls = {"score": lambda: engine.score(SEQUENCES), "load": lambda: engine.update_weights(iter([]), 4)}
        with pytest.raises(EngineLost, match=f"{servers[0].url}: .*; {servers[1].url}: "):
            calls.get(where, lambda: drawn(engine))()


def test_server_at_work_is_not_lost(tmp_path: Path) -> None:
    """Answers come one after another, and take two deadlines in all."""
    with given(tmp_path, 1, deadline_s=3.0) as (engine, (server,)):
        complete = server._complete

        def slowly(body: dict[str, Any]) -> Any:
            threading.Event().wait(0.8)
            return complete(body)

        server._complete = slowly
        assert drawn(engine) == right()


def test_refusal_ends_the_call_with_the_servers_words(tmp_path: Path) -> None:
    """Though another server never answers: that is not waited for."""
    with given(tmp_path, 2, deadline_s=10_000.0) as (engine, servers):
        hanging, released = threading.Event(), threading.Event()

        def hang() -> None:
            hanging.set()
            released.wait()

        def refuse_then() -> None:
            hanging.wait()
            raise Refuse(400, '{"error":{"message":"max_tokens is too large"}}')

        servers[0].on["complete"] = refuse_then
        servers[1].on["complete"] = repeated(hang, servers[1].on, "complete")
        with pytest.raises(EngineError, match=f"^{servers[0].url} answered 400 to /v1/.*: max_tokens is too large$"):
            drawn(engine)
        released.set()


def test_servers_of_two_runs_are_told(tmp_path: Path) -> None:
    """The second run takes the server over; the first does not sample from its weights."""
    with given(tmp_path, 1) as (engine, servers):
        other = meet(servers, tmp_path, owner="other")
        other.update_weights(BASE.named_parameters(), 1)
        with pytest.raises(EngineError, match="has weights of another run .*one run at a time"):
            drawn(engine)
        drawn(other)


def test_weights_that_cannot_be_loaded_end_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the server says; a cache that is not free yet is asked for again."""
    with given(tmp_path, 1) as (engine, (server,)):
        server.drops_refused = 2
        engine.update_weights(GIVEN.named_parameters(), 4)
        assert server.drops_refused == -1
        assert drawn(engine) == right(4)
        monkeypatch.setattr(weight_store, "_FILE_BYTES", 10_000)
        engine.update_weights(GIVEN.named_parameters(), 5)
        assert len(list((tmp_path / "run" / "000003").iterdir())) > 1
        assert drawn(engine) == right(5)
        with pytest.raises(EngineError, match=f"{server.url} could not load the weights: ValueError: .* is not there"):
            engine.update_weights(iter([]), 6)
        assert engine.version == 5


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"token_ids": None}, "its vLLM is too old"),
        ({"finish_reason": "abort"}, "ended a completion with 'abort'"),
        ({"finish_reason": "stop"}, "token 9 by itself; start it with --generation-config vllm"),
    ],
    ids=["old", "aborted", "stopped"],
)
def test_odd_answers_are_told(tmp_path: Path, choice: dict, message: str) -> None:
    """None is taken for a completion."""
    with given(tmp_path, 1) as (engine, (server,)):
        usual = {"token_ids": [9], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
        server._complete = lambda _: {"choices": [usual | choice]}
        with pytest.raises(EngineError, match=message):
            drawn(engine)
