"""A calculator that a policy asks by ending a turn in "="."""

from __future__ import annotations

import re
from typing import Any

from srft.rewards.arithmetic import evaluate_expression

_ASKED = re.compile(r"([-+*/().\d\s]*[\d)]\s*)=\s*\Z")


class Calculator:
    """Answers "12+30=" by "42", and "error" to what has no value; a turn that does not end in "=" is the last one.

    Args:
        answer: Not used.
        row: Not used.
    """

    def __init__(self, answer: Any, row: dict[str, Any]) -> None:
        """Nothing is remembered."""

    def step(self, text: str) -> str | None:
        """Return the value of the expression with which a turn ends.

        Args:
            text: What the policy said.
        """
        if not text.rstrip().endswith("="):
            return None
        asked = _ASKED.search(text)
        try:
            value, _ = evaluate_expression(asked[1].strip() if asked else "")
        except (ValueError, ZeroDivisionError):
            return "error"
        return str(value)
