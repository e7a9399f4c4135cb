"""The ranks of a run: started with what they need, ended together, and nothing of them left, whatever ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from srft.stop import Stopped, StopSignals
from tests.trainer.processes import descendants, marked_processes, state_and_parent
from tests.trainer.runs import ROOT

# a run in small, without torch: every rank does what the last word says
MINIATURE = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from srft.launch import start_ranks
from srft.stop import Stopped, StopSignals, leave_at_once

leave_at_once()
start_ranks(sys.argv[1:])
rank = int(os.environ.get("RANK", "-1"))
here = Path(sys.argv[1].partition("=")[2])

def told():
    return len(list(here.glob("ready*"))) == int(os.environ["WORLD_SIZE"])

def wait():
    (here / f"ready{rank}").touch()
    time.sleep(100)

exec(sys.argv[-1])
"""


def miniature(folder: Path, code: str, ranks: int = 3) -> list[str]:
    return [sys.executable, "-c", MINIATURE, f"runs_dir={folder}", f"train.ranks={ranks}", code]


def environment(folder: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")}
    return clean | {"PYTHONPATH": str(ROOT), "SRFT_TEST_RUN": str(folder)}


def finished(folder: Path, code: str, ranks: int = 3) -> subprocess.CompletedProcess[str]:
    """Run it to its end, after which nothing of it is left."""
    done = subprocess.run(
        miniature(folder, code, ranks), env=environment(folder), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert not marked_processes(f"SRFT_TEST_RUN={folder}")
    return done


@contextmanager
def waiting(folder: Path, code: str) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """The launcher and what it started, once all ranks are in their ``wait``."""
    with subprocess.Popen(
        miniature(folder, code), env=environment(folder), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            while launcher.poll() is None and len(list(folder.glob("ready*"))) < 3:
                time.sleep(0.01)
            assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
            yield launcher, descendants(launcher.pid)
        finally:
            launcher.kill()


def assert_gone(folder: Path, family: set[int]) -> None:
    deadline = time.monotonic() + 10
    mark = f"SRFT_TEST_RUN={folder}"
    while (left := {p for p in family | marked_processes(mark) if state_and_parent(p)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def rank_process(launcher: subprocess.Popen[str], rank: int) -> int:
    def is_it(pid: int) -> bool:
        found = state_and_parent(pid)
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return found is not None and found[1] == launcher.pid and f"RANK={rank}".encode() in environ

    (found,) = filter(is_it, descendants(launcher.pid))
    return found


@pytest.mark.parametrize(
    ("module", "asked", "turns"),
    [
        *((f"srft.{name}", None, "0") for name in ("train", "evaluate", "selftest", "experiments")),
        ("srft.train", "ACTIVE", "[1-9][0-9]*"),
    ],
)
def test_threads_that_wait_sleep_unless_the_environment_says_how(module: str, asked: str | None, turns: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    # what OpenMP made of it, which it reads once, when torch is loaded: how often a thread looks before it sleeps
    assert re.search(rf"GOMP_SPINCOUNT *= *'{turns}'", done.stderr), done.stderr[-2000:]


def test_each_rank_has_its_place_and_only_the_first_the_terminal(tmp_path: Path) -> None:
    """What torchrun would set, a port that stays theirs, threads for their share of the cores, and numbered lines."""
    code = (
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT',"
        " 'OMP_NUM_THREADS', 'SRFT_TOKEN']\n"
        "print('out', rank); print('err', rank, file=sys.stderr)\n"
        "listening = socket.socket()\n"
        "if rank == 0:\n"
        "    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "    listening.bind((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))); listening.listen()\n"
        "(here / f'{rank}.json').write_text(json.dumps([os.environ[n] for n in names]))"
    )
    done = finished(tmp_path, code)
    assert done.returncode == 0
    assert done.stdout == "out 0\n"
    assert sorted(done.stderr.splitlines()) == ["[rank 1] err 1", "[rank 2] err 2", "err 0"]
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [row[:5] for row in rows] == [[str(r), str(r), "3", "3", "127.0.0.1"] for r in range(3)]
    assert rows[0][5:] == rows[1][5:] == rows[2][5:]
    assert rows[0][6] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert len(rows[0][7]) == 32


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["train.ranks=2"], 2), (["--train.ranks=2"], 2), (["train={ranks=2}"], 2), (["ranks.toml"], 2),
        (["ranks.toml", "train.ranks=3"], 3), (["train.ranks=3", "ranks.toml"], 2), (["train.ranks=1"], 0), ([], 0),
        (["ranks.toml", "--help"], 0), (["train.ranks=two", "absent.toml", "broken.toml", "train=7"], 0),
    ],
)  # fmt: skip
def test_number_of_ranks_is_read_where_the_options_are(words: list[str], ranks: int, tmp_path: Path) -> None:
    """Overrides and files, the last one wins; a run of one process goes on as it is."""
    (tmp_path / "ranks.toml").write_text("[train]\nranks = 2\n")
    (tmp_path / "broken.toml").write_text("[train\n")
    command = [sys.executable, "-c", MINIATURE, *words, "print(rank, os.environ.get('WORLD_SIZE'))"]
    done = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == (f"0 {ranks}\n" if ranks else "-1 None\n"), done.stderr
    assert done.returncode == 0


def test_what_all_ranks_say_is_said_once(tmp_path: Path) -> None:
    """A wrong option is the same line on each, and needs no word about ranks."""
    done = finished(tmp_path, "time.sleep(rank / 5); print('error: wrong\\nso it is', file=sys.stderr); sys.exit(2)")
    assert (done.returncode, done.stderr) == (2, "error: wrong\nso it is\n")


def test_a_rank_that_fails_alone_ends_the_others(tmp_path: Path) -> None:
    """Its last words and output are shown, its status is the run's, and the others do not keep anybody waiting."""
    code = (
        "if rank == 2:\n    print('log of 2'); print('error: no room', file=sys.stderr); sys.exit(2)\nwait()"
    )
    done = finished(tmp_path, code)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "[rank 2] error: no room",
        "[rank 2] log of 2",
        "rank 2 of 3 ended with exit status 2, so the others were ended; train.resume=true goes on from the newest "
        "checkpoint",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_takes_everything_along(rank: int, tmp_path: Path) -> None:
    """What another rank started in a session of its own ends too; the status is that of a killed process."""
    code = "subprocess.Popen(['sleep', '600'], start_new_session=True); wait()"
    with waiting(tmp_path, code) as (launcher, family):
        assert len(family) == 6
        os.kill(rank_process(launcher, rank), signal.SIGKILL)
        assert launcher.wait(timeout=20) == 137
        assert launcher.stderr is not None
        assert f"rank {rank} of 3 ended by SIGKILL (which is also how" in launcher.stderr.read()
        assert not {pid for pid in family if state_and_parent(pid)}
        assert not marked_processes(f"SRFT_TEST_RUN={tmp_path}")


def test_what_others_say_of_a_killed_rank_is_left_out(tmp_path: Path) -> None:
    """Also where one has said it before the launcher saw who was killed."""
    code = "print('error: rank 0 is missed', file=sys.stderr, flush=True) if rank else None; wait()"
    with waiting(tmp_path, code) as (launcher, _):
        os.kill(rank_process(launcher, 0), signal.SIGKILL)
        assert launcher.wait(timeout=20) == 137
        assert launcher.stderr is not None
        (line,) = launcher.stderr.read().splitlines()
        assert line.startswith("rank 0 of 3 ended by SIGKILL (which is also how")


def test_killed_launcher_leaves_no_rank(tmp_path: Path) -> None:
    """Ranks end with it, whether they are at work or not."""
    with waiting(tmp_path, "wait()") as (launcher, family):
        launcher.kill()
        launcher.wait()
        assert_gone(tmp_path, family)


STOPPING = """
with StopSignals() as stop:
    try:
        wait()
    except Stopped as stopped:
        print("caught", file=sys.stderr)
        time.sleep(0.3)
        (here / f"saved{rank}").touch()
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_signal_stops_all_ranks_once(number: int, whom: str, tmp_path: Path) -> None:
    """All save; also where a scheduler signals every process, and the launcher passes on what they had already."""
    with waiting(tmp_path, STOPPING) as (launcher, family):
        if whom == "all":
            for pid in family:
                os.kill(pid, number)
            time.sleep(0.15)
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == 128 + number
        assert launcher.stderr is not None
        name = signal.Signals(number).name
        assert sorted(launcher.stderr.read().splitlines()) == [
            f"{name}: stopping where the run can go on from; a second signal ends it at once",
            "[rank 1] caught", "[rank 2] caught", "caught", f"stopped by {name}",
        ]  # fmt: skip
    assert len(list(tmp_path.glob("saved*"))) == 3


def test_ranks_that_have_just_begun_end_as_cleanly(tmp_path: Path) -> None:
    """One that does not handle signals yet is ended by the system, and that is no failure."""
    code = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nwait()"
    with waiting(tmp_path, code) as (launcher, _):
        launcher.terminate()
        assert launcher.wait(timeout=20) == 143
        assert launcher.stderr is not None and launcher.stderr.read() == ""


def test_second_signal_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """Nothing waits for ranks that do not come to an end."""
    with waiting(tmp_path, STOPPING.replace("0.3", "60")) as (launcher, family):
        launcher.send_signal(signal.SIGTERM)
        assert launcher.stderr is not None and launcher.stderr.readline()  # they have it
        time.sleep(0.2)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=20) == 143
        assert "ended by SIGTERM before every rank had stopped by itself" in launcher.stderr.read()
        assert_gone(tmp_path, family)
    assert not list(tmp_path.glob("saved*"))


def test_a_save_that_fails_is_no_clean_stop(tmp_path: Path) -> None:
    """One rank stopped well, the first could not write: its status stays."""
    code = STOPPING.replace("0.3", "0 if rank else 0.3) or rank or sys.exit(2")
    with waiting(tmp_path, code) as (launcher, _):
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=20) == 2


def test_ranks_raise_at_the_same_point() -> None:
    """Before the first agreement a signal stops a rank at once; then it waits for one, whoever was told."""
    with StopSignals(lambda own: own) as stop:
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    with StopSignals(lambda own: own) as stop:
        stop.agree()
        os.kill(os.getpid(), signal.SIGTERM)
        stop.hold()
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            stop.release()
    other = [0, 0, signal.SIGHUP]
    with StopSignals(lambda own: max(own, other.pop(0))) as stop:
        stop.agree()
        stop.release()
        with pytest.raises(Stopped, match="stopped by SIGHUP"):
            stop.agree()
    with StopSignals() as stop:
        stop.agree()
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
