from __future__ import annotations

import math

import pytest
import torch

from secateur.training.lr_schedule import Schedule


def test_cosine_rises_then_falls_to_zero() -> None:
    factor = Schedule("cosine", steps=100, warmup=10).factor
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(10) == pytest.approx(1)
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    assert all(factor(s) >= factor(s + 1) for s in range(10, 100))
    assert math.isfinite(Schedule("cosine", steps=1, warmup=10).factor(0))


def test_step_falls_where_it_should() -> None:
    factor = Schedule("step", 100, 5, step_at=(0.5, 0.75), step_factor=0.2).factor
    assert [factor(step) for step in (0, 5, 49, 50, 74, 75, 99)] == pytest.approx(
        [0.2, 1, 1, 0.2, 0.2, 0.04, 0.04]
    )


def test_one_cycle_is_that_of_torch() -> None:
    steps = 50
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=steps)
    ours = Schedule("one_cycle", steps, warmup=10)
    # torch counts from the first step to the last, not to the end of the last.
    for step in range(steps):
        expected = theirs.get_last_lr()[0]
        assert ours.factor(step) == pytest.approx(expected, abs=0.08)
        optimiser.step()
        theirs.step()
    assert max(ours.factor(step) for step in range(steps)) == pytest.approx(1, abs=0.02)
