"""Multiples of channels that plans keep, and those that engines are found to need."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from secateur.config import Budget
from secateur.engines.multiples import BLOCK, EngineMultiples, measure_multiples
from secateur.engines.pytorch import PyTorch
from secateur.graph.build import build_dependency_graph
from secateur.graph.layer_calls import Key, LayerCall
from secateur.pruning.multiples import (
    Multiples,
    concatenated_groups,
    default_multiples,
    groups_in_blocks,
)
from secateur.pruning.plan import Allocation, make_plan

IMAGES = torch.rand(2, 3, 8, 8)


class Joined(nn.Module):
    """Two branches side by side, as in Inception; `flat` and `rows` are joined another way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 1)
        self.left = nn.Conv2d(32, 64, 1)
        self.right = nn.Conv2d(32, 64, 1)
        self.head = nn.Conv2d(128, 40, 1)
        self.rows = nn.Conv2d(40, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        stem = torch.relu(self.stem(images))
        head = self.head(torch.cat([self.left(stem), torch.relu(self.right(stem))], -3))
        rows: Tensor = self.rows(torch.cat([head, head.flip(2)], 2))
        return rows


def joined_plan(round_to: int | None, fraction: float = 0.45) -> dict[str, int]:
    """Return the channels that stay by group."""
    dependencies = build_dependency_graph(Joined().eval(), IMAGES)
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(len(group), generator=generator)
        for name, group in dependencies.groups.items()
    }
    plan = make_plan(
        *(scores, dependencies, Budget("macs", fraction), "random"),
        allocation=Allocation("uniform"),
        round_to=round_to,
    )
    return {
        name: len(group) - len(plan.removed.get(name, ()))
        for name, group in dependencies.groups.items()
    }


def test_concatenated_groups_are_those_joined_along_their_channels() -> None:
    dependencies = build_dependency_graph(Joined().eval(), IMAGES)
    assert concatenated_groups(dependencies) == {"left", "right"}
    assert set(dependencies.groups) == {"stem", "left", "right", "head"}


def test_concatenated_groups_keep_whole_blocks_of_16_by_default() -> None:
    kept = joined_plan(None)
    assert {kept["left"] % 16, kept["right"] % 16} == {0}
    assert kept["left"] < 64
    assert {kept["stem"] % 4, kept["head"] % 4} == {0}
    assert any(kept[name] % 16 for name in ("stem", "head"))


def test_wide_groups_keep_whole_blocks_by_default() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 120, 1), nn.ReLU()),
        *(nn.Conv2d(120, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()
    dependencies = build_dependency_graph(network, IMAGES)
    assert groups_in_blocks(dependencies) == {"0"}
    scores = {"0": torch.arange(128).float(), "2": torch.arange(120).float()}
    plan = make_plan(
        *(scores, dependencies, Budget("macs", 0.7), "own"),
        allocation=Allocation("uniform"),
        round_to=None,
    )
    assert len(plan.removed["0"]) % 16 == 0
    assert (120 - len(plan.removed["2"])) % 4 == 0
    assert (120 - len(plan.removed["2"])) % 16


def test_a_multiple_that_is_asked_for_holds_for_all_groups() -> None:
    kept = joined_plan(4)
    assert all(count % 4 == 0 for count in kept.values())
    assert any(kept[name] % 16 for name in ("left", "right"))


@pytest.mark.parametrize(
    ("engine_multiple", "has_blocks", "expected"),
    [
        (1, False, (Multiples(4, 4), Multiples(2, 2), Multiples(1, 1))),
        (1, True, (Multiples(4, 16), Multiples(4, 4), Multiples(2, 2), Multiples(1, 1))),
        (8, False, (Multiples(8, 8), Multiples(4, 4), Multiples(2, 2), Multiples(1, 1))),
        (
            8,
            True,
            (
                *(Multiples(8, 16), Multiples(8, 8)),
                *(Multiples(4, 16), Multiples(4, 4), Multiples(2, 2), Multiples(1, 1)),
            ),
        ),
    ],
)
def test_multiples_that_an_engine_needs_come_first(
    engine_multiple: int, has_blocks: bool, expected: tuple[Multiples, ...]
) -> None:
    assert default_multiples(engine_multiple, has_blocks=has_blocks) == expected


class Blocked(PyTorch):
    """Layers take long unless they read so many channels, dense ones and depthwise ones."""

    def __init__(self, dense: int, depthwise: int) -> None:
        self.multiples = {"dense": dense, "depthwise": depthwise}

    def layer_seconds(self, calls: Mapping[Key, LayerCall]) -> dict[Key, float]:
        """Return 1 s, or 1.5 s off the multiple."""
        seconds = {}
        for key, call in calls.items():
            (_, channels, *_), (filters, *_), *_ = call.shapes
            kind = "dense" if filters == BLOCK and call.shapes[1][1] > 1 else "depthwise"
            seconds[key] = 1.5 if channels % self.multiples[kind] else 1.0
        return seconds


@pytest.mark.parametrize(("dense", "depthwise"), [(1, 1), (4, 8), (2, 16)])
def test_multiples_of_an_engine_are_those_off_which_its_layers_are_slow(
    dense: int, depthwise: int
) -> None:
    assert measure_multiples(Blocked(dense, depthwise)) == EngineMultiples(dense, depthwise)


def test_of_an_engine_that_times_no_layers_nothing_is_said() -> None:
    assert measure_multiples(PyTorch()) is None
    assert str(EngineMultiples(1, 1)) == "any number of channels is fast"
