"""The bench of the dissection: its page is that of the result file, its statistics are scipy's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

import dissection as bench
from tables import with_table


def test_the_page_shows_what_is_in_the_result_file() -> None:
    text = bench.PAGE.read_text()
    for name, table in bench.TABLES.items():
        shown = with_table(text, f"results/dissection.json{name}", table(bench.ordered_rows()))
        assert shown == text


def test_the_rank_correlation_is_scipys(generator: torch.Generator) -> None:
    a, b = torch.randint(0, 6, (2, 40), generator=generator).double()
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert bench.rank_correlation(a, b) == pytest.approx(expected)
    assert bench.rank_correlation(a, torch.zeros(40)) is None
