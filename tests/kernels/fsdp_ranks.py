"""What one of two gloo ranks does with a FusedLMHead under FSDP2.

A rank goes through all scenarios and saves what each returns.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srft_kernels import linear_logprobs
from tests.kernels.fsdp_policy import (
    WIDTH,
    WORLD,
    LoraPolicy,
    Policy,
    Result,
    batch,
    global_count,
    gradients,
    grpo,
    train_steps,
    weighted_logprobs,
    whole,
)


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


def rank_main(rank: int, folder: Path) -> None:
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
