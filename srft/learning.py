"""Judged groups to moved weights: advantages, packing, fused loss, backward, optimizer; for the warm start too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from srft.batch import Batch, empty_batch, pack
from srft.importance import lag_figures, weigh, weigh_scored
from srft.methods import Figure, UpdateInfo, assign_advantages
from srft.policy.exchange import Exchange
from srft.policy.forwards import packed_forward
from srft.policy.gradients import TermGradients
from srft.policy.learner import Learner, kind_scales, term_scales, with_gradient
from srft.policy.model import compute
from srft.policy.parallel import whole as whole_of
from srft.policy.router import router_of, whole_load
from srft.record.metrics import combined, loss_metrics
from srft.responses import SCORES, Group, Response, Totals, count
from srft_kernels import PolicyLoss, linear_logprobs

# nats, of a token that a model excludes: differences of log-probabilities stay numbers
_LEAST = -1e4


def learn(learner: Learner, groups: list[Group], step: int) -> dict[str, float]:
    """Make the updates of a step from its groups.

    Args:
        learner: Its policy is moved.
        groups: This rank's, with rewards; their responses' advantages are filled in, and the entropies of those that
            were in a forward pass.
        step: Sets the learning rate.

    Returns:
        Losses, entropies, weights and the gradient norm, by metric name, the same on every rank; nothing where no
        response was judged.

    Raises:
        FloatingPointError: When losses or gradients were not finite in more updates in a row than
            ``train.max_skipped_updates``; the weights are as they were before the first of these.
    """
    config, world, now = learner.config, learner.world, learner.now(step)
    if config.method.resets_optimizer(now):
        learner.optimizer.state.clear()
    taught = [assign_advantages(part, config.method) for part in _parts(learner, groups)]
    counts = [_totals(learner, part) for part in taught]
    shares = learner.model.srft_traits.shares_prompts
    exchanges = [Exchange(world, with_gradient(learner, part), share_prompts=shares) for part in taught]
    held = [s for exchange in exchanges for s in exchange.held]
    behind = config.rollout.max_lag > 0 and any(totals.rollout_tokens for totals in counts)
    if len(exchanges) > 1 or (behind and config.method.needs_old):
        remember_old_logprobs(learner, held)
        if behind:
            weigh(held, config.rollout.is_cap, config.rollout.is_mode)
    if len(exchanges) > 1:
        remember_frozen(learner, held)
    filled = [(one.held, totals) for one, totals in zip(exchanges, counts, strict=True) if totals.tokens]
    every = config.train.grad_terms_every
    apart = measure_terms(learner, filled[0][0], step, filled[0][1]) if filled and every and step % every == 0 else {}
    figures = [update(learner, part, step, totals) for part, totals in filled]
    for exchange in exchanges:
        exchange.return_entropies()
    lag = lag_figures(held, step, config.rollout.is_cap, world) if behind else {}
    if more := config.method.further(groups, now, world.gather):
        # a response that was learned from has scores of the policy before, which others of these may lack
        held += (own := [_unscored(s) for s in world.own(more)])
        figures.append(update(learner, own, step))
    if not figures:
        return {}
    made = {"updates/made": len(figures), "tokens/trained": int(world.sum([sum(map(len, held))])[0])}
    return combined(figures) | apart | made | lag


def _unscored(s: Response) -> Response:
    copy = replace(s)
    for name in SCORES:
        setattr(copy, name, None)
    return copy


def _parts(learner: Learner, groups: list[Group]) -> list[list[Group]]:
    """This rank's groups by the update that takes them: the step's groups in order, cut into equal parts.

    Demonstrations that are groups by themselves are cut apart from the prompts, so that each update has its share.
    """
    world, updates = learner.world, learner.config.train.updates_per_step
    asked, shown = [g for g in groups if g.rollouts], [g for g in groups if not g.rollouts]
    parts: list[list[Group]] = [[] for _ in range(updates)]
    for own in (asked, shown):
        # where nobody has noted when they were drawn, each rank has one of every world.size groups
        drawn = world.gather([group.drawn for group in own])
        order = sorted((when, i, rank) for rank, of_rank in enumerate(drawn) for i, when in enumerate(of_rank))
        place = {(i, rank): number for number, (_, i, rank) in enumerate(order)}
        for i, group in enumerate(own):
            parts[place[i, world.rank] * updates // len(order)].append(group)
    return parts


def update(
    learner: Learner, sequences: list[Response], step: int, totals: Totals | None = None
) -> dict[str, Figure]:
    """Make one optimizer update from these sequences, however many ranks and micro-batches they fill.

    Args:
        learner: Its policy is moved.
        sequences: This rank's, with rewards and advantages, perhaps none; their ``entropy`` is filled in.
        step: Sets the learning rate.
        totals: Counts over all that the update learns from, where that is more than the sequences of all ranks: what
            ``with_gradient`` left out. None: they are all.

    Returns:
        Losses, entropies, weights and the gradient norm, by metric name, the same on every rank.

    Raises:
        FloatingPointError: When a loss or gradient is not finite, once more in a row than
            ``train.max_skipped_updates``; the weights are left as they were.
        ValueError: When the method's loss is no op.
    """
    config, model, optimizer = learner.config, learner.model, learner.optimizer
    totals = totals or _totals(learner, sequences)
    figures, _ = accumulate(learner, sequences, step, totals=totals)
    norm = whole_of(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)).item()
    lr = config.train.lr * min(1.0, step / max(1, config.train.lr_warmup_steps))
    lr *= max(kind_scales(learner, totals).values())
    for group in optimizer.param_groups:
        group["lr"] = lr
    skipped = _skipped(learner, step, norm, figures["loss/total"].value)
    if not skipped:
        optimizer.step()
    return {
        "lr": Figure(lr, "last"), "grad_norm": Figure(norm), "updates/skipped": Figure(skipped), **figures
    }  # fmt: skip


def measure_terms(
    learner: Learner, sequences: list[Response], step: int, totals: Totals | None = None
) -> dict[str, float]:
    """Compute the gradient of each term of the method's loss apart from the others, and compare them.

    The policy is left without a gradient, and its weights, moments and random numbers as they are.

    Args:
        learner: Its policy is measured.
        sequences: As for ``update``.
        step: The method may ask for it.
        totals: As for ``update``.

    Returns:
        ``grad/*`` as ``TermGradients.figures`` has it, before clipping and the learning rate; nothing for a method that
        names no terms.
    """
    kinds = learner.config.method.terms
    if not kinds:
        return {}
    totals = totals or _totals(learner, sequences)
    scales, none = term_scales(learner, totals), dict.fromkeys(kinds, 0.0)
    gradients = TermGradients(learner.model, learner.world)
    with torch.random.fork_rng():
        accumulate(learner, sequences, step, none, totals)
        gradients.set_apart()
        for term, kind in kinds.items():
            accumulate(learner, sequences, step, none | {term: scales[term]}, totals)
            gradients.add(term, kind)
    learner.optimizer.zero_grad(set_to_none=True)
    return gradients.figures()


def accumulate(
    learner: Learner,
    sequences: list[Response],
    step: int,
    scales: Mapping[str, float] | None = None,
    totals: Totals | None = None,
) -> tuple[dict[str, Figure], int]:
    """Compute the gradient of an update, the same whatever the ranks and micro-batches that share it.

    Args:
        learner: Its policy gets the gradient in the place of an older one.
        sequences: As for ``update``.
        step: The method may ask for it.
        scales: Factors of the terms of the method's loss, without the loss of routers; None: those of the options, and
            the whole loss.
        totals: As for ``update``.

    Returns:
        The figures of the loss, and how many micro-batches each rank had.

    Raises:
        ValueError: When the method's loss is no op.
    """
    config, model, world = learner.config, learner.model, learner.world
    if config.method.needs_old and world.largest(sum(s.old_logprobs is None for s in sequences)):
        remember_old_logprobs(learner, sequences)
    if _lack_scores(learner, sequences):
        remember_frozen(learner, sequences)
    given = _totals(learner, sequences)
    totals = totals or given
    batches = micro_batches(learner, sequences, totals)
    entropy, entropies = mean_entropies(learner, batches) if config.method.needs_entropy else (None, {})
    router, dtype = router_of(config, model) if scales is None else None, config.compute_dtype
    whole = UpdateInfo(
        totals, step, config.rollout.max_new_tokens, entropy, learner.memory,
        term_scales(learner, totals) if scales is None else scales, entropies,
        config.train.rollouts_per_prompt, config.train.demos_per_prompt,
    )  # fmt: skip
    learner.optimizer.zero_grad(set_to_none=True)
    outputs: list[PolicyLoss] = []
    dead: list[torch.Tensor] = []
    load = None
    if router is not None and (len(batches) > 1 or world.size > 1):
        load = whole_load(router, model, batches, dtype, world)
    balance = torch.zeros((), device=world.device)
    for batch in batches:
        out, gates = _fused_loss(learner, batch, whole, dead, router_logits=router is not None)
        aux = balance.new_zeros(())
        if router is not None:
            aux = router.loss(gates, load or router.load(gates, batch), batch) * (not batch.is_empty)
        (out.loss + aux).backward()
        balance += aux.detach()
        outputs.append(out)
    figures = loss_metrics(config.method, batches, outputs, whole, world)
    read, computed = world.sum([sum(map(len, sequences)), sum(len(b.input_ids) for b in batches if not b.is_empty)])
    figures["tokens/shared"] = Figure(1 - computed / read if read else 0.0, weight=read)
    skipped = totals.tokens - given.tokens
    figures["tokens/skipped"] = Figure(skipped / totals.tokens, weight=totals.tokens)
    if dead:
        own = sum(int(rows) for batch, rows in zip(batches, dead, strict=True) if not batch.is_empty)
        figures["tokens/dead"] = Figure((world.sum([own])[0] + skipped) / totals.tokens, weight=totals.tokens)
    if router is not None:
        (added,) = world.sum([balance.item()])
        figures["loss/router_aux"] = Figure(added)
        figures["loss/total"] = replace(figures["loss/total"], value=figures["loss/total"].value + added)
    return figures, len(batches)


def _totals(learner: Learner, sequences: list[Response]) -> Totals:
    return Totals(*map(int, learner.world.sum(astuple(count(sequences)))))


def micro_batches(
    learner: Learner, sequences: list[Response], totals: Totals, model: PreTrainedModel | None = None
) -> list[Batch]:
    """Pack this rank's sequences into as many micro-batches as every other rank has, at least one; some may be empty.

    Args:
        learner: Its configuration says how large they may be.
        sequences: This rank's.
        totals: Of the whole update.
        model: Computes them, and says whether they may share prompts; None: the policy.
    """
    device = learner.world.device
    shares = (model or learner.model).srft_traits.shares_prompts
    batches = pack(sequences, learner.config.microbatch_tokens, device, share_prompts=shares)
    scores = [name for name in SCORES if any(getattr(batch, name) is not None for batch in batches)]
    counts, known = zip(*learner.world.gather((len(batches), scores)), strict=True)
    return batches + [
        empty_batch(is_demo=not totals.rollout_sequences, scores=set().union(*known), device=device)
        for _ in range(max(1, *counts) - len(batches))
    ]


def _skipped(learner: Learner, step: int, norm: float, loss: float) -> bool:
    """Whether an update is left out since its numbers, the same on every rank, are not finite."""
    if math.isfinite(norm) and math.isfinite(loss):
        learner.skipped.count = 0
        return False
    learner.skipped.count += 1
    most = learner.config.train.max_skipped_updates
    if learner.skipped.count > most:
        before = f", after {most} such updates in a row that were left out" if most else ""
        raise FloatingPointError(
            f"step {step}: the gradient norm is {norm} and the loss {loss}{before}; "
            "lower the learning rate or the method's coefficients"
        )
    return True


def _fused_loss(
    learner: Learner, batch: Batch, whole: UpdateInfo, dead: list[torch.Tensor], *, router_logits: bool
) -> tuple[PolicyLoss, tuple[torch.Tensor, ...]]:
    """The loss of a micro-batch; its backward pass adds to ``dead`` the number of rows that it gives no gradient."""
    config = learner.config
    about = f"loss of method.name={config.method.name} must return an op of srft_kernels, bound by functools.partial, "

    def op(scores: tuple[torch.Tensor, torch.Tensor] | None = None) -> Callable[..., PolicyLoss]:
        if scores is not None:
            weigh_scored(batch, scores, config.rollout.is_cap, config.rollout.is_mode)
        loss = config.method.loss(batch, whole)
        if not callable(loss):
            raise ValueError(f"{about}got {loss!r}; return partial(linear_token_loss, ...)")
        return partial(loss, labels=batch.labels, temperature=config.rollout.temperature)

    # what an older policy's tokens count is known once this one has scored them, which the same forward pass does
    scores_first = config.rollout.max_lag > 0 and whole.totals.rollout_tokens > 0 and batch.importance is None
    scoring = partial(linear_logprobs, labels=batch.labels, temperature=config.rollout.temperature)
    out, gates = compute(
        learner.model, batch, config.compute_dtype, scoring if scores_first else op(), router_logits=router_logits,
        on_gradient=lambda rows: dead.append((rows == 0).all(-1).sum()), then=op if scores_first else None,
    )  # fmt: skip
    if not isinstance(out, PolicyLoss):
        raise ValueError(f"{about}and this one gave {type(out).__name__}; take linear_token_loss or its kin")
    return out, gates


@torch.no_grad()
def remember_old_logprobs(learner: Learner, sequences: list[Response]) -> None:
    """Store log-probabilities and entropies of the policy before a step's updates move it.

    Args:
        learner: Holds that policy.
        sequences: Everything this rank learns from in this step; modified in place.
    """
    for sequence, logprobs, entropy in _scored(learner, learner.model, sequences):
        sequence.old_logprobs, sequence.old_entropy = logprobs, entropy


@torch.no_grad()
def remember_frozen(learner: Learner, sequences: list[Response]) -> None:
    """Store the log-probabilities of the reference, and those of the teacher of rollouts, where the method has them.

    Args:
        learner: Holds these models, and the policy before a step's updates move it, which may be its own teacher.
        sequences: Everything this rank learns from in this step; modified in place.
    """
    method, frozen = learner.config.method, learner.frozen
    if method.needs_ref:
        with frozen.scoring("reference", learner.model) as model:
            for sequence, logprobs, _ in _scored(learner, model, sequences):
                sequence.ref_logprobs = logprobs.clamp(min=_LEAST)
    if method.taught_by is None:
        return
    read = {}
    for s in sequences:
        s.teacher_logprobs = torch.zeros(s.num_own, device=learner.world.device)
        if not s.is_demo:
            as_taught = replace(s, prompt_ids=s.teacher_prompt_ids or s.prompt_ids)
            read[id(as_taught)] = (as_taught, s)
    with frozen.scoring(method.taught_by, learner.model) as model:
        for as_taught, logprobs, _ in _scored(learner, model, [each for each, _ in read.values()]):
            read[id(as_taught)][1].teacher_logprobs = logprobs.clamp(min=_LEAST)


def _lack_scores(learner: Learner, sequences: list[Response]) -> int:
    """How many responses lack what frozen models say of them, on the rank that has most of these."""
    method = learner.config.method
    asked = [name for name in ("ref_logprobs",) if method.needs_ref]
    asked += [name for name in ("teacher_logprobs",) if method.taught_by is not None]
    return learner.world.largest(sum(getattr(s, name) is None for s in sequences for name in asked)) if asked else 0


def _scored(
    learner: Learner, model: PreTrainedModel, sequences: list[Response]
) -> Iterator[tuple[Response, torch.Tensor, torch.Tensor]]:
    """Each response of this rank with the log-probabilities and the entropies that a model gives its tokens."""
    for batch in micro_batches(learner, sequences, count(sequences), model):
        logprobs, entropy = _score(learner, batch, model)
        if not batch.is_empty:
            for sequence, place in batch.responses():
                yield sequence, logprobs[place], entropy[place]


@torch.no_grad()
def mean_entropies(learner: Learner, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean entropies over an update, which some methods need before the first backward pass.

    Args:
        learner: Holds the policy.
        batches: All micro-batches of this rank.

    Returns:
        Over every token, 0-d fp32, and of each kind of token that there is, "rollout" and "demo"; nats, the same on
        every rank.
    """
    device = learner.world.device
    entropy, is_demo = [torch.zeros(0, device=device)], [torch.zeros(0, dtype=torch.bool, device=device)]
    for batch in batches:
        scored = _score(learner, batch)[1]
        if not batch.is_empty:
            entropy.append(scored)
            is_demo.append(batch.is_demo)
    every, demo = torch.cat(entropy).double(), torch.cat(is_demo)
    sums = torch.stack([every[~demo].sum(), every[demo].sum(), (~demo).sum(), demo.sum()])
    rollouts, demos, num_rollout, num_demo = learner.world.sum(sums.tolist())
    kinds = {"rollout": (rollouts, num_rollout), "demo": (demos, num_demo)}
    mean = torch.tensor((rollouts + demos) / (num_rollout + num_demo), dtype=torch.float32, device=device)
    return mean, {kind: total / count for kind, (total, count) in kinds.items() if count}


def _score(
    learner: Learner, batch: Batch, model: PreTrainedModel | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    config = learner.config
    return packed_forward(model or learner.model, batch, config.compute_dtype, config.rollout.temperature)
