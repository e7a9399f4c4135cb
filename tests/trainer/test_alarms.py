"""What raises an alarm and what does not, and what becomes of one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srft.alarms import ALARMS, AlarmConfig, Watch
from srft.record.files import read_json_lines
from srft.record.log import RunLog
from srft.report.build import build_report
from tests.trainer.runs import arguments, small_config, train, train_forked, train_process
from tests.trainer.synthetic_run import srft_row

PROMPTS = 64
STEPS = 250
Row = dict[str, Any]
Change = Callable[[float], Row]
"""Numbers of a row by the part of the run that is done, 0 to 1."""


def healthy(done: float) -> Row:
    """The demo: entropy falls to nothing because the task is learned, and lengths and likelihoods settle."""
    accuracy = 0.25 + 0.74 / (1 + math.exp(-12 * (done - 0.5)))
    return {
        "reward/mean": accuracy, "reward/std": math.sqrt(accuracy * (1 - accuracy)),
        "entropy/rollout": 0.24 - 0.23 * done, "length/mean": 30.0 - 5 * done, "length/truncated": 0.02,
        "logprob/right": -0.2 + 0.19 * done, "logprob/wrong": -0.4 - 0.3 * done, "mismatch/mean": 1e-6,
        "lag/is_ess": 0.9, "ratio/tail": 0.0, "grad/cosine": 0.3 - 0.6 * done,
    }  # fmt: skip


def rows_of(*changes: Change, seed: int = 0, steps: int = STEPS) -> list[Row]:
    """A run of rows with the noise of 64 prompts, evaluated every 25 steps."""
    rng, rows = random.Random(seed), []
    for step in range(1, steps + 1):
        row: Row = {"step": step}
        for change in (healthy, *changes):
            row |= change(step / STEPS)
        if step % 25 == 0:
            accuracy = row.get("eval/accuracy", row["reward/mean"])
            row |= {"eval/accuracy": accuracy, "eval/ci_low": accuracy - 0.04, "eval/ci_high": accuracy + 0.04}
        else:
            row.pop("eval/accuracy", None)
        if row.get("reward/std") is not None:
            row["reward/mean"] += rng.gauss(0, row["reward/std"] / math.sqrt(PROMPTS))
        rows.append(row)
    return rows


def alarms(rows: list[Row], **options: Any) -> list[Any]:
    watch = Watch(AlarmConfig(**options), PROMPTS)
    return [alarm for row in rows for alarm in watch.see(row)]


def flat(reward: float, std: float = 0.4) -> Change:
    return lambda done: {"reward/mean": reward, "reward/std": std}


def after(part: float, **values: float) -> Change:
    """Values of a run's later part; two underscores stand for a slash."""
    late = {key.replace("__", "/"): value for key, value in values.items()}
    return lambda done: late if done > part else {}


SIGNS: dict[str, tuple[Change, ...]] = {
    "entropy-collapse": (flat(0.4), after(0.3, entropy__rollout=0.01)),
    "entropy-blow-up": (flat(0.3), lambda done: {"entropy/rollout": 0.24 + 2 * done}),
    "reward-plateau": (
        flat(0.4), lambda done: {"reward/mean": 0.4 + 0.15 * math.sin(STEPS * done), "entropy/rollout": 0.24,
                                 "eval/accuracy": 0.4},
    ),
    "sudden-drop": (flat(0.8), after(0.6, reward__mean=0.5), lambda done: {"entropy/rollout": 0.24}),
    "length-explosion": (flat(0.4), lambda done: {"length/mean": 30 + 60 * done, "entropy/rollout": 0.24}),
    "likelihood-blow-up": (lambda done: {"logprob/wrong": -0.4 - 5 * done},),
    "ratio-tail": (after(0.5, ratio__tail=0.05),),
    "engine-mismatch": (after(0.5, mismatch__mean=0.3),),
    "stale-rollouts": (after(0.5, lag__is_ess=0.3),),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_none(seed: int) -> None:
    """Entropy near 0 at a reward near 1 is what learning looks like, and noise is no drop."""
    assert alarms(rows_of(seed=seed)) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_run_raises_none(seed: int) -> None:
    """So is a reward that rises by 0.1 in 250 steps, or stays where it is without more than the noise of prompts."""
    rising: Change = lambda done: {"reward/mean": 0.2 + 0.1 * done, "reward/std": 0.4, "entropy/rollout": 0.5}  # noqa: E731
    assert alarms(rows_of(rising, seed=seed)) == []
    assert alarms(rows_of(flat(0.1, 0.3), lambda done: {"entropy/rollout": 0.5}, seed=seed)) == []


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_raises_its_alarm_once(name: str) -> None:
    """A number that goes wrong for good is told when it begins, in one line that says what to do."""
    (alarm,) = alarms(rows_of(*SIGNS[name]))
    assert alarm.alarm == name and alarm.seen and alarm.limit and alarm.remedy.endswith(".")
    assert 20 <= alarm.step <= STEPS and "\n" not in alarm.sentence()
    assert alarm.sentence().startswith(f"Alarm at step {alarm.step}, {name}: {alarm.seen} (")


def test_every_alarm_has_a_sign() -> None:
    """The table above leaves none out."""
    assert set(SIGNS) == set(ALARMS)


def test_held_out_accuracy_drops() -> None:
    """The reward of training may look well while it does; a fall within the intervals is none."""
    (alarm,) = alarms(rows_of(lambda done: {"eval/accuracy": 0.8 if done < 0.7 else 0.4}))
    assert alarm.alarm == "sudden-drop" and alarm.step == 175 and "accuracy fell to 0.400 from 0.800" in alarm.seen
    assert not alarms(rows_of(lambda done: {"eval/accuracy": 0.1 if done < 0.7 else 0.06}))


def test_completions_are_cut() -> None:
    """More and more of them at the limit is an explosion, however the reward does; many from the start on is none."""
    (alarm,) = alarms(rows_of(after(0.5, length__truncated=0.6)))
    assert alarm.alarm == "length-explosion" and "60% of completions" not in alarm.limit
    assert not alarms(rows_of(lambda done: {"length/truncated": 0.6}))


def test_an_alarm_comes_back_after_a_while() -> None:
    """Flickering around a threshold is one alarm; what was well for long is told again."""
    tail: Change = lambda done: {"ratio/tail": 0.03 if 0.2 < done < 0.4 or done > 0.9 else 0.0}  # noqa: E731
    assert [alarm.alarm for alarm in alarms(rows_of(tail))] == ["ratio-tail"] * 2
    flicker: Change = lambda done: {"ratio/tail": 0.018 if int(STEPS * done) // 30 % 2 else 0.0}  # noqa: E731
    assert len(alarms(rows_of(flicker))) == 1


def test_thresholds_are_options() -> None:
    """A stricter one fires on the healthy run, a laxer one not on the sick one."""
    assert [alarm.alarm for alarm in alarms(rows_of(), mismatch=1e-7)] == ["engine-mismatch"]
    assert not alarms(rows_of(*SIGNS["ratio-tail"]), ratio_tail=0.1)
    assert not alarms(rows_of(*SIGNS["stale-rollouts"]), least_ess=0.2)
    assert not alarms(rows_of(*SIGNS["likelihood-blow-up"]), wrong_logprob_fall=6)


def test_numbers_that_are_not_there_raise_none() -> None:
    """Rows without rollouts, with nulls, with NaN."""
    bare = [{"step": step, "loss/total": 1.0, "entropy/demo": 0.01} for step in range(STEPS)]
    assert alarms(bare) == []
    nulls = [dict.fromkeys(row, None) | {"step": row["step"]} for row in rows_of()]
    assert alarms(nulls) == []
    assert alarms([{**row, "ratio/tail": math.nan} for row in rows_of()]) == []


def open_watched(run_dir: Path, resume_step: int | None = None) -> RunLog:
    return RunLog(
        run_dir, total_steps=STEPS, config_text="", title="a run", resume_step=resume_step, report=build_report,
        watch=Watch(AlarmConfig(), PROMPTS),
    )  # fmt: skip


def test_the_record_of_an_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on the screen, one in alarms.jsonl, a row of the page, a word in the table; resumed, it is not again."""
    rows = [srft_row(row["step"]) | row for row in rows_of(*SIGNS["ratio-tail"])]
    (expected,) = alarms(rows)
    with open_watched(tmp_path) as log:
        raised = [alarm for row in rows[:200] for alarm in log.metrics(row)]
    with open_watched(tmp_path, resume_step=180) as log:
        raised += [alarm for row in rows[180:] for alarm in log.metrics(row)]
        log.finish({})
    assert raised == [expected]
    assert capsys.readouterr().out.count(expected.sentence()) == 1
    kept, _ = read_json_lines(tmp_path / "alarms.jsonl")
    assert kept == [expected.as_row()]
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("<h2>Alarms</h2>", expected.seen, expected.remedy, expected.limit))


def test_a_resumed_run_sets_later_alarms_aside(tmp_path: Path) -> None:
    """One raised after the checkpoint is raised again at its step."""
    rows = rows_of(*SIGNS["ratio-tail"])
    (expected,) = alarms(rows)
    with open_watched(tmp_path) as log:
        for row in rows[:200]:
            log.metrics(row)
    with open_watched(tmp_path, resume_step=expected.step - 1) as log:
        assert log.metrics(rows[expected.step - 1]) == [expected]
    assert read_json_lines(tmp_path / "alarms.jsonl")[0] == [expected.as_row()]
    assert len(read_json_lines(tmp_path / "alarms.discarded.jsonl")[0]) == 1


# every run has a mean length, which is larger than nothing
ALWAYS = {"alarms__window": 1, "alarms__mismatch": 1e-12}


def test_an_alarm_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a checkpoint of its step, a line that names it and says how to go on, and status 3; resumed, it goes on."""
    options = arguments(tmp_path, **ALWAYS, train__steps=3, train__save_every=3, train__eval_every=3)
    done = train_forked([*options, "train.stop_on_alarm=engine-mismatch"])
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("stopped by an alarm. Alarm at step 1, engine-mismatch:") and "train.resume=true" in line
    run = tmp_path / "runs" / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    assert [row["step"] for row in read_json_lines(run / "metrics.jsonl")[0]] == [0, 1]
    config = [*options, "train.stop_on_alarm=true", "train.resume=true"]
    assert train_forked(config).returncode == 0
    assert len(read_json_lines(run / "alarms.jsonl")[0]) == 1
    assert read_json_lines(run / "metrics.jsonl")[0][-1]["step"] == 3


def test_ranks_end_together_on_an_alarm(tmp_path: Path) -> None:
    """Each of two leaves with the status, and the line is written once."""
    words = arguments(tmp_path, **ALWAYS, train__ranks=2, train__stop_on_alarm=True)
    done = train_process(words, timeout=240)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("stopped by an alarm") == 1


def test_other_alarms_do_not_end_it(tmp_path: Path) -> None:
    """An alarm that is not named is told, and the run goes on."""
    run = train(tmp_path, **ALWAYS, train__steps=1, train__stop_on_alarm="ratio-tail,sudden-drop")
    assert [row["alarm"] for row in read_json_lines(run / "alarms.jsonl")[0]] == ["engine-mismatch"]


def test_names_of_alarms_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong one lists them; true and false are all and none."""
    with pytest.raises(ValueError, match="train.stop_on_alarm: .*'entropy-collapse'"):
        small_config(tmp_path, train__stop_on_alarm="entropy")
    assert small_config(tmp_path, train__stop_on_alarm=True).train.stop_on_alarm == list(ALARMS)
    assert small_config(tmp_path, train__stop_on_alarm=False).train.stop_on_alarm == []
    assert small_config(tmp_path, train__stop_on_alarm="ratio-tail,sudden-drop").train.stop_on_alarm == [
        "ratio-tail", "sudden-drop"
    ]  # fmt: skip
