"""A whole GRPO step beside its arithmetic floor and beside TRL's, in one run: python -m benchmarks.trainer_step.

Model, weights, prompts, reward and lengths are the same: every completion has exactly as many tokens as it may, so that
nobody skips work, and no two rewards of a group need be alike. Each round is a measurement of the machine's rate of
products, a step of ours and a step of TRL's; the first is not counted. On a CPU both compute in fp32, on a GPU in bf16
with gradient checkpointing, which is TRL's default.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from benchmarks import device as devices
from srft.config import Config
from srft.learning import learn
from srft.options import load_config
from srft.planning.models import ModelShape, measure_shape
from srft.planning.pace import training_flops
from srft.policy.compiled import as_written
from srft.policy.model import allow_sharing, build_tiny, byte_tokenizer
from srft.prepare import Run, prepared

PROMPT = 10  # tokens, one a byte, at least
REWARD = "def reward(completion, answer, row):\n    return sum(map(ord, completion)) * 7919 % 10007 / 10007\n"
RATE = 1e-6
INSTALL = "pip install --no-deps trl==1.16.0 accelerate"


class Spent(NamedTuple):
    """Seconds by the clock, and those that this process's threads computed, which other work does not lengthen."""

    clock: float
    cpu: float


@contextlib.contextmanager
def spent(into: dict[str, list[Spent]], part: str) -> Iterator[None]:
    """Note what the body takes, with what it left a GPU to do."""
    clock, cpu = time.perf_counter(), time.process_time()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    into.setdefault(part, []).append(Spent(time.perf_counter() - clock, time.process_time() - cpu))


def rate(device: str, seconds: float = 0.3) -> Spent:
    """FLOP/s of square products, in fp32 or on a GPU in bf16, by the clock and by the seconds computed."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    x = torch.randn(size, size, device=device, dtype=dtype)
    out = x @ x
    found: dict[str, list[Spent]] = {}
    count = 0
    with spent(found, "products"):
        began = time.process_time()
        while time.process_time() - began < seconds:
            torch.mm(x, x, out=out)
            count += 1
            if device == "cuda":
                torch.cuda.synchronize()
    flops = 2 * size**3 * count
    return Spent(*(flops / each for each in found["products"][0]))


def floors(shape: ModelShape, sequences: int, group: int, new: int, prompt: int = PROMPT) -> dict[str, float]:
    """FLOPs of matrix products that a step cannot do without.

    Rollout, for B sequences of P + T tokens, with M parameters in the linear layers of the body and V D in the head:
    2 M (P / G + T - 1) + 2 V D T for each, since the G of a group share their prompt, the last token is not fed again
    and of a prompt only the last position goes to the head; and 4 H d for every pair of a query and a key that it sees,
    about (P + T)^2 / 2 - P^2 / 2 of them a layer. Training: forward and backward are 6 M a token, 6 V D a completion's
    token and 12 H d a pair, with a prompt for every sequence, as others train; ours, which has one for a group, may be
    below that.
    """
    longest = prompt + new
    linear = 2 * shape.products * (prompt / group + new - 1) + 2 * shape.vocab * shape.hidden * new
    attention = 2 * shape.layers * shape.heads * shape.head_dim * ((longest - 1) ** 2 - prompt**2)
    return {
        "rollout": sequences * (linear + attention),
        "train": training_flops(shape, sequences * longest, sequences * new, sequences * longest**2),
    }


def configuration(folder: Path, options: argparse.Namespace) -> Config:
    """Ours: GRPO with all its defaults, on prompts and a reward that are written here."""
    rng, before = random.Random(0), ("0+" * options.prompt)[: options.prompt - PROMPT]
    lines = [
        json.dumps({"prompt": f"{before}{rng.randrange(10_000):04d}+{rng.randrange(10_000):04d}=", "answer": "0"})
        for _ in range(options.prompts * own_steps(options) + 8)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(REWARD)
    shape = [f"model.name={options.model}"] if options.model else [
        f"model.tiny.hidden_size={options.width}", f"model.tiny.num_layers={options.layers}",
        f"model.tiny.intermediate_size={options.mlp}",
    ]  # fmt: skip
    if options.device == "cuda":
        shape += ["model.compute_dtype=bfloat16", "model.gradient_checkpointing=true"]
    return load_config([
        *shape, "name=step", f"runs_dir={folder}", f"cache_dir={folder}", f"data.train={folder / 'prompts.jsonl'}",
        "data.columns.prompt=prompt", "data.columns.answer=answer", "data.eval_limit=8",
        f"data.max_prompt_tokens={options.prompt}", f"reward.kind={folder / 'reward.py'}:reward", "reward.workers=1",
        "method.name=grpo", "engine.kind=hf", "model.warm_start.max_steps=0",
        f"train.prompts_per_step={options.prompts}", f"train.rollouts_per_prompt={options.rollouts}",
        f"rollout.max_new_tokens={options.tokens}", f"rollout.min_new_tokens={options.tokens}", f"train.lr={RATE}",
        f"train.steps={own_steps(options)}", "train.grad_terms_every=0",
        f"train.device={options.device}", "train.page=false", f"model.compile={str(options.compile).lower()}",
    ])  # fmt: skip


def own_steps(options: argparse.Namespace) -> int:
    """How many steps of ours there are: one a round, or two where one of them is another way."""
    return (options.rounds + 1) * (2 if options.compile or options.copies else 1)


def step_of_ours(run: Run, config: Config, number: int, into: dict[str, list[Spent]]) -> None:
    """What ``fit`` does in a step, without its record."""
    own: dict[str, list[Spent]] = {}
    with spent(own, "step"):
        groups = run.rollouts.take(number, functools.partial(spent, own)).groups
        with spent(own, "train"):
            figures = learn(run.learner, groups, number)
        with spent(own, "sync"):
            run.sync.push(number)
    for part, each in own.items():
        into.setdefault(part, []).append(Spent(*map(sum, zip(*each, strict=True))))
    rollouts = [r for group in groups for r in group.rollouts]
    assert all(len(r.response_ids) == config.rollout.max_new_tokens for r in rollouts)
    assert figures["tokens/skipped"] == 0 and math.isfinite(figures["loss/total"]) and figures["grad_norm"] > 0
    assert all(math.isfinite(x) for r in rollouts for x in r.rollout_logprobs)


def steps_of_trl(
    folder: Path, config: Config, rounds: int, into: dict[str, list[Spent]], after: Callable[[int], None]
) -> list[dict[str, float]]:
    """Train by TRL, with ``after`` after each of its steps, and return what it logged.

    Raises:
        ImportError: Where TRL is not installed.
    """
    import datasets
    import trl

    reward: dict[str, Callable[..., float]] = {}
    exec(REWARD, reward)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]

    class Timed(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.clock = contextlib.ExitStack()
            self.clock.enter_context(spent(into, "step"))

        def on_step_end(self, args, state, control, **kwargs):
            self.clock.close()
            after(state.global_step)

    class Trainer(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            with spent(into, "rollout"):
                return super()._generate_and_score_completions(inputs)

    gpu = config.train.device == "cuda"
    sequences, tokens = config.train.prompts_per_step * config.train.rollouts_per_prompt, config.rollout.max_new_tokens
    arguments = trl.GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=sequences // (4 if gpu else 1),
        gradient_accumulation_steps=4 if gpu else 1,
        num_generations=config.train.rollouts_per_prompt, max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens}, max_steps=rounds, learning_rate=config.train.lr,
        lr_scheduler_type="constant", beta=0.0, temperature=1.0, bf16=gpu, use_cpu=not gpu, gradient_checkpointing=gpu,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    if config.model.name == "tiny":
        tokenizer = byte_tokenizer()
        model = build_tiny(config.model, tokenizer, config.longest_sequence, config.train.seed)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    trainer = Trainer(
        model=model,
        reward_funcs=lambda completions, **_: [reward["reward"](text, "", {}) for text in completions],
        args=arguments, train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer, callbacks=[Timed()],
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logged) == rounds
    for row in logged:
        assert row["completions/mean_length"] == tokens == row["completions/min_length"], row
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["reward_std"] > 0, row
    return logged


def _median(found: list[Spent]) -> Spent:
    """Of all rounds but the first."""
    return Spent(*(statistics.median(each) for each in zip(*found[1:], strict=True)))


def report(
    floor: dict[str, float], rates: list[Spent], found: dict[str, dict[str, list[Spent]]], tokens: int
) -> str:
    """A table of seconds by part, the floor beside them."""
    now = _median(rates)
    least = {part: Spent(flops / now.clock, flops / now.cpu) for part, flops in floor.items()}
    least["step"] = Spent(*(sum(each) for each in zip(*least.values(), strict=True)))
    lines = [
        f"products {now.clock / 1e9:.1f} GFLOP/s by the clock, {now.cpu / 1e9:.1f} a second computed; medians of "
        f"{len(rates) - 1} rounds",
        "", "| | part | seconds | / floor | seconds computed | / floor | tokens/s |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, parts in {"floor": {part: [seconds] * 2 for part, seconds in least.items()}, **found}.items():
        for part, each in parts.items():
            clock, cpu = _median(each)
            by_clock, computed = least.get(part, Spent(math.nan, math.nan))
            speed = f"{tokens / clock:,.0f}" if part == "step" else ""
            row = (name, part, f"{clock:.3f}", f"{clock / by_clock:.2f}", f"{cpu:.3f}", f"{cpu / computed:.2f}", speed)
            lines.append(f"| {' | '.join(row).replace('nan', '')} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in (
        ("rounds", 5, "steps of each that are counted"), ("prompts", 16, "prompts of a step"),
        ("rollouts", 8, "completions of each"), ("tokens", 64, "tokens of a completion"),
        ("prompt", PROMPT, f"tokens of a prompt, {PROMPT} or more"),
        ("width", 256, "of the model"), ("layers", 3, "of the model"), ("mlp", 672, "width of its MLP"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="folder of a model in place of a tiny one")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--compile", action="store_true", help="a second step of ours a round, with model.compile")
    parser.add_argument("--copies", action="store_true", help="a second step, with a copy of the prompt a completion")
    options = parser.parse_args()
    if options.prompt < PROMPT or (options.compile and options.copies):
        parser.error(f"--prompt is {PROMPT} or more, and one of --compile and --copies a run")
    rates: list[Spent] = []
    found: dict[str, dict[str, list[Spent]]] = {name: {} for name in ("ours", "ours, compiled", "ours, copies", "TRL")}
    with tempfile.TemporaryDirectory() as name:
        config = configuration(Path(name), options)
        with prepared(config) as run:
            run.sync.push(0)

            def round_of_ours(number: int) -> None:
                rates.append(rate(options.device))
                if options.copies:
                    for shares, name in ((True, "ours"), (False, "ours, copies")):
                        allow_sharing(run.learner.model, shares)
                        step_of_ours(run, config, 2 * number - shares, found[name])
                    return
                if not options.compile:
                    step_of_ours(run, config, number, found["ours"])
                    return
                with as_written(run.learner.model):
                    step_of_ours(run, config, 2 * number - 1, found["ours"])
                step_of_ours(run, config, 2 * number, found["ours, compiled"])

            try:
                if options.no_trl:
                    raise ImportError("left out by --no-trl")
                steps_of_trl(Path(name), config, options.rounds + 1, found["TRL"], round_of_ours)
            except ImportError as error:
                print(f"TRL: {error}; {INSTALL}")
                for number in range(1, options.rounds + 2):
                    round_of_ours(number)
            shape = measure_shape(run.learner.model)
    about = devices.facts(torch.device(options.device))
    sampled = options.prompts * options.rollouts * options.tokens
    print(
        f"{about['date']}, {about['device']['name']} ({about['device']['capability']}), threads: "
        f"{torch.get_num_threads()}; torch {torch.__version__}, transformers {transformers.__version__}, TRL "
        f"{about['device']['peers'].get('trl')}; "
        f"commit {about['commit']}; {shape.parameters:,} parameters, {options.prompts} x {options.rollouts} "
        f"completions of {options.tokens} tokens, prompts of {options.prompt}"
    )
    floor = floors(shape, options.prompts * options.rollouts, options.rollouts, options.tokens, options.prompt)
    print(report(floor, rates, found, sampled))


if __name__ == "__main__":
    main()
