"""Where servers find the weights of a run: in a folder that all of them see, or with the trainer, which they ask."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import save, save_file
from torch import Tensor

from srft.disk import sync_to_disk, writing
from srft.engine.asking import in_pieces

# a server that fetches weights holds so much of them beside its model
_FILE_BYTES = 2**30
# one that stops reading in the middle of an answer has that much time to go on
_STALLED_S = 60.0
_SENT_AT_ONCE = 2**20
_CLOSE_POLL_S = 0.05


class InFolder:
    """Weights in a folder that this process writes and every server reads, under the same path.

    Args:
        folder: For this alone; emptied now.

    Raises:
        WriteError: When it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def put(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write weights beside the last ones, to a folder that appears when it is whole.

        Args:
            named_tensors: All weights.

        Raises:
            WriteError: When the folder cannot be written, or is full.
        """
        folder = self._numbered(self._count + 1)
        partial = folder.with_suffix(".partial")
        try:
            with writing(folder):
                partial.mkdir()
                for number, piece in enumerate(in_pieces(named_tensors, _FILE_BYTES)):
                    save_file(piece, partial / f"{number:05d}.safetensors")
                    sync_to_disk(partial / f"{number:05d}.safetensors")
                os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._count += 1

    def place(self, _own_address: str) -> str:
        """Return the path of the last ones."""
        return str(self._numbered(self._count))

    def drop_older(self) -> None:
        """Remove all but the last ones: every server has these."""
        for folder in self._folder.iterdir():
            if folder != self._numbered(self._count):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder; safe to call twice."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _numbered(self, count: int) -> Path:
        return self._folder / f"{count:06d}"


class InMemory:
    """Weights in this process's memory, one copy, which servers fetch over HTTP.

    It listens at those of this machine's addresses alone from which servers are reached, on ports that are free, and
    answers those who know a secret that is made anew for it: every server it is told, in plain text.
    """

    def __init__(self) -> None:
        self._secret, self._count = secrets.token_hex(16), 0
        self._files: list[bytes] = []
        self._doors: dict[str, ThreadingHTTPServer] = {}
        self._lock = threading.Lock()

    def put(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Keep weights in place of the last ones.

        Args:
            named_tensors: All weights.
        """
        self._count += 1
        self._files = []
        self._files = [save(piece) for piece in in_pieces(named_tensors, _FILE_BYTES)]

    def place(self, address: str) -> str:
        """Return where a server finds the last ones.

        Args:
            address: Of this machine, as that server sees it.

        Raises:
            OSError: When it is none of this machine's any more.
        """
        with self._lock:
            if address not in self._doors:
                self._doors[address] = (_V6 if ":" in address else _V4)(address, self._answer)
        shown = f"[{address}]" if ":" in address else address
        return f"http://{shown}:{self._doors[address].server_address[1]}/{self._secret}/{self._count}"

    def drop_older(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Answer nobody any more, and forget the weights; safe to call twice."""
        for door in self._doors.values():
            door.shutdown()
            door.server_close()
        self._doors, self._files = {}, []

    def _answer(self, path: str) -> bytes | None:
        """What is found at a path: how many files the weights are, below that the files; None for anything else."""
        secret, _, rest = path.removeprefix("/").partition("/")
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            return None
        count, files = self._count, self._files
        here = {f"{count}": str(len(files)).encode()} | {f"{count}/{i}": file for i, file in enumerate(files)}
        return here.get(rest)


class _V4(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def __init__(self, address: str, answer: Callable[[str], bytes | None]) -> None:
        self.answer = answer
        super().__init__((address, 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(_CLOSE_POLL_S,), name="weights", daemon=True).start()


class _V6(_V4):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", _STALLED_S
    server: _V4

    def do_GET(self) -> None:
        found = self.server.answer(self.path)
        body = memoryview(found or b"")
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # each piece has the whole time, however slow the way is
        for at in range(0, len(body), _SENT_AT_ONCE):
            self.wfile.write(body[at : at + _SENT_AT_ONCE])

    def log_message(self, *_: object) -> None:
        pass
