"""What is timed, and that times come back; how long anything takes is not asserted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from networks import NETWORKS, random_images, random_plan, wired
from secateur import timing
from secateur.evaluate import LATENCY_BATCH
from secateur.latency import LatencyTable, milliseconds, widths_of


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_timed_at_its_own_width_and_narrower(
    name: str, generator: torch.Generator
) -> None:
    model, wiring = wired(name, True)
    table = timing.measure_latency(model, wiring, random_images(2))
    assert [layer.layer for layer in table.layers] == [layer.name for layer in wiring.layers]
    for times, widths in zip(table.layers, widths_of(wiring), strict=True):
        for timed, width in ((times.read, widths.read), (times.written, widths.written)):
            assert list(timed) == sorted(set(timed))
            assert timed[-1] == (width if isinstance(width, int) else len(width))
        assert all(ms > 0 for row in times.ms for ms in row)
    assert table.batch == LATENCY_BATCH
    assert table.layers_factor >= 1
    assert table.fixed_ms >= 0
    assert table.ms_per_value >= 0
    assert LatencyTable.from_json(table.to_json()) == table
    predict = milliseconds(table, wiring)
    assert predict({}) > 0
    assert predict(random_plan(wiring, generator).removed) > 0


def test_the_network_is_left_as_it_was() -> None:
    model, wiring = wired("chain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        timing.measure_latency(model, wiring, random_images(2))
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("factors", [(2.0, 0.5, 3.0), (1.0, 0.0, 2.0), (0.0, 0.0, 4.0)])
def test_terms_that_make_up_the_totals_are_found(factors: tuple[float, ...]) -> None:
    terms = np.array([[9.0, 4.0, 1.0], [4.0, 3.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert timing.combination(terms, terms @ factors) == pytest.approx(factors, abs=1e-9)


def test_no_term_is_subtracted() -> None:
    terms = np.array([[2.0, 1.0], [1.0, 1.0]])
    falling = timing.combination(terms, np.array([3.0, 5.0]))
    assert min(falling) >= 0
    assert timing.combination(terms, np.array([-1.0, -2.0])) == [0.0, 0.0]
    assert timing.combination(terms[:1], np.array([3.0])) == pytest.approx([1.5, 0.0])
