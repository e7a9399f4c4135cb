"""A run's record and what the terminal gets of it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srft.record.files import read_json_lines, set_aside_after, write_json_line
from srft.record.history import load_record
from srft.record.log import RunLog
from tests.trainer.synthetic_run import open_log, sample, srft_row

ROOT = Path(__file__).parents[2]


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Parse every line, refusing the NaN and Infinity that Python's parser lets through."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_are_strict_json_and_readable_at_once(tmp_path: Path) -> None:
    """Each row is in the file when the call returns; values that JSON lacks become null."""
    with open_log(tmp_path) as log:
        log.metrics({"step": 0, "a": float("nan"), "b": float("inf"), "c": 3, "d": True, "e": 1e-300})
        (row,) = strict_lines(tmp_path / "metrics.jsonl")
    elapsed = row.pop("time/elapsed")
    assert elapsed >= 0
    assert row == {"step": 0, "a": None, "b": None, "c": 3, "d": True, "e": 1e-300}


def test_samples_survive_any_text(tmp_path: Path) -> None:
    """Line breaks of every kind, lone surrogates, NUL and odd types come back from one line each."""
    texts = ["two\nlines\u2028three", "\ud800 lone", "nul \0 here", '"quotes" \\ 日本語']
    with open_log(tmp_path) as log:
        log.samples(1, [sample(completion=text, answer={"nums": [1, float("nan")]}) for text in texts])
        log.samples(2, [sample(answer=Path("x"))])
        log.finish({})
    rows = strict_lines(tmp_path / "samples.jsonl")
    assert [row["completion"] for row in rows[:-1]] == texts
    assert rows[0]["answer"] == {"nums": [1, None]}
    assert rows[-1]["answer"] == "x" and rows[-1]["step"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"loss": 1.0}], "integer step"),
        ([{"step": 1}, {"step": 1}], "above 1"),
        ([{"step": 0, "loss": [1.0]}], "metric loss must be a number, got list"),
    ],
    ids=["no-step", "same-step", "list"],
)
def test_bad_rows_are_refused(tmp_path: Path, rows: list[dict], message: str) -> None:
    """A row without a growing step, or with something that is no number, is the caller's error."""
    with open_log(tmp_path) as log, pytest.raises(ValueError, match=message):
        for row in rows:
            log.metrics(row)


def test_an_old_run_is_not_written_into(tmp_path: Path) -> None:
    """Starting anew in a folder that holds a run raises, and leaves its rows alone."""
    with open_log(tmp_path) as log:
        log.metrics({"step": 0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"), open_log(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_sets_later_rows_aside(tmp_path: Path) -> None:
    """After a resume there is one row a step, and every row that was there before is in one of two files."""
    with open_log(tmp_path) as log:
        for step in range(4):
            log.metrics({"step": step, "loss": float(step)})
            log.samples(step, [sample()])
            log.problems(step, "training", {"chain:1": [0, 4, 1, 1]})
    before = strict_lines(tmp_path / "metrics.jsonl")
    with open_log(tmp_path, resume_step=1) as log:
        assert log.last_step == 1
        log.metrics({"step": 2, "loss": -1.0})
    after = strict_lines(tmp_path / "metrics.jsonl")
    assert after[:2] == before[:2] and [row["step"] for row in after] == [0, 1, 2]
    assert strict_lines(tmp_path / "metrics.discarded.jsonl") == before[2:]
    assert [row["step"] for row in strict_lines(tmp_path / "samples.jsonl")] == [0, 1]
    assert [row["step"] for row in strict_lines(tmp_path / "samples.discarded.jsonl")] == [2, 3]
    assert strict_lines(tmp_path / "problems.jsonl") == [
        {"step": step, "of": "training", "problems": {"chain:1": [0, 4, 1, 1]}} for step in (0, 1)
    ]
    assert after[2]["time/elapsed"] >= before[1]["time/elapsed"]
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert [session["resume_step"] for session in sessions] == [None, 1]


def test_resume_keeps_the_configuration_it_leaves(tmp_path: Path) -> None:
    """The configuration of the first part stays in the folder when the second part has another one."""
    with open_log(tmp_path):
        pass
    first = (tmp_path / "config.toml").read_text()
    changed = "x = 1\n"
    with RunLog(
        tmp_path, total_steps=9, config_text=changed, title="a run", resume_step=3, report=load_record, quiet=True
    ):
        pass
    assert (tmp_path / "config.toml").read_text() == changed
    assert (tmp_path / "config.until-step-3.toml").read_text() == first


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"\0\0\0\0", b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n'])
def test_broken_lines_are_set_aside(tmp_path: Path, tail: bytes) -> None:
    """What is no row, such as half a line after a power cut, neither stops a resume nor is lost."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    with open_log(tmp_path, resume_step=1) as log:
        log.metrics({"step": 2})
    assert [row["step"] for row in strict_lines(path)] == [1, 2]
    (aside,) = strict_lines(tmp_path / "metrics.discarded.jsonl")
    assert aside == {"unreadable": tail.strip(b"\n").decode(errors="replace")}


def test_setting_aside_twice_changes_nothing(tmp_path: Path) -> None:
    """A second resume from the same step moves nothing."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert set_aside_after(path, 1) == 1
    assert set_aside_after(path, 1) == 0
    assert path.read_text() == '{"step": 1}\n'


def test_killed_writer_tears_at_most_its_last_line(tmp_path: Path) -> None:
    """A process killed while it writes leaves all that it reported as written, and at most one half line."""
    program = (
        "import sys; from pathlib import Path; from srft.record.files import open_json_lines, write_json_line\n"
        "file = open_json_lines(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n"
        "    write_json_line(file, {'step': step, 'text': 'x' * 5000}); print(step, flush=True)\n"
    )
    path = tmp_path / "rows.jsonl"
    arguments = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT, text=True) as writer:
        assert writer.stdout is not None
        reported = [next(writer.stdout) for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        reported += writer.stdout.readlines()
    rows, unreadable = read_json_lines(path)
    assert len(unreadable) <= 1 and all(line.startswith('{"step"') for line in unreadable)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= len([line for line in reported if line.endswith("\n")])


def test_a_part_of_a_line_is_an_error(tmp_path: Path) -> None:
    """When the disk takes only a part of a line, the writer hears of it."""

    class FullDisk(io.FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(data[:5])

    with FullDisk(str(tmp_path / "rows.jsonl"), "a") as file, pytest.raises(OSError, match="wrote 5 of"):
        write_json_line(file, {"step": 1})


def run_all(run_dir: Path, stdout: int, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "tests.trainer.synthetic_run", str(run_dir)]
    environment = os.environ | {"PYTHONWARNINGS": "error"} | env
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, text=True, stdout=stdout, stderr=subprocess.PIPE, check=False
    )


@pytest.mark.parametrize(
    "env",
    [{}, {"FORCE_COLOR": "1", "COLORTERM": "truecolor"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "20"}],
    ids=["plain", "force-color", "ascii", "narrow"],
)
def test_a_pipe_gets_plain_lines(tmp_path: Path, env: dict[str, str]) -> None:
    """Without a terminal there are no control characters, but a line every few steps and a table."""
    done = run_all(tmp_path / "run", subprocess.PIPE, env)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)
    assert "[bold]plain[/bold]  [31m sentence\n" in done.stdout
    lines = re.findall(r"^step +(\d+)/30 .*reward", done.stdout, re.MULTILINE)
    assert lines[0] == "0" and lines[-1] == "30" and 10 < len(lines) <= 31
    assert done.stdout.count("not finite") == 1 and "Step 3: loss/total not finite" in done.stdout
    assert "Complete: 30 steps." in done.stdout and "report.html" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 140


def test_a_terminal_gets_a_live_display(tmp_path: Path) -> None:
    """On a terminal the display is redrawn in place, and the cursor is shown again at the end."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    shown = run_on_terminal(pty, tmp_path / "run", "xterm-256color")
    assert b"\x1b[?25l" in shown and shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert "30/30" in shown.decode() and "Complete: 30 steps." in shown.decode()


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    """A terminal that says it cannot move its cursor gets no escape codes."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    shown = run_on_terminal(pty, tmp_path / "run", "dumb")
    assert b"\x1b" not in shown and b"step 30/30" in shown


def test_a_terminal_that_hangs_up_does_not_stop_the_run(tmp_path: Path) -> None:
    """When the terminal goes away in the middle, the rest of the run is logged in silence."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "tests.trainer.synthetic_run", str(tmp_path / "run")]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        assert process.stderr is not None and process.stderr.read() == b""
    assert process.returncode == 0
    assert len(strict_lines(tmp_path / "run" / "metrics.jsonl")) == 31


def run_on_terminal(pty, run_dir: Path, term: str) -> bytes:
    """Run with a pseudo-terminal as stdout and return all that came through it."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "tests.trainer.synthetic_run", str(run_dir)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=theirs, env=os.environ | {"TERM": term}) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux says so when the other side has closed
                break
            if not chunk:
                break
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    return shown


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path) -> None:
    """When the pipe breaks, all is written, other prints of the process go on, and the exit status is 0."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run_all(tmp_path / "run", writing, {})
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(strict_lines(tmp_path / "run" / "metrics.jsonl")) == 31
    assert (tmp_path / "run" / "report.html").exists()


def test_a_closed_stdout_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stdout closed or absent the run goes on in silence."""
    for number, stream in enumerate((None, io.StringIO())):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stdout", stream)
        with open_log(tmp_path / str(number), quiet=False) as log:
            log.say("nobody hears this")
            log.metrics(srft_row(1))


def test_quiet_shows_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A quiet log writes its files and prints nothing."""
    with open_log(tmp_path) as log:
        log.say("hush")
        log.metrics(srft_row(4))
        log.finish({})
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "report.html").exists()


def test_an_exception_leaves_a_word_on_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that fails says how far it came and how to draw what there is; the error goes on."""
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, quiet=False) as log:
        log.metrics(srft_row(2))
        raise KeyboardInterrupt
    assert (
        f"Stopped after step 2 of 4. For plots and page of what there is: python -m srft.report {tmp_path}"
        in (capsys.readouterr().out.replace("\n", " "))
    )
