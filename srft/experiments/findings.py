"""What the results of a suite say: arms over their seeds, beside the reference, and whether budgets were equal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srft.experiments.results import Budget, Result, read_results
from srft.experiments.statistics import Estimate, estimate
from srft.record.text import format_seconds

SUITE = "suite.json"
BUDGETS = {
    "prompts": "prompts", "sampled_tokens": "sampled tokens", "trained_tokens": "trained tokens",
    "updates": "updates", "flops": "FLOPs", "seconds": "seconds",
}  # fmt: skip
"""What each is called in tables, by its name in ``Budget``."""
_ALLOWED = 1.1
Score = Callable[[Result], float]


@dataclass(frozen=True)
class Arm:
    """One arm over its seeds.

    Args:
        name: Its name.
        options: Its options, as words.
        results: Its complete runs, by seed.
        failed: Seeds whose run ended with an error, with that.
        missing: Seeds that have not ended.
        final: Accuracy at the last evaluation; None where no run is complete, as for the others.
        best: The best accuracy of each run.
        area: Mean accuracy over the FLOPs of the run.
        entropy: Of rollouts: at the first step, over the run, at the last; nats per token. Empty without rollouts.
        budget: Mean of each budget over the seeds.
        final_difference: Accuracy at the last evaluation less the reference's, seed by seed; None of the reference
            and where no seed has both.
        area_difference: The same of the mean accuracy over the FLOPs.
    """

    name: str
    options: list[str]
    results: dict[int, Result]
    failed: dict[int, str]
    missing: list[int]
    final: Estimate | None
    best: Estimate | None
    area: Estimate | None
    entropy: tuple[Estimate | None, ...]
    budget: dict[str, float]
    final_difference: Estimate | None
    area_difference: Estimate | None


@dataclass(frozen=True)
class Findings:
    """A suite and what came of it.

    Args:
        title: Of the suite.
        question: Of the suite.
        reference: Name of the arm that the others are compared with.
        arms: In the order of the suite.
        warnings: Sentences on what is not as it should be.
        conditions: Sentences on what the runs were made with.
        config: Options of the reference, resolved, as TOML.
    """

    title: str
    question: str
    reference: str
    arms: list[Arm]
    warnings: list[str]
    conditions: list[str]
    config: str


def amount(what: str, value: float) -> str:
    """Return a budget as a person reads it.

    Args:
        what: Name of the budget.
        value: So much of it.
    """
    return format_seconds(value) if what == "seconds" else f"{value:.2e}" if what == "flops" else f"{value:,.0f}"


def read_findings(out: Path) -> Findings:
    """Read a suite's folder: ``suite.json`` and ``results.jsonl``, which are enough.

    Args:
        out: The folder.

    Raises:
        ValueError: When there is no suite in it.
    """
    path = out / SUITE
    if not path.is_file():
        raise ValueError(f"there is no {path}; run the suite first, or give its folder as --out")
    about = json.loads(path.read_text())
    wanted = {(arm, seed, identity) for arm, seed, identity in about["runs"]}
    every = read_results(out)
    found = {(result.arm, result.seed): result for result in every if result.key in wanted}
    seeds = sorted({seed for _, seed, _ in wanted})
    reference = {seed: r for seed in seeds if (r := found.get((about["reference"], seed))) and not r.error}
    arms = [_arm(name, options, seeds, found, reference) for name, options in about["arms"].items()]
    others = len({result.key for result in every} - wanted)
    hidden = [r for (arm, _), r in found.items() if arm not in about["arms"] and r.error]
    warnings = [f"{r.arm} (hidden), seed {r.seed}, ended early: {r.error.rstrip('.')}." for r in hidden]
    warnings += [*_incomplete(arms), *_unequal(arms, about["equal"])]
    if others:
        warnings.append(f"{others} results in the folder are of other seeds or options, and take no part.")
    complete = [result for arm in arms for result in arm.results.values()]
    return Findings(
        about["title"], about["question"], about["reference"], arms, warnings, _conditions(complete, seeds),
        about["config"],
    )


def _arm(
    name: str,
    options: list[str],
    seeds: Sequence[int],
    found: Mapping[tuple[str, int], Result],
    reference: Mapping[int, Result],
) -> Arm:
    ended = {seed: found[name, seed] for seed in seeds if (name, seed) in found}
    results = {seed: result for seed, result in ended.items() if not result.error}
    complete = list(results.values())

    def over_seeds(score: Score) -> Estimate | None:
        return estimate([score(result) for result in complete])

    def difference(score: Score) -> Estimate | None:
        both = [seed for seed in results if seed in reference]
        if any(results[seed] is reference[seed] for seed in both):
            return None
        return estimate([score(results[seed]) - score(reference[seed]) for seed in both])

    entropies = [result.entropy for result in complete if result.entropy]
    budgets = [result.budget for result in complete if result.budget]
    return Arm(
        name=name, options=options, results=results,
        failed={seed: result.error for seed, result in ended.items() if result.error},
        missing=[seed for seed in seeds if seed not in ended],
        final=over_seeds(lambda r: r.final), best=over_seeds(lambda r: r.best), area=over_seeds(lambda r: r.area),
        entropy=tuple(estimate(values) for values in zip(*entropies, strict=True)),
        budget={
            what: math.fsum(getattr(b, what) for b in budgets) / len(budgets) for what in Budget.model_fields
        } if budgets else {},
        final_difference=difference(lambda r: r.final), area_difference=difference(lambda r: r.area),
    )  # fmt: skip


def _incomplete(arms: Sequence[Arm]) -> list[str]:
    failed = [
        f"{arm.name}, seed {seed}, ended early: {why.rstrip('.')}." for arm in arms for seed, why in arm.failed.items()
    ]
    missing = [f"{arm.name} (seeds {', '.join(map(str, arm.missing))})" for arm in arms if arm.missing]
    return failed + ([f"Not made yet: {', '.join(missing)}."] if missing else [])


def _unequal(arms: Sequence[Arm], equal: Sequence[str]) -> list[str]:
    """Sentences on budgets that the suite wants equal and that are not."""
    warnings = []
    spent = [arm for arm in arms if arm.budget]
    for what in equal if spent else ():
        least = min(spent, key=lambda arm: arm.budget[what])
        most = max(spent, key=lambda arm: arm.budget[what])
        if most.budget[what] > _ALLOWED * least.budget[what]:
            warnings.append(
                f"Unequal {BUDGETS[what]}: {most.name} had {amount(what, most.budget[what])}, {least.name} "
                f"{amount(what, least.budget[what])}, where the suite wants them within a tenth of each other."
            )
    return warnings


def _conditions(results: Sequence[Result], seeds: Sequence[int]) -> list[str]:
    def listed(values: set[Any]) -> str:
        return ", ".join(sorted(str(value) for value in values))

    sentences = [f"Seeds {', '.join(map(str, seeds))}."]
    if results:
        sentences.append(f"Threads of a run: {listed({result.threads for result in results})}.")
        commits = {result.commit for result in results}
        sentences.append(f"{'Commits' if len(commits) > 1 else 'Commit'}: {listed(commits)}.")
    return sentences
