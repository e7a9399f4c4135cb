"""A `vllm serve` without vLLM: the in-process engine behind the paths that the trainer asks, and faults on request."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from srft.engine.base import Sampling
from srft.engine.hf import HfEngine
from srft.engine.vllm_extension import PROTOCOL, fetched


class Drop(Exception):
    """Close the connection without a word."""


class Refuse(Exception):
    """Answer with this status and text."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text


class FakeServer:
    """Serves a model until it is told to fail.

    ``on[what]`` is called when it is asked for that, before it answers, ``after[what]`` before the answer is sent; what
    is "about", "load", "drop", "complete" or "score". Each is called once, unless it puts itself there again.
    """

    def __init__(self, model: transformers.PreTrainedModel, max_model_len: int = 64) -> None:
        self.base = copy.deepcopy(model)
        text = model.config.get_text_config()
        self.about = {
            "protocol": PROTOCOL, "dtype": "float32", "logprobs_mode": "processed_logprobs",
            "max_model_len": max_model_len,
            "model": {
                "architecture": type(model).__name__, "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
                "num_hidden_layers": text.num_hidden_layers,
            },
        }  # fmt: skip
        self.on: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self.asked: list[dict[str, Any]] = []
        self.loads = self.drops_refused = 0
        self.lock, self.idle, self.busy = threading.Lock(), threading.Condition(), 0
        self.restart()
        self.port = 0
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """The weights are again those of its folder."""
        self.label = ""
        self.engine = HfEngine(self.base, dtype=torch.float32, pad_token_id=0, max_batch=1)

    def up(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more, and whoever asks on an open connection is dropped."""
        http, self.http = self.http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    def end(self) -> None:
        """Go down, and see that no answer is being made any more: a thread in torch ends a process that ends."""
        self.down()
        with self.idle:
            self.idle.wait_for(lambda: not self.busy, timeout=10)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with self.idle:
            self.busy += 1
        try:
            yield
        finally:
            with self.idle:
                self.busy -= 1
                self.idle.notify_all()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        what = {"/reset_prefix_cache": "drop", "/v1/completions": "score" if "prompt_logprobs" in body else "complete"}
        called = body["method"].removeprefix("srft_") if path == "/collective_rpc" else what.get(path, "")
        if self.http is None:
            raise Drop
        if act := self.on.pop(called, None):
            act()
        with self.lock:
            if self.http is None:
                raise Drop
            reply = getattr(self, f"_{called}")(*body["args"]) if "args" in body else getattr(self, f"_{called}")(body)
        if act := self.after.pop(called, None):
            act()
        if self.http is None:
            raise Drop
        return reply

    def _about(self) -> Any:
        return {"results": [self.about | {"label": self.label}]}

    def _load(self, place: str, label: str) -> Any:
        self.label, self.place = "", place
        try:
            files = [] if place.startswith("http://") else sorted(Path(place).glob("*.safetensors"))
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            if place.startswith("http://"):
                tensors = dict(fetched(place))
            elif not files:
                raise ValueError(f"{place} is not there")
        except (ValueError, OSError) as error:
            return {"results": [{"error": f"{type(error).__name__}: {error}"}]}
        self.engine.update_weights(tensors.items(), 0)
        self.label, self.loads = label, self.loads + 1
        return {"results": [{}]}

    def _drop(self, _: dict[str, Any]) -> Any:
        self.drops_refused -= 1
        return {"success": self.drops_refused < 0}

    def _complete(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        least, most = body["min_tokens"], body["max_tokens"]
        sampling = Sampling(body["temperature"], most, tuple(body["stop_token_ids"]), min_new_tokens=least)
        ((drawn,),) = self.engine.generate([body["prompt"]], sampling, [[body["seed"]]])
        assert body["return_token_ids"] and body["logprobs"] == 0
        choice = {"token_ids": drawn.token_ids, "logprobs": {"token_logprobs": drawn.logprobs}}
        return {"choices": [choice | {"finish_reason": drawn.finish}]}

    def _score(self, body: dict[str, Any]) -> Any:
        self.asked.append(body)
        (row,) = self.engine.score([body["prompt"]])
        by_token = [{str(token): {"logprob": x}} for token, x in zip(body["prompt"][1:], row, strict=True)]
        return {"choices": [{"finish_reason": "length", "prompt_logprobs": [None, *by_token]}]}


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                with server.at_work():
                    status, text = 200, json.dumps(server.answer(self.path, body))
            except Drop:
                self.close_connection = True
                return
            except Refuse as refused:
                status, text = refused.status, refused.text
            payload = text.encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except OSError:  # who asked is gone
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(model: transformers.PreTrainedModel, count: int = 1, max_model_len: int = 64) -> Iterator[list[FakeServer]]:
    """Servers of a model, ended with the body."""
    servers = [FakeServer(model, max_model_len) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.end()
