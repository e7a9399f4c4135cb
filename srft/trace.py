"""The tokens of a step that stand out in its record: ``python -m srft.trace runs/<name> <step>``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from srft.options import load_config_text
from srft.policy.model import load_tokenizer
from srft.record.rollouts import read_rows, step_file
from srft.report.table import Table, on_terminal
from srft.responses import Response

# tokens shown before one
_CONTEXT = 8
# columns, in fewer of which numbers would be cut; a terminal or a pipe that is narrower gets long lines
_WIDTH = 140


class Token(NamedTuple):
    """A token of a response.

    Args:
        row: The response, as ``read_rows`` has it.
        place: Of the token in ``response_ids``, from 0.
        gap: log p of the policy before the step - log p of the engine, nats; None on a demonstration's.
        logprob: Of the policy before the step, nats.
        pull: |advantage| · (1 - p), by which a policy gradient pushes the token's own logit, before clipping,
            denominators and the weights of the method; None on a demonstration's.
    """

    row: Mapping[str, Any]
    place: int
    gap: float | None
    logprob: float
    pull: float | None


def tokens_of(rows: Sequence[Mapping[str, Any]]) -> list[Token]:
    """Return every token whose log-probability is recorded, in order.

    Args:
        rows: From ``read_rows``.
    """
    return [token for row in rows if not row["gave_way"] for token in _tokens(row)]


def _tokens(row: Mapping[str, Any]) -> list[Token]:
    found = []
    places = Response([], row["response_ids"], False, False, [], "", spans=row.get("spans") or []).own_places
    for number, logprob in enumerate(row["logprobs"] or []):
        place = places[number]
        sampled = not row["is_demo"] and place >= row["prefix_tokens"]
        gap = logprob - row["rollout_logprobs"][number] if sampled else None
        pull = abs(row["advantage"]) * -math.expm1(logprob) if sampled else None
        found.append(Token(row, place, gap, logprob, pull))
    return found


def tables(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int) -> list[Table]:
    """Return the tokens with the largest gaps, the least likely ones, and those that are pulled at most.

    Args:
        rows: Of a step, from ``read_rows``.
        tokenizer: The policy's.
        count: Tokens in each table.

    Raises:
        ValueError: When log-probabilities were not recorded.
    """
    tokens = tokens_of(rows)
    if not tokens:
        raise ValueError(
            "the record has no log-probabilities of the policy, as on several ranks, or where nothing was learned; "
            "take a step of a run of one process"
        )
    measures: list[tuple[str, str, Callable[[Token], float | None]]] = [
        ("Policy and engine apart", "|log p - log p of the engine|, nats", _apart),
        ("Least likely", "-log p, nats", lambda t: -t.logprob),
        ("Pulled most", "|advantage| · (1 - p), before clipping and weights", lambda t: t.pull),
    ]
    return [_table(title, caption, measure, tokens, tokenizer, count) for title, caption, measure in measures]


def _apart(token: Token) -> float | None:
    return None if token.gap is None else abs(token.gap)


def _table(
    title: str,
    caption: str,
    measure: Callable[[Token], float | None],
    tokens: Sequence[Token],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> Table:
    measured = [(value, token) for token in tokens if (value := measure(token)) is not None]
    # a NaN is what is looked for
    measured.sort(key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], reverse=True)
    rows = []
    for value, (row, place, gap, logprob, _) in measured[:count]:
        ids = row["response_ids"]
        before = tokenizer.decode(ids[max(0, place - _CONTEXT) : place])
        kind = "demo" if row["is_demo"] else "prefix" if place < row["prefix_tokens"] else "rollout"
        rows.append(
            [
                f"{row['group']}.{row['place']} {kind} {row['id']}", str(place), f"{value:.4g}", f"{logprob:.4g}",
                "" if gap is None else f"{logprob - gap:.4g}", f"{row['advantage']:.3g}", f"{row['reward']:g}",
                repr(before), repr(tokenizer.decode(ids[place : place + 1])),
            ]
        )  # fmt: skip
    columns = ["response", "token", "measure", "log p", "engine's", "advantage", "reward", "after", "text"]
    return Table(title, caption, columns, rows)


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m srft.trace", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with train.record_rollouts=true")
    parser.add_argument("step", type=int)
    parser.add_argument("--count", type=int, default=5, help="tokens in each table (default: 5)")
    options = parser.parse_args()
    try:
        rows = read_rows(step_file(options.run, options.step))
        tokenizer = load_tokenizer(load_config_text((options.run / "config.toml").read_text()).model)
        console = Console()
        console.width = max(console.width, _WIDTH)
        for table in tables(rows, tokenizer, options.count):
            console.print(on_terminal(table))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
