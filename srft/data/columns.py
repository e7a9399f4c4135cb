"""Columns of a row by name or by a dotted path into nested fields."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from srft.data.messages import is_missing

Row = dict[str, Any]


def lookup(row: Row, path: str) -> Any:
    """Return the value at a column name or a dotted path.

    Args:
        row: A row of the source.
        path: Column name, dots reaching into nested fields.

    Raises:
        KeyError: If there is none.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(path)
        value = value[part]
    return value


def has_column(row: Row, path: str) -> bool:
    """Whether a row has a value at a column name or a dotted path.

    Args:
        row: A row of the source.
        path: As in :func:`lookup`.
    """
    try:
        lookup(row, path)
    except KeyError:
        return False
    return True


def merged(rows: Iterable[Row]) -> Row:
    """Return one row that has every column of these, each with the first value that says something.

    Args:
        rows: Rows that may lack a column, or have null in it.
    """
    whole: Row = {}
    for row in rows:
        for key, value in row.items():
            have = whole.get(key)
            if isinstance(have, dict) and isinstance(value, dict):
                whole[key] = merged([have, value])
            elif key not in whole or (is_missing(have) and not is_missing(value)):
                whole[key] = value
    return whole
