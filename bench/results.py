"""Writes docs/results.md from what lies in results/: `python bench/results.py`."""

from __future__ import annotations

from collections.abc import Callable

import ablations
import comparisons
import criteria
import tuned
import tuning
from cells import read_cells
from rows import ROOT
from tables import with_table

PAGE = ROOT / "docs" / "results.md"
TABLES: dict[str, Callable[[], str]] = {
    "results/criteria.jsonl cifar10": lambda: criteria.table("cifar10", criteria.cells()),
    "results/tuned.jsonl": lambda: comparisons.table(
        tuned.CONFIG, comparisons.rows_in(tuned.RESULTS)
    ),
    "results/ablations.jsonl": lambda: comparisons.table(
        ablations.CONFIG, comparisons.rows_in(ablations.RESULTS)
    ),
    "results/tuning.jsonl": lambda: tuning.table(read_cells(tuning.RESULTS, tuning.KEY)),
}
"""What stands between the markers of each name."""


def page(text: str) -> str:
    """The page with its tables brought up to date."""
    for name, table in TABLES.items():
        text = with_table(text, name, table())
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
