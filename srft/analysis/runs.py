"""What is told of a run, and of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from srft.analysis import weights
from srft.analysis.curves import draw_run, draw_shared, draw_together
from srft.analysis.curves import table as run_table
from srft.analysis.map import Point, draw_map, locate, thinned
from srft.analysis.page import table
from srft.analysis.pictures import Picture
from srft.analysis.policies import (
    encode,
    load_policy,
    model_of,
    refuse_other_words,
    sample,
    start_of,
)
from srft.analysis.problems import draw_fates, draw_lessons, fates, history, is_right, lessons, shared
from srft.analysis.stories import Story, short_names, split_label
from srft.config import Config
from srft.data.examples import Example
from srft.dataset import read_problems
from srft.methods.srft import Method
from srft.options import load_config
from srft.policy.checkpoint import checkpoints_of, step_of
from srft.record.history import RunRecord
from srft.report.page import readable
from srft.responses import Response
from srft.rollout import demonstration

_MOST_POINTS = 20  # of a run, on the map
_MOST_RESPONSES = 64  # of each kind, whose tokens are weighed
_MOST_LISTED = 40


@dataclass(frozen=True)
class Asked:
    """What the command line asks for besides runs or models.

    Args:
        problems: That models are asked, at most.
        references: Models, or runs, that the map has distances to.
        start: The model that the first run began from; None: what its record says.
        options: Of the trainer, ``section.key=value``: how models are asked.
    """

    problems: int = 64
    references: Sequence[str] = ()
    start: str | None = None
    options: Sequence[str] = ()


@dataclass
class Part:
    """A part of the page.

    Args:
        title: Its heading.
        sentences: Below it.
        pictures: Its figures.
        html: After these.
    """

    title: str
    sentences: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    html: str = ""


@dataclass
class Told:
    """What an analysis came to.

    Args:
        parts: Of the page, in order.
        numbers: What the figures show, as JSON.
    """

    parts: list[Part] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def read_config(record: RunRecord, options: Sequence[str]) -> Config:
    """Return the configuration of a run, with options of the command line on top.

    Args:
        record: Of the run.
        options: ``section.key=value``.

    Raises:
        ValueError: When it has none that can be read.
    """
    path = record.run_dir / "config.toml"
    if not path.exists():
        raise ValueError(
            f"{record.run_dir} has no config.toml, by which its models are asked; add --records to do without models"
        )
    return load_config([str(path), *options])


def tell_records(stories: Sequence[Story]) -> Told:
    """Tell what the runs wrote: curves, and what became of problems.

    Args:
        stories: One, or several to put side by side.
    """
    told = Told()
    first = stories[0]
    if len(stories) > 1 or first.begins:
        heading, rows = run_table(stories)
        title = "Runs side by side" if len(stories) > 1 else "One run after the other"
        told.parts.append(Part(title, [], draw_together(stories), table(heading, rows)))
    else:
        told.parts.append(Part("Entropy, weights and gradients", _lacking(first), draw_run(first)))
    told.parts.append(_side_by_side(stories, told.numbers) if len(stories) > 1 else _problems(first, told.numbers))
    return told


def _lacking(story: Story) -> list[str]:
    if any(key.startswith("grad/") for row in story.rows for key in row):
        return []
    return ["No gradient of single terms was measured; train.grad_terms_every=10 measures them every ten steps."]


def _side_by_side(stories: Sequence[Story], numbers: dict[str, Any]) -> Part:
    part = Part("Which problems, and whose")
    picture = draw_shared(stories)
    if picture is None:
        part.sentences.append("The runs have not recorded the same held-out problems.")
        return part
    part.pictures.append(picture)
    first = stories[0].label
    found = {other.label: names for other in stories[1:] if (names := shared(stories[0], other))}
    numbers["shared"] = {label: {kind: len(ids) for kind, ids in names.items()} for label, names in found.items()}
    kinds = ("both", "first", "other", "neither")
    rows = [[label, *(str(len(names[kind])) for kind in kinds)] for label, names in found.items()]
    part.html = table(["beside", "both", f"{first} alone", "the other alone", "neither"], rows)
    return part


def _problems(story: Story, numbers: dict[str, Any]) -> Part:
    part = Part("Problems won and forgotten")
    part.pictures += [picture for picture in (draw_fates(story), draw_lessons(story)) if picture]
    if not story.held_out and not story.training:
        part.sentences.append("The run has no problems.jsonl: it is of a version that did not record which were right.")
        return part
    every: tuple[tuple[str, Mapping[int, Mapping[str, str]]], ...] = (
        ("held_out", fates(story.held_out)), ("training", lessons(story.training))
    )  # fmt: skip
    for name, told in every:
        if told:
            last = list(told.values())[-1]
            numbers[name] = {kind: sum(fate == kind for fate in last.values()) for kind in sorted(set(last.values()))}
    if story.held_out:
        now = list(fates(story.held_out).values())[-1]
        examples = _examples(story)
        part.sentences.append(_balance(story))
        steps = ", ".join(str(step) for step in story.held_out)
        part.sentences.append(f"Below, a circle for each evaluation, full where the problem was right: steps {steps}.")
        for fate, title in (("forgotten", "Forgotten"), ("won", "Won")):
            ids = [name for name, is_of in now.items() if is_of == fate]
            if ids:
                rows = [_told(name, examples.get(name), story) for name in ids[:_MOST_LISTED]]
                more = f", of which {_MOST_LISTED}" if len(ids) > _MOST_LISTED else ""
                part.html += f"<h3>{title}: {len(ids)} held-out problems{more}</h3>"
                part.html += table(["problem", "id", "answer", "evaluations"], rows)
    return part


def _balance(story: Story) -> str:
    """What came and what went between the first evaluation and the last, in one sentence."""
    counts = list(story.held_out.values())
    first, last = ({name: is_right(c) for name, c in of.items() if c[1]} for of in (counts[0], counts[-1]))
    both = first.keys() & last.keys()
    right = [name for name in both if first[name]]
    lost, won = sum(not last[name] for name in right), sum(last[name] and not first[name] for name in both)
    return (
        f"Of {len(right)} held-out problems that were right at the first evaluation {lost} are wrong at the last; of "
        f"{len(both) - len(right)} that were wrong {won} are right."
    )


def _examples(story: Story) -> dict[str, Example]:
    """The held-out problems by id, none where their source is not there any more."""
    try:
        return {example.id: example for example in read_problems(read_config(story.last, ())).held_out}
    except ValueError:
        return {}


def _told(name: str, example: Example | None, story: Story) -> list[str]:
    words = "" if example is None else " ".join(readable(example.prompt).split())
    answer = "" if example is None else str(example.answer)
    return [words[:160], name, answer[:40], history(story.held_out, name)]


def tell_weights(story: Story, asked: Asked) -> Part | None:
    """Tell what the entropy weights did to the tokens of a run's last samples; None for another method than SRFT.

    Args:
        story: The run.
        asked: The options.

    Raises:
        ValueError: When its model cannot be read.
    """
    record = story.last
    config = read_config(record, asked.options)
    if not isinstance(config.method, Method) or not record.samples:
        return None
    logged: Mapping[str, float] = next((row for row in reversed(record.rows) if row.get("weight/sft") is not None), {})
    policy = load_policy(model_of(str(record.run_dir)), story.label, config)
    weighed = weights.weigh_samples(policy, config.method, record.samples, logged, min(_MOST_RESPONSES, asked.problems))
    if not weighed:
        return None
    sentences = [
        "Demonstrations and right rollouts of the run's last samples, as its last model finds them: s = "
        f"{config.method.sft_coef:g}·exp(±H) multiplies the likelihood of a demonstration's token, c = "
        f"{config.method.rl_coef:g}·exp(H) that of a right rollout's. {_scope_of(config.method)}"
    ]
    return Part(
        "Entropy weights, token by token", sentences, [weights.draw_weights(weighed, config.method)],
        weights.show(weighed, config.method),
    )  # fmt: skip


def _scope_of(method: Method) -> str:
    if method.weights != "entropy":
        return f"This run had method.weights={method.weights}, so that all tokens of a step weigh alike."
    what = {"token": "the token", "sequence": "the sequence", "batch": "the whole update"}[method.scope]
    return f"In this run H is the mean entropy of {what}."


def tell_map(stories: Sequence[Story], asked: Asked) -> tuple[Part, list[Point]]:
    """Tell where the checkpoints of runs lie between reference models, on the held-out problems of the first run.

    Args:
        stories: The runs.
        asked: The options.

    Raises:
        ValueError: When a model or the problems cannot be read.
    """
    config = read_config(stories[0].records[0], asked.options)
    examples = read_problems(config).held_out[: asked.problems]
    starts = [_start(story, asked if story is stories[0] else Asked(options=asked.options)) for story in stories]
    part, points = Part("Where the checkpoints lie"), []
    references, tokenizer = _references(stories[0], starts[0], config, examples, asked)
    if not references:
        part.sentences.append("No held-out problem has a demonstration and the start is not known: give --references.")
        return part, []
    for story, start in zip(stories, starts, strict=True):
        # in the way of each run's own model, at the temperature of the first
        own = read_config(story.last, asked.options).model_copy(update={"rollout": config.rollout})
        for step, source in _models(story, start):
            policy = load_policy(source, f"{story.label}, step {step}", own)
            refuse_other_words(stories[0].label, tokenizer, policy)
            points.append(locate(policy, story.label, step, references))
        if start is None:
            part.sentences.append(f"The start of {story.label} is not kept; --start names it.")
    tokens = {label: sum(r.num_own for r in responses) for label, responses in references.items()}
    counted = ", ".join(f"{number:,} tokens of {label}" for label, number in tokens.items())
    part.sentences.append(
        f"Cross-entropy of each model to responses of the references to {len(examples)} held-out problems: {counted}. "
        "Of a model to its own responses it is its entropy. train.keep_checkpoints says how many points a run leaves."
    )
    part.pictures += draw_map(points)
    heading = ["run", "step", *references]
    part.html = table(heading, [[p.run, str(p.step), *(f"{d:.4f}" for d in p.distances.values())] for p in points])
    return part, points


def _start(story: Story, asked: Asked) -> str | None:
    return model_of(asked.start) if asked.start else start_of(read_config(story.records[0], asked.options))


def _references(
    story: Story, start: str | None, config: Config, examples: Sequence[Example], asked: Asked
) -> tuple[dict[str, list[Response]], PreTrainedTokenizerBase]:
    """Responses by label: demonstrations, the start's own, those of the models that were named; and the tokenizer."""
    last = load_policy(model_of(str(story.last.run_dir)), story.label, config)
    shown = [demonstration(prompt, 0) for prompt in encode(last, examples) if prompt.demo_ids]
    references = {"demonstrations": shown} if shown else {}
    names = short_names(asked.references)
    sources = [("the start", start)] if start is not None else []
    sources += [(names[word], model_of(word)) for word in asked.references]
    for label, source in sources:
        policy = load_policy(source, label, config)
        refuse_other_words(story.label, last.tokenizer, policy)
        references[label] = sample(policy, encode(policy, examples))
    return references, last.tokenizer


def _models(story: Story, start: str | None) -> list[tuple[int, str]]:
    """(step, source) of the start, of checkpoints and of what each run came to, evenly spread."""
    found: dict[int, str] = {} if start is None else {0: start}
    for record, done in zip(story.records, [0, *story.begins], strict=True):
        found |= {done + step_of(folder): str(folder) for folder in checkpoints_of(record.run_dir)}
        if (record.run_dir / "model").is_dir():
            found[done + record.rows[-1]["step"]] = str(record.run_dir / "model")
    return [(step, found[step]) for step in thinned(sorted(found), _MOST_POINTS)]


def folder_of(words: Sequence[str]) -> Path:
    """Return where the page goes unless the command line says.

    Args:
        words: Runs or models.
    """
    labels, paths = zip(*map(split_label, words), strict=True)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return Path(paths[0]) / "analysis"
    names = [label or short_names([path])[path] for label, path in zip(labels, paths, strict=True)]
    return Path("runs") / "analysis" / "-".join(name.replace("/", "_") for name in names)[:120]
