"""What a suite would do, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srft.experiments.results import read_results
from srft.experiments.suite import Run, Suite
from srft.options import changed_keys


def preview(suite: Suite, runs: Sequence[Run], out: Path) -> str:
    """Return the arms with what sets each apart from the reference, and how many runs are left.

    Args:
        suite: From ``suite.read_suite``.
        runs: From ``suite.plan_runs``, whose options have been checked.
        out: The suite's folder; may be missing.
    """
    done = {result.key for result in read_results(out) if not result.error}
    reference = next(run for run in runs if run.arm == suite.reference)
    lines = [f"{suite.title}: {suite.question}", ""]
    for name, arm in suite.arms.items():
        own = [run for run in runs if run.arm == name]
        made = sum(run.key in done for run in own)
        steps = own[0].config.train.steps
        lines.append(f"{name}{' (hidden)' if arm.hidden else ''}: {made} of {len(own)} runs made, {steps} steps each")
        lines += [f"    {difference}" for difference in _differences(reference, own[0], name == suite.reference)]
    left = [run for run in runs if run.key not in done]
    steps = sum(run.config.train.steps for run in left)
    lines += ["", f"{len(left)} of {len(runs)} runs to make, {steps:,} steps, into {out}"]
    return "\n".join(lines)


def _differences(reference: Run, run: Run, is_reference: bool) -> list[str]:
    if is_reference:
        return ["the reference"]
    changed = changed_keys(reference.config, run.config)
    borrowed = [f"{option} = {what} of {run.source.arm}" for option, what in run.borrowed.items() if run.source]
    own = [
        f"{key} = {'unset' if new is None else new}"
        for key, (_, new) in changed.items()
        if key not in run.borrowed and key not in ("name", "runs_dir")
    ]
    return borrowed + own or ["as the reference"]
