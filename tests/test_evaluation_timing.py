from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from secateur.runtime.timing import Rounds, interleaved_medians


def test_actions_are_interleaved_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    order: list[str] = []

    def action(name: str, seconds: list[float]) -> Callable[[], None]:
        remaining = iter(seconds)

        def run() -> None:
            nonlocal clock
            order.append(name)
            clock += next(remaining)

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    actions = {
        "pruned": action("pruned", [9, 9, 1, 5, 2]),
        "original": action("original", [9, 9, 4, 3, 8]),
    }
    assert interleaved_medians(actions, Rounds(3, 3, warm_up=2)) == {
        "pruned": 2000.0,
        "original": 4000.0,
    }
    assert order == ["pruned", "original"] * 5


def test_late_rounds_are_left_out_after_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def run() -> None:
        nonlocal clock
        clock += 10.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    interleaved_medians({"only": run}, Rounds(fewest=3, most=100, seconds=15.0, warm_up=1))
    assert clock == 40.0
