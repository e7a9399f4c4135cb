"""FusedLMHead under FSDP2 on two gloo ranks: gradients are those of the averaged loss on one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from srft_kernels import reference
from tests.kernels.fsdp_policy import (
    CLIP,
    SOFTCAP,
    WORLD,
    LoraPolicy,
    Policy,
    Result,
    batch,
    global_count,
    train_steps,
)
from tests.ranks import results_of_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned, by scenario; an error is its traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_ranks("tests.kernels.fsdp_ranks", folder, WORLD, seconds=100)


def results_of(ranks: list[dict[str, Any]], name: str) -> list[Result]:
    """What the ranks returned for a scenario."""
    for rank, results in enumerate(ranks):
        if not isinstance(results.get(name), dict):
            pytest.fail(f"rank {rank}: {results.get(name, 'stopped earlier')}", pytrace=False)
    return [results[name] for results in ranks]


def eager_loss(hidden: Tensor, weight: Tensor, data: dict[str, Tensor], how: str, **options: Any) -> Tensor:
    """The loss of a scenario from materialised logits."""
    if how == "logprobs":
        return (
            reference.linear_logprobs(hidden, weight, data["labels"], **options)[0] * data["advantages"]
        ).mean()
    given = {name: x for name, x in data.items() if name != "ids"}
    return reference.linear_grpo_loss(hidden, weight, **given, clip_low=CLIP, clip_high=CLIP, **options).loss


def gold(how: str = "grpo", *, tied: bool = False, busy: int = WORLD, **options: Any) -> dict[str, Tensor]:
    """Gradients of the loss averaged over the ranks (with ``num_tokens``: added), on one process.

    Ranks from ``busy`` on have a loss of 0.
    """
    policy = Policy(tied=tied)
    scale = 1.0 if "num_tokens" in options else 1 / WORLD
    bias = policy.lm_head.bias
    dhidden = {}
    for rank in range(busy):
        data = batch(rank)
        hidden = policy.body(data["ids"])
        hidden.retain_grad()
        loss = eager_loss(
            hidden, policy.lm_head.weight, data, how, bias=bias, logit_softcap=SOFTCAP, **options
        )
        (scale * loss).backward()
        dhidden[f"dhidden{rank}"] = hidden.grad
    return {**{name: p.grad for name, p in policy.named_parameters()}, **dhidden}


def assert_close(actual: Result, expected: dict[str, Tensor], names: dict[str, str], tolerance: float) -> None:
    """Compare tensors by relative error; ``names`` maps names of ``actual`` to those of ``expected``."""
    assert names
    for mine, theirs in names.items():
        error = (actual[mine].double() - expected[theirs]).norm() / expected[theirs].norm()
        assert error < tolerance, f"{mine}: relative error {error:.2e}"


def policy_names(result: Result) -> dict[str, str]:
    """Names of a policy's gradients, the head's as those of the linear layer."""
    return {name: name.replace("head.", "lm_head.") if name.startswith("head.") else name for name in result}


@pytest.mark.parametrize("scenario", ["unit_grpo", "unit_grpo_gathered_once", "unit_logprobs"])
def test_head_is_a_unit(ranks, scenario):
    """fully_shard(head): gradients of weight, bias and hidden states."""
    expected = gold(scenario.split("_")[1])
    for rank, result in enumerate(results_of(ranks, scenario)):
        names = {"weight": "lm_head.weight", "bias": "lm_head.bias", f"dhidden{rank}": f"dhidden{rank}"}
        assert_close(result, expected, names, 1e-10)


def test_frozen_unit(ranks):
    """No gradient for the weight, the right one for the hidden states."""
    for rank, result in enumerate(results_of(ranks, "unit_frozen")):
        assert result["weight"] is None and result["bias"] is None
        assert_close(result, gold(), {f"dhidden{rank}": f"dhidden{rank}"}, 1e-10)


@pytest.mark.parametrize(
    "scenario",
    [
        "root_grpo", "root_logprobs", "root_tied", "root_tied_pair", "root_replaced",
        "by_hand_grpo", "by_hand_logprobs", "by_hand_replicated_and_sharded",
        "after_root", "after_root_tied", "after_resharded_root", "after_resharded_root_tied",
        "micro_batches",
    ],
)  # fmt: skip
def test_gradients_are_those_of_the_mean_loss(ranks, scenario):
    """Every parameter's, on both ranks, however the head came by its weight."""
    tied = "tied" in scenario or scenario == "micro_batches"
    expected = gold("logprobs" if "logprobs" in scenario else "grpo", tied=tied)
    for result in results_of(ranks, scenario):
        assert len(result) == (5 if tied else 7)
        assert_close(result, expected, policy_names(result), 1e-10)


@pytest.mark.parametrize("scenario", ["layer_alone", "outside"])
def test_the_layer_is_followed_into_its_shards(ranks, scenario):
    """Sharding the layer without the head leaves it the gradient of the mean loss."""
    for result in results_of(ranks, scenario):
        assert {"lm_head.weight", "lm_head.bias"} <= result.keys()
        assert_close(result, gold(), policy_names(result), 1e-10)


@pytest.mark.parametrize("scenario", ["idle_rank_in_root", "idle_rank_by_hand"])
def test_idle_rank(ranks, scenario):
    """A rank without tokens adds zeros to the mean."""
    for result in results_of(ranks, scenario):
        assert_close(result, gold(busy=1), policy_names(result), 1e-10)


def test_sum_reduction(ranks):
    """Losses divided by the global count, gradients added."""
    for result in results_of(ranks, "by_hand_sum"):
        assert_close(result, gold(num_tokens=global_count()), policy_names(result), 1e-10)


def test_two_steps(ranks):
    """Scores, clipped updates and state_dict keys are those of one process with all the data."""
    results = results_of(ranks, "steps")
    expected = train_steps(Policy(tied=True), [batch(r) for r in range(WORLD)], 0)
    known = {name: x for name, x in expected.items() if name != "scores"}
    for rank, result in enumerate(results):
        assert result["keys"] == ["weight"]
        assert_close(result, known, {name: name for name in known}, 1e-10)
        mine = [scores for owner, scores in expected["scores"] if owner == rank]
        assert len(mine) == 2
        for (_, actual), score in zip(result["scores"], mine, strict=True):
            assert torch.allclose(actual, score, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scenario", ["mixed_root", "mixed_by_hand"])
def test_mixed_precision(ranks, scenario):
    """The op sees bf16, gradients arrive in fp32, and the vectors inside the op are not rounded."""
    expected = gold()
    for result in results_of(ranks, scenario):
        grads = {name: x for name, x in result.items() if isinstance(x, Tensor)}
        assert result["dtypes"] == [torch.bfloat16, torch.bfloat16]
        assert result["ratio_error"] < 1e-6
        assert all(x.dtype == torch.float32 for x in grads.values())
        assert_close(grads, expected, policy_names(grads), 0.03)


def test_gathering_by_hand_rounds_like_fsdp(ranks):
    """Under mixed precision a gradient is rounded to bf16 on its rank and reduced in fp32, on both ways."""
    for by_hand, root in zip(results_of(ranks, "mixed_by_hand"), results_of(ranks, "mixed_root"), strict=True):
        names = {name: name for name in root if name == "lm_head.weight" or name.startswith("body.")}
        assert len(names) == 6
        assert_close(by_hand, {name: root[name].double() for name in names}, names, 1e-6)


@pytest.mark.parametrize("scenario", ["lora_root", "lora_by_hand"])
def test_lora(ranks, scenario):
    """The adapters get the gradient of the mean loss, the base weight none."""
    pytest.importorskip("peft")
    policy = LoraPolicy()
    adapter = {name: p for name, p in policy.lm_head.named_parameters() if "lora_" in name}
    a, b = adapter["lora_A.default.weight"], adapter["lora_B.default.weight"]
    base = policy.lm_head.base_layer
    for rank in range(WORLD):
        data = batch(rank)
        loss = eager_loss(
            policy.body(data["ids"]).detach(), base.weight + 2.0 * b @ a, data, "grpo", bias=base.bias,
            logit_softcap=SOFTCAP,
        )  # fmt: skip
        (loss / WORLD).backward()
    expected = {f"lm_head.{name}": p.grad for name, p in adapter.items()}
    assert len(expected) == 2
    for result in results_of(ranks, scenario):
        assert result.keys() == expected.keys()
        assert_close(result, expected, {name: name for name in expected}, 1e-10)


def test_parted_head_is_an_error(ranks):
    """Not a head that silently trains a copy."""
    for result in results_of(ranks, "parted"):
        assert "no longer share their weight" in result["message"]


def test_bare_op_rejects_a_shard(ranks):
    """The message says what came."""
    for result in results_of(ranks, "bare_op"):
        assert "lm_head_weight must be a plain tensor, got a DTensor" in result["message"]
