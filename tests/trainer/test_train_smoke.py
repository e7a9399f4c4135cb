"""Whole runs of every method on the built-in task: what they write, and that what they write can be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srft.options import load_config
from tests.trainer.runs import arguments, read_lines, train, train_forked, train_process, weights

METHODS = {
    "srft-paper": {"method__name": "srft"},
    "srft-official": {"method__name": "srft", "method__preset": "official"},
    "srft-upt": {"method__name": "srft", "method__preset": "upt"},
    "grpo": {"method__name": "grpo"},
    "sft": {"method__name": "sft"},
}
ALWAYS = {
    "step", "loss/total", "grad_norm", "lr", "canary/max_abs_diff", "sync/bytes", "reward/timeouts", "reward/errors",
    "speed/tokens_per_s", "speed/mfu", "speed/planned_s",
}  # fmt: skip
TIMES = {f"time/{part}" for part in ("rollout", "reward", "train", "sync", "weights", "eval", "step")}
EVAL = {"eval/accuracy", "eval/ci_low", "eval/ci_high"}
OF_ROLLOUTS = {
    "reward/mean", "entropy/rollout", "groups/all_right", "groups/all_wrong", "length/mean", "length/truncated",
}  # fmt: skip
SRFT_TERMS = ("demo_sft", "demo_rl", "rollout_positive", "rollout_negative")
OF_SRFT = {"weight/sft", "weight/rl"} | {
    f"loss/{term}{end}" for term in SRFT_TERMS for end in ("", "_unweighted")
}


@pytest.mark.parametrize("method", METHODS)
def test_run_folder(method: str, tmp_path: Path) -> None:
    """Three steps leave metrics with every promised key, samples, checkpoints, plots, a page and a model."""
    changes = METHODS[method]
    if method == "grpo":
        # a policy with random weights solves nothing, and equal rewards teach GRPO nothing
        changes = changes | {"reward__kind": _odd_length_reward(tmp_path), "data__bad_demos": "keep"}
    # as a user has it, who gives no train.page
    changes = changes | {"train__page": load_config([]).train.page}
    run = train(tmp_path, train__steps=3, train__keep_checkpoints=2, **changes)

    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0].keys() >= EVAL | {"canary/max_abs_diff"}
    promised = ALWAYS | TIMES | EVAL
    if method != "sft":
        promised |= OF_ROLLOUTS
    if method != "grpo":
        promised |= {"entropy/demo", "reward/demo"}
    if method.startswith("srft"):
        promised |= OF_SRFT
    for row in rows[1:]:
        assert not promised - row.keys()
        assert not [key for key, value in row.items() if value is None]
        assert row["grad_norm"] > 0
        assert row["canary/max_abs_diff"] <= 1e-4
    if method != "grpo":
        assert rows[1]["reward/demo"] == 1.0

    samples = read_lines(run / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    assert {sample["demo"] for sample in samples} == {
        "srft": {False, True}, "grpo": {False}, "sft": {True}
    }[method.partition("-")[0]]  # fmt: skip
    assert (run / "config.toml").is_file()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    for picture in (plots := list((run / "plots").glob("*.png"))):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert plots

    page = (run / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:|#)[^\"'\s>]+", page)
    assert not re.search(r"@import|url\(\s*[\"']?https?:", page)

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("1+2=", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    newest = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_000003")
    for (name, exported), saved in zip(model.named_parameters(), newest.parameters(), strict=True):
        assert torch.equal(exported, saved), name


def test_training_moves_the_policy(tmp_path: Path) -> None:
    """Supervised steps on a handful of problems lower their loss, so that what is trained is what is saved."""
    run = train(tmp_path, method__name="sft", train__lr=0.01, train__steps=12, train__save_every=12)
    losses = [row["loss/total"] for row in read_lines(run / "metrics.jsonl")[1:]]
    assert losses[-1] < 0.7 * losses[0]


def test_several_updates_per_step(tmp_path: Path) -> None:
    """GRPO with two updates a step compares with the policy that sampled, the second time at a ratio that is not 1."""
    run = train(
        tmp_path, method__name="grpo", train__updates_per_step=2, train__lr=0.05, train__steps=1,
        train__prompts_per_step=8, reward__kind=_odd_length_reward(tmp_path), data__bad_demos="keep",
    )  # fmt: skip
    assert read_lines(run / "metrics.jsonl")[1]["clip/share"] > 0


def test_a_run_without_a_page_counts_what_it_learned_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It draws nothing and names no page; updates and tokens are counted as they were made."""
    run = train(tmp_path, train__steps=1, train__updates_per_step=2, train__page=False)
    assert not (run / "report.html").exists() and not (run / "plots").exists()
    assert "Complete: 1 steps." in (said := capsys.readouterr().out) and "report.html" not in said
    _, row = read_lines(run / "metrics.jsonl")
    assert row["updates/made"] == 2
    assert row["tokens/trained"] == row["tokens/step"] > row["tokens/sampled"] == 12 * row["length/mean"]


def test_custom_reward(tmp_path: Path) -> None:
    """path/to/file.py:function judges rollouts and demonstrations, whatever the task's own verifier says."""
    reward = _odd_length_reward(tmp_path)
    run = train(tmp_path, reward__kind=reward, data__bad_demos="keep")
    samples = read_lines(run / "samples.jsonl")
    assert {s["reward"] for s in samples} == {0.0, 1.0}
    for sample in samples:
        assert sample["reward"] == len(sample["completion"]) % 2


def _odd_length_reward(folder: Path) -> str:
    file = folder / "odd.py"
    file.write_text("def odd(completion, answer, row):\n    return float(len(completion) % 2)\n")
    return f"{file}:odd"


def test_command_line_leaves_an_earlier_run_alone(tmp_path: Path) -> None:
    """A second run with the same name gets a numbered folder; the first keeps every byte, and both runs agree."""
    first = train_process(arguments(tmp_path))
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    second = train_forked(arguments(tmp_path))
    assert second.returncode == 0, second.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert weights(tmp_path / "runs" / "run-2") == weights(run)
    train(tmp_path, train__steps=1)
    assert (tmp_path / "runs" / "run-3" / "metrics.jsonl").is_file()
