"""One `vllm serve` on another machine or this one, as the trainer sees it."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from srft.engine.base import EngineError, EngineLost
from srft.engine.vllm_extension import PROTOCOL

# seconds until a machine that is not there at all counts as lost
_CONNECT_S = 10.0
# and until one that says nothing of itself does, which an idle one does at once
_ABOUT_S = 30.0
_CHARACTERS_QUOTED = 1000
_DROP_POLL_S = 0.1

START = (
    "start it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls srft.engine.vllm_extension.Weights, with this "
    "srft installed beside its vLLM (docs/engines.md, Servers of rollouts)"
)


class Server:
    """Asks a server over HTTP; many threads may at once.

    A server that cannot be reached, says nothing for too long or fails by itself (5xx) raises ``EngineLost``, one that
    refuses what it is asked (4xx) ``EngineError``, with its own words.

    Args:
        url: Such as "http://host:8000".
        deadline_s: Seconds in which no question is answered to its end, after which it counts as hung, > 0.
    """

    def __init__(self, url: str, deadline_s: float) -> None:
        self.url = url
        self.lost = ""
        """Why it is not asked at present; empty while it is."""
        self.own_address = ""
        """This machine's, from which it was reached last."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port, self._prefix = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self._deadline_s = deadline_s
        self._heard = time.monotonic()
        self._lines: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def line(self) -> http.client.HTTPConnection:
        """Return a connection that ``ask`` may use again and again, by one thread; closed by ``hang_up``."""
        line = http.client.HTTPConnection(self._host, self._port, timeout=min(_CONNECT_S, self._deadline_s))
        with self._lock:
            self._lines.add(line)
        return line

    def hang_up(self, line: http.client.HTTPConnection) -> None:
        """Close a connection.

        Args:
            line: From ``line``.
        """
        with self._lock:
            self._lines.discard(line)
        line.close()

    def interrupt(self) -> None:
        """Let every question that waits for its answer, in whatever thread, fail at once."""
        with self._lock:
            for line in self._lines:
                if line.sock is not None:
                    try:
                        line.sock.shutdown(socket.SHUT_RDWR)
                    except OSError:  # its other end is gone already
                        pass

    def ask(
        self,
        path: str,
        body: dict[str, Any],
        line: http.client.HTTPConnection | None = None,
        deadline_s: float | None = None,
    ) -> Any:
        """Post a question and return what the answer's JSON holds.

        Args:
            path: Such as "/v1/completions".
            body: What JSON can hold.
            line: From ``line``; None makes one for this question.
            deadline_s: For this question; None is that of all.

        Raises:
            EngineLost: When there is no answer, or the server failed.
            EngineError: When it refuses.
        """
        own, deadline_s = line or self.line(), deadline_s or self._deadline_s
        try:
            status, text = self._exchange(path, body, own, deadline_s)
        except TimeoutError:
            limit = "engine.deadline_s=" if deadline_s == self._deadline_s else ""
            raise EngineLost(f"{self.url}: no whole answer to {path} in {limit}{deadline_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineLost(f"{self.url}: {_reason(error)}") from error
        finally:
            if line is None:
                self.hang_up(own)
        self._heard = time.monotonic()
        if status != 200:
            kind = EngineLost if status >= 500 else EngineError
            raise kind(f"{self.url} answered {status} to {path}: {_said(text)}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise EngineError(f"{self.url} answered {path} with what is no JSON: {_said(text)}") from error

    def about(self) -> dict[str, Any]:
        """Return what ``vllm_extension.Weights.srft_about`` says, the same on all of its workers.

        Raises:
            EngineLost: As ``ask``.
            EngineError: As ``ask``, or where it lacks what it must be started with.
        """
        try:
            answers = self._call("srft_about", deadline_s=min(_ABOUT_S, self._deadline_s))
        except EngineError as error:
            # vLLM's words for a path, and for a method, that it does not have
            if " answered 404 to " in str(error) or "srft_about" in str(error):
                raise EngineError(f"{error}; {START}") from error
            raise
        first = answers[0]
        if not isinstance(first, dict) or first.get("protocol") != PROTOCOL:
            raise EngineError(f"{self.url} runs another version of srft than the trainer; {START}")
        # a worker that failed alone has others than the rest
        mixed = any(answer["label"] != first["label"] for answer in answers)
        return first | {"label": "" if mixed else first["label"]}

    def take(self, place: str, label: str) -> None:
        """Let it load weights and drop what it computed with others.

        Args:
            place: A folder that holds them, seen by the server under the same path, or an address that has them.
            label: What ``about`` calls them from now on.

        Raises:
            EngineLost: As ``ask``.
            EngineError: As ``ask``, or when they cannot be loaded.
        """
        for answer in self._call("srft_load", place, label):
            if "error" in answer:
                raise EngineError(f"{self.url} could not load the weights: {answer['error']}")
        until = time.monotonic() + self._deadline_s
        # questions that were given up before hold a part of the cache until vLLM has noticed
        while not self.ask("/reset_prefix_cache", {})["success"]:
            if time.monotonic() > until:
                raise EngineError(f"{self.url} could not drop its prefix cache: who else asks it?")
            time.sleep(_DROP_POLL_S)
        if (found := self.about()["label"]) != label:
            raise EngineError(f"{self.url} has weights {found!r} where it was given {label!r}: who else gives it some?")

    def _call(self, method: str, *args: str, deadline_s: float | None = None) -> list[Any]:
        return self.ask("/collective_rpc", {"method": method, "args": args}, deadline_s=deadline_s)["results"]

    def _exchange(
        self, path: str, body: dict[str, Any], line: http.client.HTTPConnection, deadline_s: float
    ) -> tuple[int, bytes]:
        if line.sock is None:
            line.connect()
            assert line.sock is not None
            line.sock.settimeout(self._deadline_s)
            self.own_address = line.sock.getsockname()[0]
        asked = time.monotonic()
        line.request("POST", self._prefix + path, json.dumps(body), {"Content-Type": "application/json"})
        answered = select.poll()
        answered.register(line.sock, select.POLLIN)
        # others that it answers in the meantime show that it is at work
        while (left := max(asked, self._heard) + deadline_s - time.monotonic()) > 0:
            if answered.poll(1000 * left):
                break
        else:
            raise TimeoutError
        answer = line.getresponse()
        return answer.status, answer.read()


def _reason(error: OSError | http.client.HTTPException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _said(text: bytes) -> str:
    """The message in an answer, as vLLM and FastAPI write them, or what there is."""
    words = text.decode(errors="replace")
    try:
        found = json.loads(words)
        words = str(found["error"]["message"] if "error" in found else found["detail"])
    except (ValueError, KeyError, TypeError):
        pass
    return words[:_CHARACTERS_QUOTED] or "nothing"
