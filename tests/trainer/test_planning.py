"""Memory of training from shapes alone: equal to what is counted by hand, and to what a process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srft.config import Config
from srft.engine.placement import ASLEEP_BYTES
from srft.options import load_config
from srft.planning.devices import find_device, known_gpu, this_cpu
from srft.planning.memory import ENGINE_ASLEEP, ENGINE_SHARE, OVERHEAD, Layout, Memory, plan_memory
from srft.planning.models import KNOWN, ModelShape, build_policy, measure_shape, read_shape
from srft.planning.pace import Pace, Tokens, plan_pace
from srft.planning.trace import BodyPasses, Held, trace_body

GIB = 2**30
H100 = find_device("H100")


def shape_of(config: Config) -> ModelShape:
    """Count the parameters of a run's model."""
    with torch.device("meta"):
        return measure_shape(build_policy(read_shape(config), config))


def trace(config: Config, checkpointing: bool = False, tokens: int = 1024, rows: int = 512) -> BodyPasses:
    """Count what its body holds."""
    return trace_body(read_shape(config), config, tokens, rows, checkpointing=checkpointing)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which can forget a peak")
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, ["fp32-tied", "bf16-recomputed"]), (2, ["bf16-recomputed"])],
    ids=["alone", "sharded"],
)
def test_the_planned_peak_is_the_measured_one(ranks: int, settings: list[str]) -> None:
    """Of updates of models of 44 and 56 million parameters, in fp32, in bf16 recomputed, and over two ranks."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    compare([*launcher, "tests.trainer.peak", "cpu"], settings)


@pytest.mark.gpu
def test_the_planned_peak_is_the_measured_one_on_a_gpu() -> None:
    """As its allocator counts it, without context and fragments."""
    compare(["tests.trainer.peak", "cuda"], ["bf16", "bf16-recomputed"])


def compare(module: list[str], settings: list[str]) -> None:
    """Measure in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *module, *settings], capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in found] == settings
    for each in found:
        assert each["planned"] == pytest.approx(each["measured"], rel=0.15), each


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-Math-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
    ],
)
def test_shapes_that_are_built_in_have_the_size_of_their_models(name: str, parameters: int) -> None:
    """The numbers of parameters that their authors publish."""
    assert name in KNOWN
    shape = shape_of(load_config([f"model.name={name}"]))
    assert shape.parameters == shape.trained == parameters
    assert shape.layers * shape.block + shape.root == parameters and shape.trained_block == shape.block


def test_a_shape_that_cannot_be_read_says_what_to_give(tmp_path: Path) -> None:
    """A folder without a config.json is named, with the remedy; one that has it needs no weights."""
    with pytest.raises(ValueError, match=r"cannot read the shape of .*config\.json \(weights are not needed\)"):
        read_shape(load_config([f"model.name={tmp_path}"]))
    read_shape(load_config(["model.name=Qwen/Qwen2.5-7B"])).save_pretrained(tmp_path)
    assert shape_of(load_config([f"model.name={tmp_path}"])) == shape_of(load_config(["model.name=Qwen/Qwen2.5-7B"]))


def test_activations_grow_with_tokens_and_blocks_alone() -> None:
    """In fp32 nothing is copied, and twice the tokens hold twice as much; so do twice the blocks, but for the ends."""
    config = load_config([])
    once, twice = trace(config), trace(config, tokens=2048, rows=1024)
    assert once.between.copies == 0
    assert twice.between.activations == pytest.approx(2 * once.between.activations, rel=0.01)
    few = load_config(["model.tiny.num_layers=4"])
    # of the last norm and of what attention is told, once
    block = (trace(few).between.activations - once.between.activations) / 2
    more = trace(load_config(["model.tiny.num_layers=10"])).between.activations
    assert more == pytest.approx(once.between.activations + 8 * block, rel=1e-3)


def test_products_are_six_flops_a_weight_and_token() -> None:
    """And recomputation leaves out the last product of a block, whose result nobody needs again."""
    config = load_config(["model.name=Qwen/Qwen2.5-1.5B"])
    shape, tokens = shape_of(config), 1024
    assert trace(config).flops == 6 * shape.products * tokens
    down = 28 * 1536 * 8960
    assert trace(config, checkpointing=True).flops == (6 * shape.products + 2 * (shape.products - down)) * tokens


def test_compiled_blocks_are_planned_as_they_are_written() -> None:
    """They keep no more; and nothing is compiled for a plan, where there may be no compiler."""
    plain, compiled = (load_config([f"model.compile={each}"]) for each in ("false", "true"))
    assert trace(compiled) == trace(plain)


def test_copies_in_16_bit_live_as_long_as_their_block_where_it_is_recomputed() -> None:
    """Not until the last block is through, whatever the number of blocks; without recomputation backward needs all."""
    config = load_config(["model.name=Qwen/Qwen2.5-1.5B", "model.compute_dtype=bfloat16"])
    block = 2 * shape_of(config).block
    passes = trace(config, checkpointing=True)
    assert 0 < passes.forward.copies < block and 0 < passes.backward.copies <= block
    assert trace(config).between.copies > 27 * 0.9 * block


def test_sharded_ranks_hold_their_part_and_what_they_gather() -> None:
    """16 bytes a parameter over the ranks; the embedding, norm and head, and two blocks whole."""
    config = load_config(["recipes/qwen2.5-math-7b.toml"])
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=0, moved=0)
    one = plan_memory(shape, passes, config, Layout(H100, 1024), 1024)
    eight = plan_memory(shape, passes, config, Layout(H100, 1024, 8, 8), 1024)
    state = ("weights, fp32", "gradients, fp32", "AdamW's moments, fp32")
    assert sum(one.standing[part] for part in state) == 16 * shape.parameters
    assert sum(eight.standing[part] for part in state) == 2 * shape.parameters
    gathered = {part: size for part, size in eight.moments["forward"].items() if part.startswith("gathered")}
    assert sum(gathered.values()) == 4 * shape.root + 2 * 4 * shape.block
    assert not any(part.startswith("gathered") and size for part, size in one.moments["forward"].items())
    back = eight.moments["backward of the blocks"]
    assert back["gradients before they are reduced"] == 2 * 4 * shape.block
    assert back["gradient of the head"] == 4 * shape.head
    away = plan_memory(shape, passes, config, Layout(H100, 1024, 8, 8, offload=True), 1024)
    assert away.host == 2 * shape.parameters and not set(state) & set(away.standing)


def test_a_reference_is_one_more_copy_that_is_sharded() -> None:
    """4 bytes a parameter over the ranks, and none where a policy with adapters is its own."""
    kl = ["method.name=grpo", "method.kl_coef=0.04"]
    config, adapted = load_config(kl), load_config([*kl, "model.lora.rank=8"])
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=0, moved=0)
    eight = plan_memory(shape, passes, config, Layout(H100, 1024, 8, 8), 1024)
    assert eight.standing["reference, fp32"] == shape.parameters // 2
    assert "reference, fp32" not in plan_memory(shape, passes, adapted, Layout(H100, 1024), 1024).standing


def test_the_head_holds_its_workspace_and_no_logits() -> None:
    """At most 2 GiB on a GPU however many tokens there are, beside a weight in bf16 and its gradient in fp32."""
    config = load_config(["recipes/qwen2.5-math-7b.toml"])
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=0, moved=0)
    few, many = (plan_memory(shape, passes, config, Layout(H100, n), n).moments["loss"] for n in (16_384, 131_072))
    assert few["head: workspace"] == many["head: workspace"] <= 2 * GIB
    assert few["head: weight and its gradient"] == 6 * shape.head
    assert many["head: hidden states and their gradient"] == 6 * shape.hidden * 131_072


def test_a_split_head_stays_where_it_is() -> None:
    """An eighth of its rows for the hidden states of all eight ranks; nothing of it is gathered or waits."""
    usual = load_config(["recipes/qwen2.5-math-7b.toml"])
    split = load_config(["recipes/qwen2.5-math-7b.toml", "train.vocab_parallel=true"])
    shape, passes = shape_of(usual), BodyPasses(*[Held(0, 0)] * 4, flops=0, moved=0)
    layout = Layout(H100, 1024, 8, 8)
    whole, own = (plan_memory(shape, passes, config, layout, 1024).moments for config in (usual, split))
    root = "gathered: embedding, norm, head"
    assert whole["forward"][root] - own["forward"][root] == 4 * shape.head
    assert own["backward of the blocks"]["gradient of the head"] == 0
    assert own["loss"]["head: weight and its gradient"] == whole["loss"]["head: weight and its gradient"] // 8
    hidden = "head: hidden states and their gradient"
    assert own["loss"][hidden] == 8 * whole["loss"][hidden]
    replicas = plan_memory(shape, passes, split, Layout(H100, 1024, 8, 4), 1024).moments
    assert replicas["forward"][root] == whole["forward"][root]


def test_an_engine_that_has_no_room_does_not_fit() -> None:
    """A share below the engine's own weights leaves no cache."""
    config = load_config(["recipes/qwen2.5-math-7b.toml", "engine.gpu_memory_utilization=0.2"])
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=0, moved=0)
    big = replace(H100, memory=400 * GIB)
    memory = plan_memory(shape, passes, config, Layout(big, 1024), 1024)
    assert memory.fits and memory.engine_cache == int(0.2 * 400 * GIB) - 2 * shape.parameters - 3 * GIB
    small = plan_memory(shape, passes, config, Layout(replace(H100, memory=80 * GIB), 1024, 8, 8), 1024)
    assert small.peak < 80 * GIB and small.engine_cache < 0 and not small.fits


def test_servers_take_nothing_of_the_trainers_devices() -> None:
    """No copy of the weights, no share of the memory, no keys and values."""
    config = load_config(["recipes/qwen2.5-math-7b.toml"])
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=0, moved=0)
    of = {
        kind: plan_memory(
            shape, passes, config.model_copy(update={"engine": config.engine.model_copy(update={"kind": kind})}),
            Layout(H100, 64), 1024,
        )
        for kind in ("vllm", "hf", "http")
    }  # fmt: skip
    engines = {kind: set(memory.standing) - set(of["http"].standing) for kind, memory in of.items()}
    assert all(engines[kind] for kind in ("vllm", "hf")) and "rollout" in of["hf"].moments
    assert "rollout" not in of["http"].moments and not any("engine" in part for part in of["http"].standing)


def plan_of(*options: str, **layout: object) -> tuple[Memory, Pace]:
    """Memory and seconds of the 7B recipe on one layout, whose passes take nothing."""
    config = load_config(["recipes/qwen2.5-math-7b.toml", *options])
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=1e15, moved=1e12)
    place = Layout(H100, 16384, 8, 8, **layout)
    memory = plan_memory(shape, passes, config, place, 1024)
    return memory, plan_pace(shape, passes, config, place, Tokens(512, 4096), max(0, memory.engine_cache))


def test_an_engine_that_sleeps_takes_its_share_while_it_samples_alone() -> None:
    """Of a GPU it has with training; awake, or beside a batch that is made meanwhile, it keeps it."""
    share = int(0.45 * H100.memory)
    asleep, _ = plan_of()
    assert asleep.standing[ENGINE_ASLEEP] == ASLEEP_BYTES and ENGINE_SHARE not in asleep.standing
    assert asleep.moments["rollout"] == {ENGINE_SHARE: share - ASLEEP_BYTES}
    for option in ("engine.sleep=false", "rollout.max_lag=1"):
        awake, _ = plan_of(option)
        assert awake.standing[ENGINE_SHARE] == share and "rollout" not in awake.moments
        assert awake.engine_cache == asleep.engine_cache
        assert awake.at("loss") - asleep.at("loss") == share - ASLEEP_BYTES
        assert awake.shown == awake.worst and asleep.shown != "rollout" == asleep.worst


def test_engines_apart_take_nothing_of_training_and_two_read_half_each() -> None:
    """Their GPUs hold their weights; two engines of two GPUs are as fast as four GPUs are."""
    one, alone = plan_of("engine.devices=[7]", engines_apart=1)
    assert not any("engine" in part for part in one.standing) and "rollout" not in one.moments
    two, several = plan_of("engine.devices=[4,5,6,7]", "engine.tensor_parallel=2", engines_apart=2, engine_ranks=2)
    assert two.engine_cache > one.engine_cache > 0
    assert several.rollout < alone.rollout / 2 and several.train == alone.train


def test_rollouts_that_are_recorded_need_no_engine() -> None:
    """No share, no seconds, no weights that are sent."""
    memory, pace = plan_of("train.replay=runs/first")
    assert not any("engine" in part for part in memory.standing) and "rollout" not in memory.moments
    assert pace.rollout == pace.sync == 0 and pace.step == pace.train and memory.fits


def test_rollouts_alone_hold_the_policy_and_its_engine() -> None:
    """No gradients, moments or activations, and no seconds but those of sampling; the engine has no need to sleep."""
    memory, pace = plan_of("train.rollouts_only=true")
    assert set(memory.standing) == {"weights, fp32", ENGINE_SHARE, OVERHEAD} and memory.moments == {"rollout": {}}
    assert pace.step == pace.rollout > 0


@pytest.mark.parametrize(
    ("options", "layout", "at_once"),
    [
        ([], {"engines_apart": 1}, False), (["rollout.max_lag=1"], {"engines_apart": 1}, True),
        (["rollout.max_lag=1"], {}, False),
        (["rollout.max_lag=1", "engine.kind=http", "engine.urls=http://a:1", "engine.weights_dir=/w"], {}, True),
    ],
)  # fmt: skip
def test_a_step_takes_the_longer_of_what_goes_on_at_once(options: list[str], layout: dict, at_once: bool) -> None:
    """Where rollouts lag and have devices of their own; on one GPU both want it."""
    _, pace = plan_of(*options, **layout)
    both = pace.rollout, pace.train
    assert min(both) > 0 and pace.at_once is at_once
    assert pace.step == pytest.approx((max(both) if at_once else sum(both)) + pace.sync)


def test_a_lag_on_a_cpu_halves_the_cores_of_both() -> None:
    """So that a step is not faster than the two in turn."""
    config, late = (load_config(["model.name=Qwen/Qwen2.5-0.5B", *more]) for more in ([], ["rollout.max_lag=1"]))
    shape, passes = shape_of(config), BodyPasses(*[Held(0, 0)] * 4, flops=1e12, moved=1e9)
    turns, beside = (
        plan_pace(shape, passes, c, Layout(this_cpu(1e11), 1024), Tokens(100, 100), 0) for c in (config, late)
    )
    assert beside.rollout == 2 * turns.rollout and beside.at_once
    # and what older tokens count, by the head of the same forward pass
    assert 2 * turns.train < beside.train < 2.2 * turns.train


def test_mixtures_of_experts_are_refused() -> None:
    """Their work depends on where tokens go."""
    from transformers import AutoConfig

    shape = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64, vocab_size=100,
    )  # fmt: skip
    with torch.device("meta"), pytest.raises(ValueError, match="mixture of experts"):
        measure_shape(build_policy(shape, load_config([])))


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA H20", "H20"),
        ("NVIDIA H200", "H200"), ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_what_their_driver_says(product: str, name: str | None) -> None:
    """H200 is no H20."""
    found = known_gpu(product)
    assert (found and found.name) == name
