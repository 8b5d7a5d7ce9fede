"""Writes docs/reference/results.md from what lies in results/: `python bench/results.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ablations
import comparisons
import criteria
import tuned
import tuning
from cells import read_cells
from rows import ROOT
from tables import with_table

PAGE = ROOT / "docs" / "reference" / "results.md"
COMPARISONS = {tuned.CONFIG: tuned.RESULTS, **ablations.RESULTS}
"""Result files by comparison."""
TABLES: dict[str, Callable[[], str]] = {
    "results/criteria.jsonl cifar10": lambda: criteria.table("cifar10", criteria.cells()),
    "results/tuning.jsonl": lambda: tuning.table(read_cells(tuning.RESULTS, tuning.KEY)),
    **{
        f"results/{rows.name}": partial(comparisons.table, config, rows)
        for config, rows in COMPARISONS.items()
    },
}
"""What stands between the markers of each name."""


def page(text: str) -> str:
    """The page with its tables brought up to date."""
    for name, table in TABLES.items():
        text = with_table(text, name, table())
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
