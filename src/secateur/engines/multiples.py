"""Measure which multiples of channels an engine needs on this machine, by kind of convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from secateur.engines.engine import Engine
from secateur.graph.build import build_dependency_graph
from secateur.graph.layer_calls import Key, LayerCall, layer_call

BLOCK, SIDE = 64, 28
"""Channels and height of the layers that narrower ones are compared with: whole blocks of every
processor's vectors."""
CANDIDATES = {1: 63, 2: 62, 4: 60, 8: 56}
"""By multiple, a width that is a multiple of it and of nothing coarser; the next multiple of 16 is
`BLOCK` for each."""
RUNS = 3
"""How often all are timed; the shortest time counts."""
SLOWER = 1.2
"""Time over that of `BLOCK` channels, above which a layer takes longer for having fewer channels.
Small layers differ by up to a tenth without a reason, in onnxruntime, OpenVINO and PyTorch."""


class EngineMultiples(NamedTuple):
    """Multiples of channels off which convolutions take longer than at the next multiple of 16.

    1 where they don't.
    """

    dense: int
    depthwise: int

    def __str__(self) -> str:
        """Return what the multiples are, as words."""
        if max(self) == 1:
            return "any number of channels is fast"
        return (
            f"dense convolutions are fast where they read a multiple of {self.dense} channels, "
            f"depthwise ones at a multiple of {self.depthwise}"
        )


def measure_multiples(engine: Engine) -> EngineMultiples | None:
    """Return the multiples of channels that an engine's convolutions need to read here.

    None for engines that don't time layers.
    """
    network = nn.Sequential(
        nn.Conv2d(3, BLOCK, 1),
        nn.Conv2d(BLOCK, BLOCK, 3, padding=1, groups=BLOCK),
        nn.ReLU(),
        nn.Conv2d(BLOCK, BLOCK, 3, padding=1),
    )
    dependencies = build_dependency_graph(network.eval(), torch.rand(1, 3, SIDE, SIDE))
    (group,) = dependencies.groups.values()
    _, depthwise, dense = dependencies.layers
    calls: dict[Key, LayerCall] = {
        (layer.name, width): layer_call(dependencies, layer, group.channels[width:])
        for layer in (dense, depthwise)
        for width in (BLOCK, *CANDIDATES.values())
    }
    runs = [engine.layer_seconds(calls) for _ in range(RUNS)]
    seconds = {key: min(run[key] for run in runs) for key in runs[0]}
    if not seconds:
        return None

    def needed(name: str) -> int:
        fast = [
            multiple
            for multiple, width in CANDIDATES.items()
            if seconds[name, width] <= SLOWER * seconds[name, BLOCK]
        ]
        return min(fast, default=2 * max(CANDIDATES))

    return EngineMultiples(needed(dense.name), needed(depthwise.name))
