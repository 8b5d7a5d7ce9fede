"""The tables of what keeping some classes saves, and how MACs at equal accuracy are read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import keep_classes
from keep_classes import Point, fractions_right, macs_at, ratio
from secateur.data import Batch


def test_the_tables_are_those_of_the_rows() -> None:
    text = keep_classes.PAGE.read_text()
    assert keep_classes.page(text) == text


def test_macs_lie_on_the_line_between_two_budgets() -> None:
    points = [Point("macs=0.6", 60.0, 0.9), Point("macs=0.4", 40.0, 0.8)]
    assert macs_at(points, 0.85) == pytest.approx(50)
    assert macs_at(points, 0.9) == pytest.approx(60)
    assert macs_at(points, 0.95) is None


def test_a_ratio_outside_of_a_curve_is_a_bound_or_none() -> None:
    points = [Point("macs=0.6", 60.0, 0.9), Point("macs=0.4", 40.0, 0.8)]
    assert ratio(points, Point("macs=0.8", 80.0, 0.85)) == "0.62"
    assert ratio(points, Point("macs=0.8", 80.0, 0.7)) == "< 0.50"
    assert ratio(points, Point("macs=0.8", 80.0, 0.95)) == "–"


def test_two_readings_of_a_network_that_has_more_outputs() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 3.0, 2.0], [2.0, 3.0, 1.0]])
    batch = Batch(logits, torch.tensor([0, 1, 1]), torch.arange(3))
    assert fractions_right(nn.Identity(), [batch], (0, 2)) == pytest.approx((1 / 3, 2 / 3))
