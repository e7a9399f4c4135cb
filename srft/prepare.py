"""Everything before the first step: data, policy, engine; all that a user can get wrong fails here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.alarms import Watch
from srft.config import Config
from srft.conversation import Environment, environment_of
from srft.data.problems import data_state
from srft.data.sampler import StepSampler
from srft.dataset import Prompts, make_prompts, read_problems, warm_starts
from srft.engine.base import Sampling
from srft.engine.placement import place_engines
from srft.engine.sampling import describe_ends, make_sampling
from srft.engine.start import cores_divided, engine_bytes, start_engine
from srft.evaluation.held_out import FurtherSet, further_sets
from srft.models import with_local_model
from srft.options import to_toml
from srft.planning.speed import Speed
from srft.policy.adapter import base_of, first_adapters, is_adapter, put_adapters
from srft.policy.budget import choose_tokens_per_microbatch
from srft.policy.checkpoint import read_state
from srft.policy.compiled import refuse_no_compiler
from srft.policy.frozen import Frozen, load_frozen
from srft.policy.learner import Learner
from srft.policy.loading import fill, skeleton
from srft.policy.lora import fill_adapters, without_adapters
from srft.policy.model import allow_sharing, build_tiny, load_model, load_tokenizer, prepare_policy, read_config
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import World, joined
from srft.policy.proof import Proof, prove
from srft.record.files import write_atomically
from srft.record.folder import METHOD_FILE, refuse_other_data, run_folder
from srft.record.history import RunRecord, load_record
from srft.record.log import NoLog, RunLog
from srft.record.progress import Progress
from srft.record.recorded import Recorded
from srft.record.trackers import open_trackers, refuse_absent
from srft.record.waiting import Waiting
from srft.replay import Replay, describe_replay, refuse_unfit_record
from srft.report.build import build_report
from srft.rewards.pool import RewardPool
from srft.rollout import Actor, refuse_long_lessons
from srft.rollouts import Rollouts, describe_lag, describe_parts, describe_step
from srft.stop import StopSignals
from srft.sync import WeightSync, make_probe
from srft.warm_start import cached_start, keep_start, warm_start
from srft.worst_case import worst_case


@dataclass(frozen=True)
class Run:
    """What a step needs, built once.

    Args:
        world: The ranks that make it together.
        prompts: What it asks.
        actor: Answers it, and judges the answers; None where rollouts are replayed.
        rollouts: Each step's, drawn, answered and judged, or recorded ones.
        learner: Moves the policy.
        sync: Brings the policy to the actor's engine, where there is one.
        stop: Signals wait from the first moved weight of a step until ``release``.
        progress: The last whole step, and its checkpoint, or its record.
        log: The record.
        speed: Measures each step beside what its devices allow.
        further: Sets that are evaluated beside the held-out problems.
    """

    world: World
    prompts: Prompts
    actor: Actor | None
    rollouts: Rollouts | Replay
    learner: Learner
    sync: WeightSync | None
    stop: StopSignals
    progress: Progress | Recorded
    log: RunLog | NoLog
    speed: Speed
    further: list[FurtherSet] = field(default_factory=list)


@contextmanager
def prepared(config: Config) -> Iterator[Run]:
    """Read the data, load or build the policy, start its engine, and resume where the options say so.

    What ends the body closes all that was opened; a signal saves the last whole step first.

    Args:
        config: From ``options.load_config``.

    Raises:
        ValueError: For anything wrong with the options or the data, before a model is loaded.
        WriteError: When the disk refuses.
    """
    refuse_absent(config)
    refuse_no_compiler(config.model.compile, choose_device(config))
    config = with_local_model(config)
    tokenizer = load_tokenizer(config.model)
    _refuse_few_positions(config)
    refuse_unfit_record(config)
    problems = read_problems(config)
    with (
        joined(config, choose_device(config)) as world,
        StopSignals(world.largest if world.size > 1 else None) as stop,
        run_folder(config, world) as (run_dir, checkpoint),
        RewardPool(problems.reward, config.reward.workers, config.reward.deadline_s) as pool,
        environment_of(config, tokenizer) as environment,
        ExitStack() as pools,
    ):
        if not config.train.replay:
            place_engines(config, world)  # for what it refuses
        data = data_state(problems)
        _refuse_differences(config, data, world)
        refuse_other_data(config, data, checkpoint)
        prompts = make_prompts(config, problems, tokenizer, pool, world)
        further = [] if config.train.replay or config.train.rollouts_only else further_sets(config, tokenizer, pools)
        learner, proof = load_policy(config, tokenizer, prompts, pool, environment, checkpoint, world)
        if config.method.shows_demos:
            refuse_long_lessons(config, learner, prompts.train)
        speed = Speed(learner)
        sampling = make_sampling(config, tokenizer, learner.model)
        # a step is abandoned without a trace until its first update moves the weights, and finished from then on
        learner.optimizer.register_step_pre_hook(lambda *_: stop.hold())
        sampler = StepSampler(len(prompts.train), len(prompts.demos), config.train.seed)
        waiting = Waiting(prompts.train, prompts.demos)
        progress: Progress | Recorded
        if config.train.rollouts_only:
            progress = Recorded(run_dir, sampler, data, world)
        else:
            progress = Progress(run_dir, learner, sampler, data, waiting)
        progress.restore(checkpoint)
        with (
            cores_divided(config, world) as threads,
            _answering(learner, sampling, pool, environment, run_dir / "engine", threads) as actor,
            _record(config, run_dir, progress, world) as log,
        ):
            rollouts: Rollouts | Replay
            if actor is None:
                rollouts = Replay(learner, prompts)
            else:
                rollouts = Rollouts(learner, prompts, sampler, actor, waiting, threads)
            # a batch that is being made is waited for once the last whole step is saved, or a lost rank is named
            with closing(rollouts), progress.saved_when_stopped(), world.naming_lost():
                if config.method.file_text and world.is_first:
                    write_atomically(run_dir / METHOD_FILE, config.method.file_text)
                log.say(f"{describe_step(learner, prompts.note)} {describe_ends(sampling, tokenizer)}")
                if actor is None:
                    log.say(describe_replay(config))
                else:
                    if config.rollout.segments > 1:
                        log.say(describe_parts(config))
                    if config.rollout.steps_ahead:
                        log.say(describe_lag(config, threads, world.size))
                if proof is not None:
                    log.say(proof.sentence())
                sync = None
                if actor is not None:
                    probe = make_probe(prompts.train, config, world)
                    sync = WeightSync(learner.model, actor.engine, probe, config, world)
                    actor.engine.sleep()
                if not config.train.rollouts_only:
                    log.say(worst_case(learner))
                yield Run(world, prompts, actor, rollouts, learner, sync, stop, progress, log, speed, further)


@contextmanager
def _answering(
    learner: Learner, sampling: Sampling, pool: RewardPool, environment: Environment | None, folder: Path,
    threads: int | None,
) -> Iterator[Actor | None]:
    """What answers and judges, with an engine of its own; nobody where rollouts are replayed."""
    if learner.config.train.replay:
        yield None
        return
    with closing(start_engine(learner, folder, threads)) as engine:
        yield Actor(engine, sampling, learner.tokenizer, pool, learner.world.beside(), environment, pool.begin)


def _refuse_differences(config: Config, data: dict[str, Any], world: World) -> None:
    """Check that the ranks, which read options and data by themselves, have read the same."""
    for what, own in (("options", to_toml(config)), ("rows of data", data)):
        if other := [rank for rank, theirs in enumerate(world.gather(own)) if theirs != world.first(own)]:
            raise ValueError(
                f"rank {other[0]} has other {what} than the first; start every rank with the same command, on files "
                "that all machines share"
            )


def _record(
    config: Config, run_dir: Path, progress: Progress | Recorded, world: World
) -> AbstractContextManager[RunLog | NoLog]:
    """The record of the run, which the first rank keeps."""
    if not world.is_first:
        return nullcontext(NoLog(run_dir))
    resume_step = progress.step if config.train.resume else None
    return RunLog(
        run_dir, total_steps=config.train.steps, config_text=to_toml(config.without_resume()),
        title=f"{config.method.label} · {config.data.train}",
        resume_step=resume_step, report=build_report if config.train.page else _unreported,
        curves=config.method.curves,
        trackers=open_trackers(config, run_dir, resume_step),
        watch=Watch(config.alarms, config.train.prompts_per_step),
    )  # fmt: skip


def _unreported(run_dir: Path) -> RunRecord:
    """What there is to tell of a run whose plots and page nobody has drawn."""
    record = load_record(run_dir)
    return replace(record, places=[place for place in record.places if place[0] not in ("page", "plots")])


def choose_device(config: Config) -> torch.device:
    """Return where the trainer computes.

    Args:
        config: The whole configuration.

    Raises:
        ValueError: When CUDA is asked for and absent.
    """
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device=cuda, but torch sees no GPU; set train.device=cpu or install a CUDA build of torch"
        )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if config.train.device == "auto" else config.train.device)


def load_policy(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    pool: RewardPool,
    environment: Environment | None,
    checkpoint: Path | None,
    world: World,
) -> tuple[Learner, Proof | None]:
    """Load the policy from a checkpoint, a folder or a hub, or build it and give it its short supervised start.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
        prompts: For the supervised start.
        pool: The verifiers.
        environment: What the policy talks to in that start, if anything.
        checkpoint: To resume from, or None.
        world: The ranks; the first gives a model its start while the others wait.

    Returns:
        The policy with a new optimizer and the tokens that a forward pass may have, and the proof that it computes on
        packed sequences what it is; where nothing is learned, without these tokens and that proof.

    Raises:
        ValueError: When it cannot be read, fails that proof, or leaves no room for a sequence.
    """
    start: Path | None = None
    # adapters are of a model in a folder, which they name
    is_made = config.model.name == "tiny" and (warm_starts(config) or config.model.lora.rank)
    if is_made and (checkpoint is None or _keeps_start(config)):
        kept = None if checkpoint is None else read_state(checkpoint).get("start")
        start = world.on_first(lambda: _started(config, tokenizer, prompts, pool, environment, world.device, kept))
    model = load_prepared(config, tokenizer, checkpoint or start, world)
    if config.train.rollouts_only:
        return Learner(config, model, tokenizer, make_optimizer(model, config), world), None
    proof = prove(model, config)
    frozen = frozen_models(config, tokenizer, start, world)
    if frozen.start and frozen.reference is not None:
        allow_sharing(frozen.reference, model.srft_traits.shares_prompts)
    engine = 0 if config.train.replay else engine_bytes(config, model, world)
    tokens = choose_tokens_per_microbatch(config, model, world, engine)
    config = config.model_copy(update={"train": config.train.model_copy(update={"tokens_per_microbatch": tokens})})
    return Learner(config, model, tokenizer, make_optimizer(model, config), world, frozen=frozen), proof


def _refuse_few_positions(config: Config) -> None:
    name = config.model.name
    if name == "tiny":
        return
    text = read_config(base_of(name) if is_adapter(name) else name, config.model).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    # dynamic NTK goes on beyond them by design
    scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if positions is not None and config.longest_sequence > positions and not scaled:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {config.longest_sequence} and model.name={name} has "
            f"positions for {positions} tokens; lower them, or set model.max_position_embeddings and model.rope_theta"
        )


def _keeps_start(config: Config) -> bool:
    """Whether a copy of the policy as the run starts is its reference; under new adapters the policy itself is that."""
    options = config.model
    return config.wants_reference and not options.reference and (not options.lora.rank or is_adapter(options.name))


def frozen_models(config: Config, tokenizer: PreTrainedTokenizerBase, start: Path | None, world: World) -> Frozen:
    """Load the models that the method wants beside the policy: the same ones when a run is resumed.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
        start: Folder of the policy as the run started, where it was built from scratch and stored; else None.
        world: The ranks.

    Raises:
        ValueError: When one cannot be read, or does not go with the policy.
    """
    named, taught_by = config.model.reference, config.method.taught_by
    reference = teacher = None
    if named is not None:
        reference = load_frozen("model.reference", named, config, tokenizer, world)
    elif _keeps_start(config):
        reference = load_prepared(config, tokenizer, start, world).requires_grad_(False)
    if taught_by is not None and taught_by not in ("policy", "reference"):
        teacher = load_frozen("method.teacher", taught_by, config, tokenizer, world)
    return Frozen(reference, teacher, start.name if start is not None and _keeps_start(config) else "")


def _started(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    pool: RewardPool,
    environment: Environment | None,
    device: torch.device,
    kept: str | None,
) -> Path:
    """The folder of a model built from scratch, after its supervised start, made where there is none yet.

    A resumed run, whose options may differ in what is free to change, has ``kept``, the name of its own.
    """
    folder = cached_start(config, prompts, pool.kind)
    if kept and (folder.parent / kept / "config.json").exists():
        return folder.parent / kept
    if kept and kept != folder.name:
        raise ValueError(
            f"the model that the run started from, {folder.parent / kept}, is not there, and with these options "
            "another would be made; bring it back, restore the options, or set another name"
        )
    if not (folder / "config.json").exists():
        config, alone = without_adapters(config), World(device=device)
        model = load_prepared(config, tokenizer, None, alone)
        learner = Learner(config, model, tokenizer, make_optimizer(model, config), alone)
        if warm_starts(config):
            warm_start(learner, prompts, pool, environment)
        keep_start(folder, learner)
    return folder


def load_prepared(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path | None, world: World
) -> PreTrainedModel:
    """Load or build the policy with its adapters, as training needs it; of a sharded one a rank reads its part.

    Args:
        config: The whole configuration.
        tokenizer: The policy's.
        folder: Of a model, or of adapters; None takes what the options say.
        world: The ranks.

    Raises:
        ValueError: When it cannot be read, or cannot be trained.
    """
    remote, name = config.model.trust_remote_code, config.model.name
    source = name if folder is None and name != "tiny" else folder
    base = base_of(source) if source is not None and is_adapter(source) else source
    if base is None:
        model = build_tiny(config.model, tokenizer, config.longest_sequence, config.train.seed)
    else:
        load = load_model if world.mesh is None else skeleton
        model = load(base, trust_remote_code=remote, config=read_config(base, config.model))
    rows = model.get_input_embeddings().num_embeddings
    if folder is None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {name} embeddings for {rows}; "
            "set model.tokenizer to the model's own"
        )
    put_adapters(model, source or name, config)
    prepare_policy(model, config.model, config.microbatch_tokens, world)
    if base is not None and world.mesh is not None:
        fill(model, base, world)
        fill_adapters(model, first_adapters(model, source or name, config))
    return model
