from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.runtime.timing import COPIES, Rounds, batch_in_time, in_turn, interleaved_medians


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
    rounds = [order[start : start + 2] for start in range(0, 10, 2)]
    assert all(sorted(names) == ["original", "pruned"] for names in rounds)
    assert rounds != [rounds[0]] * 5, "a fixed order can keep step with the scheduler"


def test_late_rounds_are_left_out_after_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def run() -> None:
        nonlocal clock
        clock += 10.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    interleaved_medians({"only": run}, Rounds(fewest=3, most=100, seconds=15.0, warm_up=1))
    assert clock == 40.0


@pytest.mark.parametrize(
    ("seconds_an_image", "size"), [(0.01, 16), (0.03125, 16), (0.04, 8), (0.2, 2), (3.0, 1)]
)
def test_slow_networks_are_timed_with_fewer_images(
    monkeypatch: pytest.MonkeyPatch, seconds_an_image: float, size: int
) -> None:
    clock = 0.0
    sizes: list[int] = []

    def run(images: Tensor) -> None:
        nonlocal clock
        sizes.append(len(images))
        clock += seconds_an_image * len(images)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert len(batch_in_time(run, torch.zeros(3, 1, 2, 2))) == size
    assert sizes == [1, 1]


def test_an_unlucky_copy_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, speeds = [0.0], iter([1.0, 9.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def prepare() -> Callable[[], None]:
        duration = next(speeds)

        def run() -> None:
            now[0] += duration

        return run

    action = in_turn(prepare)
    assert now == [11.0]  # each of the copies has run once
    assert COPIES == 3
    assert interleaved_medians({"only": action}, Rounds(6, 6)) == {"only": 1e3}
    assert now == [33.0]  # and twice more
