"""Environments: what is found wrong before a model is loaded, and what their processes survive."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from srft.environments.calculator import Calculator
from srft.environments.kinds import check_environment
from srft.environments.pool import Asked, EnvironmentPool, Reply
from srft.options import load_config

GUESS = """
import asyncio, sys, time, os

class Words(str):
    pass

class Guess:
    def __init__(self, answer, row):
        self.secret, self.log, self.turns = int(answer), row.get("log"), 0

    def reward(self):
        return 1 / self.turns if self.turns != 3 else "much"

    def step(self, text):
        self.turns += 1
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()} {text}\\n")
        if text == "sleep":
            time.sleep(60)
        if text == "die":
            os._exit(7)
        if text == "raise":
            return 1 // 0
        if text == "number":
            return 3
        if text == "exit":
            sys.exit("enough")
        if text == "cancelled":
            raise asyncio.CancelledError
        if text == "half":
            return "\\ud800 of a pair"
        if text == "fork":
            if not (child := os.fork()):
                sys.exit("the child")
            os.waitpid(child, 0)
            return "forked"
        if text == "words":
            return Words("of a class of mine")
        guess = int(text)
        return None if guess == self.secret else f"{'<' if guess < self.secret else '>'} turn {self.turns}"
"""


@pytest.fixture
def guess(tmp_path: Path) -> str:
    path = tmp_path / "my_env.py"
    path.write_text(GUESS)
    return f"{path}:Guess"


def asked(*texts: str, key: int = 0, secret: str = "5", log: Path | None = None) -> Asked:
    return Asked(key, list(texts), secret, {"log": str(log)} if log else {})


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        ("12+30=", "42"), ("so 2*(3+4) =", "14"), ("7/2=", "7/2"), ("1/0=", "error"), ("what=", "error"), ("#42", None),
        ("a\n9-10=\n", "-1"), ("", None),
    ],
)  # fmt: skip
def test_the_calculator(said: str, reply: str | None) -> None:
    """The expression before the last sign of equality, exactly; a turn without one is the last."""
    assert Calculator("", {}).step(said) == reply


def test_conversations_keep_their_state(guess: str) -> None:
    """Beside each other, over more of them than processes; after ``begin`` the same keys are others."""
    with EnvironmentPool(guess, 2, 10.0) as pool:
        for _ in range(2):
            pool.begin()
            first = pool.answer([asked("3", key=0), asked("9", key=1), asked("5", key=2)])
            assert [reply.said for reply in first] == ["< turn 1", "> turn 1", None]
            second = pool.answer([asked("9", "6", key=1), asked("3", "5", key=0)])
            assert [reply.said for reply in second] == ["> turn 2", None]


def test_an_environment_may_judge(guess: str) -> None:
    """Where it heard the turns or, its process gone, where they are played again; what is no number ends the run."""
    with EnvironmentPool(guess, 1, 1.0) as pool:
        assert not pool.judges
        pool.begin()
        assert pool.judges
        pool.answer([asked("3", key=0), asked("5", key=1)])
        assert [reply.reward for reply in pool.judge([asked("3", key=0), asked("5", key=1)])] == [1.0, 1.0]
        late, other = pool.answer([asked("3", "sleep", key=0), asked("3", "4", key=2)])
        assert late.status == "timeout" and other.said == "< turn 2"
        assert pool.judge([asked("3", "4", key=2)]) == [Reply(None, reward=0.5)]
        with pytest.raises(ValueError, match="env.name=.* reward must return a finite number, got str 'much'"):
            pool.judge([asked("3", "4", "5", key=2)])
    with EnvironmentPool("calculator", 1, 1.0) as pool:
        pool.begin()
        assert not pool.judges


def test_a_step_beyond_its_deadline_ends_its_conversation_alone(guess: str, tmp_path: Path) -> None:
    """The others of its process are played again up to where they were, and go on."""
    log, began = tmp_path / "log", time.monotonic()
    with EnvironmentPool(guess, 1, 1.0) as pool:
        pool.begin()
        pool.answer([asked("3", key=0, log=log), asked("4", key=1)])
        late, other = pool.answer([asked("4", "sleep", key=1), asked("3", "4", key=0, log=log)])
    assert late == Reply(None, "timeout", "killed after 1 s") and other == Reply("< turn 2")
    heard = [line.split() for line in log.read_text().splitlines()]
    assert [text for _, text in heard] == ["3", "3", "4"] and heard[0][0] != heard[1][0] == heard[2][0]
    assert time.monotonic() - began < 50


def test_a_process_that_dies_ends_its_conversation_alone(guess: str) -> None:
    """It is tried twice."""
    with EnvironmentPool(guess, 1, 10.0) as pool:
        pool.begin()
        dead, other = pool.answer([asked("die", key=0), asked("5", key=1)])
    assert dead.status == "error" and "died twice" in dead.message and other == Reply(None)


def test_an_environment_that_fails_from_the_start_ends_the_run(guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its first conversations, over several turns; one that has answered once may fail after that."""
    monkeypatch.setattr("srft.environments.pool._FAILURES", 2)
    with EnvironmentPool(guess, 1, 60.0) as pool:
        pool.begin()
        assert pool.answer([asked("die")])[0].status == "error"
        with pytest.raises(ValueError, match=r"env\.name=.*step has failed in all of the first 2 .*died twice"):
            pool.answer([asked("die", key=1), asked("3", key=2)])
        pool.begin()
        pool.answer([asked("3")])
        assert [reply.status for reply in pool.answer([asked("die", key=1), asked("die", key=2)])] == ["error"] * 2


def test_a_child_that_an_environment_forks_ends_nothing(guess: str) -> None:
    """It may leave by sys.exit."""
    with EnvironmentPool(guess, 1, 30.0) as pool:
        pool.begin()
        assert pool.answer([asked("fork"), asked("3", key=1)]) == [Reply("forked"), Reply("< turn 1")]


def test_text_of_a_class_of_its_own_is_text(guess: str) -> None:
    """The trainer could not load the class."""
    with EnvironmentPool(guess, 1, 10.0) as pool:
        pool.begin()
        assert pool.answer([asked("words")]) == [Reply("of a class of mine")]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("raise", r"my_env.py:24 raised ZeroDivisionError: integer division"),
        ("what", r"my_env.py:40 raised ValueError: invalid literal"),
        ("number", "step must return text or None, got int 3"),
        ("exit", r"my_env.py:28 raised SystemExit: enough"),
        ("cancelled", r"my_env.py:30 raised CancelledError"),
        ("half", "text that UTF-8 can hold, got '.ud800 of a pair'"),
    ],
)
def test_what_an_environment_raises_ends_the_run_with_its_place(guess: str, said: str, message: str) -> None:
    """File and line of the user's, in one line."""
    with EnvironmentPool(guess, 1, 10.0) as pool, pytest.raises(ValueError, match=rf"env\.name=.*{message}"):
        pool.begin()
        pool.answer([asked(said)])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("class Guess:\n    pass\n", "has no method step; write class Name"),
        ("class Guess:\n    def step(self, text): pass\n", "has the signature .*, expected class Name"),
        ("class Guess:\n    def __init__(self, answer, row): pass\n    def step(self): pass\n", "step of .* signature"),
        ("class Other:\n    pass\n", "has no class 'Guess'; it has: Other"),
        ("import math\nmath.nothing\n", r"my_env.py:2 raised AttributeError: .*; mend the file"),
        ("class Guess\n", r"my_env.py:1 raised SyntaxError: .*; mend the file"),
    ],
)
def test_a_file_without_an_environment_is_refused(tmp_path: Path, code: str, message: str) -> None:
    """When its processes start, which is before a model is loaded."""
    (tmp_path / "my_env.py").write_text(code)
    with EnvironmentPool(f"{tmp_path}/my_env.py:Guess", 1, 10.0) as pool:
        with pytest.raises(ValueError, match=f"(?s)env.name=.* cannot be loaded: .*{message}"):
            pool.prewarm()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("calculater", "did you mean 'calculator'"),
        ("nowhere.py:Guess", "no such file nowhere.py"),
        (f"{__file__}:not a name", "is not a class name"),
    ],
)
def test_names_that_cannot_be_right(name: str, message: str) -> None:
    """Nothing is started for them."""
    with pytest.raises(ValueError, match=message):
        check_environment(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env.name=calculator", "method.name=prefix_rft"], "wants rollouts and demonstrations of one turn"),
        (["env.name=calculator", "method.name=uft"], "wants rollouts and demonstrations of one turn"),
        (["env.name=calculator", "method.name=self_distill"], "wants rollouts and demonstrations of one turn"),
        (["env.name=calculator", "data.corrupt_demos=0.5"], "corrupt_demos=0.5 wants .* one turn"),
        (["data.turns=all", "method.name=uft"], "wants rollouts and demonstrations of one turn.*data.turns=all"),
        (["data.train=calculator"], "answered in turns; set env.name=calculator"),
    ],
)
def test_options_that_do_not_go_with_turns(words: list[str], message: str) -> None:
    """In one line, before anything is read."""
    with pytest.raises(ValueError, match=message):
        load_config(words)
