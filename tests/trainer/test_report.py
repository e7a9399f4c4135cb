"""The plots and the page of a run, whatever it recorded and however it ended."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from srft.curves import Curves, Line
from srft.record.files import open_json_lines, write_json_line
from srft.record.history import load_record, points, seconds_by_part
from srft.record.log import RunLog
from srft.report.build import build_report, main
from srft.report.drawing import smooth, spread
from tests.trainer.synthetic_run import open_log, sample, scored, srft_row


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = (
    '</pre></div><script src="//evil">alert(1)</script>'
    '<img src=x onerror="alert(2)">&lt;b&gt;\x1b[31m\x00\ud800'
)


def test_a_run_pays_for_matplotlib_only_when_it_ends() -> None:
    """What fit() imports of the report draws nothing yet."""
    code = "import sys, srft.report.build; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_page_escapes_everything_a_run_brings(tmp_path: Path) -> None:
    """Hostile text in any field shows up as text: no tag, attribute or control character of it survives."""
    turns = [{"role": "user", "content": HOSTILE}]
    with RunLog(
        tmp_path, total_steps=1, config_text=f"# {HOSTILE}", title=HOSTILE, resume_step=None,
        report=build_report, quiet=True,
    ) as log:
        log.say(HOSTILE)
        log.metrics(scored(srft_row(1)) | {f"loss/{HOSTILE}": float("nan")})
        log.samples(1, [sample(prompt=HOSTILE, completion=HOSTILE, answer=HOSTILE, status=HOSTILE)])
        log.samples(1, [sample(prompt=turns, completion=HOSTILE * 1000, answer={HOSTILE: HOSTILE})])
        log.finish({HOSTILE: HOSTILE})
    page = Page(tmp_path / "report.html")
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert page.text.count('<script src="//evil">alert(1)</script>') > 10
    assert page.text.count("&lt;b&gt;") > 10
    assert "\x1b" not in page.html and "\x00" not in page.html


def test_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    """The page has no address in it, no script, and only references to its own ids."""
    with open_log(tmp_path) as log:
        log.metrics(scored(srft_row(0)))
        log.metrics(scored(srft_row(4)))
        log.samples(4, [sample()])
        log.finish({})
    page = Page(tmp_path / "report.html")
    assert not re.search(r"https?:|//[a-z]|@import", page.html)
    assert re.findall(r"url\((?!#)", page.html) == []
    links = [value for name, value in page.attributes if name in ("href", "xlink:href", "src", "action")]
    assert all(value is not None and value.startswith("#") for value in links)
    assert page.tags.count("svg") == 10


def test_page_marks_right_and_wrong_in_words(tmp_path: Path) -> None:
    """Correct, incorrect, partly rewarded and unjudged completions, and demonstrations, differ in words."""
    with open_log(tmp_path) as log:
        log.metrics(srft_row(1))
        log.samples(1, [sample(), sample(reward=0.0), sample(reward=0.5), sample(demo=True)])
        log.samples(1, [sample(reward=0.0, status="timeout", message="killed after 5 s")])
        log.samples(1, [sample(reward=0.0, status="unjudged")])
        log.finish({})
    text = Page(tmp_path / "report.html").text
    assert text.count("killed after 5 s") == 1 and text.count("! not judged") == 1
    assert text.count("✓ correct") == 2 and text.count("✗ incorrect") == 1 and text.count("~ in part") == 1
    assert text.count("! deadline passed") == 1 and text.count("demonstration") >= 1


def test_page_shows_first_middle_and_last_samples(tmp_path: Path) -> None:
    """Of five sampled steps the first, third and fifth are on the page."""
    with open_log(tmp_path) as log:
        for step in (1, 2, 3, 4, 9):
            log.metrics(srft_row(step))
            log.samples(step, [sample(completion=f"said at {step}.")])
        log.finish({})
    text = Page(tmp_path / "report.html").text
    assert [step for step in range(10) if f"said at {step}." in text] == [1, 3, 9]


def only(row: dict[str, float], *prefixes: str) -> dict[str, float]:
    return {key: value for key, value in row.items() if key == "step" or key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("keep", "plots"),
    [
        (
            ("reward", "entropy/rollout", "length", "groups"),
            {"reward_accuracy", "entropy", "lengths", "shares"},
        ),
        (("entropy/demo", "loss/demo_sft"), {"entropy", "loss_components", "loss_components_unweighted"}),
        (("eval",), {"reward_accuracy"}),
        (("time/step",), {"time"}),
        (("lr",), set()),
    ],
    ids=["grpo", "sft", "eval-only", "time-only", "nothing"],
)
@pytest.mark.parametrize("steps", [1, 40])
def test_plots_of_what_a_run_recorded(
    tmp_path: Path, keep: tuple[str, ...], plots: set[str], steps: int
) -> None:
    """Each figure is drawn exactly when one of its metrics exists; the page is written in any case."""
    with open_log(tmp_path, total_steps=steps) as log:
        for step in range(1, steps + 1):
            row = srft_row(step)
            log.metrics(only(scored(row) if step == steps else row, *keep))
        log.finish({})
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert drawn == plots | ({"overview"} if plots - {"time", "lengths", "mismatch"} else set())
    assert Page(tmp_path / "report.html").tags.count("svg") == len(plots)


def test_zero_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of no steps ends with a table and a page that says so."""
    with open_log(tmp_path, total_steps=0, quiet=False) as log:
        log.finish({"checkpoint": "none"})
    assert "Complete: 0 steps." in capsys.readouterr().out
    assert "No step has been recorded." in Page(tmp_path / "report.html").text


def test_page_of_a_run_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From metrics.jsonl alone, half line included, the command makes plots and page."""
    run_dir = tmp_path / "killed"
    run_dir.mkdir()
    with open_json_lines(run_dir / "metrics.jsonl") as file:
        write_json_line(file, {"step": 0, "eval/accuracy": 0.25})
        for step in range(1, 5):
            write_json_line(file, srft_row(step))
        file.write(b'{"step": 5, "rew')
    main([str(run_dir)])
    assert "killed: " in capsys.readouterr().out
    text = Page(run_dir / "report.html").text
    assert "25.0%" in text and "left out: 1" in text
    assert (run_dir / "plots" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run_dir.iterdir()} == {"metrics.jsonl", "plots", "report.html"}


def test_partial_run_says_how_far_it_came(tmp_path: Path) -> None:
    """The status names the steps done and those planned."""
    with open_log(tmp_path, total_steps=9) as log:
        log.metrics(srft_row(3))
    assert build_report(tmp_path).status == "3 of 9 steps"


def test_command_refuses_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong path is a usage error that names it."""
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "none")])
    assert error.value.code == 2
    assert "none is no folder" in capsys.readouterr().err


def test_facts_tell_first_best_and_last(tmp_path: Path) -> None:
    """The table takes accuracy from evaluated steps only, with its interval."""
    with open_log(tmp_path) as log:
        log.metrics({"step": 0, "eval/accuracy": 0.1, "eval/ci_low": 0.05, "eval/ci_high": 0.2})
        log.metrics({"step": 1, "reward/mean": 0.3})
        log.metrics({"step": 2, "eval/accuracy": 0.7, "eval/ci_low": 0.6, "eval/ci_high": 0.8})
        log.metrics({"step": 4, "eval/accuracy": 0.6, "eval/ci_low": 0.5, "eval/ci_high": 0.7})
    accuracy, interval, reward = load_record(tmp_path).facts
    assert (accuracy.first, accuracy.best, accuracy.last) == ("10.0% at 0", "70.0% at 2", "60.0% at 4")
    assert (interval.first, interval.best, interval.last) == ("5.0 to 20.0", "60.0 to 80.0", "50.0 to 70.0")
    assert (reward.first, reward.last) == ("0.300", "0.300")


def test_smoothing_is_the_windowed_mean_of_what_exists() -> None:
    """Gaps in the steps have no weight: a constant stays itself, and other values match the plain formula."""
    steps, values = np.array([3.0, 4, 5, 9, 10, 40]), np.array([1.0, 2, 4, 3, -1, 7])
    window = np.exp(-0.5 * ((steps[:, None] - steps) / 1.5) ** 2)
    assert smooth(steps, values, 1.5) == pytest.approx(window @ values / window.sum(1), abs=1e-3)
    assert smooth(steps, np.full(6, 0.25), 1.5) == pytest.approx(np.full(6, 0.25))


def test_labels_of_curves_keep_apart() -> None:
    """Labels that would overlap move apart by the gap, keep their order and stay on the axes."""
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    assert spread([0.52, 0.5, 0.0], 0.1) == pytest.approx([0.56, 0.46, 0.0])
    assert spread([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])


def test_points_skip_nulls_and_absent_keys() -> None:
    """A curve has only the steps at which its metric was finite."""
    steps, values = points(
        [{"step": 1, "a": 2.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 5}], "a"
    )
    assert steps.tolist() == [1, 4] and values.tolist() == [2, 5]


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"time/train": 3.0, "time/eval": 2.0, "time/step": 6.0}, 1.0),
        ({"time/train": 3.0, "time/eval": 2.0, "time/step": 4.0}, 1.0),
        ({"time/train": 3.0, "time/step": 2.9}, 0.0),
        ({}, 0.0),
    ],
    ids=["eval-inside", "eval-outside", "rounding", "empty"],
)
def test_time_that_no_part_explains(row: dict[str, float], other: float) -> None:
    """The rest of a step is "other", whether or not its time includes the evaluation; never below 0."""
    assert seconds_by_part(row)["other"] == pytest.approx(other)


def test_curves_of_a_method_come_from_the_record(tmp_path: Path) -> None:
    """A figure that a method asks for is drawn from run.json alone; its name is no path."""
    own = Curves(name="own", title="Of its own", caption="A figure.", ylabel="nats",
                 lines=(Line(key="loss/own", label="own", color="amber", dashed=True),))  # fmt: skip
    with RunLog(
        tmp_path, total_steps=2, config_text="", title="a run", resume_step=None, report=build_report, curves=[own],
        quiet=True,
    ) as log:  # fmt: skip
        for step in (1, 2):
            log.metrics({"step": step, "loss/own": 0.5})
        log.finish({})
    assert (tmp_path / "plots" / "own.png").exists() and (tmp_path / "plots" / "overview.png").exists()
    assert "Of its own" in Page(tmp_path / "report.html").text
    with pytest.raises(ValueError, match="should match pattern"):
        Curves(name="../own", title="", caption="", ylabel="", lines=())
