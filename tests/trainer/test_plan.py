"""The plan of a run as its command prints it: what fits, by which options, and what breaks first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import srft.train
from srft import plan
from srft.options import load_config
from srft.planning import advice, pace
from srft.planning.advice import Planner, settings
from srft.planning.devices import find_device
from srft.planning.memory import Layout
from srft.planning.models import read_teacher
from srft.planning.pace import Tokens, plan_pace, training_flops
from srft.rollouts import describe_step
from srft.worst_case import longest_sequences
from tests.trainer.tiny import learner_of, plain_model

GIB = 2**30
H100 = find_device("H100")
RECIPE = "recipes/qwen2.5-math-7b.toml"


@pytest.fixture(scope="module")
def math_7b() -> Planner:
    """Plan the recipe of the paper, but for the pass without gradients that a second update of a step costs."""
    return Planner(load_config([RECIPE, "train.updates_per_step=1"]))


def test_the_recipe_of_the_paper_fits_eight_gpus(math_7b: Planner) -> None:
    """Sharded over all, recomputed, and its engine gets what is left; over more nodes copies lie side by side."""
    eight = math_7b.recommended(H100, 8)
    assert eight.memory.fits and eight.memory.peak <= H100.memory and eight.layout.shard == 8
    assert eight.layout.checkpointing and not eight.layout.offload
    assert f"engine.gpu_memory_utilization={eight.share:g}" in settings(eight)
    more = math_7b.recommended(H100, 64)
    assert more.layout.shard == 8 and "train.shard_ranks=8" in settings(more)
    assert more.pace.train < eight.pace.train / 7
    # an engine share one hundredth larger would not fit
    assert not math_7b.plan(eight.layout, eight.share + 0.01).memory.fits


def test_one_gpu_takes_adapters_and_not_the_whole_policy(math_7b: Planner) -> None:
    """16 bytes a parameter are more than it has; adapters leave fp32 weights and the engine beside them."""
    pytest.importorskip("peft", reason="adapters need peft")
    whole = math_7b.plan(Layout(H100, 16384, checkpointing=True), 0.01)
    assert whole.memory.peak > 113 * GIB and not whole.memory.fits
    adapters = Planner(load_config([RECIPE, "model.lora.rank=32"]))
    one = adapters.plan(Layout(H100, 16384, checkpointing=True), 0.4)
    assert one.memory.fits and one.memory.standing["weights, fp32"] == 4 * adapters.shape.parameters
    assert one.memory.standing["gradients, fp32"] == 4 * adapters.shape.trained < 0.02 * 4 * adapters.shape.parameters
    assert one.memory.moments["loss"]["head: weight and its gradient"] == 2 * adapters.shape.head


def test_the_recommended_layout_is_about_as_fast_as_any() -> None:
    """On 126 GiB the plainest leaves an engine that does not sleep so small a cache that a step takes twice as long."""
    device = replace(H100, memory=126 * GIB)
    awake = Planner(load_config([RECIPE, "train.updates_per_step=1", "engine.sleep=false"]))
    plans = [awake._roomy(layout) for layout in advice._layouts(awake.config, device, 8, 1)]
    fitting = [plan for plan in plans if plan.memory.fits]
    best, found = min(plan.pace.step for plan in fitting), awake.recommended(device, 8)
    assert fitting[0].pace.step > 2 * best and found.pace.step <= 1.15 * best
    assert not any(plan.pace.step <= 1.15 * best for plan in fitting[: fitting.index(found)])


def test_a_split_head_is_planned_where_it_can_run() -> None:
    """Over all ranks and without offload, as the trainer has it."""
    planner = Planner(load_config([RECIPE, "train.vocab_parallel=true"]))
    found = planner.recommended(H100, 64)
    assert found.layout.shard == 64 and not found.layout.offload


def test_passes_without_gradients_take_their_time() -> None:
    """Log-probabilities of the policy that sampled, where a step has several updates: a third of a pass more."""
    once, twice = (Planner(load_config([RECIPE, f"train.updates_per_step={n}"])) for n in (1, 2))
    layout = Layout(H100, 16384, 8, 8, checkpointing=True)
    more = twice.plan(layout, 0.4).pace.computing / once.plan(layout, 0.4).pace.computing
    assert more == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (["method.name=prefix_rft"], 1), (["method.name=prefix_rft", "train.updates_per_step=2"], 1),
        (["method.entropy_scope=batch"], 1), (["method.name=grpo", "method.kl_coef=0.1"], 1),
        (["method.name=opd"], 2), (["method.name=self_distill"], 3),
        (["method.name=self_distill", "method.sft_coef=1"], 1 + 2 * 8 / 9),
        (["method.name=opd", "method.teacher=Qwen/Qwen2.5-72B"], 1 + 70_212_648_960 / 6_525_288_448),
    ],
    ids=lambda x: "-".join(x).replace("method.", "") if isinstance(x, list) else None,
)  # fmt: skip
def test_methods_ask_for_passes_without_gradients(math_7b: Planner, words: list[str], passes: float) -> None:
    """Of the policy before the step, of all entropies, of a reference, and on rollouts of a teacher of any size."""
    sizes = ["train.rollouts_per_prompt=8", "train.demos_per_prompt=1"]
    config = load_config(["model.name=Qwen/Qwen2.5-Math-7B", *sizes, *words])
    assert math_7b.config.method.name == "srft" and pace._forwards(math_7b.shape, math_7b.config, None) == 0
    assert pace._forwards(math_7b.shape, config, read_teacher(config)) == pytest.approx(passes, rel=1e-3)


def test_a_teacher_takes_its_memory_and_its_time() -> None:
    """4 bytes a parameter over the ranks, blocks and head while it scores, passes of its size; said in a line."""
    words = ["model.name=Qwen/Qwen2.5-Math-7B", "model.compute_dtype=bfloat16", "method.name=opd"]
    alone, taught = (Planner(load_config(words + more)) for more in ([], ["method.teacher=Qwen/Qwen2.5-14B"]))
    assert alone.teacher is None and taught.teacher is not None and taught.teacher.layers == 48
    layout = Layout(H100, 16384, 8, 8, checkpointing=True)
    without, beside = (planner.plan(layout, 0.3) for planner in (alone, taught))
    added = {part: size for part, size in beside.memory.standing.items() if part not in without.memory.standing}
    assert added == {"teacher, fp32": 4 * taught.teacher.parameters // 8}
    scoring = beside.memory.moments["forward of the teacher"]
    assert scoring["gathered: two blocks, fp32"] == 2 * 4 * taught.teacher.block
    assert scoring["head: weight and its gradient"] == 2 * taught.teacher.head
    size = taught.teacher.products / taught.shape.products
    assert beside.pace.computing == pytest.approx(without.pace.computing * (3 + 1 + size) / (3 + 2)) and size > 2
    assert plan.describe(taught)[-1] == "A teacher of 14.77B parameters." and len(plan.describe(alone)) == 3


def test_a_teacher_without_a_shape_is_named_by_its_option() -> None:
    """What to give stands there."""
    with pytest.raises(ValueError, match=r"cannot read the shape of 'nowhere/none'.*give as method\.teacher a folder"):
        read_teacher(load_config(["method.name=opd", "method.teacher=nowhere/none"]))


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 9), (["method.name=uft"], 8), (["method.name=prefix_rft"], 8), (["method.name=self_distill"], 8),
        (["method.name=self_distill", "method.sft_coef=0.5"], 9), (["method.name=sft"], 1), (["method.name=grpo"], 8),
    ],
)  # fmt: skip
def test_a_demonstration_counts_where_it_is_a_sequence_of_its_own(words: list[str], count: int) -> None:
    """Not where rollouts begin with it or a teacher reads it."""
    config = load_config(["train.rollouts_per_prompt=8", "train.demos_per_prompt=1", *words])
    assert pace.sequences_a_prompt(config) == count
    learner = learner_of(config, plain_model(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert ("1 demonstration" in describe_step(learner, "")) == (count in (1, 9))
    kinds = {s.is_demo for s in longest_sequences(learner)}
    assert kinds == {1: {True}, 8: {False}, 9: {False, True}}[count]


def test_what_breaks_first_is_said(math_7b: Planner) -> None:
    """Memory, the engine, the host, prompts or time, by name."""
    small = replace(H100, memory=24 * GIB)
    assert math_7b.obstacle(math_7b.plan(Layout(small, 16384), 0.01)).startswith("memory: ")
    assert math_7b.as_configured(H100, 8).memory.fits
    shape = Layout(H100, 16384, 8, 8, checkpointing=True)
    asked = math_7b.obstacle(math_7b.plan(shape, 0.2))
    assert asked == "engine: with its weights 1 GiB too large for what is left of 1 GPU"
    away = Layout(replace(H100, host=8 * GIB), 16384, 8, 8, checkpointing=True, offload=True)
    assert math_7b.obstacle(math_7b.plan(away, 0.4)) == "memory of the host: 14 GiB a rank"
    assert math_7b.obstacle(math_7b.recommended(H100, 512)).startswith("prompts: 384 of 512 ranks have none")
    assert math_7b.obstacle(math_7b.recommended(H100, 64)).startswith("rollouts: ")


def test_a_step_has_the_flops_of_its_products(math_7b: Planner) -> None:
    """6 a weight and token, 6 a weight of the head and response, and for causal attention 6 S^2 a column and layer."""
    shape = math_7b.shape
    flops = training_flops(shape, tokens=1000, responses=500, squares=1000 * 100)
    assert flops == 6 * shape.products * 1000 + 6 * shape.head * 500 + 6 * 28 * 28 * 128 * 100_000


def test_seconds_follow_work_and_network(math_7b: Planner) -> None:
    """Twice the rates halve the computing; a slow network is what a step waits for."""
    layout, lengths = Layout(H100, 16384, 64, 64, checkpointing=True), Tokens(512, 4096)
    passes, config = math_7b._passes(16384, True), math_7b.config

    def pace(device):
        return plan_pace(math_7b.shape, passes, config, replace(layout, device=device), lengths, 20 * GIB)

    usual = pace(H100)
    fast = pace(replace(H100, flops=2 * H100.flops, traffic=2 * H100.traffic))
    assert fast.computing == pytest.approx(usual.computing / 2) and fast.gathering == usual.gathering
    slow = pace(replace(H100, network=H100.network / 100))
    assert slow.gathering == pytest.approx(100 * usual.gathering) and slow.train > slow.gathering > usual.train


def test_the_command_prints_parts_seconds_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    """For every number of devices a column, an answer whether it fits, and the options that make it."""
    plan.main([RECIPE, "--gpus", "8,64", "--gpu-memory", "80", "--response-tokens", "2048"])
    text = " ".join(capsys.readouterr().out.split())
    assert "7.62B parameters; 28 blocks of 233.1M, a head of 152,064 x 3,584" in text
    assert "8 sequences of at most 9,216 tokens, 73,728 in all. Counted with 512 + 2,048 each" in text
    for part in ("weights, fp32", "AdamW's moments", "gathered: two blocks", "activations", "rollout", "sync", "80.0"):
        assert part in text, part
    assert "8 x H100: fits. train.tokens_per_microbatch=16384 model.gradient_checkpointing=true" in text
    assert "64 x H100: fits." in text


def test_rollouts_beside_training_are_said(math_7b: Planner) -> None:
    """Engines on GPUs of their own, those that are behind, and the options of a layout with both."""
    config = load_config([
        RECIPE, "train.updates_per_step=1", "engine.devices=[4,5,6,7]", "engine.tensor_parallel=2", "rollout.max_lag=1",
    ])  # fmt: skip
    planner = Planner(config)
    said = plan.describe(planner)[3:]
    assert said[0] == "Engines on 4 GPUs of each machine that train nothing, one for every 2 GPUs."
    assert said[1].startswith("Rollouts go on beside training") and len(said) == 2
    found = planner.as_configured(H100, 4)
    assert (found.layout.engines_apart, found.layout.engine_ranks) == (2, 2) and found.pace.at_once
    assert {"engine.tensor_parallel=2", "engine.gpu_memory_utilization=0.9"} <= set(
        settings(planner.recommended(H100, 4))
    )
    assert advice.engines_apart(config, 16) == 8 and advice.engines_apart(math_7b.config, 16) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "H300"], "--gpu must be one of B200, "),
        (["--gpus", "8,x"], "--gpus must be numbers divided by commas"),
        (["--gpu-memory", "0"], "--gpu-memory must be above 0"),
        (["--response-tokens", "65"], "--response-tokens must be from 1 to the limit of the options, 64"),
        (["model.name=nowhere/none"], "cannot read the shape of 'nowhere/none'"),
        (["train.sharks=1"], "unknown option train.sharks"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 2, and what was expected."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as left:
        plan.main(arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and words in error and len(error.splitlines()) == 1


def test_a_dry_run_plans_this_machine_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options stand as they are, for as many ranks as they name, and no folder appears."""
    words = ["--dry-run", "train.ranks=2", f"runs_dir={tmp_path}", "train.device=cpu"]
    monkeypatch.setattr("sys.argv", ["srft.train", *words])
    srft.train.main()
    text = capsys.readouterr().out
    assert "On this machine, as the options stand" in text and "2 on CPU" in text and "2 x cpu: fits." in text
    assert not list(tmp_path.iterdir())
