"""Weights that servers fetch from the trainer: whole, the last ones, by those alone who were told where."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import torch

from srft.engine import vllm_extension, weight_store
from srft.engine.vllm_extension import fetched
from srft.engine.weight_store import InMemory

WEIGHTS = {
    "embed": torch.randn(50, 8, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(33, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "head": torch.randn(8, 50, generator=torch.Generator().manual_seed(2)).T,
    "count": torch.tensor(7),
}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemory]:
    monkeypatch.setattr(weight_store, "_FILE_BYTES", 1000)
    monkeypatch.setattr(vllm_extension, "_RETRY_S", 0.01)
    found = InMemory()
    found.put(WEIGHTS.items())
    yield found
    found.close()


def status(address: str, path: str) -> int:
    line = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    line.request("GET", path)
    answer = line.getresponse()
    answer.read()
    line.close()
    return answer.status


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_is_fetched_is_what_was_put(store: InMemory, address: str) -> None:
    """In several pieces, bit by bit, of either family of addresses."""
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    found = dict(fetched(store.place(address)))
    assert list(found) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_nobody_else_is_answered(store: InMemory) -> None:
    """It listens on the loopback device for a server on it, and every path but those of the last weights is unknown."""
    address = store.place("127.0.0.1")
    path = urlsplit(address).path
    assert urlsplit(address).hostname == "127.0.0.1" and store.place("127.0.0.1") == address
    assert status(address, path) == status(address, f"{path}/0") == 200
    wrong = path.replace(path[1:5], "0000" if path[1:5] != "0000" else "1111")
    for other in ("/", "/1", wrong, f"{path}/", f"{path}/-1", f"{path}/99", f"{path}/../1", f"{path}%2f0"):
        assert status(address, other) == 404, other


def test_only_the_last_weights_are_there(store: InMemory) -> None:
    """Whoever comes for the ones before is told so; after the end nobody is answered, and the remedy is named."""
    before = store.place("127.0.0.1")
    store.put([("new", torch.ones(3))])
    after = store.place("127.0.0.1")
    assert torch.equal(dict(fetched(after))["new"], torch.ones(3))
    with pytest.raises(OSError, match="has other weights by now"):
        dict(fetched(before))
    store.close()
    store.close()
    with pytest.raises(OSError, match="cannot be reached from the server: .*refused; open the way, or set e") as raised:
        dict(fetched(after))
    assert urlsplit(after).path.split("/")[1] not in str(raised.value)


def test_a_connection_that_breaks_is_tried_again(store: InMemory) -> None:
    """Twice in the middle of an answer; a third time is an error."""
    parts = urlsplit(store.place("127.0.0.1"))
    broken = 0

    def between(listener: socket.socket) -> None:
        nonlocal broken
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            asked = line.recv(10_000)
            if broken:
                broken -= 1
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhalf")
            else:
                with socket.create_connection(("127.0.0.1", parts.port or 0)) as way:
                    way.sendall(asked.replace(b"HTTP/1.1", b"HTTP/1.0"))
                    while found := way.recv(10_000):
                        line.sendall(found)
            line.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=between, args=(listener,), daemon=True).start()
        place = f"http://127.0.0.1:{listener.getsockname()[1]}{parts.path}"
        broken = 2
        assert list(dict(fetched(place))) == list(WEIGHTS)
        broken = 3
        with pytest.raises(OSError, match="cannot be reached"):
            dict(fetched(place))
        listener.shutdown(socket.SHUT_RDWR)


def test_a_slow_way_is_no_broken_one(store: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that reads all the while has its weights, though that takes longer than one that does not read may."""
    monkeypatch.setattr(weight_store._Handler, "timeout", 0.4)
    monkeypatch.setattr(weight_store, "_SENT_AT_ONCE", 2**16)
    store.put([("large", torch.zeros(3 * 2**20))])
    parts = urlsplit(store.place("127.0.0.1"))
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        line.connect(("127.0.0.1", parts.port or 0))
        line.sendall(f"GET {parts.path}/0 HTTP/1.0\r\n\r\n".encode())
        got, began = 0, time.monotonic()
        while found := line.recv(2**17):
            got += len(found)
            time.sleep(0.02)
    assert got > 12 * 2**20 and time.monotonic() - began > 0.8
