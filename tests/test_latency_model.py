"""Latency predicted from given times; `test_latency_profiler` measures times."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from networks import wired
from secateur.config import Budget
from secateur.graph.activation_memory import count_other_values
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.pruning.cost.latency_model import (
    Hardware,
    Interpolation,
    LatencyTable,
    LayerTimes,
    predict_milliseconds,
    widths_of,
)
from secateur.pruning.cost.quantities import Measure
from secateur.pruning.plan import make_plan
from secateur.runtime.errors import RunFolderError, TargetError, UsageError

HARDWARE = Hardware(
    processor="avx", threads=2, device="cpu", dtype="float32", engine="pytorch", version="2"
)


def bilinear(read: float, produced: float) -> float:
    return 1 + 0.5 * read + 0.25 * produced + 0.125 * read * produced


def bilinear_times(
    layer: str = "conv", read: tuple[int, ...] = (1, 8, 64), produced: tuple[int, ...] = (2, 24, 48)
) -> LayerTimes:
    ms = tuple(tuple(bilinear(r, w) for w in produced) for r in read)
    return LayerTimes(layer=layer, read=read, produced=produced, ms=ms)


def table_of(dependencies: DependencyGraph) -> LatencyTable:
    """Times that are in proportion to the multiply-accumulates of a position."""
    layers = []
    for layer, widths in zip(dependencies.layers, widths_of(dependencies), strict=True):
        read = 1 if isinstance(widths.read, int) else len(widths.read)
        produced = 1 if isinstance(widths.produced, int) else len(widths.produced)
        reads, writes = tuple(sorted({1, read})), tuple(sorted({1, produced}))
        ms = tuple(tuple(0.001 * r * w for w in writes) for r in reads)
        layers.append(LayerTimes(layer=layer.name, read=reads, produced=writes, ms=ms))
    return LatencyTable(
        hardware=HARDWARE,
        batch=16,
        block=1,
        layers=tuple(layers),
        layers_factor=2,
        fixed_ms=0.01,
        ms_per_value=1e-6,
    )


def latency_of(dependencies: DependencyGraph) -> Measure:
    return predict_milliseconds(
        table_of(dependencies), dependencies, count_other_values(dependencies)
    )


def test_between_timed_widths_times_are_interpolated_in_both_directions() -> None:
    layers = [bilinear_times(), bilinear_times(read=(3,), produced=(5, 6)), bilinear_times()]
    interpolate = Interpolation(layers, 1)
    for reads, writes in [((1, 3, 64), (2, 5, 48)), ((5, 3, 40), (30, 6, 3))]:
        expected = [bilinear(r, w) for r, w in zip(reads, writes, strict=True)]
        assert interpolate(np.array(reads), np.array(writes)) == pytest.approx(expected)


def test_narrower_and_wider_than_timed_is_as_the_nearest() -> None:
    interpolate = Interpolation([bilinear_times(read=(4, 8), produced=(4, 8))], 1)
    assert interpolate(np.array([1]), np.array([9]))[0] == pytest.approx(bilinear(4, 8))


def test_a_width_takes_as_long_as_the_next_whole_block() -> None:
    layer = bilinear_times(read=(16, 32, 64), produced=(16, 32, 50))
    interpolate = Interpolation([layer], 16)

    def at(read: int, produced: int) -> float:
        return float(interpolate(np.array([read]), np.array([produced]))[0])

    assert at(17, 16) == at(32, 16) == pytest.approx(bilinear(32, 16))
    assert at(33, 16) == at(48, 16) == pytest.approx(bilinear(48, 16))
    assert at(16, 50) == at(16, 49) == pytest.approx(bilinear(16, 50))


@pytest.mark.parametrize("name", ["chain", "depthwise", "grouped", "concat", "flattened"])
def test_latency_is_layers_and_a_line_in_all_other_values(name: str) -> None:
    dependencies = wired(name)[1]
    table, values = table_of(dependencies), count_other_values(dependencies)
    predict = latency_of(dependencies)
    group, channels = next(iter(dependencies.groups.items()))
    everything_but_one: Removed = {group: tuple(range(1, len(channels)))}
    layers = sum(layer.ms[-1][-1] for layer in table.layers)
    assert predict({}) == pytest.approx(2 * layers + 0.01 + 1e-6 * values({}))
    assert predict(everything_but_one) < predict({})


def test_values_that_layers_do_not_write() -> None:
    dependencies = wired("chain")[1]
    whole = 2 * 6 * 64 + 2 * 7 * 16 + 7  # norms, relus and the pooling; its flattening is a view
    assert count_other_values(dependencies)({}) == whole
    assert count_other_values(dependencies)({"conv1": (0,)}) == whole - 2 * 64


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_a_plan_meets_a_latency_budget(fraction: float, generator: torch.Generator) -> None:
    dependencies = wired("residual", True)[1]
    table = table_of(dependencies)
    scores = {n: torch.randn(len(g), generator=generator) for n, g in dependencies.groups.items()}
    target = Budget("latency", fraction)
    plan = make_plan(scores, dependencies, target, "random", latency=table)
    predict = latency_of(dependencies)
    assert 0.5 * fraction < predict(plan.removed) / predict({}) <= fraction


def test_a_target_of_latency_needs_times_and_can_be_out_of_reach() -> None:
    dependencies = wired("chain")[1]
    scores = {name: torch.zeros(len(group)) for name, group in dependencies.groups.items()}
    with pytest.raises(UsageError, match="needs times of the network's layers"):
        make_plan(scores, dependencies, Budget("latency", 0.5), "random")
    with pytest.raises(TargetError, match=r"latency=1e-05 is out of reach"):
        make_plan(
            scores, dependencies, Budget("latency", 1e-5), "random", latency=table_of(dependencies)
        )


def test_a_table_of_another_network_is_refused() -> None:
    table, other = table_of(wired("chain")[1]), wired("residual")[1]
    with pytest.raises(UsageError, match="is of another network"):
        predict_milliseconds(table, other, count_other_values(other))


def test_a_table_produced_and_read_is_the_same() -> None:
    table = table_of(wired("concat")[1])
    assert LatencyTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"batch": "many"}, "can't be read: batch: "),
        ({"colour": 1}, "can't be read: colour: Extra inputs"),
    ],
)
def test_a_changed_table_is_refused(change: dict[str, object], message: str) -> None:
    content = json.loads(table_of(wired("chain")[1]).to_json())
    with pytest.raises(RunFolderError, match=message):
        LatencyTable.from_json(json.dumps({**content, **change}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(RunFolderError, match="the latency table can't be read"):
        LatencyTable.from_json(text)
