"""The profiler times the right layers; no test asserts how long anything takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from networks import NETWORKS, Chain, random_images, random_plan, wired
from secateur.config import Budget
from secateur.pruning.cost import latency_profiler as profiler
from secateur.pruning.cost.latency_model import LatencyTable, widths_of
from secateur.pruning.cost.quantities import count_quantity
from secateur.pruning.plan import make_plan
from secateur.runtime import timing
from secateur.runtime.timing import LATENCY_BATCH, Rounds


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "TABLE_ROUNDS", Rounds(1, 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_timed_at_its_own_width_and_narrower(
    name: str, generator: torch.Generator
) -> None:
    model, dependencies = wired(name, True)
    table = profiler.measure_latency(model, dependencies, random_images(2))
    assert [layer.layer for layer in table.layers] == [layer.name for layer in dependencies.layers]
    for times, widths in zip(table.layers, widths_of(dependencies), strict=True):
        for timed, width in ((times.read, widths.read), (times.produced, widths.produced)):
            assert list(timed) == sorted(set(timed))
            assert timed[-1] == (width if isinstance(width, int) else len(width))
        assert all(ms > 0 for row in times.ms for ms in row)
    assert table.batch == LATENCY_BATCH
    assert table.layers_factor >= 1
    assert table.fixed_ms >= 0
    assert table.ms_per_value >= 0
    assert LatencyTable.from_json(table.to_json()) == table
    predict = count_quantity(dependencies, "latency", table)
    assert predict({}) > 0
    assert predict(random_plan(dependencies, generator).removed) > 0


def test_the_network_is_left_as_it_was() -> None:
    model, dependencies = wired("chain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        profiler.measure_latency(model, dependencies, random_images(2))
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("factors", [(2.0, 0.5, 3.0), (1.0, 0.0, 2.0), (0.0, 0.0, 4.0)])
def test_factors_of_the_terms_are_fitted(factors: tuple[float, ...]) -> None:
    terms = np.array([[9.0, 4.0, 1.0], [4.0, 3.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert profiler.fit_non_negative(terms, terms @ factors) == pytest.approx(factors, abs=1e-9)


def test_no_factor_is_negative() -> None:
    terms = np.array([[2.0, 1.0], [1.0, 1.0]])
    falling = profiler.fit_non_negative(terms, np.array([3.0, 5.0]))
    assert min(falling) >= 0
    assert profiler.fit_non_negative(terms, np.array([-1.0, -2.0])) == [0.0, 0.0]
    assert profiler.fit_non_negative(terms[:1], np.array([3.0])) == pytest.approx([1.5, 0.0])


def test_two_networks_are_timed_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower slows both."""
    durations = (1.1**number for number in range(100))

    def seconds(action: Callable[[], object]) -> float:
        action()
        return next(durations)

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(profiler, "INTERLEAVED_ROUNDS", Rounds(9, 9))
    model, smaller = Chain(), Chain().train()
    # Each pass takes longer than the one before it. One network after the other: 2.4.
    fraction = profiler.Stopwatch(model.eval(), random_images(2)).fraction_left(smaller)
    assert fraction == pytest.approx(1.0, abs=0.11)
    assert smaller.training
    assert not model.training


@pytest.mark.parametrize("name", ["chain", "residual", "grouped"])
def test_networks_are_timed_with_the_same_fraction_in_every_group(name: str) -> None:
    _, dependencies = wired(name, True)
    scores = {name: torch.zeros(len(group)) for name, group in dependencies.groups.items()}
    plans = [
        make_plan(scores, dependencies, Budget("filters", fraction), "uniform").removed
        for fraction in profiler.FRACTIONS
    ]
    cuts = profiler._uniform_cuts(dependencies, grid=1)
    assert cuts[0] == {}
    assert all(removed in cuts for removed in plans)
    assert all(removed in plans for removed in cuts[1:])
