"""What is told of runs from their records alone: the numbers behind each figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from srft.analysis.command import main
from srft.analysis.curves import draw_shared, draw_together, table
from srft.analysis.page import Token, response
from srft.analysis.pictures import axes, draw_stack
from srft.analysis.problems import ends, fates, history, lessons, shared
from srft.analysis.stories import read_stories, short_names
from srft.report.drawing import STYLE

HELD_OUT = {
    0: {"a": [1, 1], "b": [0, 1], "c": [1, 1], "d": [0, 1]},
    5: {"a": [1, 1], "b": [1, 1], "c": [0, 1], "d": [0, 1]},
    9: {"a": [1, 2], "b": [0, 1], "c": [3, 4], "d": [0, 0]},
}
CHAIN = '[data]\ntrain = "chain"\n'


def write_run(
    folder: Path, rows: list[dict[str, Any]], held_out: dict[int, Any] | None = None,
    training: dict[int, Any] | None = None, config: str = CHAIN,
) -> Path:  # fmt: skip
    """A run's folder with these rows and counts."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"step": s, "of": "held-out", "problems": p} for s, p in (held_out or {}).items()]
    lines += [{"step": s, "of": "training", "problems": p} for s, p in (training or {}).items()]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(config)
    return folder


def rows_of(*accuracies: float, entropy: float = 0.5) -> list[dict[str, Any]]:
    """A row a step; the entropy falls to half at each."""
    return [
        {"step": s, "eval/accuracy": a, "eval/ci_low": a - 0.1, "eval/ci_high": a + 0.1}
        | ({"entropy/rollout": entropy / 2 ** (s - 1), "tokens/sampled": 10} if s else {})
        for s, a in enumerate(accuracies)
    ]


def drawn(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The bold curves of axes by colour."""
    return {
        line.get_color(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.get_lines() if line.get_alpha() is None and len(line.get_xdata()) > 2
    }  # fmt: skip


def test_what_became_of_held_out_problems() -> None:
    """Won, kept, forgotten and never right; one that was not judged stays as it was; half right is right."""
    told = fates(HELD_OUT)
    assert told[0] == {"a": "kept", "b": "never", "c": "kept", "d": "never"}
    assert told[5] == {"a": "kept", "b": "won", "c": "forgotten", "d": "never"}
    assert told[9] == {"a": "kept", "b": "forgotten", "c": "kept", "d": "never"}
    assert [history(HELD_OUT, name) for name in "abcd"] == ["●●●", "○●○", "●○●", "○○·"]


def test_what_won_the_problems_that_were_trained_on() -> None:
    """Shown before the first right rollout, or not; known before; forgotten; a problem seen once is not told."""
    told = lessons({
        1: {"known": [1, 4, 1, 1], "shown": [0, 4, 1, 1], "bad demo": [0, 4, 0, 1], "lost": [4, 4, 1, 1]},
        2: {"known": [4, 4, 1, 1], "hard": [0, 4, 1, 1]},
        3: {"shown": [1, 4, 1, 1], "bad demo": [2, 4, 1, 1], "lost": [0, 4, 1, 1], "once": [0, 4, 1, 1]},
        4: {"shown": [0, 4, 1, 1], "hard": [0, 4, 1, 1], "lost": [0, 0, 1, 1]},
        5: {"shown": [1, 4, 1, 1]},
    })  # fmt: skip
    assert told[1] == {} and told[2] == {"known": "known"}
    assert told[3] == {
        "known": "known", "shown": "by demonstration", "bad demo": "otherwise", "lost": "forgotten"
    }  # fmt: skip
    assert told[4]["shown"] == "forgotten" and told[4]["hard"] == "never"
    assert told[5]["shown"] == "by demonstration" and "once" not in told[5]


def test_runs_that_follow_each_other_are_one(tmp_path: Path) -> None:
    """Steps and problems of the second go on from the first; its start, where the first ended, is not told again."""
    first = write_run(tmp_path / "sft", rows_of(0.1, 0.2, 0.4), {0: HELD_OUT[0], 2: HELD_OUT[5]})
    second = write_run(
        tmp_path / "rl", rows_of(0.35, 0.3, 0.6), {0: HELD_OUT[5], 2: HELD_OUT[9]}, {1: {"x": [1, 4, 0, 0]}},
        config=f'{CHAIN}[model]\nname = "{first}/model"\n',
    )  # fmt: skip
    (story,) = read_stories([f"{first}+{second}"])
    assert not story.warnings and "did not go on from" in read_stories([f"{second}+{first}"])[0].warnings[0]
    assert story.label == "sft + rl" and story.begins == [2] and story.last.run_dir == second
    assert [(row["step"], row["eval/accuracy"]) for row in story.rows] == [
        (0, 0.1), (1, 0.2), (2, 0.4), (3, 0.3), (4, 0.6)
    ]  # fmt: skip
    assert list(story.held_out) == [0, 2, 4] and story.held_out[2] == HELD_OUT[5] and list(story.training) == [3]
    with matplotlib.rc_context(STYLE):
        (picture,) = draw_together([story])
    above, below = picture.figure.axes
    assert list(drawn(above).values()) == [([0, 1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3, 0.6])]
    # no line from one run's entropy to the next one's, and a mark between them
    assert [list(line.get_xdata()) for line in below.get_lines()] == [[1, 2], [3, 4], [2, 2]]


def test_curves_of_several_runs_are_their_rows(tmp_path: Path) -> None:
    """Accuracy and entropy in one figure, each run's numbers as recorded, labelled at its end."""
    one = write_run(tmp_path / "one", rows_of(0.1, 0.2, 0.4))
    two = write_run(tmp_path / "two", rows_of(0.1, 0.5, 0.7, 0.8, entropy=0.8))
    stories = read_stories([str(one), f"my own={two}"])
    with matplotlib.rc_context(STYLE):
        (picture,) = draw_together(stories)
    above, below = picture.figure.axes
    assert list(drawn(above).values()) == [([0, 1, 2], [0.1, 0.2, 0.4]), ([0, 1, 2, 3], [0.1, 0.5, 0.7, 0.8])]
    assert list(drawn(below).values()) == [([1, 2, 3], [0.8, 0.4, 0.2])]
    assert [text.get_text() for text in above.texts] == ["one", "my own"] and below.get_ylim()[0] == 0
    heading, rows = table(stories)
    assert rows[1][:6] == ["my own", "3", "10.0%", "80.0% at 3", "80.0%", "70.0 to 90.0"]
    assert len(heading) == len(rows[0])
    assert rows[0][6:9] == ["0.500", "0.250", "20"]


def test_problems_that_runs_share(tmp_path: Path) -> None:
    """Who has which right at the end; nothing where the problems are others, though they have the same ids."""
    other = {0: {"a": [0, 1], "b": [1, 1], "c": [1, 1], "d": [1, 1]}}
    stories = read_stories([
        str(write_run(tmp_path / "one", rows_of(0.5), HELD_OUT)), str(write_run(tmp_path / "two", rows_of(0.5), other)),
        str(write_run(tmp_path / "sums", rows_of(0.5), other, config='[data]\ntrain = "sums"\n')),
        str(write_run(tmp_path / "fewer", rows_of(0.5), {0: {"a": [1, 1]}})),
    ])  # fmt: skip
    assert ends(stories[0]) == {"a": True, "b": False, "c": True, "d": False}
    assert shared(stories[0], stories[1]) == {"both": ["c"], "first": ["a"], "other": ["b", "d"], "neither": []}
    assert shared(stories[0], stories[2]) is None and shared(stories[0], stories[3]) is None
    with matplotlib.rc_context(STYLE):
        picture = draw_shared(stories)
    assert picture is not None
    bars = picture.figure.axes[0].patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 1), (1, 1), (2, 2), (4, 0)]


def test_a_stack_adds_up() -> None:
    """Each band begins where the one below ends; what is nowhere is left out."""
    with matplotlib.rc_context(STYLE):
        _, ax = axes()
        draw_stack(ax, [0, 2], {"x": ([1, 3], "red"), "none": ([0, 0], "blue"), "y": ([2, 2], "green")}, "problems")
    extents = [band.get_paths()[0].get_extents() for band in ax.collections]
    assert [(e.y0, e.y1) for e in extents] == [(0, 3), (1, 5)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["y", "x"]


def test_short_names_tell_paths_apart(tmp_path: Path) -> None:
    """The last part where it does, more where it does not, and the run's name for its model."""
    words = [str(tmp_path / "a" / "seed-0"), str(tmp_path / "b" / "seed-0")]
    assert list(short_names(words).values()) == ["a/seed-0", "b/seed-0"]
    assert list(short_names(["Qwen/Qwen2.5-0.5B", "runs/x/model"]).values()) == ["Qwen2.5-0.5B", "x"]
    assert short_names(["x", "x"]) == {"x": "x"}


def test_tokens_are_text_on_the_page() -> None:
    """Hostile tokens are escaped, in the text and in what is told of them; shades stop at 1."""
    html = response("<b>p</b>", [Token("<script>", -7.0, 'a"b'), Token("\n", 0.25, "")], "<i>")
    assert "<script>" not in html and "<b>" not in html and "<i>" not in html and 'a"b' not in html
    assert 'class="v" style="--d:1.000" title="a&quot;b">&lt;script&gt;<' in html and "↵\n" in html


def test_the_command_writes_figures_numbers_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of records alone, of one run and of two."""
    training = {1: {"x": [0, 4, 1, 1], "y": [1, 4, 1, 1]}, 2: {"x": [2, 4, 1, 1]}, 3: {"y": [0, 4, 1, 1]}}
    run = write_run(tmp_path / "run", rows_of(0.1, 0.2, 0.4, 0.4), HELD_OUT, training)
    main([str(run), "--records"])
    out = run / "analysis"
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers == {
        "held_out": {"forgotten": 1, "kept": 2, "never": 1}, "training": {"by demonstration": 1, "forgotten": 1}
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "Of 2 held-out problems that were right at the first evaluation 0 are wrong at the last; of 1 that" in page
    assert "Forgotten: 1 held-out problems" in page and "○●○" in page and "<script" not in page
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"entropy.png", "held_out_problems.png", "training_problems.png"}
    other = write_run(tmp_path / "other", rows_of(0.1, 0.3), {0: HELD_OUT[5]})
    main([str(run), str(other), "--records", "--out", str(tmp_path / "both")])
    assert json.loads((tmp_path / "both" / "numbers.json").read_text()) == {
        "shared": {"other": {"both": 1, "first": 1, "other": 1, "neither": 1}}
    }
    assert {path.name for path in (tmp_path / "both").glob("*.png")} == {"together.png", "shared_problems.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none"], "none is no folder; give the folder of a run"),
        (["{tmp}/empty"], "empty has no step in metrics.jsonl"),
        (["{tmp}/run", "{tmp}/none"], "none is no folder"),
        (["{tmp}/run"] * 13, "expected 1 to 12 runs or models"),
        (["{tmp}/run"], "run/config.toml is not valid TOML"),
        (["{tmp}/run", "--prompts", "chain"], "--prompts compares models, the base first and then others; got"),
    ],
)
def test_what_cannot_be_analysed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """What is wrong and what helps, exit status 2, and nothing written."""
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", rows_of(0.1, 0.2), config="no toml")
    with pytest.raises(SystemExit) as stopped:
        main([word.format(tmp=tmp_path) for word in words] + ["--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
