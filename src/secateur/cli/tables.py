"""Tables of a configuration, before they are checked."""

from __future__ import annotations

from typing import Any

from secateur.runtime.errors import UsageError


def put(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables; raises `UsageError` if a table is needed."""
    section, dot, name = key.partition(".")
    if dot:
        tables[section] = {**table_of(tables, section), name: value}
    else:
        tables[section] = value


def table_of(tables: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a table of the configuration, empty if it is missing."""
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"configuration, {name}: must be a table; got {table!r}")
    return table
