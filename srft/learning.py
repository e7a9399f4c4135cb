"""Judged groups to moved weights: advantages, packing, fused loss, backward, optimizer; for the warm start too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from srft.batch import Batch, Group, Response, count, pack
from srft.methods import Figure, UpdateInfo, assign_advantages
from srft.policy.forwards import packed_forward
from srft.policy.learner import Learner
from srft.policy.model import head_of, run_body
from srft.policy.router import router_of, whole_load
from srft.record.metrics import combined, loss_metrics
from srft_kernels import PolicyLoss


def learn(learner: Learner, groups: list[Group], step: int) -> dict[str, float]:
    """Make the updates of a step from its groups.

    Args:
        learner: Its policy is moved.
        groups: With rewards; their responses' advantages and entropies are filled in.
        step: Sets the learning rate.

    Returns:
        Losses, entropies, weights and the gradient norm, by metric name; nothing where no response was judged.

    Raises:
        FloatingPointError: When a gradient is not finite; the weights are left as they were before that update.
    """
    size = len(groups) // learner.config.train.updates_per_step
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    sequences = [assign_advantages(part, learner.config.method) for part in parts]
    if len(parts) > 1:
        remember_old_logprobs(learner, [s for part in sequences for s in part])
    return combined([update(learner, part, step) for part in sequences if part])


def update(learner: Learner, sequences: list[Response], step: int) -> dict[str, Figure]:
    """Make one optimizer update from these sequences, however many micro-batches they fill.

    Args:
        learner: Its policy is moved.
        sequences: With rewards and advantages; their ``entropy`` is filled in.
        step: Sets the learning rate.

    Returns:
        Losses, entropies, weights and the gradient norm, by metric name.

    Raises:
        FloatingPointError: When the gradient is not finite; the weights are left as they were.
        ValueError: When the method's loss is no op.
    """
    config, model, optimizer = learner.config, learner.model, learner.optimizer
    batches = pack(sequences, config.train.tokens_per_microbatch, model.device)
    entropy = mean_entropy(learner, batches) if config.method.needs_entropy else None
    whole = UpdateInfo(count(sequences), step, config.rollout.max_new_tokens, entropy)
    optimizer.zero_grad(set_to_none=True)
    outputs: list[PolicyLoss] = []
    router, dtype = router_of(config, model), config.compute_dtype
    load = whole_load(router, model, batches, dtype) if router is not None and len(batches) > 1 else None
    balance = torch.zeros((), device=model.device)
    for batch in batches:
        hidden_states, gates = run_body(model, batch, dtype, router_logits=router is not None)
        out = _fused_loss(learner, batch, whole, hidden_states)
        aux = router.loss(gates, load or router.load(gates)) if router is not None else balance.new_zeros(())
        (out.loss + aux).backward()
        balance += aux.detach()
        outputs.append(out)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {norm.item()}; lower the learning rate or the method's coefficients"
        )
    lr = config.train.lr * min(1.0, step / max(1, config.train.lr_warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    figures = loss_metrics(config.method, batches, outputs, whole)
    if router is not None:
        figures["loss/router_aux"] = Figure(balance.item())
        figures["loss/total"] = replace(figures["loss/total"], value=figures["loss/total"].value + balance.item())
    return {"lr": Figure(lr, "last"), "grad_norm": Figure(norm.item()), **figures}


def _fused_loss(learner: Learner, batch: Batch, whole: UpdateInfo, hidden_states: torch.Tensor) -> PolicyLoss:
    config = learner.config
    about = f"loss of method.name={config.method.name} must return an op of srft_kernels, bound by functools.partial, "
    loss = config.method.loss(batch, whole)
    if not callable(loss):
        raise ValueError(f"{about}got {loss!r}; return partial(linear_token_loss, ...)")
    loss = partial(loss, labels=batch.labels, temperature=config.rollout.temperature)
    out = head_of(learner.model)(hidden_states, loss)
    if not isinstance(out, PolicyLoss):
        raise ValueError(f"{about}and this one gave {type(out).__name__}; take linear_token_loss or its kin")
    return out


@torch.no_grad()
def remember_old_logprobs(learner: Learner, sequences: list[Response]) -> None:
    """Store the log-probabilities of the policy that sampled, before several updates move it.

    Args:
        learner: Holds that policy.
        sequences: Everything this step learns from; modified in place.
    """
    model = learner.model
    for batch in pack(sequences, learner.config.train.tokens_per_microbatch, model.device):
        logprobs, _ = _score(learner, batch)
        for sequence, place in batch.responses():
            sequence.old_logprobs = logprobs[place]


@torch.no_grad()
def mean_entropy(learner: Learner, batches: list[Batch]) -> torch.Tensor:
    """Mean entropy over every token of an update, which some methods need before the first backward pass.

    Args:
        learner: Holds the policy.
        batches: All micro-batches of the update.

    Returns:
        0-d fp32, nats.
    """
    return torch.cat([_score(learner, batch)[1] for batch in batches]).mean()


def _score(learner: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    config = learner.config
    return packed_forward(learner.model, batch, config.compute_dtype, config.rollout.temperature)
