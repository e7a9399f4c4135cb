"""The tables of a suite: as rows of text, which Markdown, the terminal and the page have in common."""

from __future__ import annotations

from collections.abc import Sequence

from srft.experiments.findings import BUDGETS, Arm, Findings, amount
from srft.experiments.statistics import Estimate
from srft.report.table import Table
from srft.report.table import markdown as as_markdown

_NONE = "–"


def make_tables(findings: Findings) -> list[Table]:
    """Return accuracies, differences, entropies and budgets of the arms.

    Args:
        findings: From ``findings.read_findings``.
    """
    arms, reference = findings.arms, findings.reference
    return [
        Table(
            "Accuracy", "Held-out accuracy in percent, greedy: mean over seeds ± half of its 95 % t interval. Final: "
            "at the last evaluation. Over the run: mean over its FLOPs. Best: of all evaluations, which favours noise.",
            ["arm", "seeds", "final", "over the run", "best"],
            [[a.name, _seeds(a), _percent(a.final), _percent(a.area), _percent(a.best)] for a in arms],
        ),
        Table(
            f"Beside {reference}", f"Accuracy less that of {reference} with the same seed, in points: mean of these "
            "differences ± half of its 95 % t interval, and its sign where that leaves out 0, as one in twenty does by "
            "chance.",
            ["arm", "pairs", "final", "", "over the run", ""],
            [[a.name, _pairs(a), *_difference(a.final_difference), *_difference(a.area_difference)]
             for a in arms if a.name != reference],
        ),
        Table(
            "Entropy of rollouts", "H in nats per token, a mean over the tokens of a step; over seeds as above.",
            ["arm", "first step", "over the run", "last step"],
            [[a.name, *(_nats(e) for e in (a.entropy or (None, None, None)))] for a in arms],
        ),
        Table(
            "Budgets", "Mean over seeds of what a run was given, and its ratio to the reference. FLOPs: 6 · parameters "
            "· trained tokens + 2 · parameters · sampled tokens, a prompt counted for each of its sequences though a "
            "micro-batch computes it once; attention, evaluation and other passes left out.",
            ["arm", *BUDGETS.values()],
            [[a.name, *(_spent(a, findings, what) for what in BUDGETS)] for a in arms],
        ),
    ]  # fmt: skip


def markdown(findings: Findings, tables: Sequence[Table]) -> str:
    """Return the tables as a Markdown document.

    Args:
        findings: Give heading, question and warnings.
        tables: From ``make_tables``.
    """
    parts = [f"# {findings.title}", findings.question, " ".join(findings.conditions)]
    parts += [f"**Warning:** {warning}" for warning in findings.warnings]
    parts += [as_markdown(table) for table in tables]
    parts.append("## Arms")
    parts.append("\n".join(f"- {arm.name}: {_code(arm.options)}" for arm in findings.arms))
    return "\n\n".join(parts) + "\n"


def _code(words: Sequence[str]) -> str:
    return " ".join(f"`{word}`" for word in words) or "nothing besides what all have"


def _seeds(arm: Arm) -> str:
    asked = len(arm.results) + len(arm.failed) + len(arm.missing)
    return f"{len(arm.results)}" if len(arm.results) == asked else f"{len(arm.results)} of {asked}"


def _pairs(arm: Arm) -> str:
    return str(arm.final_difference.count if arm.final_difference else 0)


def _percent(e: Estimate | None) -> str:
    if e is None:
        return _NONE
    return f"{100 * e.mean:.1f}" + ("" if e.half is None else f" ± {100 * e.half:.1f}")


def _difference(e: Estimate | None) -> tuple[str, str]:
    """The difference in points, and its sign where that is told apart from 0."""
    if e is None:
        return _NONE, ""
    told = "" if e.half is None or e.low <= 0 <= e.high else "above" if e.mean > 0 else "below"
    return f"{100 * e.mean:+.1f}" + ("" if e.half is None else f" ± {100 * e.half:.1f}"), told


def _nats(e: Estimate | None) -> str:
    return _NONE if e is None else f"{e.mean:.3f}" + ("" if e.half is None else f" ± {e.half:.3f}")


def _spent(arm: Arm, findings: Findings, what: str) -> str:
    if not arm.budget:
        return _NONE
    value = arm.budget[what]
    text = amount(what, value)
    reference = next(other for other in findings.arms if other.name == findings.reference)
    if arm is reference or not reference.budget.get(what):
        return text
    return f"{text} ({value / reference.budget[what]:.2f})"
