"""The tables of what keeping some classes saves, and how MACs at equal accuracy are read."""

from __future__ import annotations

import pytest

import keep_classes
from keep_classes import Point, macs_at


def test_the_tables_are_those_of_the_rows() -> None:
    text = keep_classes.PAGE.read_text()
    assert keep_classes.page(text) == text


def test_macs_lie_on_the_line_between_two_budgets() -> None:
    points = [Point("macs=0.6", 60.0, 0.9), Point("macs=0.4", 40.0, 0.8)]
    assert macs_at(points, 0.85) == pytest.approx(50)
    assert macs_at(points, 0.9) == pytest.approx(60)
    assert macs_at(points, 0.95) is None
