"""One process for each run, forked from this one, which has imported all that a run needs: so it begins at once.

This process must have no thread that computes and must not have touched a GPU, which no fork survives.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

import srft.train
from srft.disk import writing
from srft.launch import end_with
from srft.stop import SIGNALS, leave_at_once

_LAST_BYTES = 1 << 14


class Child:
    """A running ``python -m srft.train``, in a group of its own: a signal at the keyboard is the parent's to pass on.

    Args:
        words: The command line's.
        log: Gets what it prints, after what was there.
        threads: It computes with.
        ranks: Processes of the run.

    Raises:
        WriteError: When the disk refuses.
    """

    def __init__(self, words: Sequence[str], log: Path, threads: int, ranks: int) -> None:
        self.log = log
        self.status: int | None = None
        """Exit status, negative the signal that ended it; None while it runs."""
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # until the child has its own, a signal would run the parent's handler in it and be lost
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _become(list(words), output, threads, ranks, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(output)

    def has_ended(self) -> bool:
        """Whether it has; ``status`` is known from then on."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def send(self, number: int) -> None:
        """Send a signal, if it is still there.

        Args:
            number: The signal's.
        """
        if self.status is None:
            os.kill(self.pid, number)

    def last_words(self) -> str:
        """Say why it ended: what it printed as its error, else how it ended."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        said = [place for place, line in enumerate(lines) if line.startswith("error: ")]
        if self.status == 2 and said:
            return "\n".join(lines[said[-1] :]).removeprefix("error: ")
        if self.status is not None and self.status < 0:
            hint = ", as the kernel does when memory runs out" if self.status == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-self.status).name}{hint}; see {self.log}"
        return f"ended with exit status {self.status}; see {self.log}"


def _become(words: list[str], output: int, threads: int, ranks: int, parent: int) -> None:
    """Be the run, and never return."""
    status = 1
    try:
        os.setpgid(0, 0)
        end_with(parent)
        leave_at_once()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(ours, theirs)
        # nothing that the parent has not flushed is written twice, and what is said is in the log at once
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), _stream(1), _stream(2)
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // ranks))
        command = [sys.executable, "-m", "srft.train", *words]
        if ranks > 1:
            os.execv(sys.executable, command)
        torch.set_num_threads(threads)
        # what run.json shows, and what main() reads
        sys.orig_argv, sys.argv = command, command[2:]
        srft.train.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _stream(descriptor: int):
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
