"""Train a policy on demonstrations and on its own rollouts at once: ``python -m srft.train``. Read ``fit`` first."""

# ruff: noqa: E402
from __future__ import annotations

from srft.stop import Stopped, StopSignals, leave_at_once

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds, in which a signal would end in a traceback of theirs

import random
import signal
import sys
from contextlib import closing
from dataclasses import replace

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.batch import Batch, Group, Response, count, pack, unweighted
from srft.config import Config
from srft.data.problems import data_state
from srft.data.prompts import Prompt
from srft.data.sampler import PromptSampler, sample_seed
from srft.data.templates import completion_text
from srft.engine.base import Engine, EngineError, Sampling
from srft.engine.sampling import describe_ends, make_sampling
from srft.evaluate import evaluate
from srft.methods import assign_advantages, method_loss, needs_demos, needs_rollouts, token_weight
from srft.options import exit_on_help, load_config, to_toml
from srft.policy.checkpoint import export_model
from srft.policy.forwards import packed_forward
from srft.policy.model import head_of, load_tokenizer, run_body
from srft.policy.router import router_of, whole_load
from srft.prepare import (
    choose_device,
    describe_step,
    load_policy,
    make_optimizer,
    make_prompts,
    read_problems,
    start_engine,
)
from srft.record.folder import refuse_other_data, run_folder
from srft.record.log import RunLog
from srft.record.metrics import Clock, Figure, combined, group_metrics, loss_metrics, sample_rows
from srft.record.progress import Progress
from srft.report.build import build_report
from srft.rewards.pool import RewardPool
from srft.sync import CanaryError, WeightSync
from srft_kernels import PolicyLoss


def fit(config: Config) -> None:
    """Train: prompts, rollouts, rewards, advantages, packed fused loss, update, weights to the engine, log.

    Args:
        config: From ``config.load_config``.

    Raises:
        ValueError: For anything wrong with the options or the data, before a model is loaded.
        CanaryError: When the engine does not sample from the trainer's weights.
        WriteError: When the disk refuses; checkpoints that were written are whole.
        Stopped: On SIGTERM, Ctrl-C or SIGHUP, once the last whole step is saved; a second signal ends the process.
    """
    train, device = config.train, choose_device(config)
    tokenizer = load_tokenizer(config.model)
    problems = read_problems(config)
    with (
        StopSignals() as stop,
        run_folder(config) as (run_dir, checkpoint),
        RewardPool(problems.reward, config.reward.workers, config.reward.deadline_s) as pool,
    ):
        data = data_state(problems)
        refuse_other_data(config, data, checkpoint)
        prompts, held_out, data_note = make_prompts(config, problems, tokenizer, pool)
        model, proof = load_policy(config, tokenizer, prompts, held_out, pool, checkpoint, device)
        sampling = make_sampling(config, tokenizer, model)
        optimizer = make_optimizer(model, config)
        # a step is abandoned without a trace until its first update moves the weights, and finished from then on
        optimizer.register_step_pre_hook(lambda *_: stop.hold())
        sampler = PromptSampler(len(prompts), train.seed)
        progress = Progress(run_dir, config, model, tokenizer, optimizer, sampler, data)
        if checkpoint is not None:
            progress.restore(checkpoint)
        done = progress.step
        with (
            closing(start_engine(config, model, tokenizer, run_dir, device)) as engine,
            RunLog(run_dir, total_steps=train.steps, config_text=to_toml(config.without_resume()),
                   title=f"{config.method.name} · {config.data.train}",
                   resume_step=done if train.resume else None, report=build_report) as log,
            progress.saved_when_stopped(),
        ):  # fmt: skip
            log.say(f"{describe_step(config, model, data_note)} {describe_ends(sampling, tokenizer)}")
            log.say(proof.sentence())
            sync = WeightSync(model, engine, _probe(prompts, config), config)
            canary = sync.push(done)
            row = {"step": 0, **canary} if done == 0 else progress.unlogged
            if row is not None and log.last_step < done:
                log.metrics(row | evaluate(engine, tokenizer, held_out, pool, sampling))
            for step in range(done + 1, train.steps + 1):
                clock = Clock()
                torch.manual_seed(sample_seed(train.seed, step, "torch", 0))
                with clock("rollout"):
                    chosen = [prompts[i] for i in sampler.next(train.prompts_per_step)]
                    groups = roll_out(config, engine, sampling, tokenizer, chosen, step)
                with clock("reward"):
                    judge(groups, pool)
                with clock("train"):
                    parts = _parts(groups, train.updates_per_step)
                    sequences = [assign_advantages(part, config.method) for part in parts]
                    if train.updates_per_step > 1:
                        remember_old_logprobs(config, model, [s for part in sequences for s in part])
                    updates = [update(config, model, optimizer, part, step) for part in sequences if part]
                if not updates:
                    log.say(f"Step {step}: no sample was judged, so nothing was learned.")
                with clock("sync"):
                    canary = sync.push(step)
                log.samples(step, sample_rows(groups))
                row = {"step": step, **canary, **combined(updates), **group_metrics(groups)}
                if step % train.eval_every == 0 or step == train.steps:
                    progress.reached(step, unlogged=row | clock.seconds())
                    stop.release()  # a run stopped in here repeats the evaluation when it goes on
                    with clock("eval"):
                        row |= evaluate(engine, tokenizer, held_out, pool, sampling)
                    stop.hold()
                log.metrics(row | clock.seconds())
                progress.reached(step, unlogged=None)
                if step % train.save_every == 0 or step == train.steps:
                    progress.save()
                stop.release()
            export_model(run_dir / "model", model, tokenizer)
            log.finish({"model": str(run_dir / "model")})


def roll_out(
    config: Config,
    engine: Engine,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    step: int,
) -> list[Group]:
    """Sample completions and join each prompt's demonstrations to them.

    Args:
        config: The whole configuration.
        engine: Holds the current policy.
        sampling: How to draw.
        tokenizer: Turns completions back to text.
        prompts: One group is made of each.
        step: Part of every sample's seed.
    """
    groups = [Group(p) for p in prompts]
    if needs_rollouts(config.method):
        samples = range(config.train.rollouts_per_prompt)
        # the place in the batch tells two copies of a prompt apart where a batch crosses into the next epoch
        uids = [f"{p.example.id}@{place}" for place, p in enumerate(prompts)]
        seeds = [[sample_seed(config.train.seed, step, uid, k) for k in samples] for uid in uids]
        for group, drawn in zip(
            groups, engine.generate([p.prompt_ids for p in prompts], sampling, seeds), strict=True
        ):
            group.rollouts = [
                Response(group.prompt.prompt_ids, c.token_ids, is_demo=False, truncated=c.finish == "length",
                         rollout_logprobs=c.logprobs,
                         text=completion_text(tokenizer, c.token_ids, group.prompt.opened, sampling.stop))
                for c in drawn
            ]  # fmt: skip
    if needs_demos(config.method):
        for place, group in enumerate(groups):
            prompt, most = group.prompt, config.train.demos_per_prompt
            seed = sample_seed(config.train.seed, step, f"{prompt.example.id}@{place}", -1)
            # of more demonstrations than are joined, others at every visit
            chosen = sorted(random.Random(seed).sample(range(len(prompt.demo_ids)), most))
            group.demos = [
                Response(prompt.prompt_ids, prompt.demo_ids[i], is_demo=True, truncated=False, rollout_logprobs=[],
                         text=prompt.example.demos[i])
                for i in chosen
            ]  # fmt: skip
    return groups


def judge(groups: list[Group], pool: RewardPool) -> None:
    """Give every rollout and demonstration its reward.

    Args:
        groups: Modified in place.
        pool: The verifiers; demonstrations are judged like rollouts, so a bad one earns nothing.
    """
    members = [(s, g.prompt.example) for g in groups for s in (*g.rollouts, *g.demos)]
    results = pool.score([(s.text, example.answer, example.row) for s, example in members])
    for (sequence, _), result in zip(members, results, strict=True):
        sequence.reward, sequence.status, sequence.message = result.value, result.status, result.message


def update(
    config: Config,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    sequences: list[Response],
    step: int,
) -> dict[str, Figure]:
    """Make one optimizer update from these sequences, however many micro-batches they fill.

    Args:
        config: The whole configuration.
        model: The policy.
        optimizer: Holds its parameters.
        sequences: With rewards and advantages; their ``entropy`` is filled in.
        step: Sets the learning rate.

    Returns:
        Losses, entropies, weights and the gradient norm, by metric name.

    Raises:
        FloatingPointError: When the gradient is not finite; the weights are left as they were.
    """
    totals = count(sequences)
    batches = pack(sequences, config.train.tokens_per_microbatch, token_weight(config, totals), model.device)
    entropy = mean_entropy(config, model, batches) if config.method.scope == "batch" else None
    optimizer.zero_grad(set_to_none=True)
    outputs: list[PolicyLoss] = []
    router, dtype = router_of(config, model), config.compute_dtype
    load = whole_load(router, model, batches, dtype) if router is not None and len(batches) > 1 else None
    balance = torch.zeros((), device=model.device)
    for batch in batches:
        hidden_states, gates = run_body(model, batch, dtype, router_logits=router is not None)
        out = method_loss(config, hidden_states, head_of(model), batch, totals, entropy)
        aux = router.loss(gates, load or router.load(gates)) if router is not None else balance.new_zeros(())
        (out.loss + aux).backward()
        balance += aux.detach()
        outputs.append(out)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {norm.item()}; lower train.lr or the method's coefficients"
        )
    lr = config.train.lr * min(1.0, step / max(1, config.train.lr_warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    figures = loss_metrics(config.method, batches, outputs, totals)
    if router is not None:
        figures["loss/router_aux"] = Figure(balance.item())
        figures["loss/total"] = replace(figures["loss/total"], value=figures["loss/total"].value + balance.item())
    return {"lr": Figure(lr, "last"), "grad_norm": Figure(norm.item()), **figures}


@torch.no_grad()
def remember_old_logprobs(config: Config, model: PreTrainedModel, sequences: list[Response]) -> None:
    """Store the log-probabilities of the policy that sampled, before several updates move it.

    Args:
        config: The whole configuration.
        model: The policy.
        sequences: Everything this step learns from; modified in place.
    """
    for batch in pack(sequences, config.train.tokens_per_microbatch, unweighted, model.device):
        logprobs, _ = _score(config, model, batch)
        for sequence, place in batch.responses():
            sequence.old_logprobs = logprobs[place]


@torch.no_grad()
def mean_entropy(config: Config, model: PreTrainedModel, batches: list[Batch]) -> torch.Tensor:
    """Mean entropy over every token of an update, which the "batch" scope needs before the first backward pass.

    Args:
        config: The whole configuration.
        model: The policy.
        batches: All micro-batches of the update.

    Returns:
        0-d fp32, nats.
    """
    return torch.cat([_score(config, model, batch)[1] for batch in batches]).mean()


def _score(config: Config, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return packed_forward(model, batch, config.compute_dtype, config.rollout.temperature)


def _parts(groups: list[Group], parts: int) -> list[list[Group]]:
    size = len(groups) // parts
    return [groups[i : i + size] for i in range(0, len(groups), size)]


def _probe(prompts: list[Prompt], config: Config) -> list[list[int]]:
    """A few prompts, with their demonstrations where they have some, cut to what an engine can score."""
    most = min(256, config.longest_sequence - 1)
    whole = [p.prompt_ids + (p.demo_ids[0] if p.demo_ids else []) for p in prompts[:4]]
    return [(ids if len(ids) > 1 else ids * 2)[:most] for ids in whole]


def main() -> None:
    """Read the command line, run ``fit``, and turn what a user can get wrong into one line."""
    arguments = sys.argv[1:]
    exit_on_help(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        fit(load_config(arguments))
    except (ValueError, CanaryError, EngineError, FloatingPointError, OSError) as error:
        print(f"error: {_with_notes(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        print(_with_notes(stopped), file=sys.stderr)
        sys.exit(stopped.exit_code)


def _with_notes(error: BaseException) -> str:
    text = str(error)
    return ("\n" if "\n" in text else "; ").join([text, *getattr(error, "__notes__", [])])


if __name__ == "__main__":
    main()
