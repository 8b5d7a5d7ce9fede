"""The page of estimates is that of the result files, and estimates are near."""

from __future__ import annotations

import estimates
import training_free
from rows import read_rows
from tables import with_table


def test_the_page_is_that_of_the_result_files() -> None:
    text = estimates.PAGE.read_text()
    assert estimates.page(text, read_rows(estimates.RESULTS)) == text
    table = training_free.fast_table(training_free.measured())
    assert with_table(text, "fast", table) == text


def test_all_runs_are_within_the_factor() -> None:
    ratios = estimates.ratios(read_rows(estimates.RESULTS))
    assert len(ratios) == len(estimates.RUNS) == 12
    assert all(1 / estimates.WITHIN <= ratio <= estimates.WITHIN for ratio in ratios)


def test_the_table_has_a_line_for_each_run() -> None:
    row = {
        "network": "resnet20",
        "images": 200,
        "side": 32,
        "expected_seconds": {"cut": 2.0, "refit": 1.0},
        "expected_memory_bytes": 2**30,
        "seconds": 4.0,
        "memory_bytes": 2**31,
    }
    last = estimates.table([row]).splitlines()[-1]
    assert last == "| resnet20 | 200 of 32² | 3.0 | 4.0 | 0.75 | 1.00 | 2.00 | 0.50 |"
    failed = {key: row[key] for key in ("network", "images", "side")}
    failed |= {"outcome": "failed", "reason": "it broke"}
    assert "failed: it broke" in estimates.table([failed])
    assert estimates.ratios([row, failed]) == [0.75]
