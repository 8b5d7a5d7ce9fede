"""Tables in the documentation that commands write, between two markers."""

from __future__ import annotations

import re


def with_table(text: str, name: str, table: str) -> str:
    """Return the text with `table` between the markers of `name`."""
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    assert count == 1, f"{count} tables {name!r}"
    return replaced
