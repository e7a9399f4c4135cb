"""A suite as its TOML file says it, and the runs that it asks for."""

from __future__ import annotations

import glob
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from srft.config import Config
from srft.data.files import is_local
from srft.options import load_config, to_toml
from srft.rewards.kinds import check_kind
from srft.section import Section

SUITES = Path(__file__).parent / "suites"
Quantity = Literal["prompts", "sampled_tokens", "trained_tokens", "updates", "flops", "seconds"]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_LEFT_BY_A_RUN = {"model": "model", "samples": "samples.jsonl"}
# what a suite may change: one worker judges as much as a run on one core asks, and pages are drawn when one is wanted
_CHEAP = ("reward.workers=1", "train.page=false")


class FromRun(Section):
    """What an arm takes from the run of another arm with the same seed, which is made first."""

    arm: str
    """The other arm."""
    options: dict[str, Annotated[str, Field(pattern="^(model|samples|mean:.+)$")]]
    """Dotted option = "mean:<metric>", its mean over the steps of that run; "samples", the file of the samples that it
    kept, as for data.demos; or "model", the folder of the model that it ended with: as model.name, the arm goes
    on where the other ended, and its curves and budgets have both."""


class Arm(Section):
    """One way to train; in the file also a bare list of its options."""

    options: list[str] = []
    """As on the command line: section.key=value."""
    from_run: FromRun | None = None
    """What it takes from another arm's run."""
    hidden: bool = False
    """It is there for other arms alone, and in no table."""


def _options_alone(value: object) -> object:
    return {"options": value} if isinstance(value, list) else value


class Suite(Section):
    """A question, and the arms that answer it."""

    title: str
    """A few words."""
    question: str
    """What the arms are compared for."""
    base: list[str] = []
    """What all arms have in common: recipes, by their path from the suite's folder, and section.key=value."""
    reference: str
    """The arm that the others are compared with, seed by seed."""
    equal: list[Quantity] = []
    """Budgets that the arms must share; one that is more than a tenth above another is warned of."""
    arms: dict[Annotated[str, Field(pattern=_NAME)], Annotated[Arm, BeforeValidator(_options_alone)]] = Field(
        min_length=1
    )
    """The arms, by name, in the order of the tables."""


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    Args:
        arm: Name of its arm.
        seed: Its ``train.seed``.
        words: Its options as on the command line, without what ``borrowed`` adds.
        last_words: Options that win over those.
        borrowed: Options that ``source`` gives, as in ``FromRun``.
        source: The run that is made first, or None.
        config: The options as checked; what is still to come from the source has the value 1.
        folder: Where it is written.
        identity: A digest of all that its numbers depend on, so that a run with other options is another run.
    """

    arm: str
    seed: int
    words: tuple[str, ...]
    last_words: tuple[str, ...]
    borrowed: Mapping[str, str]
    source: Run | None
    config: Config
    folder: Path
    identity: str

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from every other run."""
        return self.arm, self.seed, self.identity

    @property
    def goes_on(self) -> bool:
        """Whether it starts from the model that its source ended with."""
        return self.borrowed.get("model.name") == "model"

    def command(self, means: Mapping[str, float]) -> list[str]:
        """Return the words of ``python -m srft.train`` that make this run, or go on with it.

        Args:
            means: Mean of each metric over the source's steps.

        Raises:
            ValueError: When the source has no such metric.
        """
        taken = []
        for option, what in self.borrowed.items():
            assert self.source is not None
            if what in _LEFT_BY_A_RUN:
                taken.append(f"{option}={self.source.folder / _LEFT_BY_A_RUN[what]}")
                continue
            metric = what.removeprefix("mean:")
            if metric not in means:
                raise ValueError(
                    f"{option} of arm {self.arm} is the mean of {metric}, which arm {self.source.arm} does not log; "
                    f"it logs {', '.join(sorted(means))}"
                )
            taken.append(f"{option}={means[metric]!r}")
        place = [f"name={self.folder.name}", f"runs_dir={self.folder.parent}", "train.resume=true"]
        return [*self.words, *taken, *self.last_words, *place]


def suite_names() -> list[str]:
    """Return the names of the suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def find_suite(name: str) -> Path:
    """Return the file of a suite.

    Args:
        name: One of ``suite_names``, or a path that ends in .toml.

    Raises:
        ValueError: When there is none.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"there is no suite {name}; expected {', '.join(suite_names())} or path/to/suite.toml")
    return path


def read_suite(path: Path) -> Suite:
    """Read a suite.

    Args:
        path: Of its TOML file.

    Raises:
        ValueError: When it is no TOML, lacks something, or names an arm that it does not have.
    """
    try:
        suite = Suite.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}, got {first['input']!r}") from None
    named = {"reference": suite.reference}
    named |= {f"arms.{name}.from_run": arm.from_run.arm for name, arm in suite.arms.items() if arm.from_run}
    for where, name in named.items():
        if name not in suite.arms:
            raise ValueError(f"{path}: {where} names {name}, which is no arm; there are {', '.join(suite.arms)}")
    if suite.arms[suite.reference].hidden:
        raise ValueError(f"{path}: the reference {suite.reference} is hidden; show it, or take another")
    return suite


def plan_runs(suite: Suite, path: Path, words: Sequence[str], seeds: Sequence[int], out: Path) -> list[Run]:
    """Return the runs of a suite, each checked, in the order in which they are best begun.

    The first arm has all its seeds first, since what is cached for a seed, such as a warm start, is then made once;
    after it come all arms of the first seed, so that every arm is seen early.

    Args:
        suite: From ``read_suite``.
        path: Of its file.
        words: From the command line, for all arms: recipes, which take the place of ``base``, and section.key=value,
            which win over the arm's own.
        seeds: Of each arm.
        out: The suite's folder.

    Raises:
        ValueError: When the options of an arm are wrong, or arms wait for each other.
    """
    recipes = [word for word in words if word.endswith(".toml") and "=" not in word]
    last = [word for word in words if word not in recipes]
    base = recipes or [str(path.parent / w) if w.endswith(".toml") and "=" not in w else w for w in suite.base]
    made: dict[tuple[str, int], Run] = {}
    digests: dict[str, str] = {}

    def make(name: str, seed: int, waiting: tuple[str, ...] = ()) -> Run:
        if (name, seed) in made:
            return made[name, seed]
        arm = suite.arms[name]
        if name in waiting:
            raise ValueError(f"{path}: arms {' and '.join(waiting)} wait for each other's runs")
        source = make(arm.from_run.arm, seed, (*waiting, name)) if arm.from_run else None
        borrowed = dict(arm.from_run.options) if arm.from_run else {}
        own, after = (*_CHEAP, *base, *arm.options), (*last, f"train.seed={seed}")
        unknown = [f"{option}={what if what in _LEFT_BY_A_RUN else 1}" for option, what in borrowed.items()]
        try:
            config = load_config([*own, *unknown, *after])
            _refuse_missing(config, borrowed)
        except ValueError as error:
            raise ValueError(f"arm {name}: {error}") from None
        identity = _identity(config, borrowed, source, digests)
        folder = out / "runs" / name / f"seed-{seed}-{identity[:8]}"
        made[name, seed] = Run(name, seed, own, after, borrowed, source, config, folder, identity)
        return made[name, seed]

    first, *others = suite.arms
    order = [(first, seed) for seed in seeds] + [(name, seed) for seed in seeds for name in others]
    for name, seed in order:
        make(name, seed)
    # what was made for another arm stands before it
    return list(made.values())


def _refuse_missing(config: Config, borrowed: Mapping[str, str]) -> None:
    """Look for the files and folders that the options name, which a run would miss only once it has begun."""
    data, model = config.data, config.model
    sources = {"data.train": data.train, "data.eval": data.eval, "data.demos": data.demos}
    named = {option: name for option, name in sources.items() if name and is_local(name)}
    # what does not begin so may be a hub id
    folders = {"model.name": model.name, "model.tokenizer": model.tokenizer}
    named |= {option: name for option, name in folders.items() if name and name[0] in "./~"}
    for option, name in named.items():
        if option not in borrowed and not glob.glob(str(Path(name).expanduser())):
            raise ValueError(f"{option}={name}: there is no such file or folder")
    if config.reward.kind != "auto":
        check_kind(config.reward.kind)


def _identity(config: Config, borrowed: Mapping[str, str], source: Run | None, digests: dict[str, str]) -> str:
    """Digest of what the options set, but for the names of folders, of the files that they name, and of the source.

    What stands at its default is left out, so that an option which a later version adds makes no other run of this one.
    """
    plain = _placeless(config)
    files = [config.data.train, config.data.eval or "", config.reward.kind.rpartition(":")[0]]
    files += [config.data.demos] if config.data.demos else []
    facts = [
        plain.model_dump(mode="json", exclude_defaults=True), config.method.file_text,
        [_digest_of_file(file, digests) for file in files],
        dict(borrowed), source.identity if source else None,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _placeless(config: Config) -> Config:
    """The same run wherever it is written."""
    places = {"name": "run", "runs_dir": Path("runs"), "cache_dir": Path("cache")}
    return config.without_resume().model_copy(update=places)


def _digest_of_file(name: str, digests: dict[str, str]) -> str:
    """Of a file's contents; empty for whatever else the name is, such as a task or a folder."""
    if name not in digests:
        path = Path(name)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest() if name and path.is_file() else ""
    return digests[name]


def describe_suite(suite: Suite, runs: Sequence[Run]) -> dict[str, Any]:
    """Return what a report needs of a suite besides its results, as JSON.

    Args:
        suite: From ``read_suite``.
        runs: From ``plan_runs``.
    """
    return {
        **suite.model_dump(mode="json", include={"title", "question", "reference", "equal"}),
        "arms": {
            name: [*arm.options, *(f"{k}={v} of {arm.from_run.arm}" for k, v in arm.from_run.options.items())]
            if arm.from_run else arm.options
            for name, arm in suite.arms.items()
            if not arm.hidden
        },
        "runs": [[run.arm, run.seed, run.identity] for run in runs],
        "config": to_toml(_placeless(next(run.config for run in runs if run.arm == suite.reference))),
    }  # fmt: skip
