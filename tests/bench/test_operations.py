"""Tensor functions between two convolutions: each is followed, or frozen with a reason."""

from __future__ import annotations

import pytest

import operation_outcomes
from operations import FUNCTIONS

NAMES = list(FUNCTIONS)
SAMPLE = NAMES[::8]
"""Functions of every family, which take few seconds."""


@pytest.mark.parametrize(
    "name",
    [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_function_is_followed_or_frozen_as_the_page_says(name: str) -> None:
    (row,) = [row for row in operation_outcomes.read_rows() if row["function"] == name]
    outcome = operation_outcomes.measure(name)
    assert (outcome.followed, outcome.cause) == (row["followed"], row["cause"])


def test_the_page_is_that_of_the_result_file() -> None:
    text, rows = operation_outcomes.PAGE.read_text(), operation_outcomes.read_rows()
    assert operation_outcomes.page(text, rows) == text
    assert [row["function"] for row in rows] == NAMES


def test_at_least_two_thirds_of_150_functions_and_more_are_followed() -> None:
    rows = operation_outcomes.read_rows()
    assert len(rows) >= 300
    assert sum(row["followed"] > 0 for row in rows) >= 280
