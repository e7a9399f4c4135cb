"""Kill a random process of a run on two ranks at random moments, and look for what it left and what it lost.

    python -m tests.trainer.kill_at_random --times 30 --engine vllm --folder /tmp/killed

Each time the run is resumed, one of its processes gets SIGKILL (the launcher, a rank, the engine, a reward worker, or
one of the guards of these), and the run either ends, all of it, or goes on; then it is told to stop. At the end it must
have the rows and weights, to the last bit, of a run that nobody disturbed. A table says what was killed, when, and what
became of it; the exit status is 1 when anything was left behind or lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.trainer.processes import marked_processes, state_and_parent
from tests.trainer.runs import ROOT, arguments, command, comparable_rows, environment, read_lines, weights

# vLLM's attention on CPU takes heads of 32 and more
RUN = {
    "train__save_every": 3, "train__eval_every": 4, "train__lr": 0.01,
    "model__tiny__hidden_size": 64, "model__tiny__num_layers": 2, "train__rollouts_per_prompt": 2, "reward__workers": 1,
}  # fmt: skip
MARK = "SRFT_TEST_RUN"
GONE_S = 30.0


@dataclass
class Killed:
    """What was killed, and what became of the run."""

    what: str
    after_s: float
    step: int
    outcome: str
    orphans: int


class Session:
    """One start of the run, resumed where it was."""

    def __init__(self, folder: Path, options: dict[str, object], steps: int) -> None:
        words = arguments(folder, **RUN, **options, train__steps=steps, train__resume=True)
        self.mark = f"{MARK}={folder}"
        self.metrics = folder / "runs" / "run" / "metrics.jsonl"
        self.began = time.monotonic()
        self.rows_before = self.rows()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "output.log").open("ab")
        env = environment() | dict([self.mark.split("=")])
        self.process = subprocess.Popen(command(words), cwd=ROOT, env=env, stdout=self.log, stderr=self.log)

    def rows(self) -> int:
        """Whole lines of the metrics."""
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def wait_until(self, seconds: float) -> None:
        """Return so long after the start, or when the run has ended."""
        while self.process.poll() is None and time.monotonic() - self.began < seconds:
            time.sleep(0.02)

    def wait_for_rows(self, count: int, seconds: float) -> None:
        """Return when it has written so many rows, or has ended, or takes too long."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and self.rows() < count and time.monotonic() < until:
            time.sleep(0.1)

    def kinds(self) -> dict[int, str]:
        """Its live processes, by what they are."""
        return {pid: kind for pid in marked_processes(self.mark) if (kind := self._kind(pid))}

    def _kind(self, pid: int) -> str:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            leads = os.getpgid(pid) == pid
        except (FileNotFoundError, ProcessLookupError):
            return ""
        if pid == self.process.pid:
            return "launcher"
        rank = next((v.decode().removeprefix("RANK=") for v in variables if v.startswith(b"RANK=")), "?")
        if b"vllm_worker" in words:
            return "engine" if leads else "guard of the engine"
        if b"srft.rewards.worker" in words:
            return f"reward worker of rank {rank}" if leads else f"guard of a reward worker of rank {rank}"
        return f"rank {rank}" if b"srft.train" in words else ""

    def end(self) -> int | None:
        """Tell it to stop; its exit status, None when it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
        finally:
            self.log.close()

    def orphans(self) -> set[int]:
        """What is left of it after the time that it has to end."""
        until = time.monotonic() + GONE_S
        while (left := {p for p in marked_processes(self.mark) if state_and_parent(p)}) and time.monotonic() < until:
            time.sleep(0.1)
        return left


def kill_once(folder: Path, options: dict[str, object], window_s: float, rng: random.Random) -> Killed:
    """Start or resume the run, kill one of its processes within this window, and end what goes on."""
    session = Session(folder, options, steps=100_000)
    session.wait_until(rng.uniform(0.2, window_s))
    kinds = session.kinds()
    # kinds first: there are more guards than anything else
    kind = rng.choice(sorted(set(kinds.values())))
    pid = rng.choice(sorted(pid for pid, each in kinds.items() if each == kind))
    after, rows = time.monotonic() - session.began, session.rows()
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        kind += " (it had just ended)"
    if kind == "launcher" or kind.startswith("rank "):
        session.wait_for_rows(10**9, GONE_S)
    else:
        session.wait_for_rows(rows + 2, 150)
    status = session.process.poll()
    if status is None:
        outcome = "went on" if session.rows() >= rows + 2 else "HUNG"
        if (status := session.end()) != 143:
            outcome += f", then ended with {status} INSTEAD OF 143"
    else:
        # before its first call an engine that dies is an error like any other of the start
        wanted = -9 if kind == "launcher" else 2 if kind == "engine" and rows == session.rows_before else 137
        outcome = f"ended with {status}" + ("" if status == wanted else f" INSTEAD OF {wanted}")
    left = session.orphans()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    steps = [row["step"] for row in read_lines(session.metrics)] if session.metrics.exists() else []
    return Killed(kind, after, steps[-1] if steps else -1, outcome, len(left))


def finish(folder: Path, options: dict[str, object], steps: int) -> Path:
    """Let the run come to its end; its folder."""
    session = Session(folder, options, steps)
    if status := session.process.wait(timeout=1800):
        raise SystemExit(f"the run in {folder} ended with {status}; see output.log there")
    return folder / "runs" / "run"


def main() -> None:
    """Kill, resume, compare, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lag", type=int, default=0, help="rollout.max_lag")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="kept; unset: a new one in the temporary folder")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill-at-random-"))
    rng, killed = random.Random(given.seed), []
    options: dict[str, object] = {
        "engine__kind": given.engine, "train__ranks": given.ranks, "rollout__max_lag": given.lag,
    }  # fmt: skip
    first = Session(folder / "killed", options, steps=100_000)
    first.wait_for_rows(2, 600)
    window = 1.5 * (time.monotonic() - first.began)
    print(f"first step after {window / 1.5:.0f} s; stopped with {first.end()}; {len(first.orphans())} left", flush=True)
    for number in range(given.times):
        killed.append(one := kill_once(folder / "killed", options, window, rng))
        print(
            f"{number + 1:3d}  {one.after_s:5.1f} s  {one.what:36s} {one.outcome:28s} last step {one.step:4d}  "
            f"{one.orphans} left",
            flush=True,
        )
    steps = max(one.step for one in killed) + 2
    run, expected = (finish(folder / name, options, steps) for name in ("killed", "undisturbed"))
    rows, wanted = ([drop_restarts(row) for row in comparable_rows(path)] for path in (run, expected))
    faults = [one for one in killed if one.orphans or "INSTEAD" in one.outcome or "HUNG" in one.outcome]
    same = weights(run) == weights(expected)
    whole = [row["step"] for row in rows] == list(range(steps + 1))
    print(
        f"{given.times} kills: {sum(one.orphans for one in killed)} processes left, {len(faults)} other than expected; "
        f"rows of steps 0 to {steps} {'without a gap' if whole else 'WITH GAPS'}; "
        f"rows {'equal' if rows == wanted else 'DIFFER'}, weights {'equal' if same else 'DIFFER'}"
    )
    sys.exit(bool(faults) or not whole or rows != wanted or not same)


def drop_restarts(row: dict[str, object]) -> dict[str, object]:
    """A row without the count that a kill may raise."""
    return {key: value for key, value in row.items() if key != "engine/restarts"}


if __name__ == "__main__":
    main()
