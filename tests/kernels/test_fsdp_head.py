"""FusedLMHead under FSDP2 on two gloo ranks: gradients are those of the averaged loss on one process, in float64.

Run as a script, this file is one of the ranks: it goes through all scenarios and saves what each returns.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from srft_kernels import FusedLMHead, linear_grpo_loss, linear_logprobs, reference

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
DEADLINE_S = 100.0
# no multiple of the number of ranks: their shards differ in size
VOCAB, WIDTH = 101, 16
SOFTCAP = 5.0
# no ratio is so close to a bound that bf16 would carry it over
CLIP = 0.45

Result = dict[str, Any]


class Policy(nn.Module):
    """Embedding, one layer and norm, and an lm_head beside its FusedLMHead or replaced by it."""

    def __init__(self, *, tied: bool = False, beside: bool = True, grad_reduction: str = "mean"):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH)
        )
        lm_head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            lm_head.weight = self.body[0].weight
        head = FusedLMHead.from_linear(lm_head, logit_softcap=SOFTCAP, grad_reduction=grad_reduction)
        if beside:
            self.lm_head = lm_head
        self.head = head
        self.double()

    def forward(self, ids: Tensor, op: Callable) -> Any:
        """What ``op`` makes of the hidden states of ``ids`` [N]."""
        return self.head(self.body(ids), op)


def batch(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Tokens of one rank; ranks hold different numbers of them."""
    generator = torch.Generator().manual_seed(100 + rank)
    count = 9 + 5 * rank
    labels = torch.randint(VOCAB, (count,), generator=generator)
    labels[rank] = -100
    return {
        "ids": torch.randint(VOCAB, (count,), generator=generator),
        "labels": labels,
        "advantages": torch.randn(count, generator=generator).to(dtype),
        "old_logprobs": (-4.6 + 0.3 * torch.randn(count, generator=generator)).to(dtype),
    }


def grpo(data: dict[str, Tensor], **options: Any) -> Callable:
    """The GRPO loss of ``data``, waiting for a head."""
    given = {name: x for name, x in data.items() if name != "ids"}
    return partial(linear_grpo_loss, **given, clip_low=CLIP, clip_high=CLIP, **options)


def weighted_logprobs(data: dict[str, Tensor]) -> Callable:
    """A loss made by autograd from ``linear_logprobs``, whose backward reads the weight again."""

    def loss(hidden_states: Tensor, lm_head_weight: Tensor, **options: Any) -> Tensor:
        logprobs, _ = linear_logprobs(hidden_states, lm_head_weight, data["labels"], **options)
        return (logprobs * data["advantages"]).mean()

    return loss


def whole(x: Tensor | None) -> Tensor | None:
    """A copy of ``x``, gathered where it is a DTensor."""
    return None if x is None else (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def gradients(module: nn.Module) -> Result:
    """Whole gradients by parameter name."""
    return {name: whole(p.grad) for name, p in module.named_parameters()}


# scenarios: what a rank does


def _unit(rank: int, op: Callable, *, second_gather: bool = True, frozen: bool = False) -> Result:
    from torch.distributed.fsdp import fully_shard

    policy = Policy(beside=False)
    head = policy.head
    if frozen:
        head.requires_grad_(False)
    data = batch(rank)
    hidden = policy.body(data["ids"]).detach().requires_grad_()
    fully_shard(head, reshard_after_forward=True)
    head.set_unshard_in_backward(second_gather)
    out = head(hidden, op(data))
    getattr(out, "loss", out).backward()
    assert hidden.grad is not None
    return {**gradients(head), f"dhidden{rank}": hidden.grad / WORLD}


def unit_grpo(rank: int) -> Result:
    """The head is a unit of its own, the loss computes its gradients in forward."""
    return _unit(rank, grpo)


def unit_grpo_gathered_once(rank: int) -> Result:
    """The same without a gather in backward."""
    return _unit(rank, grpo, second_gather=False)


def unit_logprobs(rank: int) -> Result:
    """The head is a unit of its own, and backward reads its weight."""
    return _unit(rank, weighted_logprobs)


def unit_frozen(rank: int) -> Result:
    """A frozen unit."""
    return _unit(rank, grpo, frozen=True)


def _root(rank: int, op: Callable, *, tied: bool = False, beside: bool = True, head_unit: bool = False) -> Result:
    from torch.distributed.fsdp import fully_shard

    policy = Policy(tied=tied, beside=beside)
    if head_unit:
        fully_shard(policy.head)
    fully_shard(policy)
    data = batch(rank)
    out = policy(data["ids"], op(data))
    getattr(out, "loss", out).backward()
    return gradients(policy)


def root_grpo(rank: int) -> Result:
    """The head beside the linear layer, in one sharded root."""
    return _root(rank, grpo)


def root_logprobs(rank: int) -> Result:
    """The same with a loss made by autograd."""
    return _root(rank, weighted_logprobs)


def root_tied(rank: int) -> Result:
    """Embedding, linear layer and head share one parameter."""
    return _root(rank, grpo, tied=True)


def root_replaced(rank: int) -> Result:
    """The head in the linear layer's place, a unit inside a unit."""
    return _root(rank, grpo, beside=False, head_unit=True)


def root_tied_pair(rank: int) -> Result:
    """Embedding and head as one unit of two modules inside the root."""
    from torch.distributed.fsdp import fully_shard

    policy = Policy(tied=True, beside=False)
    fully_shard([policy.body[0], policy.head])
    fully_shard(policy)
    data = batch(rank)
    policy(data["ids"], grpo(data)).loss.backward()
    return gradients(policy)


def layer_alone(rank: int) -> Result:
    """The linear layer is sharded, and the head made from it is outside: it gathers the layer's shards."""
    from torch.distributed.fsdp import fully_shard

    policy = Policy()
    fully_shard(policy.lm_head)
    data = batch(rank)
    policy(data["ids"], grpo(data)).loss.backward()
    return {name: whole(p.grad) for name, p in policy.lm_head.named_parameters(prefix="lm_head")}


def outside(rank: int) -> Result:
    """All of the model is sharded after the head was made, which is no part of it."""
    from torch.distributed.fsdp import fully_shard

    policy = Policy()
    head = policy.head
    del policy.head
    fully_shard(policy.body)
    fully_shard(policy)
    data = batch(rank)
    head(policy.body(data["ids"]), grpo(data)).loss.backward()
    return gradients(policy)


def parted(rank: int) -> Result:
    """The head is sharded, and the linear layer that it was made from is outside: it would keep its weight."""
    from torch.distributed.fsdp import fully_shard

    policy = Policy()
    fully_shard(policy.head)
    data = batch(rank)
    try:
        policy(data["ids"], grpo(data))
    except ValueError as error:
        return {"message": str(error)}
    return {"message": "none"}


def _by_hand(rank: int, op: Callable, *, grad_reduction: str = "mean", mesh: Any = None, **policy_options) -> Result:
    """Body and head are called one by one, the module that holds the head never."""
    from torch.distributed.fsdp import fully_shard

    policy = Policy(grad_reduction=grad_reduction, **policy_options)
    fully_shard(policy.body, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    if grad_reduction == "sum":
        for unit in (policy, policy.body):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    data = batch(rank)
    assert hasattr(policy.head.weight, "full_tensor")
    out = policy.head(policy.body(data["ids"]), op(data))
    getattr(out, "loss", out).backward()
    for p in policy.parameters():
        assert p.grad.placements == p.placements and p.grad.dtype == p.dtype
    return gradients(policy)


def by_hand_grpo(rank: int) -> Result:
    """The head meets a DTensor; gradients are averaged."""
    return _by_hand(rank, grpo)


def by_hand_logprobs(rank: int) -> Result:
    """The same with a loss made by autograd."""
    return _by_hand(rank, weighted_logprobs)


def by_hand_sum(rank: int) -> Result:
    """A loss divided by the global token count, and gradients that are added."""
    return _by_hand(rank, partial(grpo, num_tokens=global_count()), grad_reduction="sum")


def by_hand_replicated_and_sharded(rank: int) -> Result:
    """Hybrid sharding: a mesh with a dimension of replicas."""
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicate", "shard")
    first = _by_hand(rank, grpo, mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=names))
    second = _by_hand(rank, grpo, mesh=init_device_mesh("cpu", (1, WORLD), mesh_dim_names=names))
    for name, x in first.items():
        assert torch.allclose(x, second[name], rtol=1e-12, atol=1e-15), name
    return first


def _after_root(rank: int, *, tied: bool, reshard: bool) -> Result:
    """The root's forward returns hidden states, and the head is called after it."""
    from torch.distributed.fsdp import fully_shard

    policy = Policy(tied=tied)
    policy.forward = lambda ids: policy.body(ids)
    fully_shard(policy, reshard_after_forward=reshard)
    data = batch(rank)
    hidden = policy(data["ids"])
    assert hasattr(policy.head.weight, "full_tensor") == reshard
    policy.head(hidden, grpo(data)).loss.backward()
    return gradients(policy)


def after_root(rank: int) -> Result:
    """FSDP2 leaves a root's weights gathered."""
    return _after_root(rank, tied=False, reshard=False)


def after_root_tied(rank: int) -> Result:
    """The same with a tied embedding."""
    return _after_root(rank, tied=True, reshard=False)


def after_resharded_root(rank: int) -> Result:
    """The root's weights are sharded again before the head needs them."""
    return _after_root(rank, tied=False, reshard=True)


def after_resharded_root_tied(rank: int) -> Result:
    """FSDP2 reduces the embedding's share of the gradient, the head its own, and they add up."""
    return _after_root(rank, tied=True, reshard=True)


def micro_batches(rank: int) -> Result:
    """Two calls with one reduction after the second."""
    from torch.distributed.fsdp import fully_shard

    policy = fully_shard(Policy(tied=True))
    data = batch(rank)
    count = int((data["labels"] != -100).sum())
    for part, last in ((slice(0, 4), False), (slice(4, None), True)):
        policy.set_requires_gradient_sync(last)
        piece = {name: x[part] for name, x in data.items()}
        policy(piece["ids"], grpo(piece, num_tokens=count)).loss.backward()
    return gradients(policy)


def _first_rank_only(data: dict[str, Tensor]) -> Callable:
    """The loss of rank 0; the other rank has no row."""
    if dist.get_rank() == 0:
        return grpo(data)

    def loss(hidden_states: Tensor, lm_head_weight: Tensor, **options: Any) -> Any:
        none = {name: x[:0] for name, x in data.items()}
        return grpo(none)(hidden_states[:0], lm_head_weight, **options)

    return loss


def idle_rank_in_root(rank: int) -> Result:
    """A rank without tokens takes part in every collective."""
    return _root(rank, _first_rank_only)


def idle_rank_by_hand(rank: int) -> Result:
    """The same where the head gathers."""
    return _by_hand(rank, _first_rank_only)


def steps(rank: int) -> Result:
    """Score without a graph, train, clip, update, twice; and the keys of the state_dict."""
    from torch.distributed.fsdp import fully_shard

    policy = fully_shard(Policy(tied=True))
    keys = {"keys": list(policy.head.state_dict())}
    return {**train_steps(policy, [batch(rank)], rank), **keys}


def _mixed(rank: int, *, by_hand: bool) -> Result:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = Policy().float()
    # FSDP2 rounds the bias to bf16 too, the head does not
    policy.lm_head.bias.data = policy.lm_head.bias.bfloat16().float()
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if by_hand:
        fully_shard(policy.body, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)
    data = batch(rank, torch.float32)
    seen = {}

    def op(hidden_states: Tensor, lm_head_weight: Tensor, **options: Any) -> Any:
        seen["dtypes"] = [hidden_states.dtype, lm_head_weight.dtype]
        return grpo(data)(hidden_states, lm_head_weight, **options)

    if by_hand:
        out = policy.head(policy.body(data["ids"]), op)
    else:
        out = policy(data["ids"], op)
    out.loss.backward()
    counted = data["labels"] != -100
    expected = (out.logprobs - data["old_logprobs"]).exp()[counted]
    return {
        **gradients(policy),
        **seen,
        "ratio_error": ((out.ratio[counted] - expected) / expected).abs().max().item(),
    }


def mixed_root(rank: int) -> Result:
    """bf16 parameters and fp32 reduction: per-token vectors stay fp32."""
    return _mixed(rank, by_hand=False)


def mixed_by_hand(rank: int) -> Result:
    """The same where the head gathers an fp32 DTensor for bf16 hidden states."""
    return _mixed(rank, by_hand=True)


class LoraPolicy(Policy):
    """A policy whose lm_head is a LoRA layer of peft, beside its head."""

    def __init__(self):
        super().__init__()
        import peft

        del self.head
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=6)
        peft.inject_adapter_in_model(config, self)
        nn.init.normal_(self.lm_head.lora_B["default"].weight, std=0.3)
        self.head = FusedLMHead.from_linear(self.lm_head, logit_softcap=SOFTCAP)
        self.double()


def _lora(rank: int, *, by_hand: bool) -> Result:
    from torch.distributed.fsdp import fully_shard

    policy = LoraPolicy()
    if by_hand:
        fully_shard(policy.body)
    fully_shard(policy)
    data = batch(rank)
    out = policy.head(policy.body(data["ids"]), grpo(data)) if by_hand else policy(data["ids"], grpo(data))
    out.loss.backward()
    return {name: whole(p.grad) for name, p in policy.named_parameters() if "lora_" in name or p.grad is not None}


def lora_root(rank: int) -> Result:
    """Adapters gathered with everything else."""
    return _lora(rank, by_hand=False)


def lora_by_hand(rank: int) -> Result:
    """Adapters gathered by the head."""
    return _lora(rank, by_hand=True)


def bare_op(rank: int) -> Result:
    """An op that is handed a shard says so."""
    from torch.distributed.fsdp import fully_shard

    head = fully_shard(Policy(beside=False).head)
    data = batch(rank)
    try:
        linear_logprobs(torch.zeros(data["ids"].numel(), WIDTH).double(), head.weight, data["labels"])
    except ValueError as error:
        return {"message": str(error)}
    return {"message": "none"}


SCENARIOS = [
    unit_grpo, unit_grpo_gathered_once, unit_logprobs, unit_frozen,
    root_grpo, root_logprobs, root_tied, root_tied_pair, root_replaced, layer_alone, outside, parted,
    by_hand_grpo, by_hand_logprobs, by_hand_sum, by_hand_replicated_and_sharded,
    after_root, after_root_tied, after_resharded_root, after_resharded_root_tied,
    idle_rank_in_root, idle_rank_by_hand, micro_batches, steps, mixed_root, mixed_by_hand, bare_op,
]  # fmt: skip
if importlib.util.find_spec("peft") is not None:
    SCENARIOS += [lora_root, lora_by_hand]


def run_rank(rank: int, folder: Path) -> None:
    """Go through the scenarios; after an error the ranks are out of step, so stop."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario(rank)
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
            break
    torch.save(results, folder / f"rank{rank}.pt")
    # no barrier and no clean-up of groups: the other rank may have stopped
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned, by scenario; an error is its traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], cwd=ROOT, env=environment)
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            process.wait(DEADLINE_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def results_of(ranks: list[dict[str, Any]], name: str) -> list[Result]:
    """What the ranks returned for a scenario."""
    for rank, results in enumerate(ranks):
        if not isinstance(results.get(name), dict):
            pytest.fail(f"rank {rank}: {results.get(name, 'stopped earlier')}", pytrace=False)
    return [results[name] for results in ranks]


def global_count() -> int:
    """Counted tokens of all ranks."""
    return sum(int((batch(r)["labels"] != -100).sum()) for r in range(WORLD))


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


def train_steps(policy: nn.Module, batches: list[dict[str, Tensor]], rank: int) -> Result:
    """Two updates from the mean loss over ``batches``, after scoring them; weights and scores."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    scores = []
    for _ in range(2):
        with torch.no_grad():
            for i, data in enumerate(batches):
                logprobs, _ = policy(data["ids"], partial(linear_logprobs, labels=data["labels"]))
                scores.append((rank + i, logprobs.clone()))
        optimizer.zero_grad()
        for data in batches:
            (policy(data["ids"], grpo(data)).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
        optimizer.step()
    weights = {name: whole(p) for name, p in policy.named_parameters()}
    return {**weights, "scores": scores}


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


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
