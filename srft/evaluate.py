"""Evaluate a run or a model as the paper does: ``python -m srft.evaluate runs/demo chain math500=path.jsonl``."""

# ruff: noqa: E402
from __future__ import annotations

import sys

from srft.launch import share_cores
from srft.stop import StopSignals, ends_in_a_line, leave_at_once

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds, in which a signal would end in a traceback of theirs
    share_cores()

import argparse
import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import GenerationConfig, PreTrainedTokenizerBase

from srft.config import Config
from srft.conversation import Environment, environment_of
from srft.data.files import is_local
from srft.data.templates import stop_token_ids
from srft.engine.base import Engine, EngineError, Sampling
from srft.engine.sampling import prompt_format
from srft.engine.start import start_engine
from srft.evaluation.answering import Drawing, answer_all, as_prompts, room_for, unreadable
from srft.evaluation.overlap import contamination
from srft.evaluation.page import write_page
from srft.evaluation.record import Answered, keep_settings, read_settings, taken
from srft.evaluation.sets import SETS, EvalSet, read_set
from srft.evaluation.subject import Subject, find_subject
from srft.evaluation.summary import make_tables, markdown, read_results, warnings
from srft.policy.adapter import base_of, is_adapter
from srft.policy.learner import Learner
from srft.policy.model import load_tokenizer
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import World
from srft.policy.weights import whole_tensors
from srft.prepare import choose_device, load_prepared
from srft.record.environment import describe_environment
from srft.record.files import write_atomically
from srft.record.text import format_seconds
from srft.report.table import on_terminal, plain
from srft.rewards.pool import RewardPool

_EPILOG = f"""\
Sets: {", ".join(SETS)}, from the hub or as name=file; or any source of data.train: a built-in task such as chain,
reasoning_gym:<task>, a file, a hub id. Killed at any moment, the same command goes on: no problem is answered twice."""
_TEMPERATURE, _MAX_NEW_TOKENS = 0.6, 8192  # the paper's


@dataclass(frozen=True)
class Asked:
    """One set with its problems as tokens, and what cannot be judged left out.

    Args:
        chosen: The set.
        drawing: How it is answered.
        pool: Judges it.
        left_out: By id, why a problem cannot be judged.
    """

    chosen: EvalSet
    drawing: Drawing
    pool: RewardPool
    left_out: dict[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the sets, judge, and write tables and page.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    given = _parser().parse_intermixed_args(argv)
    transformers.utils.logging.disable_progress_bar()
    with ends_in_a_line(ValueError, EngineError, OSError), StopSignals():
        evaluate(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srft.evaluate", description="Evaluate a run or a model on sets of problems.", epilog=_EPILOG
    )
    parser.add_argument("model", help="folder of a run, a checkpoint or a model; smollm2-135m; a hub id")
    parser.add_argument("words", nargs="+", metavar="set", help="a set, or section.key=value of the trainer's options")
    parser.add_argument("--samples", type=_positive, help="answers to each problem (default: the paper's, 32 or 1)")
    parser.add_argument("--k", type=_numbers, default=[], help="pass@k for these k, such as 4,8 (default: the samples)")
    parser.add_argument("--greedy", action="store_true", help="the most likely answer, once")
    parser.add_argument("--temperature", type=float, help=f"of sampling (default: {_TEMPERATURE})")
    parser.add_argument(
        "--max-new-tokens", type=_positive,
        help=f"of an answer (default: {_MAX_NEW_TOKENS}, or what the model has positions for)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of the order of options (default: 0)")
    parser.add_argument("--limit", type=_positive, help="first problems of each set (default: all)")
    parser.add_argument("--instruction", help="what follows a question of a named set (default: asks for a box)")
    parser.add_argument(
        "--trained-on", action="append", metavar="SOURCE",
        help="a training set to look for the problems in; again for another (default: files that the run trained on)",
    )  # fmt: skip
    parser.add_argument("--batch", type=_positive, help="answers drawn together (default: 512, of vLLM 2048)")
    parser.add_argument("--out", type=Path, help="folder (default: evaluation in the run's, or runs/evaluation/NAME)")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _numbers(text: str) -> list[int]:
    return [_positive(word) for word in text.split(",")]


def evaluate(given: argparse.Namespace) -> None:
    """Evaluate what a command line asks for; what is there already is not made again.

    Args:
        given: From the parser.

    Raises:
        ValueError: For what a user can get wrong.
        EngineError: When the engine fails.
        WriteError: When the disk refuses; what was written stays.
    """
    if given.greedy and (given.temperature or (given.samples or 1) > 1):
        raise ValueError("--greedy is temperature 0 and one answer; leave out --temperature and --samples")
    temperature = 0.0 if given.greedy else _TEMPERATURE if given.temperature is None else given.temperature
    if not (given.greedy or 0 < temperature <= 2):
        raise ValueError(f"--temperature is above 0 and at most 2, got {temperature}; for 0 give --greedy")
    options = [word for word in given.words if "." in word.partition("=")[0] and "=" in word or word.endswith(".toml")]
    names = [word for word in given.words if word not in options]
    if not names:
        raise ValueError(f"give a set to evaluate on: {', '.join(SETS)}, chain, or a file")
    subject = find_subject(given.model, options)
    config = subject.config
    out = given.out or (subject.out.with_name(subject.out.name + "-greedy") if given.greedy else subject.out)
    tokenizer = load_tokenizer(config.model)
    sets = [
        read_set(word, config, seed=given.seed, limit=given.limit, instruction=given.instruction) for word in names
    ]
    if len({chosen.name for chosen in sets}) < len(sets):
        raise ValueError(f"two of the sets have one name: {', '.join(chosen.name for chosen in sets)}; rename a file")
    with taken(out), ExitStack() as stack:
        environment = stack.enter_context(environment_of(config, tokenizer))
        asked = [_asked(chosen, given, subject, tokenizer, temperature, stack, environment) for chosen in sets]
        if given.k and max(given.k) > (most := max(one.drawing.samples for one in asked)):
            raise ValueError(f"--k {max(given.k)} is more than the answers to a problem, {most}; raise --samples")
        _keep(out, asked, given, subject, temperature)
        starting = _Starting(config, tokenizer, asked, out, stack)
        for one in asked:
            answered, clock = Answered(out, one.chosen.name), time.monotonic()
            _announce(one, answered)
            answer_all(one.drawing, answered, starting.engine, one.pool, tokenizer, _told(one.chosen.title, clock))
        _report(out, subject, given.k)


def _asked(
    chosen: EvalSet, given: argparse.Namespace, subject: Subject, tokenizer: PreTrainedTokenizerBase,
    temperature: float, stack: ExitStack, environment: Environment | None,
) -> Asked:  # fmt: skip
    config = subject.config
    pool = stack.enter_context(RewardPool(chosen.reward, config.reward.workers, config.reward.deadline_s))
    left_out = unreadable(chosen, pool)
    prompts = [p for p in as_prompts(chosen, config, tokenizer) if p.example.id not in left_out]
    longest = room_for(prompts, chosen.title, subject.positions, given.max_new_tokens, _MAX_NEW_TOKENS)
    ends = stop_token_ids(prompt_format(config, tokenizer), _end_tokens(config), config.rollout.stop)
    sampling = Sampling(temperature, longest, ends, tuple(config.rollout.stop))
    samples = 1 if given.greedy else given.samples or chosen.samples
    batch = given.batch or (config.engine.max_batch if _kind(config) == "hf" else 2048)
    return Asked(chosen, Drawing(prompts, samples, sampling, given.seed, batch, environment), pool, left_out)


def _end_tokens(config: Config) -> int | list[int] | None:
    """Those of the model's generation_config, where it has one."""
    source = config.model.name
    try:
        found = GenerationConfig.from_pretrained(base_of(source) if is_adapter(source) else source)
    except OSError:
        return None
    return found.eos_token_id


def _keep(
    out: Path, asked: Sequence[Asked], given: argparse.Namespace, subject: Subject, temperature: float
) -> None:
    config, trained_on = subject.config, given.trained_on
    if trained_on is None:
        known = [config.data.train, *filter(None, [config.data.demos])]
        trained_on = [source for source in known if is_local(source) and Path(source).expanduser().exists()]
    shared = contamination([one.chosen for one in asked], trained_on, read_settings(out).get("sets", {}))
    keep_settings(
        out,
        {
            "weights": subject.weights, "temperature": temperature, "seed": given.seed,
            "engine": _kind(config), "dtype": str(config.engine_dtype).removeprefix("torch."),
            "stop": config.rollout.stop, "rope_theta": config.model.rope_theta,
            **({"environment": config.env.name, "turns": config.env.max_turns} if config.env.name else {}),
        },
        {
            one.chosen.name: {
                "title": one.chosen.title, "source": one.chosen.source, "rows": one.chosen.rows,
                "left_out": one.left_out, **shared[one.chosen.name],
                "asked": {
                    "samples": one.drawing.samples, "max_new_tokens": one.drawing.sampling.max_new_tokens,
                    "temperature": temperature, "batch": one.drawing.batch, "reward": one.chosen.reward,
                },
            }
            for one in asked
        },
        {"model": subject.label, **describe_environment()},
    )  # fmt: skip


def _kind(config: Config) -> str:
    if config.engine.kind != "auto":
        return config.engine.kind
    return "vllm" if choose_device(config).type == "cuda" and importlib.util.find_spec("vllm") is not None else "hf"


class _Starting:
    """The engine of an evaluation, started when a problem is found that is not answered."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], out: Path, stack: ExitStack
    ) -> None:
        prompt = max(len(p.prompt_ids) for one in asked for p in one.drawing.prompts)
        completion = max(one.drawing.sampling.max_new_tokens for one in asked)
        # how long a sequence may be is what an engine makes room for
        self._config = config.model_copy(
            update={
                "data": config.data.model_copy(update={"max_prompt_tokens": prompt}),
                "rollout": config.rollout.model_copy(update={"max_new_tokens": completion}),
                # nothing is trained that it could sleep beside
                "engine": config.engine.model_copy(update={"kind": _kind(config), "sleep": None}),
            }
        )
        self._tokenizer, self._out, self._stack = tokenizer, out, stack
        self._engine: Engine | None = None

    def engine(self) -> Engine:
        if self._engine is None:
            config, tokenizer = self._config, self._tokenizer
            # a model that only goes to vLLM leaves the GPU to that
            world = World(device=choose_device(config)) if config.engine.kind == "hf" else World()
            model = load_prepared(config, tokenizer, None, world)
            learner = Learner(config, model, tokenizer, make_optimizer(model, config), world)
            self._engine = self._stack.enter_context(closing(start_engine(learner, self._out / "engine")))
            if config.engine.kind == "http":  # the others read the model when they start
                self._engine.update_weights(whole_tensors(model, config.engine_dtype), 0)
        return self._engine


def _announce(one: Asked, answered: Answered) -> None:
    """Say what is to come: on a slow machine the first batch takes long."""
    drawing = one.drawing
    if left := sum(prompt.example.id not in answered.rows for prompt in drawing.prompts):
        print(
            f"{one.chosen.title}: {left * drawing.samples} answers to draw, of at most "
            f"{drawing.sampling.max_new_tokens} tokens each, up to {max(drawing.batch, drawing.samples)} together",
            file=sys.stderr,
        )


def _told(title: str, since: float) -> Any:
    def say(so_far: dict[str, Any]) -> None:
        share = "" if so_far["accuracy"] is None else f", {so_far['accuracy']:.1%} right so far"
        took = format_seconds(time.monotonic() - since)
        print(f"{title}: {so_far['done']} of {so_far['of']} problems{share}, {took}", file=sys.stderr)

    return say


def _report(out: Path, subject: Subject, ks: Sequence[int]) -> None:
    results = read_results(out, ks)
    tables, sentences = make_tables(results, subject.label), warnings(results)
    title = f"Evaluation of {subject.label}"
    write_atomically(out / "table.md", markdown(title, tables, sentences))
    page = write_page(out, title, tables, sentences, results, read_settings(out))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(on_terminal(table))
    for sentence in sentences:
        console.print(plain(sentence), soft_wrap=True)
    console.print(plain(str(page)), soft_wrap=True)


if __name__ == "__main__":
    main()
