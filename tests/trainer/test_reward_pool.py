"""The pool of reward workers survives whatever a completion does to it, and says what a user got wrong."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import chain
from pathlib import Path

import pytest

from srft.data.examples import load_examples
from srft.data.judging import check_demos
from srft.rewards.pool import RewardPool, RewardResult

ROOT = Path(__file__).parents[2]
TOWER = r"\boxed{9^{9^{9^{9}}}}"
FRACTIONS = r"\boxed{" + r"\frac{1}{" * 60 + "2" + "}" * 60 + "}"
VERIFIERS = """
import itertools, os, subprocess, sys, time

def graded(completion, answer, row):
    return {"right": 1.0, "half": 0.5, "wrong": 0.0, "truth": True}[completion]

def trouble(completion, answer, row):
    if completion == "program":
        with open(answer, "w") as file:
            file.write(str(subprocess.Popen(["sleep", "600"]).pid))
    if completion in ("endless", "program"):
        sum(itertools.repeat(0, 10**15))
    if completion == "sleep":
        time.sleep(60)
    if completion == "exit":
        os._exit(3)
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    if completion == "quit":
        sys.exit(1)
    if completion == "once" and not os.path.exists(answer):
        open(answer, "w").close()
        os.kill(os.getpid(), 9)
    return float(row["value"])

def modules(completion, answer, row):
    return float("torch" in sys.modules or "transformers" in sys.modules or "numpy" in sys.modules)

def process(completion, answer, row):
    time.sleep(0.02)
    return float(os.getpid())

not_a_function = 3
"""


@pytest.fixture
def custom(tmp_path: Path) -> str:
    """Path of a file of custom verifiers."""
    path = tmp_path / "my_rewards.py"
    path.write_text(VERIFIERS)
    return str(path)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all processes end within the time."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_order_and_values_are_kept(custom: str) -> None:
    """Results stand where their items stood, over more items than workers; custom values pass through."""
    words = random.Random(0).choices(["right", "half", "wrong", "truth"], k=200)
    with RewardPool(f"{custom}:graded", 2, 5.0) as pool:
        results = pool.score([(word, "", {}) for word in words])
        assert [r.value for r in results] == [
            {"right": 1, "half": 0.5, "wrong": 0, "truth": 1}[w] for w in words
        ]
        assert {r.status for r in results} == {"ok"}
        assert pool.score([]) == []
        assert pool.counts == {"ok": 200}


def test_check_demos_names_those_that_fail() -> None:
    """Demonstrations without their final answer are listed by id; examples without one are passed over."""
    examples = load_examples("chain", limit=6)
    broken = [
        e if i % 2 else type(e)(e.id, e.prompt, e.answer, ["forgot"], e.row) for i, e in enumerate(examples)
    ]
    without = type(examples[0])("none:0", "p", "1", [], {})
    with RewardPool("exact", 1, 5.0) as pool:
        assert check_demos([*broken, without], pool) == [("chain:0", 0), ("chain:2", 0), ("chain:4", 0)]


def test_reasoning_gym_scores_with_the_tasks_own_scorer() -> None:
    """Answers, bare or tagged, get the task's own score from the entry that came with the example."""
    pytest.importorskip("reasoning_gym")
    examples = load_examples("reasoning_gym:spell_backward", limit=20, require_demo=True)
    with RewardPool("reasoning_gym:spell_backward", 1, 10.0) as pool:
        assert check_demos(examples, pool) == []
        e = examples[0]
        right, wrong = pool.score(
            [(f"so <answer>{e.answer}</answer>", e.answer, e.row), ("?", e.answer, e.row)]
        )
    assert right.value == 1 and wrong.value < 0.5


def test_math_bombs_earn_nothing_and_cost_nothing() -> None:
    """Power towers and deep fractions are not worked out; every item around them gets its grade."""
    pytest.importorskip("math_verify")
    good = (r"\boxed{5}", "5", {})
    bombs = [(TOWER, "5", {}), (FRACTIONS, "5", {})]
    with RewardPool("math", 2, 10.0) as pool:
        results = pool.score([good, bombs[0], good, good, bombs[1], good])
        assert [r.value for r in results] == [1, 0, 1, 1, 0, 1]
        assert pool.counts == {"ok": 6}


def test_endless_c_calls_time_out_and_the_rest_is_graded(custom: str) -> None:
    """What no Python signal can end is killed at the deadline; every item around it gets its grade."""
    good = ("", "", {"value": 1})
    with RewardPool(f"{custom}:trouble", 2, 1.0) as pool:
        pool.prewarm()
        results = pool.score([good, ("endless", "", {}), good, good, ("endless", "", {}), good])
        assert [r.status for r in results] == ["ok", "timeout", "ok", "ok", "timeout", "ok"]
        assert [r.value for r in results] == [1, 0, 1, 1, 0, 1]
        assert pool.score([good]) == [RewardResult(1.0, "ok")]
        assert pool.counts == {"ok": 5, "timeout": 2}


def test_bad_items_wait_one_deadline_each_at_most(custom: str) -> None:
    """Four sleepers on two workers hold a batch up for two deadlines and restarts, not for their sleep."""
    items = [("sleep", "", {})] * 4 + [("", "", {"value": 1})] * 20
    with RewardPool(f"{custom}:trouble", 2, 1.0) as pool:
        pool.prewarm()
        start = time.monotonic()
        results = pool.score(items)
        waited = time.monotonic() - start
    assert [r.status for r in results] == ["timeout"] * 4 + ["ok"] * 20
    assert 2.0 <= waited < 15.0  # the sleep alone is 60 s


def test_deadline_does_not_count_the_start(tmp_path: Path) -> None:
    """A verifier that takes longer to import than the deadline grades, also after a worker was replaced."""
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\ntime.sleep(1.0)\ndef f(completion, answer, row):\n"
        "    time.sleep(float(completion))\n    return 1.0\n"
    )
    with RewardPool(f"{path}:f", 1, 0.5) as pool:
        results = pool.score([("0", "", {}), ("30", "", {}), ("0", "", {})])
    assert [r.status for r in results] == ["ok", "timeout", "ok"]


def test_exceptions_keep_their_message(custom: str) -> None:
    """What a verifier raises or returns in error is that item's status, never another's."""
    good = {"value": 1}
    items = [("", "", {}), ("nan", "", good), ("none", "", good), ("quit", "", good), ("", "", good)]
    with RewardPool(f"{custom}:trouble", 1, 5.0) as pool:
        missing, nan, none, quits, fine = pool.score(items)
    assert (missing.status, missing.value, missing.message) == ("error", 0.0, "KeyError: 'value'")
    assert nan.status == "error" and "returned nan" in nan.message
    assert (none.status, none.value) == ("unjudged", 0.0)
    assert quits.status == "error" and "exit code 1" in quits.message
    assert fine == RewardResult(1.0, "ok")


def test_bad_gold_is_not_a_wrong_answer() -> None:
    """A ground truth that cannot be read has its own status."""
    with RewardPool("numeric", 1, 5.0) as pool:
        bad, good = pool.score([("3", "many", {}), ("3", "3", {})])
    assert (bad.status, bad.value) == ("bad_gold", 0.0) and "many" in bad.message
    assert good == RewardResult(1.0, "ok")


def test_worker_that_dies_twice_on_an_item_gives_it_up(custom: str) -> None:
    """An item that ends its process is tried once more, then is an error; its neighbours are graded."""
    items = [("", "", {"value": 1}), ("exit", "", {}), ("", "", {"value": 0.5})]
    with RewardPool(f"{custom}:trouble", 1, 5.0) as pool:
        first, dead, last = pool.score(items)
    assert (first.value, last.value) == (1.0, 0.5)
    assert dead.status == "error" and "died twice on this item: exit code 3" in dead.message


def test_item_is_retried_when_its_worker_is_killed(custom: str, tmp_path: Path) -> None:
    """A worker killed in the middle of an item, as by the kernel's memory killer, costs the item nothing."""
    with RewardPool(f"{custom}:trouble", 1, 5.0) as pool:
        (result,) = pool.score([("once", str(tmp_path / "mark"), {"value": 1})])
    assert result == RewardResult(1.0, "ok")


def test_idle_workers_that_are_killed_are_replaced(custom: str) -> None:
    """SIGKILL between two batches goes unnoticed by the second."""
    items = [("", "", {})] * 8
    with RewardPool(f"{custom}:process", 2, 5.0) as pool:
        pool.prewarm()
        first = {int(r.value) for r in pool.score(items)}
        assert len(first) == 2
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        # one of the new ones may be done before the other has started
        second = {int(r.value) for r in pool.score(items)}
        pool.prewarm()
        third = {int(r.value) for r in pool.score(items)}
        assert len(third) == 2 and second <= third and not first & third


@pytest.mark.parametrize("times", [3, 4])
def test_worker_killed_while_it_loads_is_replaced(times: int, tmp_path: Path) -> None:
    """What the memory killer may do comes to pass three times; the fourth ends the run, with its reason."""
    deaths = f"""
import os
if len(os.listdir({str(tmp_path / "deaths")!r})) < {times}:
    open({str(tmp_path / "deaths")!r} + "/" + str(os.getpid()), "w")
    os.kill(os.getpid(), 9)

def right(completion, answer, row):
    return 1.0
"""
    (tmp_path / "deaths").mkdir()
    (tmp_path / "dying.py").write_text(deaths)
    with RewardPool(f"{tmp_path}/dying.py:right", 1, 5.0) as pool:
        if times == 4:
            with pytest.raises(ValueError, match="cannot be loaded: its worker ended with SIGKILL while loading"):
                pool.prewarm()
        else:
            pool.prewarm()
            assert pool.score([("", "", {})]) == [RewardResult(1.0, "ok")]


def test_pool_started_in_a_thread_outlives_it(custom: str) -> None:
    """The kernel ends workers with the thread that started them; the next batch starts new ones."""
    with RewardPool(f"{custom}:graded", 1, 5.0) as pool:
        starter = threading.Thread(target=pool.prewarm)
        starter.start()
        starter.join()
        assert pool.score([("right", "", {})] * 3) == [RewardResult(1.0, "ok")] * 3


def test_interrupted_batch_leaves_a_usable_pool(custom: str) -> None:
    """After an error on our side no answer of the old batch can be taken for one of the next."""
    with RewardPool(f"{custom}:graded", 2, 5.0) as pool:
        pool.prewarm()
        with pytest.raises(Exception, match="pickle"):
            pool.score([("half", "", {}), ("half", lambda: None, {})])
        assert pool.score([("right", "", {})]) == [RewardResult(1.0, "ok")]


def test_workers_do_not_import_the_heavy_packages(custom: str) -> None:
    """A worker imports neither torch nor transformers nor numpy, though this process has."""
    assert "torch" in sys.modules
    with RewardPool(f"{custom}:modules", 1, 5.0) as pool:
        assert pool.score([("", "", {})])[0].value == 0


def test_pool_module_imports_light() -> None:
    """Importing data and rewards costs no torch either."""
    modules = "srft.data.judging, srft.data.problems, srft.data.prompts, srft.rewards.pool"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.timeout(60)
def test_close_ends_the_workers_after_a_signal_inside_poll() -> None:
    """A handler that raises while ``Popen.poll`` holds its lock leaves it locked, and the pool closes all the same."""
    pool = RewardPool("exact", 2, 5.0)
    pool.prewarm()
    processes = [worker.process for worker in pool._workers]
    for process in processes:
        assert process._waitpid_lock.acquire(False)
    pool.close()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    with pytest.raises(ChildProcessError):
        os.waitpid(processes[0].pid, os.WNOHANG)


def test_close_ends_the_workers_and_can_be_repeated(custom: str) -> None:
    """No process is left after close; a closed pool says so."""
    pool = RewardPool(f"{custom}:process", 2, 5.0)
    pool.close()
    pool = RewardPool(f"{custom}:process", 2, 5.0)
    pool.prewarm()  # one that starts late would find nothing left to do
    pids = list({int(r.value) for r in pool.score([("", "", {})] * 8)})
    assert len(pids) == 2 and all(map(alive, pids))
    pool.close()
    pool.close()
    assert not any(map(alive, pids))
    with pytest.raises(ValueError, match="closed"):
        pool.score([("", "", {})])


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc; only Linux kills a busy worker with its parent"
)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit"])
def test_workers_end_with_their_parent(custom: str, tmp_path: Path, how: str) -> None:
    """However the parent ends, idle workers and one inside an endless C call end too, and what its verifier started."""
    script, started = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, threading, time
        from srft.rewards.pool import RewardPool
        pool = RewardPool({f"{custom}:trouble"!r}, 2, 500.0)
        pool.prewarm()
        threading.Thread(target=pool.score, args=([("program", {str(started)!r}, {{}})],), daemon=True).start()
        while not (os.path.exists({str(started)!r}) and open({str(started)!r}).read()):
            time.sleep(0.02)
        print(*[worker.process.pid for worker in pool._workers], flush=True)
        {"os._exit(0)" if how == "exit" else "time.sleep(60)"}
        """)
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    pids.append(int(started.read_text()))
    if how != "exit":
        assert all(map(alive, pids))
        parent.send_signal(getattr(signal, how))
    parent.wait(10)
    parent.stdout.close()
    assert wait_until_gone(pids)


@pytest.mark.parametrize(("workers", "deadline"), [(0, 1.0), (1, 0.0), (1, math.nan), (1, math.inf)])
def test_bad_numbers(workers: int, deadline: float) -> None:
    """A pool needs a worker and some time."""
    with pytest.raises(ValueError, match="workers >= 1 and a finite deadline_s > 0"):
        RewardPool("exact", workers, deadline)


def test_many_items_of_mixed_kinds_keep_their_places(custom: str) -> None:
    """Timeouts, deaths, errors and grades interleaved come back in order."""
    kinds = {"": "ok", "sleep": "timeout", "exit": "error", "nan": "error"}
    words = list(chain.from_iterable(("", "", word, "") for word in ("sleep", "exit", "nan")))
    with RewardPool(f"{custom}:trouble", 2, 0.5) as pool:
        results = pool.score([(word, "", {"value": index}) for index, word in enumerate(words)])
    assert [r.status for r in results] == [kinds[word] for word in words]
    assert [r.value for r in results] == [float(i) if word == "" else 0.0 for i, word in enumerate(words)]
