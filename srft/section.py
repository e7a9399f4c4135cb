"""What every group of options has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


def one_or_more(value: object) -> object:
    """Return a list of the one text that an option of several was given, and anything else as it is.

    Args:
        value: What was given.
    """
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    """A group of options: unknown names are errors, the text under each field is its help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False,
        validate_default=True,
    )  # fmt: skip
