"""Write the tables of docs/reference/results.md from results/: `python bench/results.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ablations
import benchmarks
import criteria
import finetuned
import segmentation
import tuning
from measurements import read_measurements
from rows import ROOT
from tables import with_table

PAGE = ROOT / "docs" / "reference" / "results.md"
BENCHMARKS = {finetuned.CONFIG: finetuned.RESULTS, **ablations.RESULTS}
"""Result files by benchmark."""
TABLES: dict[str, Callable[[], str]] = {
    "results/criteria.jsonl cifar10": lambda: criteria.table("cifar10", criteria.measured()),
    "results/tuning.jsonl": lambda: tuning.table(read_measurements(tuning.RESULTS, tuning.KEY)),
    "results/segmentation.jsonl": lambda: segmentation.table(segmentation.measured()),
    "results/segmentation.jsonl classes": lambda: segmentation.class_table(segmentation.measured()),
    **{
        f"results/{rows.name}": partial(benchmarks.table, config, rows)
        for config, rows in BENCHMARKS.items()
    },
}
"""Tables by the name of their marker."""


def page(text: str) -> str:
    """Return the page with current tables."""
    for name, table in TABLES.items():
        text = with_table(text, name, table())
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
