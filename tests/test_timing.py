"""What is timed, and that times come back; how long anything takes is not asserted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from networks import NETWORKS, Chain, random_images, random_plan, wired
from secateur.config import Budget
from secateur.errors import TargetError
from secateur.evaluation.timing import LATENCY_BATCH
from secateur.graph.build import build_dependency_graph
from secateur.pruning.cost import latency_profiler as timing
from secateur.pruning.cost.latency_model import LatencyTable, milliseconds, widths_of
from secateur.pruning.plan import PruningPlan


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_timed_at_its_own_width_and_narrower(
    name: str, generator: torch.Generator
) -> None:
    model, dependencies = wired(name, True)
    table = timing.measure_latency(model, dependencies, random_images(2))
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
    predict = milliseconds(table, dependencies)
    assert predict({}) > 0
    assert predict(random_plan(dependencies, generator).removed) > 0


def test_the_network_is_left_as_it_was() -> None:
    model, dependencies = wired("chain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        timing.measure_latency(model, dependencies, random_images(2))
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


def test_two_networks_take_turns_so_that_a_slower_machine_slows_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = (float(2**number) for number in range(100))

    def seconds(action: Callable[[], object]) -> float:
        action()
        return next(taken)

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "TURNS", (9, 9))
    model, smaller = Chain(), Chain().train()
    # Each pass takes twice the time of the one before it: so does the second network, and no more.
    assert timing.measure_fraction_left(model.eval(), smaller, random_images(2)) == 2
    assert smaller.training
    assert not model.training


LEAST = 0.3


class Timed:
    """Plans by number, and times that are not what was predicted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, taken: Callable[[float], float]) -> None:
        self.asked: list[float] = []
        monkeypatch.setattr(timing, "cut", lambda model, dependencies, removed: model)
        monkeypatch.setattr(timing, "time_left", lambda *_: taken(self.asked[-1]))

    def plan(self, fraction: float) -> PruningPlan:
        assert fraction >= LEAST
        self.asked.append(fraction)
        return PruningPlan({}, Budget("latency", fraction), "l1")


def planned(timed: Timed, fraction: float) -> tuple[PruningPlan, float]:
    model = Chain()
    dependencies = build_dependency_graph(model, random_images(2))
    return timing.plan_in_time(model, dependencies, timed.plan, fraction, LEAST, random_images(2))


@pytest.mark.parametrize(
    "taken", [lambda f: 0.1 + 0.9 * f, lambda f: 0.8 * f, lambda f: f**2, lambda f: f]
)
def test_a_plan_that_takes_longer_or_shorter_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, taken: Callable[[float], float]
) -> None:
    timed = Timed(monkeypatch, taken)
    plan, left = planned(timed, 0.6)
    assert left == pytest.approx(taken(plan.budget.fraction_left))
    assert (1 - 2 * timing.NEAR) * 0.6 <= left <= 0.6
    assert len(timed.asked) <= timing.PLANS


def test_a_time_that_no_plan_keeps_to_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for taken, fraction, said in (
        (lambda f: 0.5 + 0.5 * f, 0.5, r"latency=0\.5 is out of reach: 0\.65\d of the time stay"),
        (lambda f: f, 0.2, r"latency=0\.2 is out of reach: 0\.300 of the time stay"),
    ):
        with pytest.raises(TargetError, match=said):
            planned(Timed(monkeypatch, taken), fraction)


def test_what_is_foretold_to_be_out_of_reach_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, lambda f: 0.6 * f)
    plan, left = planned(timed, 0.2)
    assert plan.budget.fraction_left == pytest.approx(left / 0.6)
    assert (1 - 2 * timing.NEAR) * 0.2 <= left <= 0.2
