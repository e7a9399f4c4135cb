"""Tasks that need no download: chains of digits, countdown, sums, with a calculator or not, and reasoning-gym's."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable
from typing import Any

from srft.data.countdown import countdown_problem, problem_text
from srft.rewards.gym import reasoning_gym_dataset

BUILTIN_TASKS = ("calculator", "chain", "countdown", "sums")
CHAIN_ALPHABET = "0123456789+-*=;#"
_STEP_ENDS = ";,:|!&~_"
EVAL_SHARE = 8  # one problem text in this many belongs to evaluation


def in_eval_split(text: str) -> bool:
    """Whether a problem text belongs to evaluation: a fixed function of it, so that splits cannot overlap.

    Args:
        text: The problem.
    """
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % EVAL_SHARE == 0


def chain_problem(rng: random.Random, min_ops: int, max_ops: int, notations: int = 1) -> dict[str, str]:
    """Draw one chain of + - * on digits, read strictly left to right, every value taken modulo 10.

    Args:
        rng: Advanced by the draw.
        min_ops: Fewest operations, >= 1.
        max_ops: Most operations, >= ``min_ops``.
        notations: Signs of which the demonstration ends each step with one, in [1, 8].
    """
    value = rng.randrange(10)
    text, steps = str(value), ""
    for _ in range(rng.randint(min_ops, max_ops)):
        op, operand = rng.choice("+-*"), rng.randrange(10)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % 10
        text += f"{op}{operand}"
        steps += f"{value}{op}{operand}={result}{rng.choice(_STEP_ENDS[:notations]) if notations > 1 else ';'}"
        value = result
    return {"prompt": text + "=", "demo": f"{steps}#{value}", "answer": str(value)}


def chain_rows(
    count: int, *, split: str, seed: int, min_ops: int = 2, max_ops: int = 4, notations: int = 1
) -> list[dict[str, Any]]:
    """Return ``count`` chain problems of one split, row ``i`` of training depending on (seed, i) alone.

    Demonstrations of several notations are as of many hands: what ends a step is drawn at random, so that a policy that
    imitates them keeps an entropy however well it computes.

    Args:
        count: Number of rows, >= 1.
        split: "train", or anything else for evaluation. No text is in both; evaluation texts are distinct.
        seed: Stream of problems.
        min_ops: Fewest operations in a chain, >= 1.
        max_ops: Most operations in a chain, >= ``min_ops``.
        notations: Signs of which a demonstration ends each step with one, in [1, 8].

    Raises:
        ValueError: On an option out of its range, or when that many distinct evaluation problems do not exist.
    """
    if not 1 <= min_ops <= max_ops:
        raise ValueError(f"task chain needs 1 <= min_ops <= max_ops, got min_ops={min_ops} max_ops={max_ops}")
    if not 1 <= notations <= len(_STEP_ENDS):
        raise ValueError(f"task chain needs notations from 1 to {len(_STEP_ENDS)}, got notations={notations}")
    return _drawn_rows(
        "chain", count, split=split, seed=seed, draw=lambda rng: chain_problem(rng, min_ops, max_ops, notations),
        text=lambda row: row["prompt"], about=f"{min_ops}-{max_ops} operations", remedy="max_ops",
    )  # fmt: skip


def countdown_rows(
    count: int, *, split: str, seed: int, min_numbers: int = 3, max_numbers: int = 3, largest: int = 20,
    max_target: int = 99, demos: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return ``count`` countdown problems of one split, row ``i`` of training depending on (seed, i) alone.

    A prompt is the numbers and the target, "3 5 8:19=", a demonstration an expression, "3*8-5".

    Args:
        count: Number of rows, >= 1.
        split: As in ``chain_rows``; the order of the numbers makes no other problem.
        seed: Stream of problems.
        min_numbers: Fewest numbers, >= 2.
        max_numbers: Most numbers, >= ``min_numbers``.
        largest: Largest number given, >= 5.
        max_target: Largest target, >= ``largest``.
        demos: Distinct demonstrations of each problem, in [1, 4]; problems that lack them are passed over.

    Raises:
        ValueError: On an option out of its range, or when that many distinct evaluation problems do not exist.
    """
    if not (2 <= min_numbers <= max_numbers and 5 <= largest <= max_target and 1 <= demos <= 4):
        raise ValueError(
            "task countdown needs 2 <= min_numbers <= max_numbers, 5 <= largest <= max_target and 1 <= demos <= 4, got "
            f"min_numbers={min_numbers} max_numbers={max_numbers} largest={largest} max_target={max_target} "
            f"demos={demos}"
        )
    if demos > 2 and min_numbers == 2:
        raise ValueError(f"two numbers make few targets in more than two ways, got demos={demos}; raise min_numbers")

    def draw(rng: random.Random) -> dict[str, Any]:
        return countdown_problem(
            rng, min_numbers=min_numbers, max_numbers=max_numbers, largest=largest, max_target=max_target, demos=demos
        )

    return _drawn_rows(
        "countdown", count, split=split, seed=seed, draw=draw, text=problem_text,
        about=f"{min_numbers}-{max_numbers} numbers up to {largest}", remedy="largest or max_numbers",
    )  # fmt: skip


def sums_problem(rng: random.Random, terms: int, largest: int) -> dict[str, str]:
    """Draw a sum of whole numbers, some of them taken away, that is nowhere below 0 from left to right.

    Args:
        rng: Advanced by the draw.
        terms: Numbers in it, >= 2.
        largest: Numbers are from 1 to this.
    """
    value = rng.randint(1, largest)
    text, steps = str(value), []
    for _ in range(terms - 1):
        number = rng.randint(1, largest)
        op = rng.choice("+-") if number <= value else "+"
        result = value + number if op == "+" else value - number
        text += f" {op} {number}"
        steps.append(f"{value}{op}{number}={result}")
        value = result
    return {"prompt": f"What is {text}?", "demo": "\n".join(steps), "answer": str(value)}


def sums_rows(count: int, *, split: str, seed: int, terms: int = 3, largest: int = 20) -> list[dict[str, Any]]:
    """Return ``count`` sums of one split in plain English, row ``i`` of training depending on (seed, i) alone.

    A prompt is "What is 16 - 15 + 9?", a demonstration its steps, "16-15=1" and "1+9=10", a line each. A model that was
    pretrained gets some of them right before it has seen one.

    Args:
        count: Number of rows, >= 1.
        split: As in ``chain_rows``.
        seed: Stream of problems.
        terms: Numbers in a sum, >= 2.
        largest: Numbers are from 1 to this.

    Raises:
        ValueError: On an option out of its range, or when that many distinct evaluation problems do not exist.
    """
    return _rows_of_sums("sums", count, split, seed, terms, largest, put=lambda problem: problem)


def calculator_rows(count: int, *, split: str, seed: int, terms: int = 3, largest: int = 99) -> list[dict[str, Any]]:
    """Return ``count`` sums of one split as conversations with a calculator, row ``i`` of training of (seed, i) alone.

    Args:
        count: Number of rows, >= 1.
        split: As in ``chain_rows``.
        seed: Stream of problems.
        terms: Numbers in a sum, >= 2.
        largest: Numbers are from 1 to this.

    Raises:
        ValueError: On an option out of its range, or when that many distinct evaluation problems do not exist.
    """
    return _rows_of_sums("calculator", count, split, seed, terms, largest, put=_as_conversation)


def task_rows(name: str, count: int, *, split: str, seed: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``count`` rows of one split of a built-in task.

    Args:
        name: One of ``BUILTIN_TASKS``.
        count: Number of rows, >= 1.
        split: "train", or anything else for evaluation.
        seed: Stream of problems.
        options: The task's own, all of them whole numbers.

    Raises:
        ValueError: On an option that the task does not have or cannot follow, or from the task.
    """
    tasks: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "calculator": calculator_rows, "chain": chain_rows, "countdown": countdown_rows, "sums": sums_rows,
    }  # fmt: skip
    rows = tasks[name]
    known = [option for option in inspect.signature(rows).parameters if option not in ("count", "split", "seed")]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"task {name} has no option {unknown}; it has {', '.join(known[:-1])} and {known[-1]}")
    if wrong := {option: value for option, value in options.items() if type(value) is not int}:
        raise ValueError(f"options of task {name} are whole numbers, got {wrong}; give task.{min(wrong)} one")
    return rows(count, split=split, seed=seed, **options)


def _as_conversation(problem: dict[str, Any]) -> dict[str, Any]:
    """A sum whose steps are asked of a calculator, one a turn."""
    turns = []
    for step in problem["demo"].split("\n"):
        asked, _, result = step.partition("=")
        turns += [{"role": "assistant", "content": f"{asked}="}, {"role": "user", "content": result}]
    turns.append({"role": "assistant", "content": f"#{problem['answer']}"})
    prompt = problem["prompt"].removeprefix("What is ").rstrip("?").replace(" ", "")
    return {"prompt": f"{prompt}:", "demo": turns, "answer": problem["answer"]}


def _rows_of_sums(
    task: str,
    count: int,
    split: str,
    seed: int,
    terms: int,
    largest: int,
    put: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of a task on sums, each ``put`` as the task has it."""
    if terms < 2 or largest < 1:
        raise ValueError(f"task {task} needs terms >= 2 and largest >= 1, got terms={terms} largest={largest}")
    return _drawn_rows(
        task, count, split=split, seed=seed, draw=lambda rng: put(sums_problem(rng, terms, largest)),
        text=lambda row: row["prompt"], about=f"{terms} numbers up to {largest}", remedy="largest or terms",
    )  # fmt: skip


def _drawn_rows(
    task: str,
    count: int,
    *,
    split: str,
    seed: int,
    draw: Callable[[random.Random], dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    about: str,
    remedy: str,
) -> list[dict[str, Any]]:
    """The rows of one split, told apart by the text of the problem, each from a stream of its own."""
    wants_eval = split != "train"
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    index = 0
    while len(rows) < count:
        rng = random.Random(f"{task}:{seed}:{wants_eval}:{index}")
        index += 1
        row = draw(rng)
        while in_eval_split(text(row)) != wants_eval:
            row = draw(rng)
        if wants_eval and text(row) in seen:
            # a space that is nearly used up repeats itself far more often than it yields
            if index > 100 * (count + 10):
                raise ValueError(
                    f"task {task} with {about} has only about {len(rows)} distinct "
                    f"evaluation problems, {count} were asked for; raise {remedy} or ask for fewer"
                )
            continue
        seen.add(text(row))
        rows.append(row)
    return rows


def reasoning_gym_rows(
    name: str, count: int, *, split: str, seed: int, options: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return ``count`` entries (question, answer, metadata) of one split; evaluation questions are distinct.

    Args:
        name: Task name.
        count: Number of entries, >= 1.
        split: "train", or anything else for evaluation; told apart by the question text.
        seed: Seed of the underlying data set.
        options: Fields of the task's own configuration.

    Raises:
        ValueError: From ``reasoning_gym_dataset``, or when the task runs out of distinct questions.
    """
    wants_eval = split != "train"
    # an eighth of the texts is for evaluation; no more than that takes, since some tasks are slow to size up
    draws = 16 * count + 1000 if wants_eval else 2 * count + 200
    dataset = reasoning_gym_dataset(name, **(options or {}), size=draws, seed=seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for index in range(draws):
        row = dataset[index]
        if in_eval_split(row["question"]) == wants_eval and not (wants_eval and row["question"] in seen):
            seen.add(row["question"])
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(
        f"reasoning_gym task {name!r} gave only {len(rows)} of {count} problems of split {split!r} in "
        f"{draws} draws; ask for fewer, or widen the task's options"
    )
