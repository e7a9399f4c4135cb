"""The page of a run: one file without scripts or outside references, made from what lies in the run folder.

``python -m srft.report runs/<name>`` makes plots and page again, also while the run goes on or after a crash.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from srft.disk import WriteError, writing
from srft.record.files import write_atomically
from srft.record.history import RunRecord, first_best_last, interval, load_record, percent, tokens_per_second
from srft.record.text import format_count
from srft.report import page


def build_report(run_dir: Path) -> RunRecord:
    """Draw ``plots/`` and write ``report.html`` from what lies in the run folder.

    Args:
        run_dir: The folder of the run, complete or not.

    Returns:
        What was read, for a table of it.

    Raises:
        ValueError: When there is no such folder.
        WriteError: When the disk refuses.
    """
    # here, so that a run pays for matplotlib only when it ends
    from srft.report.drawing import smoothing_width
    from srft.report.plots import draw_plots, panels

    run_dir = Path(run_dir)
    record = load_record(run_dir)
    with writing(run_dir / "plots"):
        svgs = draw_plots(record.rows, run_dir / "plots", record.curves)
    captions = {panel.name: (panel.title, panel.caption) for panel in panels(record.curves)}
    figures = [(*captions[name], svg) for name, svg in svgs.items()]
    html = page.render(
        title=record.title,
        status=record.status,
        cards=_cards(record),
        figures=figures,
        smoothing_width=smoothing_width(record.rows),
        samples=record.samples,
        warnings=record.warnings,
        said=record.about.get("said", []),
        config_text=record.config_text,
        sessions=record.about.get("sessions", []),
        facts=[(fact.label, fact.first, fact.best, fact.last) for fact in record.facts],
        places=record.places,
        alarms=record.alarms,
    )
    write_atomically(run_dir / "report.html", html)
    return record


def _cards(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return (label, headline, line below) of the numbers that open the page."""
    cards = []
    by_label = {fact.label: fact for fact in record.facts}
    if shown := first_best_last(record.rows):
        first, best, last = shown
        below = f"best {percent(best)} at step {best['step']}"
        if interval(last):
            below = f"95% interval {interval(last)}; {below}"
        change = f"{percent(first)} → {percent(last)}" if first is not last else percent(last)
        cards.append(("Eval accuracy", change, below))
    for label, title, below in (
        ("training reward", "Training reward", "means of the first and last steps"),
        ("entropy, rollouts (nats)", "Entropy, rollouts", "nats per token, first and last steps"),
        ("entropy, demonstrations (nats)", "Entropy, demonstrations", "nats per token, first and last steps"),
        ("loss", "Loss", "means of the first and last steps"),
    ):  # fmt: skip
        if label in by_label and len(cards) < 4:
            cards.append((title, f"{by_label[label].first} → {by_label[label].last}", below))
    run_time = dict(record.places).get("run time")
    if run_time:
        rates = [rate for row in record.rows if (rate := tokens_per_second(row)) is not None]
        below = f"{format_count(sum(rates) / len(rates))} tokens per second" if rates else record.status
        cards.append(("Run time", run_time, below))
    return cards


def main(argv: Sequence[str] | None = None) -> None:
    """Make plots and page of run folders again.

    Args:
        argv: Command-line arguments without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m srft.report", description="Draw a run's plots and page.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder of a run, complete or not: runs/demo")
    parsed = parser.parse_args(argv)
    for run_dir in parsed.run_dir:
        try:
            record = build_report(run_dir)
        except (ValueError, WriteError) as error:
            parser.error(str(error))
        print(f"{record.title}: {record.status}. {run_dir / 'report.html'}")


if __name__ == "__main__":
    main()
