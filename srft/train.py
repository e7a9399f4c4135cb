"""Train a policy on demonstrations and on its own rollouts at once: ``python -m srft.train``. Read ``fit`` first."""

# ruff: noqa: E402
from __future__ import annotations

import sys

from srft.launch import share_cores, start_ranks
from srft.sampled import Sampled
from srft.stop import ALARMED, Stopped, leave_at_once

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds, in which a signal would end in a traceback of theirs
    share_cores()
    if "--dry-run" not in sys.argv:
        start_ranks(sys.argv[1:])  # what waits for the ranks of a run needs none of them

import os
import signal
from dataclasses import replace

import torch
import transformers

from srft.alarms import Alarm, Alarmed
from srft.config import Config
from srft.data.prompts import Prompt
from srft.data.sampler import sample_seed
from srft.engine.base import EngineError
from srft.evaluation.held_out import demo_loss, evaluate
from srft.learning import learn
from srft.methods import assign_advantages, place_in_method
from srft.options import exit_on_help, load_config
from srft.plan import dry_run
from srft.policy.export import export_policy
from srft.policy.lost import LostRank
from srft.policy.parallel import Elsewhere
from srft.prepare import Run, prepared
from srft.record.metrics import Clock, group_metrics, sample_rows
from srft.record.problems import Verdicts, trained_on
from srft.record.recorded import Recorded
from srft.record.rollouts import write_step
from srft.rollout import Actor
from srft.sync import CanaryError


def fit(config: Config) -> None:
    """Train: prompts, rollouts, rewards, advantages, packed fused loss, update, weights to the engine, log.

    With ``train.rollouts_only`` a step ends with its rewards and their record.

    Args:
        config: From ``options.load_config``.

    Raises:
        ValueError: For anything wrong with the options or the data, before a model is loaded.
        CanaryError: When the engine does not sample from the trainer's weights.
        EngineError: When an engine fails, or is lost more than ``engine.restarts`` times.
        LostRank: When another rank is gone, or did not come within ``train.collective_deadline_s``.
        WriteError: When the disk refuses; checkpoints that were written are whole.
        Stopped: On SIGTERM, Ctrl-C or SIGHUP, once the last whole step is saved; a second signal ends the process.
        Alarmed: After a step that raised an alarm among ``train.stop_on_alarm``, once it is saved.
    """
    train = config.train
    with prepared(config) as run:
        if train.rollouts_only:
            return _roll_out_only(run)
        _begin(run)
        for step in range(run.progress.step + 1, train.steps + 1):
            clock, is_last = Clock(run.world, step), step == train.steps
            torch.manual_seed(sample_seed(train.seed, step, "torch", run.world.rank))
            sampled = run.rollouts.take(step, clock)
            groups = sampled.groups
            run.stop.agree()
            with clock("train"):
                figures = learn(run.learner, groups, step)
            if not figures:
                run.log.say(f"Step {step}: {_why_nothing(sampled)}, so nothing was learned.")
            with clock("rollout"):
                run.rollouts.wait()
            with clock("sync"):
                synced = run.sync.push(step) if run.sync else {}
            run.log.samples(step, sample_rows(groups))
            run.log.problems(step, "training", trained_on(groups, run.world))
            if train.record_rollouts:
                # before the step counts as done: a run that goes on has every file up to where it does
                write_step(run.log.run_dir, sampled, config, run.world)
            row = {"step": step, **synced, **figures, **group_metrics(groups, run.world, sampled.gave_way)}
            row |= sampled.figures()
            if run.actor is not None:
                row["engine/restarts"] = run.actor.engine.restarts
            if step % train.eval_every == 0 or is_last:
                run.progress.reached(step, unlogged=row | clock.seconds())
                run.stop.release()  # a run stopped in here repeats the evaluation when it goes on
                with clock("eval"):
                    row |= _evaluated(run, step)
                run.stop.hold()
            config.method.note(row, run.learner.now(step))
            alarms = run.log.metrics(run.speed.with_figures(row | clock.seconds()))
            run.progress.reached(step, unlogged=None)
            ends = _ending(run, alarms)
            if step % train.save_every == 0 or is_last or ends:
                run.progress.save()
            run.stop.release()
            if ends and not is_last:
                raise Alarmed(ends[0])
        size = sum(p.numel() for p in run.learner.model.parameters())
        run.log.finish({"parameters": size} | export_policy(run.log.run_dir, run.learner))


def _roll_out_only(run: Run) -> None:
    """Make, judge and record what is left of the steps' rollouts, with the weights that the engine gets now."""
    config, world = run.learner.config, run.world
    assert run.sync is not None and isinstance(run.progress, Recorded)
    canary = run.sync.push(0)
    if world.first(run.log.last_step) < 0:
        run.log.metrics({"step": 0, **canary})
    for step in range(run.progress.step + 1, config.train.steps + 1):
        clock = Clock(world, step)
        sampled = run.rollouts.take(step, clock)
        run.stop.agree()
        assign_advantages(sampled.groups, config.method)
        run.log.samples(step, sample_rows(sampled.groups))
        run.log.problems(step, "training", trained_on(sampled.groups, world))
        write_step(run.log.run_dir, sampled, config, world, run.progress.facts())
        row = {"step": step, **group_metrics(sampled.groups, world, sampled.gave_way)}
        alarms = run.log.metrics(run.speed.with_figures(row | clock.seconds()))
        run.progress.reached(step, unlogged=None)
        if (ends := _ending(run, alarms)) and step < config.train.steps:
            raise Alarmed(ends[0])
    run.log.finish({"rollouts": str(run.log.run_dir / "rollouts")})


def _ending(run: Run, alarms: list[Alarm]) -> list[Alarm]:
    """The alarms among these that end the run, on every rank."""
    return run.world.first([alarm for alarm in alarms if alarm.alarm in run.learner.config.train.stop_on_alarm])


def _why_nothing(sampled: Sampled) -> str:
    if sampled.ended is not None and not sampled.ended[0]:
        return f"no group has ended, {sampled.ended[1]} go on"
    return "no sample was judged, or the method took none"


def _begin(run: Run) -> None:
    """Give the engine its weights, and write the row that lacks its evaluation: step 0's, or that of the stop."""
    done = run.progress.step
    synced = run.sync.push(done) if run.sync else {}
    row = {"step": 0, **synced} if done == 0 else run.progress.unlogged
    if row is not None and run.world.first(run.log.last_step) < done:
        row |= _evaluated(run, done)
        if done:
            run.learner.config.method.note(row, run.learner.now(done))
        run.log.metrics(row)


def _evaluated(run: Run, step: int) -> dict[str, float]:
    held_out = run.prompts.held_out
    if run.actor is None:
        return demo_loss(run.learner, held_out)
    own = _judged(run, run.actor, step, "held-out", "eval", held_out)
    figures = own | demo_loss(run.learner, held_out)
    for one in run.further:
        actor = replace(run.actor, pool=one.pool, begin=one.pool.begin)
        figures |= _judged(run, actor, step, one.name, f"eval/{one.name}", one.prompts)
    return figures


def _judged(run: Run, actor: Actor, step: int, name: str, prefix: str, prompts: list[Prompt]) -> dict[str, float]:
    train, verdicts = run.learner.config.train, Verdicts(actor.pool, [prompt.example for prompt in prompts])
    figures = evaluate(
        replace(actor, pool=verdicts), prompts, samples=train.eval_samples, temperature=train.eval_temperature,
        seed=train.seed, prefix=prefix,
    )  # fmt: skip
    run.log.problems(step, name, verdicts.counts(run.world))
    return figures


def main() -> None:
    """Read the command line, run ``fit``, and turn what a user can get wrong into one line."""
    arguments = sys.argv[1:]
    exit_on_help(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        if "--dry-run" in arguments:
            dry_run(load_config([argument for argument in arguments if argument != "--dry-run"]))
        else:
            fit(load_config(arguments))
    except Elsewhere:
        sys.exit(2)
    except Alarmed as alarmed:
        if os.environ.get("RANK", "0") == "0":
            print(_with_notes(alarmed), file=sys.stderr)
        sys.exit(ALARMED)
    except (ValueError, CanaryError, EngineError, LostRank, FloatingPointError, OSError) as error:
        print(f"error: {_with_notes(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        print(_with_notes(stopped), file=sys.stderr)
        sys.exit(stopped.exit_code)


def _with_notes(error: BaseException) -> str:
    text, notes = str(error), getattr(error, "__notes__", [])
    if place := place_in_method(error):
        notes = [f"raised at {place}", *notes]
    return ("\n" if "\n" in text else "; ").join([text, *notes])


if __name__ == "__main__":
    main()
