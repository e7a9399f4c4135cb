"""What a suite's file says, and the runs that come of it; what is wrong in it is told before any work."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from srft.experiments.command import main
from srft.experiments.runner import make_runs
from srft.experiments.suite import Run, describe_suite, find_suite, plan_runs, read_suite, suite_names
from srft.stop import Stopped

HEAD = 'title = "A"\nquestion = "B?"\nreference = "aware"\n'
ARMS = """
base = ["train.steps=3", "train.prompts_per_step=4"]
[arms]
aware = []
plus = ["method.sft_entropy_sign=1"]
[arms.average]
options = ["train.lr=0.01"]
from_run = { arm = "aware", options = { "method.sft_coef" = "mean:weight/sft", "method.rl_coef" = "mean:weight/rl" } }
[arms.after]
from_run = { arm = "plus", options = { "model.name" = "model" } }
"""

BORROWS = '{{from_run = {{arm = "{}", options = {{"train.lr" = "mean:lr"}}}}}}'


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.toml"
    path.write_text(text)
    return path


def plan(folder: Path, *words: str, text: str = HEAD + ARMS, seeds: int = 2) -> list[Run]:
    path = write(folder, text)
    return plan_runs(read_suite(path), path, words, range(seeds), folder / "out")


def test_suites_of_the_package_can_be_run() -> None:
    """Every arm of each of them has options that load, and a reference to compare with."""
    assert "entropy-ablation" in suite_names()
    for name in suite_names():
        path = find_suite(name)
        suite = read_suite(path)
        assert {run.arm for run in plan_runs(suite, path, [], [0], Path("out"))} == set(suite.arms)


def test_order_of_the_runs(tmp_path: Path) -> None:
    """The first arm has all seeds first; then come all arms of a seed, sources before what they feed."""
    order = [(run.arm, run.seed) for run in plan(tmp_path)]
    assert order[:2] == [("aware", 0), ("aware", 1)]
    assert order[2:5] == [("plus", 0), ("average", 0), ("after", 0)]
    late = HEAD + '[arms.first]\nfrom_run = { arm = "aware", options = { "train.lr" = "mean:lr" } }\n[arms.aware]\n'
    assert [run.arm for run in plan(tmp_path, text=late, seeds=1)] == ["aware", "first"]


def test_options_of_a_run(tmp_path: Path) -> None:
    """Those of the arm win over the base, those of the command line over both; seed and place are the suite's."""
    runs = {(run.arm, run.seed): run for run in plan(tmp_path, "train.steps=5", "train.lr=0.5")}
    config = runs["average", 1].config
    assert (config.train.steps, config.train.lr, config.train.prompts_per_step, config.train.seed) == (5, 0.5, 4, 1)
    assert config.reward.workers == 1 and not config.train.page
    words = runs["average", 1].command({"weight/sft": 0.125, "weight/rl": 2.5})
    assert {"method.sft_coef=0.125", "method.rl_coef=2.5", "train.seed=1", "train.resume=true"} <= set(words)
    folder = runs["average", 1].folder
    assert f"name={folder.name}" in words and f"runs_dir={tmp_path / 'out/runs/average'}" in words
    assert f"model.name={runs['plus', 0].folder / 'model'}" in runs["after", 0].command({})
    assert runs["after", 0].goes_on and not runs["average", 0].goes_on


def test_samples_of_another_run_are_demonstrations(tmp_path: Path) -> None:
    """Those of the same seed, by the file in which that run keeps them; the arm does not go on from it."""
    text = HEAD + (
        "[arms]\naware = []\nweak = {options = ['method.name=grpo'], hidden = true}\n"
        "[arms.shown]\nfrom_run = {arm = 'weak', options = {'data.demos' = 'samples'}}\n"
    )
    runs = {(run.arm, run.seed): run for run in plan(tmp_path, text=text)}
    shown = runs["shown", 1]
    assert f"data.demos={runs['weak', 1].folder / 'samples.jsonl'}" in shown.command({}) and not shown.goes_on


def test_a_recipe_takes_the_place_of_the_base(tmp_path: Path) -> None:
    """One of the command line does, and one in the base is found beside the suite."""
    (tmp_path / "recipe.toml").write_text("[train]\nprompts_per_step = 6\n")
    given = plan(tmp_path, str(tmp_path / "recipe.toml"))[0].config.train
    assert (given.prompts_per_step, given.steps) == (6, 250)
    text = HEAD + 'base = ["recipe.toml", "train.steps=3"]\n[arms]\naware = []\n'
    named = plan(tmp_path, text=text)[0].config.train
    assert (named.prompts_per_step, named.steps) == (6, 3)


def test_other_options_make_another_run(tmp_path: Path) -> None:
    """So does another source or another file; the place and an option at its default do not."""
    first = {run.arm: run for run in plan(tmp_path, seeds=1)}
    same = {run.arm: run.identity for run in plan(tmp_path, "cache_dir=elsewhere", "train.grad_clip=1.0", seeds=1)}
    assert same == {arm: run.identity for arm, run in first.items()}
    other = {run.arm: run for run in plan(tmp_path, text=HEAD + ARMS.replace("sign=1", "sign=-1"), seeds=1)}
    assert {arm for arm in first if first[arm].identity != other[arm].identity} == {"plus", "after"}
    assert other["plus"].folder != first["plus"].folder
    reward = tmp_path / "reward.py"
    identities = set()
    for text in ("def f(completion, answer, row): return 1.0", "def f(completion, answer, row): return 0.0"):
        reward.write_text(text)
        identities.add(plan(tmp_path, f"reward.kind={reward}:f", seeds=1)[0].identity)
    assert len(identities) == 2


def test_what_is_kept_of_a_suite_names_no_place(tmp_path: Path) -> None:
    """Its results can be shown elsewhere: the reference's options are there, the folders of this machine are not."""
    runs = plan(tmp_path, f"cache_dir={tmp_path}")
    about = describe_suite(read_suite(tmp_path / "suite.toml"), runs)
    assert "prompts_per_step = 4" in about["config"] and str(tmp_path) not in json.dumps(about)
    assert about["arms"]["average"][1] == "method.sft_coef=mean:weight/sft of aware"


def test_a_metric_that_the_source_lacks(tmp_path: Path) -> None:
    """It is named, with those that there are."""
    run = next(run for run in plan(tmp_path) if run.arm == "average")
    with pytest.raises(ValueError, match="mean of weight/rl, which arm aware does not log; it logs weight/sft"):
        run.command({"weight/sft": 0.5})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('title = "A"\n', "question: Field required"),
        (HEAD + "[arms]\nother = []\n", "reference names aware, which is no arm; there are other"),
        (HEAD + '[arms]\naware = []\nb = {from_run = {arm = "c", options = {}}}\n', "from_run names c"),
        (HEAD + '[arms]\naware = {from_run = {arm = "aware", options = {"a.b" = "sum:x"}}}\n', "pattern"),
        (HEAD + "[arms]\naware = {hidden = true}\n", "the reference aware is hidden"),
        (HEAD + '[arms]\naware = []\n"../b" = []\n', "pattern"),
        (HEAD + 'equal = ["tokens"]\n[arms]\naware = []\n', "equal.0"),
        (HEAD + "[arms\n", "is not valid TOML"),
        (HEAD + f"[arms]\naware = {BORROWS.format('b')}\nb = {BORROWS.format('aware')}\n", "aware and b wait for each"),
        (HEAD + '[arms]\naware = []\nb = ["train.step=3"]\n', "arm b: unknown option train.step; did you mean"),
        (HEAD + f"[arms]\naware = []\nb = {BORROWS.format('aware').replace('train.lr', 'train.x')}\n", "arm b: unkn"),
        (HEAD + '[arms]\naware = []\nb = ["data.train=no/such.jsonl"]\n', "data.train=no/such.jsonl: there is no"),
        (HEAD + '[arms]\naware = []\nb = ["data.demos=no/such.jsonl"]\n', "data.demos=no/such.jsonl: there is no"),
        (HEAD + '[arms]\naware = []\nb = ["model.name=./none"]\n', "arm b: model.name=./none: there is no such"),
        (HEAD + '[arms]\naware = []\nb = ["reward.kind=numerical"]\n', "arm b: unknown reward"),
    ],
    ids=["question", "reference", "source", "what", "hidden", "name", "equal", "toml", "circle", "option", "borrowed",
         "data", "demos", "model", "reward"],
)  # fmt: skip
def test_what_is_wrong_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    """In one line, with exit status 2; no run has begun, and no folder is there."""
    path = write(tmp_path, text)
    with pytest.raises(SystemExit) as end:
        main([str(path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_sets_arms_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each arm with its steps and its differences from the reference; nothing is written."""
    path = write(tmp_path, HEAD + ARMS)
    main([str(path), "--dry-run", "--seeds", "3", "--out", str(tmp_path / "out"), "train.steps=7"])
    said = capsys.readouterr().out
    assert "plus: 0 of 3 runs made, 7 steps each\n    method.sft_entropy_sign = 1\n" in said
    assert "method.sft_coef = mean:weight/sft of aware\n" in said and "train.lr = 0.01\n" in said
    assert "model.name = model of plus\n" in said
    assert "12 of 12 runs to make, 84 steps" in said
    assert not (tmp_path / "out").exists()


def test_a_signal_in_the_last_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is passed on once; a run that it ended has no result, and the suite is not taken for complete."""
    sent: list[int] = []

    class Stand:
        status: int | None = None

        def __init__(self, *_: object) -> None:
            pass

        def has_ended(self) -> bool:
            if not sent:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.status is not None

        def send(self, number: int) -> None:
            sent.append(number)
            self.status = 143

    monkeypatch.setattr("srft.experiments.runner.Child", Stand)
    (run,) = plan(tmp_path, text=HEAD + "[arms]\naware = []\n", seeds=1)
    with pytest.raises(Stopped) as stopped:
        make_runs([run], tmp_path, jobs=2, threads=1)
    assert stopped.value.exit_code == 143 and sent == [signal.SIGTERM]
    assert not (tmp_path / "results.jsonl").exists()


def test_unknown_suite_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong name lists those that there are, as --list does with their questions."""
    with pytest.raises(SystemExit) as end:
        main(["entropy"])
    assert end.value.code == 2 and "entropy-ablation" in capsys.readouterr().err
    main(["--list"])
    assert "entropy-ablation" in capsys.readouterr().out
